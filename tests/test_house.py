"""The house rules that a machine can check: addresses, paths, sizes, the environment, the wheel's contents."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from pipelines.core import home
from pipelines.core.errors import near_miss, unknown

LIMIT_LINES = 600
TEXT_LIMIT_BYTES = 5_000_000

# The parts are joined here, so that this file does not match its own patterns.
FORBIDDEN = {
    "address of a package registry": re.compile(
        r"(?:https?:)?//[\w.-]*(?:"
        + "|".join(("py" + "pi", "files.python" + "hosted", "download.py" + "torch"))
        + r")\b"
        r"|--(?:extra-)?index-" + r"url[ =]+\S*:" + r"//|file:" + r"///opt/"
    ),
    "path of one machine": re.compile(
        r"(?<![\w.{}$/-])/(?:" + "|".join(("wo" + "rk/", "ro" + "ot/", "ho" + "me/[a-z]+/", "Us" + "ers/[a-z]+/")) + ")"
    ),
}
OWN_VARIABLES = {"RESTORAY_HOME", "RESTORAY_GOLDEN", "RESTORAY_IMAGES"}


def project_files(root: Path) -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout.split("\0")
    return [root / name for name in names if name and not name.startswith(".venv/") and (root / name).is_file()]


def texts(root: Path) -> list[tuple[Path, str]]:
    """Project files that are text."""
    documents = []
    for path in project_files(root):
        data = path.read_bytes()
        if len(data) <= TEXT_LIMIT_BYTES and b"\0" not in data:
            documents.append((path, data.decode("utf-8", "replace")))
    return documents


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_no_file_holds(repository: Path, what: str) -> None:
    lines = []
    for path, text in texts(repository):
        for number, line in enumerate(text.splitlines(), 1):
            if FORBIDDEN[what].search(line):
                lines.append(f"{path.relative_to(repository)}:{number}: {line.strip()[:100]}")
    assert lines == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("address of a package registry", "https:" + "//py" + "pi.org/simple"),
        ("address of a package registry", "--index-" + "url https:" + "//example.org/simple"),
        ("path of one machine", "open('/wo" + "rk/main/x')"),
        ("path of one machine", "/ho" + "me/anna/data"),
    ],
)
def test_the_patterns_match(what: str, line: str) -> None:
    assert FORBIDDEN[what].search(line)


def test_no_lock_with_addresses(repository: Path) -> None:
    assert not (repository / "uv.lock").exists()


@pytest.mark.parametrize(("name", "least"), [("requirements.lock", 100), ("requirements-dev.lock", 50)])
def test_lock_is_hashed_and_pinned(repository: Path, name: str, least: int) -> None:
    lock = (repository / name).read_text()
    pins = re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", lock, flags=re.MULTILINE)
    assert len(pins) > least
    blocks = re.split(r"^(?=[a-z0-9])", lock, flags=re.MULTILINE)[1:]
    assert [block.split()[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_lock_meets_every_requirement(repository: Path) -> None:
    """The two locks fit pyproject.toml; `make lock` renews them."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    document = tomllib.loads((repository / "pyproject.toml").read_text())
    unmet = []
    for name, texts_of_lock in (
        ("requirements.lock", document["project"]["dependencies"]),
        ("requirements-dev.lock", document["dependency-groups"]["dev"]),
    ):
        pins: dict[str, set[str]] = {}
        lock = (repository / name).read_text()
        for package, version in re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;\\]+)", lock, flags=re.MULTILINE):
            pins.setdefault(canonicalize_name(package), set()).add(version)
        for text in texts_of_lock:
            requirement = Requirement(text)
            versions = pins.get(canonicalize_name(requirement.name), set())
            if not versions or not all(requirement.specifier.contains(v, prereleases=True) for v in versions):
                unmet.append(f"{text}: {sorted(versions)}")
    assert unmet == []


