"""Plans: stages in order, each known by the digest of everything that decides its result.

A stage's folder is <run>/<name>-<digest8>/. Its done.json is written last and atomically, so that at any moment a stage
is either done, and then skipped by every later run, or continued in place by the same command after Ctrl-C or kill -9.
Changing a recipe gives another digest and so another folder: nothing is overwritten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.console import Console
from pipelines.errors import EXIT_OK, EXIT_QUARANTINED, Failure, RetryLater, UsageError, unknown
from pipelines.home import runs_folder, shipped
from pipelines.rows import replace_file
from pipelines.stages import VERBS, StageContext, TrainSettings, Verb, check_recipe

PLAN_FORMAT = 1
STAGE_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
LOCK_NAME = ".lock"


@dataclass(kw_only=True)
class PlanDocument:
    """A file in pipelines/plans/.

    Attributes:
        title: one line for people.
        workers: training workers of every train stage; 0 leaves each recipe's own number. Never part of a digest.
        free_mib: free disk that the whole run wants before it starts.
        stages: mappings with name, verb, needs (names of earlier stages) and the verb's own settings.
    """

    title: str = ""
    workers: int = 0
    free_mib: int = 500
    stages: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One stage, resolved: nothing about it is left to be decided while it runs.

    Attributes:
        resolved: the settings and recipe as plain data, for people and for the report.
        digest: sha256, hex; folder: its name below the run's folder.
    """

    name: str
    verb: str
    needs: tuple[str, ...]
    settings: Any
    recipe: Any
    resolved: Mapping[str, Any]
    digest: str
    version: int
    folder: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A resolved plan."""

    name: str
    title: str
    free_mib: int
    stages: tuple[PlannedStage, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)  # file ("" if shipped), overrides: what the report repeats


@dataclass(kw_only=True)
class StageRecord:
    """How a stage fared in this run: state is planned, done (skipped), running, finished, failed or interrupted."""

    stage: PlannedStage
    state: str = "planned"
    seconds: float = 0.0
    results: Mapping[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class PlanResult:
    """What a run of a plan left behind; paths are None where the plan has no such thing."""

    plan: str
    run_dir: Path
    stages: list[StageRecord]
    seconds: float = 0.0
    report: Path | None = None
    model: Path | None = None
    tracking: str | None = None
    dry_run: bool = False

    @property
    def quarantined(self) -> int:
        """Rejected samples over all stages, also of stages that were done before."""
        return sum(int(record.results.get("quarantined", 0)) for record in self.stages)

    @property
    def verdict(self) -> str:
        """The last stage's sentence on how restored pictures scored, "" without one."""
        return next((str(r.results["verdict"]) for r in reversed(self.stages) if r.results.get("verdict")), "")

    def last_model(self) -> StageRecord | None:
        """The last stage that left a model, None without one."""
        folders = ((record, self.run_dir / record.stage.folder) for record in reversed(self.stages))
        return next((record for record, folder in folders if (folder / "model" / "model.json").is_file()), None)

    @property
    def exit_code(self) -> int:
        return EXIT_QUARANTINED if self.quarantined else EXIT_OK

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "plan": self.plan,
            "run": str(self.run_dir),
            "dry_run": self.dry_run,
            "seconds": round(self.seconds, 1),
            "report": self.report and str(self.report),
            "model": self.model and str(self.model),
            "tracking": self.tracking,
            "quarantined": self.quarantined,
            "verdict": self.verdict,
            "stages": [stage_json(record) for record in self.stages],
        }

    def lines(self) -> list[str]:
        """The last lines of a run for people."""
        lines = [f"Run        {self.run_dir}"]
        for label, value in (("Report", self.report), ("Model", self.model), ("MLflow", self.tracking)):
            if value:
                lines.append(f"{label:<10} {value}")
        if self.quarantined:
            lines.append(f"Quarantine {self.quarantined} samples were refused; each with its reason in the report.")
        if self.verdict:
            lines.append(f"Scores     {self.verdict}")
        return lines


# -- resolving -------------------------------------------------------------------------------------------------------


