"""Processes that hang end: the guard in a worker, and the one on the driver."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.core.errors import Failure
from pipelines.curation.watch import (
    DEATHS,
    PART_DEATHS,
    Guard,
    forget_candidates_in_work,
    last_sign_of_life,
    watch_items,
)


def die(folder: Path, candidate: str, how: str) -> int:
    """Run a process that ends while it works on a candidate; returns its exit code."""
    script = textwrap.dedent(f"""
        import os, sys, time
        from pathlib import Path
        from pipelines.curation.watch import Guard
        guard = Guard(Path({str(folder)!r}), "part", 0.3)
        guard.at("fine")
        guard.at({candidate!r})
        os._exit(9) if {how!r} == "crash" else time.sleep(60)
    """)
    top = str(Path(__file__).resolve().parents[3])
    return subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": top}, timeout=60).returncode


def test_a_candidate_that_kills_three_processes_is_refused(tmp_path: Path) -> None:
    for death in range(DEATHS):
        guard = Guard(tmp_path, "part", 0.3)
        assert guard.refusal("bad") is None, death
        guard.close(complete=False)
        assert die(tmp_path, "bad", "crash") == 9
    guard = Guard(tmp_path, "part", 0.3)
    assert guard.refusal("bad") == ("crashed", "the process that decoded it died 3 times")
    assert guard.refusal("fine") is None
    assert not guard.is_lethal
    guard.close(complete=True)
    assert list(tmp_path.iterdir()) == []
    assert Guard(tmp_path, "part", 0.3).refusal("bad") is None  # another run tries again


def test_a_candidate_that_hangs_is_refused_at_once(tmp_path: Path) -> None:
    assert die(tmp_path, "slow", "hang") == 1
    guard = Guard(tmp_path, "part", 0.3)
    verdict = guard.refusal("slow")
    assert verdict is not None
    assert verdict[0] == "timeout"
    assert guard.refusal("fine") is None
    guard.close(complete=False)


def test_a_part_that_dies_again_and_again_is_lethal(tmp_path: Path) -> None:
    for _ in range(PART_DEATHS):
        guard = Guard(tmp_path, "part", 100)
        assert not guard.is_lethal
        guard.at("x")
        guard.at("")
        os.close(guard.cursor)  # as after a death: no files are removed
    assert Guard(tmp_path, "part", 100).is_lethal


def test_a_killed_run_is_no_death_of_its_candidates(tmp_path: Path) -> None:
    for _ in range(DEATHS):
        assert die(tmp_path, "innocent", "crash") == 9
        forget_candidates_in_work(tmp_path)
    guard = Guard(tmp_path, "part", 0.3)
    assert guard.refusal("innocent") is None
    guard.close(complete=True)


def test_a_job_without_progress_is_ended() -> None:
    stop = threading.Event()

    def stuck() -> Iterator[int]:
        yield 1
        stop.wait(30)

    items = watch_items(stuck(), 0.3, lambda: 0.0, "measuring")
    assert next(items) == 1
    with pytest.raises(Failure, match=r"measuring: no progress for 0\.3 s"):
        next(items)
    stop.set()


def test_a_slow_job_with_signs_of_life_continues(tmp_path: Path) -> None:
    def slow() -> Iterator[int]:
        for _ in range(8):
            time.sleep(0.1)
            (tmp_path / "x.now").write_text("")
        yield 1

    assert last_sign_of_life(tmp_path / "none") == 0.0
    assert list(watch_items(slow(), 0.4, lambda: last_sign_of_life(tmp_path), "x")) == [1]


def test_errors_of_the_job_pass_through() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    items = watch_items(broken(), 9, lambda: 0.0, "x")
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)