def test_python_files_stay_readable(repository: Path) -> None:
    long = {
        str(path.relative_to(repository)): text.count("\n")
        for path, text in texts(repository)
        if path.suffix == ".py" and text.count("\n") > LIMIT_LINES
    }
    assert long == {}


def test_every_module_has_a_docstring(repository: Path) -> None:
    without_docstring = [
        str(path.relative_to(repository))
        for path, text in texts(repository)
        if path.suffix == ".py" and text.strip() and not ast.get_docstring(ast.parse(text))
    ]
    assert without_docstring == []


def test_only_three_environment_variables_are_ours(repository: Path) -> None:
    names = set()
    for _, text in texts(repository):
        names.update(re.findall(r"\bRESTORAY_[A-Z][A-Z_]*\b", text))
    assert names - OWN_VARIABLES == set()


def test_tests_skip_only_for_absent_data(repository: Path) -> None:
    pattern = re.compile(r"pytest\.(?:mark\.)?(?:skip|skipif|xfail|importorskip)\b|unittest\.skip")
    users = {
        str(path.relative_to(repository))
        for path, text in texts(repository)
        if path.suffix == ".py" and "tests" in path.parts and pattern.search(text)
    }
    assert users <= {"tests/conftest.py", "tests/test_house.py"}


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "here"))
    assert home.home() == tmp_path / "here"
    assert home.runs_folder() == tmp_path / "here" / "runs"
    assert not (tmp_path / "here").exists()
    monkeypatch.delenv("RESTORAY_HOME")
    assert home.home() == Path.home() / ".restoray"


def test_near_miss() -> None:
    assert "instantir-dcp" in near_miss("instantr-dcp", ["instantir-dcp", "supir-adaptor"])
    assert near_miss("zzz", ["instantir-dcp"]) == ""
    error = unknown("recipe", "instantr-dcp", ["instantir-dcp"])
    assert error.exit_code == 2
    assert 'Did you mean "instantir-dcp"?' in str(error)


@pytest.mark.slow
def test_the_wheel_holds_its_data_and_finds_it(repository: Path, tmp_path: Path) -> None:
    """The wheel holds recipes, plans, datasets/, clusters/ and weights, and data_folder finds them there."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=repository,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for kind, inside in (("datasets", "pipelines/_data/datasets"), ("clusters", "pipelines/_data/clusters")):
        expected = {f"{inside}/{p.name}" for p in (repository / kind).iterdir()}
        assert expected and expected <= names
    for kind in ("recipes", "plans"):
        expected = {f"pipelines/{kind}/{p.name}" for p in (repository / "pipelines" / kind).glob("*.yaml")}
        assert expected and expected <= names
    assert "pipelines/pages/templates/report.html.j2" in names
    demo_corpus = {str(p.relative_to(repository)) for p in project_files(repository) if "demo_corpus" in p.parts}
    assert demo_corpus and demo_corpus <= names
    weights = repository / "components" / "priors" / "weights"
    assert {str(p.relative_to(repository)) for p in weights.rglob("*") if p.is_file()} <= names
    assert {"components/priors/weights/nano/model.json"} < {n for n in names if "/weights/nano/" in n}
    top = {name.split("/")[0] for name in names}
    assert top <= {"components", "pipelines", "restoray.py", next(t for t in top if t.endswith(".dist-info"))}
    code = "from pipelines.core.home import shipped_files as f; print(sorted(f('datasets')), sorted(f('clusters')))"
    process = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "'demo'" in process.stdout and "'local'" in process.stdout


def test_names_are_things_not_participles(repository: Path) -> None:
    """`found`, `told` and `said` say what happened to a thing; a name says what the thing is."""
    guilty: dict[str, set[str]] = {}
    for path, text in texts(repository):
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            name = ""
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                name = node.name
            if name.strip("_").lower() in {"found", "told", "said", "known", "made", "wanted"}:
                guilty.setdefault(str(path.relative_to(repository)), set()).add(name)
    assert guilty == {}