def canonical(document: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal documents give equal bytes. NaN is refused."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def stage_digest(resolved: Mapping[str, Any], inputs: Mapping[str, str], version: int) -> str:
    """sha256 of a stage's identity.

    Args:
        resolved: settings and recipe without placement keys, plain data.
        inputs: digest by name of each needed stage.
        version: the verb's integer version.
    """
    return hashlib.sha256(canonical({"recipe": resolved, "inputs": inputs, "version": version})).hexdigest()


def load_plan(
    name: str | Path,
    overrides: Sequence[str] = (),
    images: Path | None = None,
    verbs: Mapping[str, Verb] = VERBS,
) -> Plan:
    """Resolve a plan: every name, key and value in it and in its recipes is checked here, before anything runs.

    Args:
        name: a shipped plan's name or a path to a YAML file.
        overrides: "workers=2" for the plan, "<stage>.<key>=value" for one stage's settings or recipe.
        images: a folder of photographs that replaces the sources of curate stages.

    Raises:
        UsageError: anything unknown or of a wrong type, with the near name.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = plan_path(name)
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} cannot be read as a plan: {str(error).splitlines()[0]}.") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get("stages"), list):
        raise UsageError(f"{path.name} is no plan: it has no list of stages.")
    stages = [check_stage(stage, path.name, verbs) for stage in loaded["stages"]]
    names = [stage["name"] for stage in stages]
    if len(set(names)) < len(names):
        raise UsageError(f"{path.name}: two stages have one name: {', '.join(names)}.")
    own, by_stage = split_overrides(overrides, names)
    head = resolve_settings(PlanDocument, {k: v for k, v in loaded.items() if k != "stages"}, own, path.name)

    planned: dict[str, PlannedStage] = {}
    for stage in stages:
        for need in stage["needs"]:
            if need not in planned:
                raise unknown(f"earlier stage in the needs of {stage['name']}", str(need), planned)
        inputs = {need: planned[need].digest for need in stage["needs"]}
        settled = resolve_stage(stage, by_stage[stage["name"]], head.workers, inputs, images, verbs)
        above = [recipe for need in stage["needs"] if (recipe := planned[need].recipe) is not None]
        verbs[stage["verb"]].check(settled.settings, settled.recipe, above)
        planned[stage["name"]] = settled
    origin = {"file": "" if str(name) in shipped("plans") else str(path.absolute()), "overrides": list(overrides)}
    return Plan(name=path.stem, title=head.title, free_mib=head.free_mib, stages=tuple(planned.values()), origin=origin)


def plan_path(name: str | Path) -> Path:
    """The file of a shipped plan or of a path."""
    plans = shipped("plans")
    path = plans.get(str(name)) or Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise unknown("plan", str(name), plans)
    return path


def check_stage(stage: Any, where: str, verbs: Mapping[str, Verb]) -> dict[str, Any]:
    """A stage's mapping with `needs` filled in; its name and verb are known good afterwards."""
    if not isinstance(stage, dict) or not isinstance(stage.get("name"), str) or not isinstance(stage.get("verb"), str):
        raise UsageError(f"{where}: a stage needs a name and a verb, got {stage!r}.")
    if not STAGE_NAME.fullmatch(stage["name"]):
        raise UsageError(f'{where}: "{stage["name"]}" is no stage name (a-z, 0-9 and -, at most 32).')
    if stage["verb"] not in verbs:
        raise unknown("verb", stage["verb"], verbs)
    needs = stage.get("needs") or []
    if not isinstance(needs, list):
        raise UsageError(f"{where}: needs of {stage['name']} must be a list of stage names, got {needs!r}.")
    return {**stage, "needs": needs}


def split_overrides(overrides: Sequence[str], stages: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of the plan itself, and of each stage with the stage's name taken off."""
    own: list[str] = []
    by_stage: dict[str, list[str]] = {name: [] for name in stages}
    known = [f.name for f in dataclasses.fields(PlanDocument) if f.name != "stages"]
    for override in overrides:
        key, equals, value = override.partition("=")
        head, dot, rest = key.partition(".")
        if not equals or not key:
            raise UsageError(f'"{override}" is not key=value.')
        if dot and head in by_stage:
            by_stage[head].append(f"{rest}={value}")
        elif key in known:
            own.append(override)
        elif dot or key in by_stage:
            raise (
                unknown("stage in the override", head, stages)
                if dot
                else UsageError(f'"{override}": say which key of stage {key}, as in {key}.KEY=value.')
            )
        else:
            raise unknown("plan key", key, [*known, *(f"{name}.KEY" for name in stages)])
    return own, by_stage


def resolve_settings(schema: type, document: Any, overrides: Sequence[str], where: str) -> Any:
    """Dataclass, YAML and overrides merged into a real dataclass; wrong keys and types become UsageError."""
    from components.recipes import RecipeError, resolve

    try:
        return resolve(schema, document, list(overrides), where)
    except (RecipeError, ValueError) as error:
        raise UsageError(str(error)) from error


def resolve_stage(
    stage: Mapping[str, Any],
    overrides: Sequence[str],
    workers: int,
    inputs: Mapping[str, str],
    images: Path | None,
    verbs: Mapping[str, Verb],
) -> PlannedStage:
    """Settle one stage's settings, recipe and digest."""
    name, verb = stage["name"], verbs[stage["verb"]]
    document = {key: value for key, value in stage.items() if key not in ("name", "verb", "needs")}
    trains = issubclass(verb.settings, TrainSettings)
    settings = resolve_settings(verb.settings, document, () if trains else overrides, f"stage {name}")
    recipe, resolved = None, dataclasses.asdict(settings)
    identity: dict[str, Any] = dict(resolved)
    if trains:
        placement = [f"placement.workers={workers}"] if workers else []
        recipe = load_checked_recipe(settings.recipe, [*settings.overrides, *placement, *overrides])
        resolved, identity = recipe_documents(recipe)
    version = recipe_version(recipe) if trains else verb.version
    own = {"verb": f"{stage['verb']} {verb.version}", "settings": identity}
    digest = stage_digest({**own, **verb.identity(settings, recipe, images)}, inputs, version)
    return PlannedStage(
        name=name,
        verb=stage["verb"],
        needs=tuple(stage["needs"]),
        settings=settings,
        recipe=recipe,
        resolved=resolved,
        digest=digest,
        version=version,
        folder=f"{name}-{digest[:8]}",
    )


def load_checked_recipe(name: str, overrides: Sequence[str]) -> Any:
    """components.recipes.load_recipe, with the names inside judged too and every error as UsageError."""
    from components.recipes import RecipeError, load_recipe

    try:
        recipe = load_recipe(name, overrides)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    check_recipe(recipe)
    return recipe


def recipe_documents(recipe: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe as plain data: whole, and without placement for the digest."""
    from components.recipes import as_dict, identity

    return dict(as_dict(recipe)), dict(identity(recipe))


def recipe_version(recipe: Any) -> int:
    """The integer version that a system gives the training stage of a recipe."""
    from components.systems import SYSTEMS

    return SYSTEMS[recipe.system].stages[recipe.stage]


# -- running ---------------------------------------------------------------------------------------------------------


def run_plan(
    plan: str | Path,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    images: Path | None = None,
    dry_run: bool = False,
    console: Console | None = None,
    verbs: Mapping[str, Verb] = VERBS,
    track: bool = True,
) -> PlanResult:
    """Run a plan's stages in order, skipping what is done.

    Args:
        plan: a shipped plan's name or a path.
        out: the run's folder; None takes RESTORAY_HOME/runs/<plan>.
        overrides: see load_plan.
        images: photographs instead of the plan's own.
        dry_run: resolve everything, touch nothing.
        console: where progress goes.
        verbs: the dictionary of verbs; tests bring their own.
        track: log to MLflow in the run's folder.

    Raises:
        UsageError: the plan or an override is wrong.
        RetryLater: another driver works on `out`.
        Failure: `out` cannot be written, or the disk is too full.
    """
    console = console or Console()
    if images is not None:
        images = Path(images).expanduser().absolute()
    resolved = load_plan(plan, overrides, images, verbs)
    run_dir = Path(out).expanduser().absolute() if out else runs_folder() / resolved.name
    if images is not None and run_dir.resolve() == images.resolve():
        raise UsageError(f"{images} is both input and output; choose another output folder.")
    records = [StageRecord(stage=stage) for stage in resolved.stages]
    for record in records:
        done = read_done(run_dir / record.stage.folder, record.stage.digest)
        if done is not None:
            record.state, record.results, record.seconds = "done", done["results"], float(done["seconds"])
    result = PlanResult(plan=resolved.name, run_dir=run_dir, stages=records, dry_run=dry_run)
    if dry_run:
        return result

    start = time.monotonic()
    check_output(run_dir, resolved.free_mib if any(r.state != "done" for r in records) else 0)
    with run_lock(run_dir):
        run_stages(resolved, result, images, console, verbs, track)
        result.seconds = time.monotonic() - start
        finish(resolved, result, console)
    return result


def run_stages(
    plan: Plan, result: PlanResult, images: Path | None, console: Console, verbs: Mapping[str, Verb], track: bool
) -> None:
    """Run what is not done; plan.json always tells the truth about how far this came."""
    from pipelines.cluster import local_ray
    from pipelines.follow import RunTracking, published

    with ExitStack() as stack:
        ray_stands, tracking = False, None
        write_plan_json(plan, result, images)
        for number, record in enumerate(result.stages, 1):
            stage, title = record.stage, f"[{number}/{len(result.stages)}] {record.stage.name}"
            if record.state == "done":
                console.say(f"{title}: done before, skipped ({stage.folder})")
                continue
            if track and tracking is None:
                tracking = stack.enter_context(RunTracking(result.run_dir, plan.name))
                result.tracking = tracking.location
            verb = verbs[stage.verb]
            if verb.uses_ray and not ray_stands:
                stack.enter_context(local_ray())
                ray_stands = True
            resumes = (result.run_dir / stage.folder).exists()
            console.say(f"{title}: {'goes on' if resumes else 'starts'} in {stage.folder}")
            run_one(plan, result, record, verb, images, console, tracking)
            console.say(f"{title}: finished in {record.seconds:.0f} s")
        if track and tracking is None and not published(result):  # an earlier driver died before it came to this
            tracking = stack.enter_context(RunTracking(result.run_dir, plan.name))
        if tracking is not None:
            tracking.publish(result)


def run_one(
    plan: Plan,
    result: PlanResult,
    record: StageRecord,
    verb: Verb,
    images: Path | None,
    console: Console,
    tracking: Any,
) -> None:
    """Run one stage inside its child run and write its done.json."""
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
        images=images,
        console=console,
    )
    start = time.monotonic()
    record.state = "running"
    write_plan_json(plan, result, images)
    try:
        with ExitStack() as stack:
            if tracking is not None:
                context.tracker = tracking.tracker
                context.tracking_run = stack.enter_context(tracking.stage(stage, folder))
            record.results = dict(verb.run(context))
        record.seconds = time.monotonic() - start
        inputs = {r.stage.name: r.stage.digest for r in result.stages if r.stage.name in stage.needs}
        write_done(folder, stage, inputs, record.seconds, record.results)
        record.state = "finished"
    except BaseException as error:
        record.state = "failed" if isinstance(error, Exception) else "interrupted"
        record.seconds = time.monotonic() - start
        raise
    finally:
        write_plan_json(plan, result, images)


def finish(plan: Plan, result: PlanResult, console: Console) -> None:
    """Point at the model, and write the report anew: it is cheap, and it shows also what was done before."""
    from pipelines.report import write_report

    last, store = result.last_model(), result.run_dir / "mlflow.db"
    result.model = result.run_dir / last.stage.folder / "model" if last else None
    if result.tracking is None and store.is_file():
        result.tracking = f"sqlite:///{store}"
    result.report = result.run_dir / "report.html"
    write_report(result.run_dir, result.report)


# -- what lies in the run's folder -----------------------------------------------------------------------------------


def read_done(folder: Path, digest: str) -> dict[str, Any] | None:
    """A stage's done.json if it says that this very stage is done and its outputs are still there, else None."""
    try:
        done = json.loads((folder / "done.json").read_text())
        outputs = done["outputs"]
        if done["digest"] != digest or not isinstance(done["results"], dict) or float(done["seconds"]) < 0:
            return None
        if any((folder / name).stat().st_size != size for name, size in outputs.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # unreadable or incomplete: the stage simply is not done
    return dict(done)


def write_done(
    folder: Path, stage: PlannedStage, inputs: Mapping[str, str], seconds: float, results: Mapping[str, Any]
) -> None:
    """Mark a stage as done: outputs are recorded with their sizes, so that a later run notices if they vanish.

    Raises:
        Failure: the verb claims an output that does not exist.
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
    """Write JSON so that a reader, also after a power cut, sees the old file or the new one."""
    replace_file(path, json.dumps(document, indent=1, ensure_ascii=False).encode(), sync=True)


def stage_json(record: StageRecord) -> dict[str, Any]:
    """One stage for plan.json and --json."""
    stage = record.stage
    return {
        "name": stage.name,
        "verb": stage.verb,
        "needs": list(stage.needs),
        "digest": stage.digest,
        "version": stage.version,
        "folder": stage.folder,
        "state": record.state,
        "skipped": record.state == "done",
        "seconds": round(record.seconds, 3),
        "resolved": dict(stage.resolved),
    }


def write_plan_json(plan: Plan, result: PlanResult, images: Path | None) -> None:
    """The run's table of contents, for the report."""
    document = {
        "format": PLAN_FORMAT,
        "plan": plan.name,
        **plan.origin,
        "title": plan.title,
        "images": images and str(images),
        "stages": [stage_json(record) for record in result.stages],
    }
    write_json(result.run_dir / "plan.json", document)


def check_output(run_dir: Path, free_mib: int) -> None:
    """Make the run's folder and refuse early what would fail late.

    Raises:
        Failure: it cannot be made or written, or the disk has less than `free_mib` free.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Failure(f"cannot write to {run_dir}: {error.strerror or error}.") from error
    free = shutil.disk_usage(run_dir).free // 2**20
    if free < free_mib:
        raise Failure(f"{run_dir} has {free} MiB free and this plan wants {free_mib} MiB: free some or choose --out.")


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Refuse a second driver on one run. The kernel drops the lock when its holder dies, however it dies.

    Raises:
        RetryLater: another process holds it.
    """
    import fcntl

    with (run_dir / LOCK_NAME).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise RetryLater(f"{run_dir} is in use by {file.read().strip() or 'another process'}.") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield
