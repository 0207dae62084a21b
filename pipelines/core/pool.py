"""A pool of workers: it takes a list of jobs and yields answers as workers finish them.

A worker is any callable that takes a list of jobs and returns one answer per job, in the same order. Jobs and answers
are dataclasses; Ray pickles them as they are. A worker must return its failures as answers: an exception ends the pool.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from pipelines.core.cluster import running_ray
from pipelines.core.devices import check_gpus
from pipelines.core.errors import Failure, UsageError
from pipelines.core.placement import Needs, check_placement

J = TypeVar("J")
A = TypeVar("A")
Worker = Callable[[Sequence[J]], Sequence[A]]

THREADS = 1
"""Torch threads of a worker, in batch jobs and in the service. The number can change the last bit of a sum."""

MAX_BLOCKS = 4096
"""Most blocks of a Ray dataset. Answers arrive block by block, so a kill costs the blocks in work.

Each block costs time in the scheduler.
"""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Number and resources of the workers.

    Attributes:
        workers: most processes; they start when needed. 0: this process does the work, without Ray.
        num_cpus, num_gpus: resources of one worker; may be fractions.
        batch_size: jobs per call of a worker.
        needs: where the workers may run, and further needs; its CPUs, GPUs and number are those of the pool.
    """

    workers: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    batch_size: int = 1
    needs: Needs = field(default_factory=Needs)

    def __post_init__(self) -> None:
        shares = (self.num_cpus, self.num_gpus)
        if self.workers < 0 or self.batch_size < 1 or not all(0 <= share < math.inf for share in shares):
            raise UsageError(
                "a pool needs workers >= 0, batch_size >= 1, and shares of CPUs and GPUs that are numbers of at least "
                f"0; got workers {self.workers}, batch_size {self.batch_size}, num_cpus {self.num_cpus:g}, num_gpus "
                f"{self.num_gpus:g}."
            )

    def placed(self, needs: Needs) -> Pool:
        """This pool with other needs. They replace its numbers where they state one; 0 workers stay."""
        full = needs.or_else(self.workers or 1, self.num_cpus, self.num_gpus)
        workers = self.workers and (full.workers or 1)
        return replace(self, workers=workers, num_cpus=full.cpus or 0.0, num_gpus=full.gpus or 0.0, needs=full)

    @property
    def others(self) -> int:
        """How many other workers each worker has at most."""
        return max(0, self.workers - 1)


def set_threads(threads: int) -> None:
    """Set the number of torch's threads in this process, if torch is imported."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


@contextmanager
def fixed_threads(threads: int = THREADS) -> Iterator[None]:
    """Set the number of torch's threads inside a `with` block, and restore the earlier number afterwards."""
    import torch

    earlier = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(earlier)


def answers_of(make: Callable[[], Worker[J, A]], jobs: Sequence[J], pool: Pool) -> Iterator[A]:
    """Yield the answers to all jobs, in the order in which they arrive.

    Args:
        make: builds a worker in each process; picklable.
        jobs: each job runs once; if its process dies, it runs again.
        pool: number and resources of the workers.

    Raises:
        UsageError: a worker needs more GPUs than there are.
        Failure: Ray ended the job.
    """
    check_gpus({"num_gpus": pool.num_gpus})
    if pool.workers == 0:
        worker = make()
        for start in range(0, len(jobs), pool.batch_size):
            yield from worker(jobs[start : start + pool.batch_size])
    elif jobs:
        yield from _through_ray(make, jobs, pool)


class _Actor(Generic[J, A]):
    """Adapter of a worker for Ray Data: takes batches of the column "job", returns the column "answer"."""

    def __init__(self, make: Callable[[], Worker[J, A]]) -> None:
        self.worker = make()

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"answer": object_column(self.worker(list(batch["job"])))}


def object_column(values: Sequence[Any]) -> np.ndarray:
    """Put objects into a numpy array [n] of dtype object, unchanged; np.array would unpack sequences."""
    column = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        column[index] = value
    return column


def _through_ray(make: Callable[[], Worker[J, A]], jobs: Sequence[J], pool: Pool) -> Iterator[A]:
    import ray
    from ray.data import ActorPoolStrategy

    batches = -(-len(jobs) // pool.batch_size)
    with running_ray(), ray_errors("the job"), _without_bars():
        check_placement("a worker", pool.placed(pool.needs).needs)
        rows = [{"job": job} for job in jobs]
        dataset = ray.data.from_items(rows, override_num_blocks=min(batches, MAX_BLOCKS)).map_batches(
            _Actor,  # type: ignore[arg-type]
            fn_constructor_kwargs={"make": make},
            batch_size=pool.batch_size,
            batch_format="numpy",
            # The pool is elastic: a fixed pool as large as the cluster hung when a node died.
            compute=ActorPoolStrategy(min_size=1, max_size=min(pool.workers, batches)),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus or None,
            **pool.needs.options(),
        )
        for row in dataset.iter_rows():
            yield row["answer"]


@contextmanager
def ray_errors(what: str) -> Iterator[None]:
    """Turn errors of Ray into a Failure of one sentence, with the error's type and the last line of its message."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        kind, reason = type(error).__name__, last_line(error)
        raise Failure(f"Ray ended {what} ({kind}: {reason}); the same command continues") from error


def last_line(error: object) -> str:
    """Return the last line of an error's message, or its type if it has none. Ray puts a worker's own error there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _without_bars() -> Iterator[None]:
    """Turn off Ray Data's progress bars inside a `with` block: the console shows ours."""
    from ray.data import DataContext

    context = DataContext.get_current()
    earlier, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        yield
    finally:
        context.enable_progress_bars = earlier
