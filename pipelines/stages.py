"""The verbs that a plan's stages name: one dictionary, and the thin adapter of each to its module.

An adapter gets a `StageContext`, works inside `stage_dir` only, may be called again on a half-finished folder, and
returns JSON-serialisable results. Three keys mean something to the engine: "outputs" (paths below stage_dir that later
stages read), "quarantined" (number of rejected samples) and "verdict" (one sentence for the last lines).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.console import Console
from pipelines.errors import Failure, UsageError
from pipelines.home import package_folder

if TYPE_CHECKING:
    from pipelines.tracking import Tracker


@dataclass(kw_only=True)
class StageContext:
    """All that a stage may know.

    Attributes:
        plan, name, verb, digest: who this is.
        run_dir, stage_dir: folders; stage_dir exists and may hold an earlier attempt's work.
        inputs: folders of the stages this one needs, by name, in the plan's order.
        settings: the verb's settings dataclass, resolved.
        recipe: the resolved recipe of a train stage, else None.
        images: the user's folder of photographs, which replaces the sources of a curate stage.
        tracker, tracking_run: where to log besides the folder; None without a tracker.
        console: bars and lines.
    """

    plan: str
    name: str
    verb: str
    digest: str
    run_dir: Path
    stage_dir: Path
    inputs: Mapping[str, Path]
    settings: Any
    recipe: Any = None
    images: Path | None = None
    tracker: Tracker | None = None
    tracking_run: str | None = None
    console: Console = field(default_factory=Console)

    def find(self, relative: str) -> Path:
        """`relative` inside the last needed stage that has it, e.g. "model" or "index.json".

        Raises:
            Failure: no needed stage has it.
        """
        for folder in reversed(list(self.inputs.values())):
            if (folder / relative).exists():
                return folder / relative
        raise Failure(f'stage "{self.name}" needs {relative}, and none of its inputs has it: {", ".join(self.inputs)}.')


@dataclass(kw_only=True)
class CurateSettings:
    """spec: a name in datasets/ or a path."""

    spec: str = "demo"


@dataclass(kw_only=True)
class TrainSettings:
    """recipe: a name in pipelines/recipes/ or a path; overrides: key=value on top of it."""

    recipe: str = ""
    overrides: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class RestoreSettings:
    """Degrade held-out pictures with a fixed seed and restore them.

    Attributes:
        preset, preset_options: the degradation, as in components.degradations.
        seed: of the degradation and of the restoration.
        short_side: pixels of the held-out pictures' short side.
        limit: pictures at most; 0 takes all.
        options: of the restorer: steps, cfg_scale, ...
    """

    preset: str = "realesrgan-nano"
    preset_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    short_side: int = 256
    limit: int = 0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class EvaluateSettings:
    """metrics: pyiqa names; empty takes the set that needs no download."""

    metrics: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ServeCheckSettings:
    """timeout_s: for the model to load and one picture to come back."""

    timeout_s: float = 300.0


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What the engine must know of a verb.

    Attributes:
        run: does the work.
        settings: dataclass of what a plan may say beside name, verb and needs.
        version: raised by hand when equal settings would give another result; part of the digest.
        uses_ray: whether a local Ray must stand before it runs.
        identity: what besides settings decides the result, e.g. a fingerprint of the source pictures.
    """

    run: Callable[[StageContext], Mapping[str, Any]]
    settings: type
    version: int = 1
    uses_ray: bool = True
    identity: Callable[[Any, Path | None], Mapping[str, Any]] = lambda settings, images: {}


def folder_fingerprint(folder: Path) -> str:
    """sha256 over the names, sizes and modification times of all files below `folder`, without reading them.

    Raises:
        UsageError: no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}.")
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def content_fingerprint(folder: Path) -> str:
    """sha256 over the names and contents of the files right in `folder`: for small folders that come with the code,
    whose modification times are those of the check-out."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.glob("*") if p.is_file()):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def curate_identity(settings: CurateSettings, images: Path | None) -> dict[str, Any]:
    """The spec's text and the pictures it would read: with other pictures the stage is another one."""
    from pipelines.errors import unknown
    from pipelines.home import shipped

    specs = shipped("datasets")
    path = specs.get(settings.spec) or Path(settings.spec)
    if not path.is_file():
        raise unknown("corpus spec", settings.spec, specs)
    pictures = folder_fingerprint(images) if images else content_fingerprint(package_folder() / "demo_corpus")
    return {"spec": path.read_text(), "pictures": pictures}


def run_curate(context: StageContext) -> dict[str, Any]:
    """Photographs to shards."""
    from pipelines.curate import curate

    with context.console.bar(context.name) as progress:
        result = curate(context.settings.spec, context.stage_dir, progress=progress, images=context.images)
    return {
        "accepted": result.accepted,
        "quarantined": result.rejected,
        "manifest_digest": result.digest,
        "outputs": ["index.json", "manifest.jsonl"],
    }


def run_train(context: StageContext) -> dict[str, Any]:
    """One training stage."""
    from pipelines.train import train

    with context.console.bar(context.name) as progress:
        results = train(context.recipe, context.inputs, context.stage_dir, progress=progress)
    return {"outputs": ["model/model.json"], **(results or {})}


def run_restore(context: StageContext) -> dict[str, Any]:
    """Held-out pictures, degraded with a fixed seed, through the trained model."""
    from pipelines.restore import prepare_heldout, restore_folder

    settings, corpus = context.settings, context.find("index.json").parent
    prepare_heldout(
        corpus,
        context.stage_dir,
        preset=settings.preset,
        preset_options=settings.preset_options,
        seed=settings.seed,
        short_side=settings.short_side,
        limit=settings.limit or None,
    )
    with context.console.bar(context.name) as progress:
        result = restore_folder(
            context.find("model"),
            context.stage_dir / "lq",
            context.stage_dir / "restored",
            options=settings.options,
            seed=settings.seed,
            progress=progress,
        )
    return {"restored": result.restored, "skipped": result.skipped, "quarantined": result.quarantined}


def run_evaluate(context: StageContext) -> dict[str, Any]:
    """Restored pictures against their originals, beside the input and a classical baseline."""
    from pipelines.evaluate import evaluate

    restored, settings = context.find("restored").parent, context.settings
    chosen = {"metrics": settings.metrics} if settings.metrics else {}
    with context.console.bar(context.name) as progress:
        summary = evaluate(
            restored / "restored", restored / "lq", restored / "hq", context.stage_dir, progress=progress, **chosen
        )
    return {"verdict": summary.verdict, "outputs": ["scores.jsonl", "summary.json"]}


def run_serve_check(context: StageContext) -> dict[str, Any]:
    """One picture through the service: its bytes must equal the batch result's."""
    from pipelines.serve import check_served, start

    restored = context.find("restored")
    expected = min(restored.glob("*.png"))
    with context.console.bar(context.name) as progress:
        progress(0, 1, "starting the service")
        handle = start(context.find("model"))
        try:
            check_served(handle.url, restored.parent / "lq" / expected.name, expected)
        finally:
            handle.stop()
        progress(1, 1)
    return {"picture": expected.name, "equal": True}


VERBS: Mapping[str, Verb] = {
    "curate": Verb(run=run_curate, settings=CurateSettings, identity=curate_identity),
    "train": Verb(run=run_train, settings=TrainSettings),
    "restore": Verb(run=run_restore, settings=RestoreSettings),
    "evaluate": Verb(run=run_evaluate, settings=EvaluateSettings, uses_ray=False),
    "serve-check": Verb(run=run_serve_check, settings=ServeCheckSettings),
}
