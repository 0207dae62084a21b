"""Runs a plan: stages in order. A done stage is skipped, an interrupted one continues in its folder.

A stage's done.json is written last and atomically. So a stage is either done, and later runs skip it, or the same
command continues it after Ctrl-C or kill -9.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from components.writing import replace_file
from pipelines.core.cluster import running_ray
from pipelines.core.console import Console
from pipelines.core.devices import check_gpus
from pipelines.core.errors import Failure, UsageError
from pipelines.core.folders import check_output, job_lock
from pipelines.core.home import runs_folder
from pipelines.core.places.place import Where
from pipelines.core.places.working_copy import check_one_machine
from pipelines.core.rows import json_text
from pipelines.runs.follow import RunTracking, is_published
from pipelines.runs.plan import load_plan
from pipelines.runs.records import Plan, PlannedStage, PlanResult, StageRecord, stage_json
from pipelines.runs.report import write_report
from pipelines.runs.stages import VERBS
from pipelines.runs.tracking import DATABASE, store_uri
from pipelines.runs.verb import StageContext, Verb
from pipelines.training.train import store_mib

PLAN_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a plan runs.

    Attributes:
        images: the user's folder of photographs, which replaces the sources of curate stages; None keeps the plan's.
        dry_run: resolve everything and write nothing.
        track: log to MLflow in the run's folder.
        console: shows the progress.
        minutes: a training ends at its first checkpoint after this time; the same command continues. 0 for no limit.
        place: the folder of a store whose copy is the run's folder; None for a run that stays here.
        verbs: the verbs that stages may name; tests bring their own.
    """

    images: Path | None = None
    dry_run: bool = False
    track: bool = True
    console: Console = field(default_factory=Console)
    minutes: float = 0.0
    place: Where | None = None
    verbs: Mapping[str, Verb] = field(default_factory=lambda: VERBS)


def run_plan(
    plan: str | Path,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    options: RunOptions | None = None,
) -> PlanResult:
    """Run a plan's stages in order and skip those that are done.

    Args:
        plan: a shipped plan's name or a path.
        out: the run's folder; None takes RESTORAY_HOME/runs/<plan>.
        overrides: see load_plan.
        options: how the plan runs; None takes the defaults.

    Raises:
        UsageError: the plan or an override is wrong, or `out` is the folder of the images.
        RetryLater: another driver works on `out`.
        Failure: `out` cannot be written, or the disk is too full.
    """
    options = options or RunOptions()
    images = options.images
    if images is not None:
        images = Path(images).expanduser().absolute()
        options = replace(options, images=images)
    resolved = load_plan(plan, overrides, images, options.verbs)
    run_dir = Path(out).expanduser().absolute() if out else runs_folder() / resolved.name
    if options.track and not options.dry_run:
        store_uri(run_dir / DATABASE)  # MLflow refuses some folders
    if images is not None and run_dir.resolve() == images.resolve():
        raise UsageError(f"{images} is both input and output; choose another output folder.")
    records = [StageRecord(stage=stage) for stage in resolved.stages]
    for record in records:
        document = read_done_json(run_dir / record.stage.folder, record.stage.digest)
        if document is not None:
            record.state, record.results, record.seconds = "done", document["results"], float(document["seconds"])
    result = PlanResult(plan=resolved.name, run_dir=run_dir, stages=records, dry_run=options.dry_run)
    if options.dry_run:
        return result

    for record in records:
        if record.state != "done":  # no stage runs for hours before a later one fails
            check_gpus(record.stage.resolved)
    start = time.monotonic()
    check_output(run_dir, resolved.free_mib if any(r.state != "done" for r in records) else 0)
    with job_lock(run_dir):
        run_stages(resolved, result, options)
        result.seconds = time.monotonic() - start
        finish(result)
    return result


def run_stages(plan: Plan, result: PlanResult, options: RunOptions) -> None:
    """Run the stages that are not done. plan.json always holds the current state of every stage."""
    with ExitStack() as stack:
        ray_runs, tracking = False, None
        write_plan_json(plan, result, options.images)
        for number, record in enumerate(result.stages, 1):
            stage, title = record.stage, f"[{number}/{len(result.stages)}] {record.stage.name}"
            if record.state == "done":
                options.console.say(f"{title}: done before, skipped ({stage.folder})")
                continue
            if options.track and tracking is None:
                tracking = stack.enter_context(RunTracking(result.run_dir, plan.name))
                result.tracking = tracking.location
            if options.verbs[stage.verb].uses_ray and not ray_runs:
                stack.enter_context(running_ray(store_need(result.stages)))
                check_one_machine(options.place)
                ray_runs = True
            resumes = (result.run_dir / stage.folder).exists()
            options.console.say(f"{title}: {'continues' if resumes else 'starts'} in {stage.folder}")
            run_one(plan, result, record, options, tracking)
            options.console.say(f"{title}: finished in {record.seconds:.0f} s")
        if options.track and tracking is None and not is_published(result):
            # an earlier driver died before it published
            tracking = stack.enter_context(RunTracking(result.run_dir, plan.name))
        if tracking is not None:
            tracking.publish(result)


