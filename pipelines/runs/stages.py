"""The verbs that a plan's stages name: one dictionary, and one thin adapter for each verb.

An adapter gets a `StageContext` and writes only inside `stage_dir`. It may be called again on a half-finished folder.
It returns JSON-serialisable results. The engine reads three keys of them: "outputs" (paths below stage_dir that later
stages read), "quarantined" (number of rejected samples) and "verdict" (one sentence for the last lines).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.corpora import CorpusSpec, SourceSpec, SplitSpec
from components.images import read_png_text
from components.options import OptionCheck
from components.places import find_model_folder, shipped_models
from components.recipes import Gate, Recipe, RecipeError, as_dict
from components.secrets import public
from components.systems import parent_stage
from pipelines.analysis.arms import INPUT, MODEL, OWN_KEYS, check_trainings, model_names
from pipelines.analysis.model import StudyJob
from pipelines.analysis.studies import ARM_STUDIES, analyze
from pipelines.core.errors import Failure, UsageError, unknown
from pipelines.core.placement import needs_of
from pipelines.core.pool import Pool
from pipelines.curation.curate import curate, load_spec
from pipelines.curation.sources import DEFAULT_HELD_OUT_FRACTION, for_folder, identities
from pipelines.evaluation.choice import VERDICT, choose_model
from pipelines.evaluation.evaluate import check_metrics, evaluate
from pipelines.evaluation.heldout import prepare_heldout
from pipelines.restoration.batch import RestoreJob, restore_folder
from pipelines.restoration.models import open_model, option_check, recipe_defaults, request_options
from pipelines.runs.identity import model_digest, train_identity
from pipelines.runs.one_training import train_inputs, train_one
from pipelines.runs.verb import (
    ChooseSettings,
    CurateSettings,
    EvaluateSettings,
    RestoreSettings,
    ServeCheckSettings,
    StageContext,
    StudySettings,
    TrainSettings,
    Verb,
)
from pipelines.service.client import check_service
from pipelines.training.packing import packed_start
from pipelines.training.recipes import check_degradation


def check_train(settings: TrainSettings, recipe: Recipe, parent_recipes: Mapping[str, Recipe]) -> None:
    """Check that a train stage needs the stage whose model it starts from, and the one whose model is its teacher."""
    if settings.teacher and settings.teacher not in parent_recipes:
        raise unknown(f"stage with the teacher of {recipe.name} among the needs", settings.teacher, parent_recipes)
    parent = parent_stage(recipe)
    if parent and not any((other.system, other.stage) == (recipe.system, parent) for other in parent_recipes.values()):
        raise UsageError(
            f"{recipe.name} starts from the model of {recipe.system} stage {parent}, "
            "and none of the stages that it needs trains that model."
        )


def check_restore(settings: RestoreSettings, recipe: Recipe | None, parent_recipes: Mapping[str, Recipe]) -> None:
    """Check a restore stage's degradation, and its options against the system of its model."""
    check_degradation(settings.preset, settings.preset_options)
    if settings.pairs and settings.preset != "none":
        raise UsageError(f"pairs={settings.pairs}: the inputs of pairs are not degraded again; set preset=none.")
    request_options(settings.options, check_of(parent_recipes))
    needs_of(settings.placement)


def check_serve(settings: ServeCheckSettings, recipe: Recipe | None, parent_recipes: Mapping[str, Recipe]) -> None:
    """Check the placement of a service."""
    needs_of(settings.placement)


def check_of(parent_recipes: Mapping[str, Recipe], stage: str = "") -> OptionCheck:
    """The check of options for the model of a needed stage, or of the last one."""
    recipe = parent_recipes.get(stage or next(iter([*parent_recipes][::-1]), ""))
    return option_check(recipe.system, recipe_defaults(recipe.system, as_dict(recipe))) if recipe else dict


