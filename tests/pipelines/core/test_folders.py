"""The lock of a folder, and the check of an output folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.core.errors import Failure, RetryLater
from pipelines.core.folders import LOCK_NAME, check_output, folder_lock

HOLDER = """
import sys, time
from pathlib import Path
from pipelines.core.folders import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path: Path, repository: Path) -> None:
    out = tmp_path / "made" / "here"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], cwd=repository, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline().strip() == "held"
        with pytest.raises(RetryLater, match=f"in use by process {process.pid} since"), folder_lock(out):
            pass
    finally:
        process.kill()
        process.wait()
    with folder_lock(out):
        assert (out / LOCK_NAME).read_text().startswith("process ")


def test_a_folder_that_cannot_be_made_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failure, match="cannot write to"), folder_lock(tmp_path / "file" / "out"):
        pass
    with pytest.raises(Failure, match="cannot write to"):
        check_output(tmp_path / "file" / "out", free_mib=0)


def test_a_full_disk_is_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="MiB free"):
        check_output(tmp_path / "out", free_mib=1 << 40)