def store_need(records: Sequence[StageRecord]) -> float:
    """MiB of the object store that the trainings of a run need, one after the other."""
    recipes = [record.stage.recipe for record in records if record.state != "done" and record.stage.recipe is not None]
    return max((store_mib(recipe) for recipe in recipes), default=0.0)


def run_one(
    plan: Plan, result: PlanResult, record: StageRecord, options: RunOptions, tracking: RunTracking | None
) -> None:
    """Run one stage inside its MLflow run and write its done.json."""
    stage = record.stage
    folders = {r.stage.name: result.run_dir / r.stage.folder for r in result.stages}
    folder = folders[stage.name]
    folder.mkdir(exist_ok=True)
    context = StageContext(
        plan=plan.name,
        name=stage.name,
        verb=stage.verb,
        digest=stage.digest,
        run_dir=result.run_dir,
        stage_dir=folder,
        inputs={need: folders[need] for need in stage.needs},
        settings=stage.settings,
        recipe=stage.recipe,
        images=options.images,
        console=options.console,
        minutes=options.minutes,
    )
    start = time.monotonic()
    record.state = "running"
    write_plan_json(plan, result, options.images)
    try:
        with ExitStack() as stack:
            if tracking is not None:
                context.tracker = tracking.tracker
                context.tracking_run = stack.enter_context(tracking.stage(stage, folder))
            record.results = dict(options.verbs[stage.verb].run(context))
        record.seconds = time.monotonic() - start
        inputs = {r.stage.name: r.stage.digest for r in result.stages if r.stage.name in stage.needs}
        write_done_json(folder, stage, inputs, record.seconds, record.results)
        record.state = "finished"
    except BaseException as error:
        record.state = "failed" if isinstance(error, Exception) else "interrupted"
        record.seconds = time.monotonic() - start
        raise
    finally:
        write_plan_json(plan, result, options.images)


def finish(result: PlanResult) -> None:
    """Add model, tracking and report to the result. The report is always written again: it is cheap."""
    last, store = result.last_model(), result.run_dir / "mlflow.db"
    result.model = result.run_dir / last.stage.folder / "model" if last else None
    if result.tracking is None and store.is_file():
        result.tracking = store_uri(store)
    result.report = result.run_dir / "report.html"
    write_report(result.run_dir, result.report)


def read_done_json(folder: Path, digest: str) -> dict[str, Any] | None:
    """A stage's done.json if it has this digest and all its outputs still exist with their sizes, else None."""
    try:
        document = json.loads((folder / "done.json").read_text())
        outputs = document["outputs"]
        if document["digest"] != digest or not isinstance(document["results"], dict) or float(document["seconds"]) < 0:
            return None
        if any((folder / name).stat().st_size != size for name, size in outputs.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # unreadable or incomplete: the stage is not done
    return dict(document)


def write_done_json(
    folder: Path, stage: PlannedStage, inputs: Mapping[str, str], seconds: float, results: Mapping[str, Any]
) -> None:
    """Write done.json. It holds the outputs' sizes, so a later run notices a missing or cut file.

    Raises:
        Failure: the verb names an output that does not exist.
    """
    sizes: dict[str, int] = {}
    for name in results.get("outputs", ()):
        path = folder / name
        if not path.is_file():
            raise Failure(f"stage {stage.name} ended without its output {name}.")
        sizes[name] = path.stat().st_size
    document = {
        "digest": stage.digest,
        "version": stage.version,
        "verb": stage.verb,
        "inputs": dict(inputs),
        "outputs": sizes,
        "seconds": round(seconds, 3),
        "results": dict(results),
    }
    write_json(folder / "done.json", document)


def write_json(path: Path, document: Any) -> None:
    """Write JSON atomically: also after a power cut the file is the old one or the new one."""
    replace_file(path, json_text(document, indent=1).encode(), sync=True)


def write_plan_json(plan: Plan, result: PlanResult, images: Path | None) -> None:
    """Write plan.json, the run's table of contents for the report."""
    document = {
        "format": PLAN_FORMAT,
        "plan": plan.name,
        **plan.origin,
        "title": plan.title,
        "images": images and str(images),
        "stages": [stage_json(record) for record in result.stages],
    }
    write_json(result.run_dir / "plan.json", document)
