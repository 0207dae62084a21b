"""The notebooks use `import restoray` alone, are stored without outputs, and run from top to bottom."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted(path.name for path in (Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
OTHERS = {"IPython", "PIL", "matplotlib", "numpy", "torch"}
"""Packages for pictures that a notebook may import besides restoray and the standard library."""

STDLIB = {"collections", "io", "json", "pathlib", "tempfile", "urllib"}


def code_cells(path: Path) -> list[dict[str, Any]]:
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["nbformat"] == 4
    return [cell for cell in document["cells"] if cell["cell_type"] == "code"]


def test_there_are_six() -> None:
    assert [name[:2] for name in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_uses_the_python_api_alone_and_holds_no_outputs(repository: Path, name: str) -> None:
    cells = code_cells(repository / "notebooks" / name)
    modules: set[str] = set()
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Import):
                modules.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                modules.add(str(node.module).partition(".")[0])
    assert "restoray" in modules and modules - {"restoray"} <= OTHERS | STDLIB
    assert sum(cell["source"] != [] for cell in cells) >= 4


@pytest.mark.slow
def test_the_first_one_runs_from_the_wheel_in_another_folder(repository: Path, tmp_path: Path) -> None:
    """The wheel's content comes first on the path; the dependencies are those of this environment."""
    wheel = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(wheel, cwd=repository, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    code = ["".join(cell["source"]) for cell in code_cells(repository / "notebooks" / NOTEBOOKS[0])]
    (folder / "first.py").write_text("\n".join([*code, "print(restoray.__file__, restored.size, poor.size)"]))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "first.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    last = process.stdout.splitlines()[-1]
    assert last == f"{tmp_path / 'site' / 'restoray.py'} (1024, 576) (1024, 576)"


@pytest.mark.full
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(repository: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, with a home of its own. Its pictures are there: every figure is a PNG in the outputs."""
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    book = nbformat.read(repository / "notebooks" / name, as_version=4)
    nbformat.validate(book)
    nbclient.NotebookClient(
        book, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output for output in outputs if output.output_type == "error"] == []
