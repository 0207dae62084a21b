"""The commands `restoray run`, `restoray demo` and `restoray report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.support import complete_plan, plan_lines
from pipelines.commands.words import Address, DryRun, Images, Json, Out, Overrides
from pipelines.core.console import Console
from pipelines.core.errors import UsageError


def demo(
    overrides: Overrides = None,
    out: Out = None,
    images: Images = None,
    dry_run: DryRun = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Run the demo plan on real photographs. This is the same as `restoray run demo`."""
    run_and_print("demo", overrides, out, images, dry_run, as_json)


def run(
    plan: Annotated[str, typer.Argument(autocompletion=complete_plan, help="The name of a plan or a YAML file.")],
    overrides: Overrides = None,
    out: Out = None,
    images: Images = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="End a training at its first checkpoint after this time; 0 for no limit.")
    ] = 0,
    dry_run: DryRun = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Run the stages of a plan in order. Finished stages are skipped, and an interrupted stage continues."""
    run_and_print(plan, overrides, out, images, dry_run, as_json, minutes)


def run_and_print(
    plan: str,
    overrides: list[str] | None,
    out: str | None,
    images: Path | None,
    dry_run: bool,
    as_json: bool,
    minutes: float = 0.0,
) -> None:
    """Run a plan, print its result and exit; a dry run prints the resolved plan and runs nothing."""
    from pipelines.api.plans import run_in
    from pipelines.runs.engine import RunOptions

    console = Console(silent=as_json)
    options = RunOptions(images=images, dry_run=dry_run, console=console, minutes=minutes)
    result = run_in(plan, out, overrides or (), options)
    lines = plan_lines(result) if dry_run else result.lines()
    console.result(result.to_json(), lines)
    raise typer.Exit(0 if dry_run else result.exit_code)


def report(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run, here or in a store.")],
    out: Annotated[str | None, typer.Option("--out", "-o", help="The HTML file, RUN/report.html by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained report.html about a finished or unfinished run."""
    from pipelines.core.places.files import upload
    from pipelines.core.places.place import Place, place_of
    from pipelines.core.places.working_copy import local_copy
    from pipelines.runs.report import write_report

    run = place_of(run_dir)
    target = place_of(out) if out else run / "report.html"
    folder = local_copy(run)
    if not (folder / "plan.json").is_file():
        raise UsageError(f"{run} is not a run: it has no plan.json.")
    page = folder / "report.html" if isinstance(target, Place) else target
    write_report(folder, page)
    if isinstance(target, Place):
        upload(target, page)
    Console(silent=as_json).result({"report": str(target)}, [str(target)])
