"""The verbs that a plan's stages name: one dictionary, and the thin adapter of each to its module.

An adapter gets a `StageContext`, works inside `stage_dir` only, may be called again on a half-finished folder, and
returns JSON-serialisable results. Three keys mean something to the engine: "outputs" (paths below stage_dir that later
stages read), "quarantined" (number of rejected samples) and "verdict" (one sentence for the last lines).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.places import stored_models, weights_folder
from pipelines.console import Console, Progress
from pipelines.errors import Failure, UsageError, unknown
from pipelines.home import package_folder, shipped

if TYPE_CHECKING:
    from pipelines.tracking import Tracker
    from pipelines.train import TrainInputs


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
        pairs: column of the corpus with each picture's own input, instead of a degradation (preset none).
        seed: of the degradation and of the restoration.
        short_side: pixels of the held-out pictures' short side.
        limit: pictures at most; 0 takes all.
        options: of the restorer: steps, cfg_scale, ...; reference=hq gives each picture its target.
    """

    preset: str = "realesrgan-nano"
    preset_options: dict[str, Any] = field(default_factory=dict)
    pairs: str = ""
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
        identity: (settings, recipe, images) -> what besides settings and recipe decides the result, e.g. the source
            pictures; small plain data.
        check: (settings, own recipe or None, recipes of the stages it needs) -> None; UsageError for a name, value or
            missing need that only the verb can judge. Called when a plan is loaded: it imports neither torch nor ray.
    """

    run: Callable[[StageContext], Mapping[str, Any]]
    settings: type
    version: int = 1
    uses_ray: bool = True
    identity: Callable[[Any, Any, Path | None], Mapping[str, Any]] = lambda settings, recipe, images: {}
    check: Callable[[Any, Any, Sequence[Any]], None] = lambda settings, recipe, above: None


def shipped_weights() -> Path:
    """The folder of shipped models; spelled here because components.models imports torch."""
    return package_folder().parent / "components" / "priors" / "weights"


def check_recipe(recipe: Any) -> None:
    """Judge the names inside a resolved recipe: degradation, prior, warm start and who writes missing captions.

    Raises:
        UsageError: one of them does not exist; names the near one.
    """
    from pipelines.stream_texts import check_missing_captions

    check_missing_captions(recipe)
    check_degradation(recipe.degradation.preset, recipe.degradation.options)
    if recipe.system != "prior":  # its stages make a prior and open none
        check_start("prior", recipe.prior)
    if getattr(recipe, "warm_start", ""):
        check_start("warm_start", recipe.warm_start)
    if getattr(recipe, "distil", False) and not recipe.teacher:
        raise UsageError(f"{recipe.name}: whose steps are to be distilled? Name a trained model: teacher=MODEL.")
    for key in ("coarse", "teacher"):
        if getattr(recipe, key, ""):
            check_start(key, getattr(recipe, key), hub=False)


def check_degradation(preset: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError unless the preset and its options can be built."""
    from components.degradations import build_degradation

    try:
        build_degradation(preset, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def check_start(key: str, name: str, hub: bool = True) -> None:
    """Raises UsageError unless weights are a shipped model, something that exists, or (with hub) an id owner/name."""
    known = [*(path.parent.name for path in shipped_weights().glob("*/model.json")), *stored_models()]
    if name not in known and not Path(name).exists() and not (hub and re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        makes = [f"restoray train {name}"] if name in shipped("recipes") else []
        makes += [f"restoray weights import {name}"] if name in ("instarevive", "swinir") else []
        if makes and key in ("warm_start", "coarse"):
            raise UsageError(
                f"{key} {name} is not there: make it ({' or '.join(makes)}), name another folder with {key}=MODEL, "
                f"or leave it out with {key}=."
            )
        raise unknown(key, name, known)


def check_options(system: str, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises UsageError for restorer options that the system refuses, or a model with these defaults, or everyone."""
    from components.restoring import parse_ask
    from pipelines.restore import option_check

    try:
        parse_ask(options, option_check(system, defaults))
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_train(settings: TrainSettings, recipe: Any, above: Sequence[Any]) -> None:
    """Of a train stage: among its needs is the stage whose model it goes on from."""
    from components.systems import parent_stage

    wanted = parent_stage(recipe)
    if wanted and not any((other.system, other.stage) == (recipe.system, wanted) for other in above):
        raise UsageError(
            f"{recipe.name} goes on from the model of {recipe.system} stage {wanted}, "
            "and no stage that it needs trains it."
        )


def check_restore(settings: RestoreSettings, recipe: Any, above: Sequence[Any]) -> None:
    """Of a restore stage: the degradation, and the options by the system of the model that it restores with."""
    from components.recipes import as_dict
    from pipelines.restore import recipe_defaults

    check_degradation(settings.preset, settings.preset_options)
    if settings.pairs and settings.preset != "none":
        raise UsageError(f"pairs={settings.pairs}: the inputs of pairs are not degraded again: preset=none.")
    system = above[-1].system if above else ""
    check_options(system, recipe_defaults(system, as_dict(above[-1])) if above else {}, settings.options)


def check_evaluate(settings: EvaluateSettings, recipe: Any, above: Sequence[Any]) -> None:
    """Of an evaluate stage: the metrics; a name outside the usual set makes pyiqa load."""
    from components.evaluation.metrics import metric_info

    for name in settings.metrics:
        try:
            metric_info(name)
        except ValueError as error:
            raise UsageError(str(error)) from error


def curate_identity(settings: CurateSettings, recipe: Any, images: Path | None) -> dict[str, Any]:
    """The resolved spec and every candidate picture: with other pictures the stage is another one."""
    from pipelines.curate import load_spec
    from pipelines.sources import for_folder, identities

    spec = load_spec(settings.spec)
    if images is not None:
        spec = for_folder(spec, images)
    pictures = hashlib.sha256()
    for identity in identities(spec):
        pictures.update(json.dumps(identity).encode())
    document = dataclasses.asdict(spec)
    for source in document["sources"]:
        source["path"] = ""  # pictures are known by name, size and time: a moved folder is the same corpus
    for told in ("description", "homepage", "papers", "role", "pairs", "metrics", "stall_timeout_s"):
        document.pop(told)  # for people, or for other verbs
    return {"spec": document, "pictures": pictures.hexdigest()}


def train_identity(settings: TrainSettings, recipe: Any, images: Path | None) -> dict[str, Any]:
    """The weights that training starts from, or asks for captions, where they lie on this machine; a hub id is known by
    its name alone."""
    identity: dict[str, Any] = {}
    for name in ("prior", "warm_start", "coarse", "teacher"):
        start = str(getattr(recipe, name, "") or "")
        if not start:
            continue
        for folder in (Path(start), shipped_weights() / start, weights_folder() / start):
            if (folder / "model.json").is_file():
                identity[name] = hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()
                break
    captioner = Path(recipe.missing_captions.model).expanduser() if recipe.missing_captions.model else None
    if captioner and captioner.is_dir():
        from components.captions.presets import folder_digest

        identity["captioner"] = folder_digest(captioner)
    return identity


def run_curate(context: StageContext) -> dict[str, Any]:
    """Photographs to shards."""
    from pipelines.curate import curate

    with context.console.bar(context.name) as progress:
        result = curate(context.settings.spec, context.stage_dir, progress=progress, images=context.images)
    return {
        "accepted": result.accepted,
        "quarantined": result.rejected,
        "manifest_digest": result.digest,
        "outputs": ["index.json", "manifest.jsonl", "quarantine.jsonl", *corpus_files(context.stage_dir)],
    }


def corpus_files(corpus: Path) -> list[str]:
    """Paths of a corpus' tables and shards below its folder."""
    splits = json.loads((corpus / "index.json").read_text())["splits"]
    tables = [content["table"]["name"] for content in splits.values()]
    return tables + [f"{split}/{shard['name']}" for split, content in splits.items() for shard in content["shards"]]


def run_train(context: StageContext) -> dict[str, Any]:
    """One training stage."""
    from pipelines.train import train

    with context.console.bar(context.name) as progress:
        told = step_progress(progress, context.recipe.steps)
        result = train(context.recipe, train_inputs(context.inputs), context.stage_dir, on_metrics=told)
    heldout: dict[str, dict[str, float]] = {}
    for name, losses in result.heldout.items():
        if losses:
            start, end = losses[min(losses)], losses[max(losses)]
            heldout[name] = {"start": start, "end": end, "change": end / start - 1 if start else 0.0}
    made = [path for path in result.model.rglob("*") if path.is_file()]
    outputs = sorted(path.relative_to(context.stage_dir).as_posix() for path in made)
    return {"heldout_loss": heldout, "outputs": [*outputs, "metrics.jsonl"]}


def train_inputs(folders: Mapping[str, Path]) -> TrainInputs:
    """Sort folders into corpora, by their given name, and models, by the training stage that made them.

    Raises:
        UsageError: a folder is neither.
    """
    from pipelines.train import TrainInputs

    corpora: dict[str, Path] = {}
    parents: dict[str, Path] = {}
    digests: dict[str, str] = {}
    for name, folder in folders.items():
        model = folder if (folder / "model.json").is_file() else folder / "model"
        if (folder / "index.json").is_file():
            corpora[name], digests[name] = folder, str(json.loads((folder / "index.json").read_text())["digest"])
        elif (model / "model.json").is_file():
            recipe = json.loads((model / "model.json").read_text()).get("recipe") or {}
            parents[str(recipe.get("stage") or name)] = model
        else:
            raise UsageError(f"input {name} is neither a corpus (index.json) nor a model (model.json): {folder}.")
    return TrainInputs(corpora=corpora, parents=parents, data_digests=digests)


@contextmanager
def train_folder(recipe: Any, inputs: TrainInputs, out: Path) -> Iterator[None]:
    """Hold a folder for one training: nobody else works there, and no other training was begun there.

    Raises:
        UsageError: it belongs to another recipe or other inputs.
        RetryLater: another process works there.
        Failure: it cannot be made or written.
    """
    from pipelines.plans import check_output, recipe_documents, recipe_version, run_lock, stage_digest
    from pipelines.rows import replace_file

    models = {k: hashlib.sha256((v / "model.json").read_bytes()).hexdigest() for k, v in inputs.parents.items()}
    own = {"settings": recipe_documents(recipe)[1], **train_identity(TrainSettings(), recipe, None)}
    digest = stage_digest(own, {**inputs.data_digests, **models}, recipe_version(recipe))
    check_output(out, free_mib=0)
    with run_lock(out):
        note, begun = out / "stage.json", any((out / name).exists() for name in ("ray", "model", "done.json"))
        known = json.loads(note.read_text()) if note.is_file() else {}
        if known.get("digest", "" if begun else digest) != digest:
            other = f"of {known['recipe']} with other settings or inputs" if known else "that it does not name"
            raise UsageError(f"{out} holds a training {other}: choose another --out.")
        replace_file(note, json.dumps({"recipe": recipe.name, "digest": digest}).encode())
        yield


def step_progress(progress: Progress, steps: int) -> Callable[[Sequence[tuple[int, str, float, float]]], None]:
    """A callback for metric rows that moves a bar to the newest step and shows the newest loss beside it."""

    def tell(rows: Sequence[tuple[int, str, float, float]]) -> None:
        losses = [row for row in rows if row[1] == "loss"]
        note = f"{losses[-1][1]} {losses[-1][2]:.4g}" if losses else ""
        if rows:
            progress(max(row[0] for row in rows), steps, note)

    return tell


def run_restore(context: StageContext) -> dict[str, Any]:
    """Held-out pictures, degraded with a fixed seed, through the trained model."""
    from pipelines.heldout import prepare_heldout
    from pipelines.restore import restore_folder

    settings, corpus = context.settings, context.find("index.json").parent
    prepared = prepare_heldout(
        corpus,
        context.stage_dir,
        preset=settings.preset,
        preset_options=settings.preset_options,
        seed=settings.seed,
        short_side=settings.short_side,
        limit=settings.limit or None,
        pairs=settings.pairs,
    )
    with context.console.bar(context.name) as progress:
        result = restore_folder(
            context.find("model"),
            context.stage_dir / "lq",
            context.stage_dir / "restored",
            options=settings.options,
            seed=settings.seed,
            actors=min(2, len(os.sched_getaffinity(0))),
            progress=progress,
            references=context.stage_dir / "hq" if settings.options.get("reference") == "hq" else None,
        )
    pictures = (path for name in ("hq", "lq", "restored") for path in (context.stage_dir / name).glob("*.png"))
    return {
        "restored": result.restored,
        "skipped": result.skipped,
        "quarantined": prepared.quarantined + result.quarantined,
        "outputs": [
            "heldout.jsonl",
            "restored/records.jsonl",
            *sorted(path.relative_to(context.stage_dir).as_posix() for path in pictures),
        ],
    }


def run_evaluate(context: StageContext) -> dict[str, Any]:
    """Restored pictures against their originals, beside the input and a classical baseline."""
    from pipelines.evaluate import evaluate

    restored, settings = context.find("restored").parent, context.settings
    chosen = {"metrics": settings.metrics} if settings.metrics else {}
    with context.console.bar(context.name) as progress:
        summary = evaluate(
            restored / "restored", restored / "lq", restored / "hq", context.stage_dir, progress=progress, **chosen
        )
    return {
        "verdict": summary.verdict,
        "pictures": len(summary.pictures),
        "quarantined": sum(entry["where"] == "score" for entry in summary.missing),  # others count where they failed
        "outputs": ["scores.jsonl", "summary.json"],
    }


def run_serve_check(context: StageContext) -> dict[str, Any]:
    """One picture through the service: its bytes must equal the batch result's."""
    from components.images import read_png_text
    from pipelines.serve import check_served, start

    restored, model = context.find("restored"), context.find("model")
    pictures = sorted(restored.glob("*.png"))
    if not pictures:
        raise Failure(f"stage {context.name}: no restored picture to compare with.")
    timeout_s = context.settings.timeout_s
    with context.console.bar(context.name) as progress:
        progress(0, 2, "loading the model")
        with start(model, timeout_s=timeout_s) as service:
            progress(1, 2, f"sending {pictures[0].name}")
            source = restored.parent / "lq" / pictures[0].name
            options = json.loads(read_png_text(pictures[0].read_bytes())["options"])
            hq = restored.parent / "hq" / pictures[0].name if options.get("reference") == "hq" else None
            answer = check_served(service.url, source, pictures[0], timeout_s=timeout_s, reference_path=hq)
        progress(2, 2, "bytes equal")
    return {"picture": pictures[0].name, "equal": True, **answer}


VERBS: Mapping[str, Verb] = {
    "curate": Verb(run=run_curate, settings=CurateSettings, version=3, identity=curate_identity),
    "train": Verb(run=run_train, settings=TrainSettings, identity=train_identity, check=check_train),
    "restore": Verb(run=run_restore, settings=RestoreSettings, version=3, check=check_restore),
    "evaluate": Verb(run=run_evaluate, settings=EvaluateSettings, uses_ray=False, check=check_evaluate),
    "serve-check": Verb(run=run_serve_check, settings=ServeCheckSettings),
}
