"""Rules of imports: rooms of pipelines/, systems, and modules that must import without torch, Ray or MLflow."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

TORCH_FREE = (
    "components.types",
    "components.randomness",
    "components.naming",
    "components.images",
    "components.synthetic",
    "components.captions",
    "components.degradations",
    "components.recipes",
    "components.options",
    "components.systems.instantir.options",
    "components.corpora",
    "components.quality",
    "components.quality_models",
    "components.fingerprints",
    "components.negatives",
)
"""Prefixes of modules that Ray Data workers import; torch would take half a gigabyte in each worker."""
WITH_TORCH = ("components.degradations.batched",)
"""Modules below these prefixes that need torch, for GPUs."""

PACKAGES = ("components", "pipelines")

MAY: dict[str, set[str]] = {
    "core": set(),
    "pages": {"core"},
    "corpus": {"core"},
    "restoration": {"core"},
    "stream": {"core", "corpus"},
    "curation": {"core", "corpus", "pages"},
    "evaluation": {"core", "corpus", "pages", "restoration"},
    "service": {"core", "pages", "restoration"},
    "analysis": {"core", "pages", "restoration"},
    "training": {"core", "corpus", "stream"},
    "runs": {"core", "pages", "corpus", "analysis", "curation", "evaluation", "restoration", "service", "training"},
    "api": {
        "core",
        "corpus",
        "stream",
        "curation",
        "evaluation",
        "restoration",
        "service",
        "training",
        "runs",
    },
    "commands": {
        "api",
        "core",
        "corpus",
        "curation",
        "evaluation",
        "analysis",
        "restoration",
        "service",
        "training",
        "runs",
    },
}
"""The rooms of pipelines/, and what each may import. Imports in functions and under TYPE_CHECKING count too."""

MAY_IMPORT_SYSTEM: dict[str, set[str]] = {"instarevive": {"swinir", "regressor"}}
"""Systems that a system may import: InstaRevive's coarse restorer is a SwinIR or a regressor."""

SYSTEM_WORDS = r"(?i)instantir|instarevive|swinir|supir|(?<![a-z])dra(?![a-z])"

MAY_NAME: dict[str, set[str]] = {
    # the dictionary of systems
    "components/systems/__init__.py": {"instantir", "instarevive", "supir", "swinir", "dra"},
    # degradations go by the names of the papers that define them
    "components/degradations/__init__.py": {"supir", "instantir", "instarevive", "dra"},
    # lists of negative prompts also go by the names of the papers
    "components/negatives.py": {"supir"},
    "components/corpora.py": {"supir"},
    # model.json of a prior has the system "prior"
    "components/priors/files.py": {"model.info['system'] != 'prior'"},
    # the dictionary of studies
    "pipelines/analysis/studies.py": {"instantir", "supir"},
}
"""Systems that a shared file may name, each with a reason. Keep this list short."""

HEAVY = {
    "torch", "torchvision", "diffusers", "transformers", "peft", "timm", "huggingface_hub", "ray", "mlflow", "pyiqa",
    "scipy", "skimage", "matplotlib", "rich", "webdataset",
}  # fmt: skip
"""Libraries that may be imported inside a function: each takes 0.3 s to 6 s and up to half a gigabyte."""

SLOW = {"cv2", "fsspec", "numpy", "omegaconf", "PIL", "pyarrow", "socket", "yaml"}
"""Libraries that commands put off too: they would double the time of `--help`."""

IMPORTER = """
import importlib, json, sys

refused, names = json.loads(sys.argv[1]), json.loads(sys.argv[2])

class Without:
    # this finder hides the refused packages; libraries that probe for them work as if they were not installed

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in refused else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
problems = {}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        problems[name] = str(error)
print(json.dumps(problems))
"""


def modules(root: Path, package: str) -> list[str]:
    """Return the dotted names of all modules of a package."""
    names = []
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def import_with_refusal(root: Path, names: list[str], refused: list[str]) -> dict[str, str]:
    """Import each module in a new interpreter without the refused packages; return the ImportErrors by module."""
    command = [sys.executable, "-c", IMPORTER, json.dumps(refused), json.dumps(names)]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    problems: dict[str, str] = json.loads(process.stdout.splitlines()[-1])
    return problems


