"""The batches of a restorer whose pictures run in steps: grouped jobs, noise by seed, progress, results in order."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from components.randomness import generator
from components.types import Cancelled, Image, OnStep, Request, Restored, StepEvent

Job = TypeVar("Job", bound=Any)
"""A prepared request: index among the requests, request, and options with steps."""


def group_jobs(jobs: Sequence[Job], kind: Callable[[Job], Hashable], size: int) -> Iterator[list[Job]]:
    """Batches of at most `size` jobs of one kind each, in order of first appearance."""
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault(kind(job), []).append(job)
    for group in groups.values():
        for first in range(0, len(group), size):
            yield group[first : first + size]


def request_noise(requests: Sequence[Request], name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal float32 [B, *shape]; a row depends only on its request's seed and `name`."""
    rows = [generator(request.seed, name).standard_normal(shape, dtype=np.float32) for request in requests]
    return torch.from_numpy(np.stack(rows) if len(rows) > 1 else rows[0][None]).to(device)


def restore_batches(
    batches: Sequence[Sequence[Job]],
    run: Callable[[Sequence[Job], OnStep, Cancelled | None], Sequence[Image]],
    info: Callable[[Job], Mapping[str, str]],
    on_step: OnStep | None,
    cancelled: Cancelled | None,
) -> list[Restored]:
    """Results in the order of the requests.

    Args:
        batches: jobs of one size and equal options each; together every index once.
        run: restores a batch.
        info: a job's entries for the result.
        on_step: called after each step; steps are counted over all batches.
        cancelled: passed on.
    """
    total, offset = sum(batch[0].options.steps for batch in batches), 0
    restored: dict[int, Restored] = {}

    def report(event: StepEvent) -> None:
        if on_step is not None:
            on_step(replace(event, step=offset + event.step, of=total))

    for batch in batches:
        for job, image in zip(batch, run(batch, report, cancelled), strict=True):
            restored[job.index] = Restored(key=job.request.key, image=image, info=dict(info(job)))
        offset += batch[0].options.steps
    return [restored[index] for index in range(len(restored))]
