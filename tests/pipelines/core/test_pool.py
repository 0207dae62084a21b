"""The pool of workers: typed jobs in, typed answers out, in this process and on Ray."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from pipelines.core.errors import Failure, UsageError
from pipelines.core.pool import Pool, answers_of, last_line, object_column, ray_errors


@dataclass(frozen=True)
class Job:
    number: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    number: int
    square: int
    calls: int


class Squares:
    """Squares the numbers of its jobs; counts its calls."""

    def __init__(self, fail_at: int = -1) -> None:
        self.fail_at, self.calls = fail_at, 0

    def __call__(self, jobs: Sequence[Job]) -> list[Answer]:
        self.calls += 1
        if any(job.number == self.fail_at for job in jobs):
            raise ValueError("a worker must not raise")
        return [Answer(job.number, job.number**2, self.calls) for job in jobs]


JOBS = [Job(number, names=("a", "b")) for number in range(7)]


def test_without_workers_this_process_answers_in_order_and_in_batches() -> None:
    answers = list(answers_of(Squares, JOBS, Pool(workers=0, batch_size=3)))
    assert [(one.number, one.square) for one in answers] == [(n, n * n) for n in range(7)]
    assert [one.calls for one in answers] == [1, 1, 1, 2, 2, 2, 3]


def test_no_jobs_need_no_worker() -> None:
    def never() -> Squares:
        raise AssertionError("no worker is needed")

    assert list(answers_of(never, [], Pool(workers=2))) == []


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_on_ray_every_job_is_answered_once_with_its_own_dataclass() -> None:
    answers = list(answers_of(Squares, JOBS, Pool(workers=2, batch_size=2)))
    assert sorted((one.number, one.square) for one in answers) == [(n, n * n) for n in range(7)]
    with pytest.raises(Failure, match=r"Ray ended the job .*; the same command continues"):
        list(answers_of(functools.partial(Squares, fail_at=4), JOBS, Pool(workers=1)))


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"batch_size": 0}, {"num_cpus": -1.0}, {"num_gpus": -0.5}])
def test_a_pool_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="a pool needs"):
        Pool(**wrong)  # type: ignore[arg-type]


def test_a_column_of_objects_does_not_look_into_them() -> None:
    column = object_column([(1, 2), [3], np.zeros(2)])
    assert column.dtype == object and column.shape == (3,) and column[0] == (1, 2)


def test_the_last_line_of_an_error_is_the_original_one() -> None:
    assert last_line("Traceback ...\n  File x\nValueError: bad\n") == "ValueError: bad"
    assert last_line(KeyError()) == "KeyError"


def test_an_error_of_ray_is_one_sentence() -> None:
    from ray.exceptions import RayError

    with pytest.raises(Failure, match=r"Ray ended the test \(RayError: gone\)"), ray_errors("the test"):
        raise RayError("first line\ngone")