def imported_names(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@dataclass(frozen=True)
class Import:
    """An import of one of our modules.

    Attributes:
        by, of: importing module and imported module.
        line: of the statement.
        inside: whether it is inside a function.
    """

    by: str
    of: str
    line: int
    inside: bool


@dataclass(frozen=True)
class Statement:
    """An import statement: its node, and whether it is inside a function or under TYPE_CHECKING."""

    node: ast.Import | ast.ImportFrom
    inside: bool
    typing: bool


def own_modules(root: Path) -> dict[str, Path]:
    """Return the files of our packages by dotted name."""
    files: dict[str, Path] = {}
    for package in PACKAGES:
        paths = sorted((root / package).rglob("*.py"))
        files.update(zip(modules(root, package), paths, strict=True))
    return files


@cache
def import_statements(path: Path) -> list[Statement]:
    """Return all import statements of a file."""
    statements: list[Statement] = []
    stack: list[tuple[ast.AST, bool, bool]] = [(ast.parse(path.read_text(encoding="utf-8")), False, False)]
    while stack:
        node, inside, typing = stack.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            statements.append(Statement(node=node, inside=inside, typing=typing))
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = typing or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        stack.extend((child, inside, typing) for child in ast.iter_child_nodes(node))
    return statements


def targets(node: ast.AST) -> list[tuple[str, str]]:
    """Return (module, name) of each import in a statement; the name is "" for a plain import."""
    if isinstance(node, ast.Import):
        return [(alias.name, "") for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [(node.module, alias.name) for alias in node.names]
    return []


@cache
def own_imports(root: Path) -> list[Import]:
    """Return every import between our modules: at the top, in a function, under TYPE_CHECKING."""
    files = own_modules(root)
    imports: list[Import] = []
    for name, path in files.items():
        for statement in import_statements(path):
            for module, attribute in targets(statement.node):
                of = next((m for m in (f"{module}.{attribute}", module) if m in files), "")
                if of and of != name:
                    imports.append(Import(by=name, of=of, line=statement.node.lineno, inside=statement.inside))
    return imports


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of two or more modules that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(arrows.get(name, ())):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return groups


def room_of(module: str) -> str:
    """Return the room of a module of pipelines; "" for another module."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipelines" and len(parts) > 1 else ""


def heavy_modules(root: Path, libraries: Set[str]) -> set[str]:
    """Return our modules whose import brings one of the libraries along, directly or through another module."""
    files = own_modules(root)
    needs: dict[str, set[str]] = {name: {name.rpartition(".")[0]} & set(files) for name in files}
    heavy: set[str] = set()
    for name, path in files.items():
        for statement in import_statements(path):
            at_import = not statement.inside and not statement.typing
            for module, attribute in targets(statement.node) if at_import else ():
                of = next((m for m in (f"{module}.{attribute}", module) if m in files), "")
                if of:
                    needs[name].add(of)
                elif module.partition(".")[0] in libraries:
                    heavy.add(name)
    while more := {name for name, others in needs.items() if name not in heavy and others & heavy}:
        heavy |= more
    return heavy


def test_the_hook_refuses(repository: Path) -> None:
    problems = import_with_refusal(repository, ["json", "sqlite3.dbapi2"], ["sqlite3"])
    assert list(problems) == ["sqlite3.dbapi2"]


def test_components_import_without_ray_mlflow_and_pipelines(repository: Path) -> None:
    assert import_with_refusal(repository, modules(repository, "components"), ["ray", "mlflow", "pipelines"]) == {}


def test_components_name_no_ray_mlflow_or_pipelines_even_inside_functions(repository: Path) -> None:
    wrong = {
        str(path.relative_to(repository)): sorted(names)
        for path in sorted((repository / "components").rglob("*.py"))
        if (names := imported_names(path) & {"ray", "mlflow", "pipelines"})
    }
    assert wrong == {}


def test_picture_path_imports_without_torch(repository: Path) -> None:
    names = [
        name
        for name in modules(repository, "components")
        if name.startswith(TORCH_FREE) and not name.startswith(WITH_TORCH)
    ]
    missing = [prefix for prefix in TORCH_FREE if not any(name.startswith(prefix) for name in names)]
    assert missing == []
    assert import_with_refusal(repository, names, ["torch", "torchvision", "diffusers", "transformers", "ray"]) == {}


def test_pyiqa_only_in_evaluation(repository: Path) -> None:
    users = [p for p in (repository / "components").rglob("*.py") if "pyiqa" in imported_names(p)]
    assert [p for p in users if p.parent.name != "evaluation"] == []


def test_only_tracking_imports_mlflow(repository: Path) -> None:
    users = [p.name for p in sorted((repository / "pipelines").rglob("*.py")) if "mlflow" in imported_names(p)]
    assert users == ["tracking.py"]


@pytest.mark.parametrize(("folder", "others"), [("datasets", r"$^"), ("clusters", r"Dockerfile|.*\.sbatch")])
def test_data_folders_hold_data_only(repository: Path, folder: str, others: str) -> None:
    files = [p for p in (repository / folder).rglob("*") if p.is_file()]
    assert files
    assert [p.name for p in files if p.suffix not in (".yaml", ".yml") and not re.fullmatch(others, p.name)] == []


def test_importing_pipelines_has_no_side_effects(repository: Path, tmp_path: Path) -> None:
    """An import creates no file, no folder, no Ray, no thread, and no signal handler."""
    code = (
        "import importlib, json, sys, threading, signal\n"
        "before = signal.getsignal(signal.SIGTERM)\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "ray = sys.modules.get('ray')\n"
        "print(json.dumps([bool(ray and ray.is_initialized()), 'mlflow' in sys.modules,\n"
        "    [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()],\n"
        "    signal.getsignal(signal.SIGTERM) == before]))\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": str(repository), "TMPDIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-B", "-c", code, json.dumps(modules(repository, "pipelines"))],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout.splitlines()[-1]) == [False, False, [], True]
    files = [p for p in home.rglob("*") if p.is_file() and ".cache" not in p.parts and ".config" not in p.parts]
    assert files == []


def test_tests_are_no_packages(repository: Path) -> None:
    assert list((repository / "tests").rglob("__init__.py")) == []


# --- the rooms --------------------------------------------------------------------------------------------------------


def test_every_file_of_pipelines_stands_in_a_room(repository: Path) -> None:
    strays = [name for name in modules(repository, "pipelines") if room_of(name) not in {"", *MAY}]
    assert strays == []
    assert [path.name for path in (repository / "pipelines").glob("*.py")] == ["__init__.py"]


def test_rooms_import_only_what_they_may(repository: Path) -> None:
    wrong = [
        f"{one.by}:{one.line} imports {one.of}"
        for one in own_imports(repository)
        if room_of(one.by) and room_of(one.of) and room_of(one.of) not in {room_of(one.by), *MAY[room_of(one.by)]}
    ]
    assert wrong == []


def test_the_table_of_rooms_has_floors() -> None:
    """No room may import a room that may import it, over any number of steps."""
    assert circles(MAY) == []


def test_there_is_no_import_circle(repository: Path) -> None:
    arrows: dict[str, set[str]] = {}
    for one in own_imports(repository):
        arrows.setdefault(one.by, set()).add(one.of)
    assert circles(arrows) == []


def test_a_circle_is_detected() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}}) == [["a", "b", "c"]]


def test_imports_stand_at_the_top(repository: Path) -> None:
    """Functions import only heavy libraries and modules that bring one along. Commands also put off the slow ones."""
    heavy, slow = (heavy_modules(repository, libraries) for libraries in (HEAVY, HEAVY | SLOW))
    wrong = [
        f"{one.by}:{one.line} imports {one.of} inside a function"
        for one in own_imports(repository)
        if one.inside and one.of not in (slow if room_of(one.by) == "commands" else heavy)
    ]
    for name, path in own_modules(repository).items():
        allowed = HEAVY | SLOW if room_of(name) == "commands" else HEAVY
        for statement in import_statements(path):
            for module, _ in targets(statement.node) if statement.inside else ():
                if module.partition(".")[0] not in {*allowed, *PACKAGES}:
                    wrong.append(f"{name}:{statement.node.lineno} imports {module} inside a function")
    assert wrong == []


def test_heavy_modules_are_the_right_ones(repository: Path) -> None:
    heavy = heavy_modules(repository, HEAVY)
    assert {"components.tensors", "components.systems.swinir.network", "pipelines.service.serve"} <= heavy
    assert not {"components.types", "components.images", "components.systems", "pipelines.curation.curate"} & heavy


def test_contributing_lists_the_rooms_as_they_are(repository: Path) -> None:
    """The number of files is exact, that of lines within 20 %. `python tests/test_layering.py` prints the new table."""
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)/` \|.*\| (\d+) \| ([\d,]+) \|$", text, flags=re.MULTILINE)
    table = {room: (int(files), int(lines.replace(",", ""))) for room, files, lines in rows}
    actual = room_sizes(repository)
    assert {room: files for room, (files, _) in table.items()} == {room: files for room, (files, _) in actual.items()}
    off = {room for room, (_, lines) in actual.items() if abs(lines - table[room][1]) > 0.2 * lines}
    assert off == set()


def room_sizes(root: Path) -> dict[str, tuple[int, int]]:
    """Return the numbers of Python files and lines of each room."""
    sizes: dict[str, tuple[int, int]] = {}
    for room in MAY:
        texts = [path.read_text(encoding="utf-8") for path in (root / "pipelines" / room).rglob("*.py")]
        sizes[room] = len(texts), sum(text.count("\n") for text in texts)
    return sizes


def test_the_module_restoray_only_names_what_others_define(repository: Path) -> None:
    """It imports nothing but the standard library when it is imported; its table and its typing block agree."""
    path, files = repository / "restoray.py", own_modules(repository)
    names: dict[str, str] = {}
    for statement in import_statements(path):
        for module, attribute in targets(statement.node):
            if module.partition(".")[0] in PACKAGES:
                assert statement.typing, f"restoray.py:{statement.node.lineno} imports {module} at import"
                names[attribute] = module
            else:
                assert module.partition(".")[0] in {*sys.stdlib_module_names}
    (table,) = (
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULES"
    )
    assert table == names and set(table.values()) <= set(files)
    assert {module for module in table.values() if room_of(module) not in ("api", "core")} == {"components.types"}


# --- the systems ------------------------------------------------------------------------------------------------------


def test_a_system_imports_no_other(repository: Path) -> None:
    shared = {"system", "weights_io", "importing"}
    wrong = []
    for one in own_imports(repository):
        by, of = one.by.split("."), one.of.split(".")
        if by[:2] != ["components", "systems"] or of[:2] != ["components", "systems"] or len(of) < 3:
            continue
        own = by[2] if len(by) > 3 else ""
        if by == ["components", "systems"]:
            fine = of[2:] == ["system"] or (len(of) == 4 and of[3] == "system")
        elif own:
            fine = of[2] in {own, *shared, *MAY_IMPORT_SYSTEM.get(own, ())}
        else:
            fine = of[2] in shared and by[2] != of[2]
        if not fine:
            wrong.append(f"{one.by}:{one.line} imports {one.of}")
    assert wrong == []


def test_no_shared_file_names_a_system(repository: Path) -> None:
    """The rule is for names, texts and imports in code. Docstrings and comments may cite the paper of a formula."""
    wrong: dict[str, set[str]] = {}
    for name, path in own_modules(repository).items():
        place = name.split(".")
        if place[:2] == ["components", "systems"] and len(place) > 3:
            continue
        if place[:2] == ["pipelines", "analysis"] and place[2:3] in (["instantir"], ["supir"]):
            continue
        for word in system_words(path):
            if word not in MAY_NAME.get(str(path.relative_to(repository)), ()):
                wrong.setdefault(str(path.relative_to(repository)), set()).add(word)
    assert wrong == {}


def test_the_allow_list_has_no_unused_entry(repository: Path) -> None:
    unused = {
        file: sorted(set(words) - set(system_words(repository / file)))
        for file, words in MAY_NAME.items()
        if set(words) - set(system_words(repository / file))
    }
    assert unused == {}


def system_words(path: Path) -> set[str]:
    """Return the systems that a file's code names, in lower case, and comparisons of a model's system with a name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words: set[str] = set()
    for node in ast.walk(tree):
        texts: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            texts = [node.value]
        elif isinstance(node, ast.Name | ast.Attribute | ast.alias | ast.ImportFrom):
            texts = [
                str(getattr(node, field) or "") for field in ("id", "attr", "name", "module") if hasattr(node, field)
            ]
        elif isinstance(node, ast.Compare) and re.search(
            r"system\W{0,3}\)? (==|!=|in|not in) \W*\w+'", ast.unparse(node)
        ):
            words.add(ast.unparse(node))
        for text in texts:
            words.update(word.lower() for word in re.findall(SYSTEM_WORDS, text))
    return words


if __name__ == "__main__":
    for room, (files, lines) in room_sizes(Path(__file__).resolve().parent.parent).items():
        print(f"| `{room}/` | {files} | {lines:,} |")
