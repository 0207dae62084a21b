"""Who may import whom, proved by importing with the forbidden packages refused."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
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
"""Module prefixes that Ray Data workers import: a torch there costs each of them half a gigabyte."""
WITH_TORCH = ("components.degradations.batched",)
"""What lies below those and is for GPUs."""

IMPORTER = """
import importlib, json, sys

refused, names = json.loads(sys.argv[1]), json.loads(sys.argv[2])

class Without:
    # to such a finder the refused packages are not installed, so libraries that probe for them go on

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
    """Dotted names of all modules of a package."""
    names = []
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def import_with_refusal(root: Path, names: list[str], refused: list[str]) -> dict[str, str]:
    """Import each module in a fresh interpreter that lacks the refused packages; the ImportErrors by module."""
    command = [sys.executable, "-c", IMPORTER, json.dumps(refused), json.dumps(names)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    problems: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return problems


def imported_names(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_the_hook_refuses(repository: Path) -> None:
    problems = import_with_refusal(repository, ["json", "sqlite3.dbapi2"], ["sqlite3"])
    assert list(problems) == ["sqlite3.dbapi2"]


def test_components_import_without_ray_mlflow_and_pipelines(repository: Path) -> None:
    assert import_with_refusal(repository, modules(repository, "components"), ["ray", "mlflow", "pipelines"]) == {}


def test_components_name_no_ray_mlflow_or_pipelines_even_inside_functions(repository: Path) -> None:
    guilty = {
        str(path.relative_to(repository)): sorted(found)
        for path in sorted((repository / "components").rglob("*.py"))
        if (found := imported_names(path) & {"ray", "mlflow", "pipelines"})
    }
    assert guilty == {}


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


@pytest.mark.parametrize("folder", ["datasets", "clusters"])
def test_data_folders_hold_yaml_only(repository: Path, folder: str) -> None:
    files = [p for p in (repository / folder).rglob("*") if p.is_file()]
    assert files
    assert [p.name for p in files if p.suffix not in (".yaml", ".yml")] == []


def test_importing_pipelines_has_no_side_effects(repository: Path, tmp_path: Path) -> None:
    """No file, no folder, no Ray, no thread, and no signal handler: importing is reading."""
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
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, json.dumps(modules(repository, "pipelines"))],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [False, False, [], True]
    made = [p for p in home.rglob("*") if p.is_file() and ".cache" not in p.parts and ".config" not in p.parts]
    assert made == []


def test_tests_are_no_packages(repository: Path) -> None:
    assert list((repository / "tests").rglob("__init__.py")) == []
