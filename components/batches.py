"""The loop over batches of a restorer whose pictures run in steps: progress over all batches, results in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from components.types import Cancelled, Image, OnStep, Restored, StepEvent

Job = TypeVar("Job", bound=Any)
"""A prepared request: index among the requests, request, and options with steps."""


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
