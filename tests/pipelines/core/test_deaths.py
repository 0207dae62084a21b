"""Marks that count dead processes, and attempts that find a lethal item."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipelines.core.deaths import MAX_DEATHS, Attempt, Marks, WorkersDied


def marks_of(folder: Path) -> Marks:
    marks = Marks(folder / "marks")
    marks.clear()
    return marks


def test_a_mark_counts_this_process_and_then_nothing(tmp_path: Path) -> None:
    marks = marks_of(tmp_path)
    with marks.work_on("a"):
        assert (marks.deaths("a"), marks.deaths("b")) == (1, 0)
    assert marks.deaths("a") == 0


def test_an_error_is_no_death(tmp_path: Path) -> None:
    marks = marks_of(tmp_path)
    with pytest.raises(ValueError, match="bad"), marks.work_on("a"):
        raise ValueError("bad")
    assert marks.deaths("a") == 0


def test_a_process_that_exits_leaves_its_mark(tmp_path: Path) -> None:
    marks = marks_of(tmp_path)
    with pytest.raises(SystemExit), marks.work_on("a"):
        sys.exit(1)
    assert marks.deaths("a") == 1


def test_bytes_that_stay_are_deaths_until_a_job_clears_them(tmp_path: Path) -> None:
    marks = marks_of(tmp_path)
    (marks.folder / "a").write_bytes(b"..")
    assert marks.deaths("a") == 2
    marks.clear()
    assert marks.deaths("a") == 0


@pytest.mark.parametrize("others", [0, 3])
def test_a_model_that_kills_its_processes_is_refused(tmp_path: Path, others: int) -> None:
    marks = marks_of(tmp_path)
    (marks.folder / "loading").write_bytes(b"." * (MAX_DEATHS + others - 1))
    assert marks.load("loading", others, lambda: "model") == "model"
    (marks.folder / "loading").write_bytes(b"." * (MAX_DEATHS + others))
    with pytest.raises(WorkersDied, match="died again and again"):
        marks.load("loading", others, lambda: "model")


def test_after_a_death_the_items_in_work_are_suspects(tmp_path: Path) -> None:
    path = tmp_path / "attempt"
    Attempt(path).work_on([3, 4])  # the process dies here
    second = Attempt(path)
    assert second.suspects == {3, 4} and second.lethal == []
    second.work_on([3])  # and again, over one item alone
    third = Attempt(path)
    assert third.deaths == {3: 1} and third.lethal == []
    third.work_on([3])
    assert Attempt(path).lethal == [3]
    third.finish()
    assert Attempt(path).suspects == set()


def test_a_torn_record_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "attempt"
    path.write_bytes(b'{"flight": [1')
    assert Attempt(path).suspects == set() and Attempt(path).lethal == []