def check_study(settings: StudySettings, recipe: Recipe | None, parent_recipes: Mapping[str, Recipe]) -> None:
    """Check a study's degradation and captioner, and the options and the model of every arm."""
    check_degradation(settings.preset, {})
    if settings.study not in ARM_STUDIES:
        raise unknown("study with arms", settings.study, ARM_STUDIES)
    if not settings.arms:
        raise UsageError("a study needs at least one arm")
    for name, values in settings.arms.items():
        stages = model_names(values)
        for stage in stages:
            if stage not in parent_recipes:
                raise unknown(f"stage with a model for arm {name!r} among the needs", stage, parent_recipes)
        if settings.study != "arms" and (set(values) != {MODEL} or len(stages) != 1):
            raise UsageError(f"arm {name!r}: study {settings.study} compares models alone: give its model")
        own = {key: value for key, value in values.items() if key not in OWN_KEYS}
        for stage in stages or [""]:
            try:
                request_options({**settings.options, **own}, check_of(parent_recipes, stage))
            except UsageError as error:
                raise UsageError(f"arm {name!r}: {error}") from error
    check_trainings({name: len(model_names(values)) or 1 for name, values in settings.arms.items()})
    if strange := [name for name in settings.paper if name not in (*settings.arms, INPUT)]:
        raise unknown("arm of the paper's numbers", strange[0], [INPUT, *settings.arms])
    check_evaluate(settings, recipe, parent_recipes)


def gate_of(settings: ChooseSettings) -> Gate:
    """The gate of a choice."""
    return Gate(
        psnr_db=settings.psnr_db, perceptual=settings.perceptual, metric=settings.metric, pictures=settings.pictures
    )


def check_choose(settings: ChooseSettings, recipe: Recipe | None, parent_recipes: Mapping[str, Recipe]) -> None:
    """Check a choice's model, degradation and metric."""
    check_degradation(settings.preset, settings.preset_options)
    try:
        gate_of(settings)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    needs_of(settings.placement)
    check_metrics((settings.metric,))
    if find_model_folder(settings.model) is None:
        raise unknown("model", settings.model, shipped_models())


def check_evaluate(
    settings: EvaluateSettings | StudySettings, recipe: Recipe | None, parent_recipes: Mapping[str, Recipe]
) -> None:
    """Check an evaluate stage's metrics. A name outside the usual set imports pyiqa."""
    if settings.metrics:
        check_metrics(settings.metrics)


WITHOUT_EFFECT = ("stall_timeout_s", "placement", "requests", "spool_gib")
"""Settings of a spec that do not decide its corpus."""


def curate_identity(settings: CurateSettings, recipe: Any, images: Path | None) -> dict[str, Any]:
    """The resolved spec and a digest of all candidate pictures: other pictures make another stage."""
    spec = spec_of(settings)
    if images is not None and not any(_takes_a_stages_corpus(source) for source in spec.sources):
        spec = for_folder(spec, images)
    pictures, made_here = hashlib.sha256(), [source for source in spec.sources if _takes_a_stages_corpus(source)]
    others = dataclasses.replace(spec, sources=[source for source in spec.sources if source not in made_here])
    for identity in identities(others) if others.sources else ():  # the digest of a stage has its needs' digests
        pictures.update(json.dumps(identity).encode())
    document = dataclasses.asdict(spec)
    for source in document["sources"]:
        source["storage"] = public(source["storage"])
        source["path"] = ""  # pictures are identified by name, size and time: a moved folder gives the same corpus
        (source["negatives"] or {}).pop("placement", None)
    for key in (*WITHOUT_EFFECT, "description", "homepage", "papers", "role", "pairs", "metrics"):
        document.pop(key)  # these are for people, for other verbs, or say where the work is done
    for part in (document["caption"], document["precompute"]):
        (part or {}).pop("placement", None)
    return {"spec": document, "pictures": pictures.hexdigest()}


def spec_of(settings: CurateSettings) -> CorpusSpec:
    """The spec of a curate stage, with the folder of its settings.

    A folder source without a path, which nobody named, is left out if there are others. Pictures are then held out by
    fraction: the names of the spec may be those of the folder.

    Raises:
        UsageError: `pictures` is set, and no folder source lacks a path.
    """
    spec = load_spec(settings.spec, settings.overrides)
    nameless = [n for n, source in enumerate(spec.sources) if source.kind == "folder" and not source.path]
    if settings.pictures:
        if not nameless:
            raise UsageError(f"pictures={settings.pictures}: spec {settings.spec} has no folder source without a path.")
        sources = list(spec.sources)
        folder = str(Path(settings.pictures).expanduser().absolute())
        sources[nameless[0]] = dataclasses.replace(sources[nameless[0]], path=folder)
        return dataclasses.replace(spec, sources=sources)
    others = [source for n, source in enumerate(spec.sources) if n not in nameless]
    if not nameless or not others:
        return spec
    return dataclasses.replace(spec, sources=others, split=SplitSpec(held_out_fraction=DEFAULT_HELD_OUT_FRACTION))


