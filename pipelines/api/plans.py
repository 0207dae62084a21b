"""`restoray.run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.api.settings import setting_texts
from pipelines.core.console import Console
from pipelines.core.places.place import place_of
from pipelines.core.places.working_copy import working_copy
from pipelines.runs.engine import RunOptions, run_plan
from pipelines.runs.records import PlanResult


def run(
    plan: str | Path,
    *,
    out: str | Path | None = None,
    images: str | Path | None = None,
    minutes: float = 0.0,
    dry_run: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> PlanResult:
    """Run the stages of a plan in order. Finished stages are skipped, and an interrupted one continues.

    Args:
        plan: name of a plan (`restoray.recipes()["plans"]`), or a YAML file.
        out: folder of the run, here or in a store; None takes RESTORAY_HOME/runs/<plan>.
        images: your folder of photographs in place of the plan's sources.
        minutes: a training ends at its first checkpoint after this time; 0 for no limit.
        dry_run: resolve everything and write nothing.
        quiet: print no progress on standard error.
        settings: of the stages; `tuned__steps=50` changes the steps of the stage `tuned`.

    Returns:
        PlanResult: `run_dir`, `stages`, `model`, `report` and `tracking`.

    Raises:
        UsageError: an unknown plan or setting.
        Unfinished: the minutes are over; the same call continues.
        RetryLater: another process works in `out`.
        Failure, GateFailed: a stage failed.
    """
    options = RunOptions(
        images=Path(images) if images is not None else None,
        dry_run=dry_run,
        console=Console(silent=quiet),
        minutes=minutes,
    )
    return run_in(str(plan), out, setting_texts(settings), options)


def run_in(plan: str, out: str | Path | None, overrides: Sequence[str], options: RunOptions) -> PlanResult:
    """Run a plan in a folder, here or in a store; see `run`."""
    place = place_of(out) if out is not None else None
    if place is None or options.dry_run:  # a dry run in a store does not look at what is done there
        return run_plan(plan, place if isinstance(place, Path) else None, overrides, options)
    with working_copy(place) as folder:
        return run_plan(plan, folder, overrides, replace(options, place=place))
