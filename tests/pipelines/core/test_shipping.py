"""The zip file that travels to a cluster: the wheel's content, the same bytes each time, and no more."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipelines.core import shipping
from pipelines.core.errors import UsageError
from pipelines.core.shipping import code_environment, code_files, write_code


def test_the_code_is_that_of_the_wheel_and_runs_from_the_zip(repository: Path, tmp_path: Path) -> None:
    path = write_code(tmp_path / "code.zip")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "node")
    expected = {
        file.relative_to(repository).as_posix()
        for package in ("components", "pipelines")
        for file in (repository / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    expected |= {
        f"pipelines/_data/{kind}/{file.name}"
        for kind in ("datasets", "clusters")
        for file in (repository / kind).iterdir()
    }
    assert set(names) == {*expected, "restoray.py"}
    code = (
        "import components.recipes as recipes; from pipelines.core.home import shipped_files\n"
        "print(*shipped_files('datasets'), recipes.__file__)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "node")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "demo" in process.stdout.split() and str(tmp_path / "node" / "components") in process.stdout


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Code of one file of 10 bytes."""
    (tmp_path / "code.py").write_bytes(b"0123456789")
    monkeypatch.setattr(shipping, "code_files", lambda: iter([("components/code.py", tmp_path / "code.py")]))
    return tmp_path


def test_the_same_files_give_the_same_bytes(small: Path) -> None:
    first = write_code(small / "1.zip").read_bytes()
    os.utime(small / "code.py", (1, 1))
    (small / "code.py").chmod(0o600)
    assert write_code(small / "2.zip").read_bytes() == first


def test_too_much_is_refused_with_the_largest_files(small: Path) -> None:
    (small / "model.bin").write_bytes(bytes(3 << 20))
    with pytest.raises(UsageError, match=r"have 3 MiB, and at most 2 MiB may travel \(weights/model.bin: 3 MiB"):
        write_code(small / "x.zip", {"weights/model.bin": small / "model.bin"}, limit_mib=2)
    assert not (small / "x.zip").exists()


def test_a_users_file_does_not_replace_code(small: Path) -> None:
    with pytest.raises(UsageError, match="would replace code of Restoray"):
        write_code(small / "x.zip", {"pipelines/core/home.py": small / "code.py"})


def test_a_submitted_job_has_its_code_already(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_environment(small) == {"working_dir": str(small / "restoray.zip")}
    monkeypatch.setenv(shipping.JOB_CONFIG, "{}")
    assert code_environment(small) == {}


def test_hidden_files_and_caches_stay_here(tmp_path: Path) -> None:
    for name in (".env", "a.yaml", ".git/config", "sub/b.yaml", "sub/__pycache__/c.pyc", ".venv/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in shipping.files_below(tmp_path)] == ["a.yaml", "sub/b.yaml"]
    assert sum(source.stat().st_size for _, source in code_files()) < shipping.MAX_CODE_MIB * 2**20 / 4