def _takes_a_stages_corpus(source: SourceSpec) -> bool:
    return source.kind == "negatives" and not source.path


def run_curate(context: StageContext) -> dict[str, Any]:
    """Curate photographs into shards."""
    spec, images = spec_of(context.settings), context.images
    if any(_takes_a_stages_corpus(source) for source in spec.sources):
        corpus, images = str(context.find("index.json").parent), None
        sources = [dataclasses.replace(s, path=corpus) if _takes_a_stages_corpus(s) else s for s in spec.sources]
        spec = dataclasses.replace(spec, sources=sources)
    with context.console.bar(context.name) as progress:
        result = curate(spec, context.stage_dir, progress=progress, images=images)
    return {
        "accepted": result.accepted,
        "quarantined": result.rejected,
        "manifest_digest": result.digest,
        "outputs": ["index.json", "manifest.jsonl", "quarantine.jsonl", *corpus_files(context.stage_dir)],
    }


def corpus_files(corpus: Path) -> list[str]:
    """Paths of a corpus's tables and shards, relative to its folder."""
    splits = json.loads((corpus / "index.json").read_text())["splits"]
    tables = [content["table"]["name"] for content in splits.values()]
    return tables + [f"{split}/{shard['name']}" for split, content in splits.items() for shard in content["shards"]]


def run_train(context: StageContext) -> dict[str, Any]:
    """Train one stage."""
    recipe, inputs, teacher = context.recipe, dict(context.inputs), context.settings.teacher
    if teacher:
        recipe = dataclasses.replace(recipe, teacher=str(inputs.pop(teacher) / "model"))
    with context.console.bar(context.name) as progress:
        result = train_one(
            recipe,
            train_inputs(inputs),
            context.stage_dir,
            progress,
            minutes=context.minutes,
            start=packed_start(context.settings.start, context.recipe),
        )
    heldout: dict[str, dict[str, float]] = {}
    for name, losses in result.heldout.items():
        if losses:
            start, end = losses[min(losses)], losses[max(losses)]
            heldout[name] = {"start": start, "end": end, "change": end / start - 1 if start else 0.0}
    return {"heldout_loss": heldout, "outputs": [*files_below(result.model, context.stage_dir), "metrics.jsonl"]}


def files_below(folder: Path, base: Path) -> list[str]:
    """Paths of all files in a folder, relative to `base`, sorted."""
    return sorted(path.relative_to(base).as_posix() for path in folder.rglob("*") if path.is_file())


def run_restore(context: StageContext) -> dict[str, Any]:
    """Degrade held-out pictures with a fixed seed and restore them with the trained model."""
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
    model, folder = open_model(context.find("model")), context.stage_dir
    job = RestoreJob(
        ask=model.request_options(settings.options),
        seed=settings.seed,
        references=folder / "hq" if settings.options.get("reference") == "hq" else None,
    )
    pool = Pool(workers=WORKERS).placed(needs_of(settings.placement))
    with context.console.bar(context.name) as progress:
        result = restore_folder(model, folder / "lq", folder / "restored", job, pool, progress)
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


def run_choose(context: StageContext) -> dict[str, Any]:
    """Hand on the trained model, or the standard one if that is better."""
    settings = context.settings
    with context.console.bar(context.name) as progress:
        choice = choose_model(
            context.find("model"),
            settings.model,
            context.find("index.json").parent,
            context.stage_dir,
            gate_of(settings),
            preset=settings.preset,
            preset_options=settings.preset_options,
            short_side=settings.short_side,
            needs=needs_of(settings.placement),
            progress=progress,
        )
    outputs = [VERDICT, *files_below(choice.model, context.stage_dir)]
    return {"chosen": choice.chosen, "verdict": choice.sentence, "outputs": outputs}


def run_evaluate(context: StageContext) -> dict[str, Any]:
    """Score restored pictures, their inputs and a classical baseline against the originals."""
    restored, settings = context.find("restored").parent, context.settings
    arguments = {"metrics": settings.metrics} if settings.metrics else {}
    with context.console.bar(context.name) as progress:
        summary = evaluate(
            restored / "restored", restored / "lq", restored / "hq", context.stage_dir, progress=progress, **arguments
        )
    return {
        "verdict": summary.verdict,
        "pictures": len(summary.pictures),
        "quarantined": sum(
            entry["where"] == "score" for entry in summary.missing
        ),  # the other missing entries are not rejected pictures
        "outputs": ["scores.jsonl", "summary.json"],
    }


def run_study(context: StageContext) -> dict[str, Any]:
    """Study the models of the needed stages on the held-out pictures; see StudySettings."""
    settings, folder = context.settings, context.stage_dir
    prepared = prepare_heldout(
        context.find("index.json").parent, folder / "pictures", preset="none", short_side=settings.side_px
    )
    arms = {name: {**values, **folders_of(values, context.inputs)} for name, values in settings.arms.items()}
    job = StudyJob(
        model=context.find("model"),
        images=prepared.hq,
        out=folder / "study",
        options=settings.options,
        limit=settings.limit,
        side_px=settings.side_px,
        seed=settings.seed,
    )
    more = {"metrics": settings.metrics, "paper": settings.paper} if settings.study == "arms" else {}
    given: dict[str, Any] = {"mixed": settings.preset, "arms": arms, "captioner": settings.captioner, **more}
    with context.console.bar(context.name) as progress:
        result = analyze(settings.study, job, progress=progress, **given)
    return {
        "quarantined": prepared.quarantined + result.quarantined,
        "verdict": " ".join(result.seen),
        "outputs": files_below(result.folder, folder),
    }


def folders_of(values: Mapping[str, Any], inputs: Mapping[str, Path]) -> dict[str, Any]:
    """An arm's entry `model` with folders in place of stages; {} without one."""
    folders = [str(inputs[stage] / "model") for stage in model_names(values)]
    return {MODEL: folders if len(folders) > 1 else folders[0]} if folders else {}


def run_serve_check(context: StageContext) -> dict[str, Any]:
    """Restore one picture through the service; its bytes must equal the batch result's."""
    from pipelines.service.serve import start

    restored, model = context.find("restored"), context.find("model")
    pictures = sorted(restored.glob("*.png"))
    if not pictures:
        raise Failure(f"stage {context.name}: there is no restored picture to compare with.")
    timeout_s = context.settings.timeout_s
    with context.console.bar(context.name) as progress:
        progress(0, 2, "loading the model")
        with start(open_model(model), timeout_s=timeout_s, needs=needs_of(context.settings.placement)) as service:
            progress(1, 2, f"sending {pictures[0].name}")
            source = restored.parent / "lq" / pictures[0].name
            options = json.loads(read_png_text(pictures[0].read_bytes())["options"])
            hq = restored.parent / "hq" / pictures[0].name if options.get("reference") == "hq" else None
            answer = check_service(service.url, source, pictures[0], timeout_s=timeout_s, reference_path=hq)
        progress(2, 2, "bytes equal")
    return {"picture": pictures[0].name, "equal": True, **answer}


WORKERS = 2
"""Processes of a restore stage without a placement."""

VERBS: Mapping[str, Verb] = {
    "curate": Verb(run=run_curate, settings=CurateSettings, version=3, identity=curate_identity),
    "train": Verb(
        run=run_train,
        settings=TrainSettings,
        identity=lambda settings, recipe, images: {
            **train_identity(recipe),
            **({"teacher_stage": settings.teacher} if settings.teacher else {}),
        },
        check=check_train,
    ),
    "choose": Verb(
        run=run_choose,
        settings=ChooseSettings,
        hands_on=True,
        identity=lambda settings, recipe, images: {"model": model_digest(settings.model)},
        check=check_choose,
    ),
    "restore": Verb(run=run_restore, settings=RestoreSettings, version=3, check=check_restore),
    "evaluate": Verb(run=run_evaluate, settings=EvaluateSettings, uses_ray=False, check=check_evaluate),
    "study": Verb(run=run_study, settings=StudySettings, uses_ray=False, check=check_study),
    "serve-check": Verb(run=run_serve_check, settings=ServeCheckSettings, check=check_serve),
}
