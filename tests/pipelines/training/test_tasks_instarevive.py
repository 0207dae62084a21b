"""The recipe of every task, from synthetic corpora to an optimiser step, at nano size; two trainings under Ray.

`make test` runs one recipe of each kind (strokes, pairs, unpaired) in this process: stream, collate, builder, step.
`make test-full` runs the others, and complete trainings under Ray Train with restoration and gate.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.images import ANY_SHAPE, encode_png, to_float, to_uint8
from components.models import Model, ModelCard, ModelError, load_model, save_model
from components.randomness import Noise
from components.recipes import as_dict
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from components.systems.recipes import load_recipe
from components.tensors import collate, collate_rows
from components.training import build_optimizers, train_step
from components.types import Image
from pipelines.core.pool import Pool
from pipelines.corpus.catalogue import load_spec
from pipelines.corpus.columns.computing import compute_column
from pipelines.corpus.columns.spec import ColumnSpec
from pipelines.corpus.shards import write_corpus
from pipelines.curation.curate import curate
from pipelines.curation.pairs import Input, PairReader
from pipelines.evaluation.gate import pass_gate
from pipelines.restoration.batch import restore_folder
from pipelines.restoration.models import open_model
from pipelines.stream.rows import heldout_rows, load_columns
from pipelines.training.inputs import TrainInputs, stream_config
from pipelines.training.train import train

NANO = [
    *("family=nano", "prior=nano", "coarse=", "warm_start=", "missing_captions.model=", "captioner=tags"),
    *("resolution=48", "short_side=64", "batch_size=2", "accumulation=1", "steps=2", "heldout_triples=2"),
    *("precision=fp32", "placement.gpus_per_worker=0", "gradient_checkpointing=false", "ema_decay=0"),
    *("evaluate_every=2", "checkpoint_every=2", "optimizer.lr=1e-3", "distillation.lpips="),
]
"""Overrides that shrink a paper's recipe to seconds; data, degradation, masks, prompts and losses (but LPIPS) stay."""


def rainy(picture: Image, index: int) -> Image:
    """The picture with slanted bright streaks."""
    draw = np.random.default_rng(index)
    height, width = picture.shape[:2]
    pixels = to_float(picture).copy()
    for _ in range(40):
        top, left = int(draw.integers(0, height - 12)), int(draw.integers(4, width))
        for step in range(12):
            pixels[top + step, left - step // 4] = 0.6 * pixels[top + step, left - step // 4] + 0.4
    return to_uint8(pixels)


def dark(picture: Image, index: int) -> Image:
    """The picture with a fifth of the light, and noise."""
    noise = np.random.default_rng(index).normal(0, 0.02, picture.shape).astype(np.float32)
    return to_uint8((to_float(picture) * 0.2 + noise).clip(0, 1))


def flat(picture: Image, index: int) -> Image:
    """The picture with eight levels per channel, as a drawing; the task's real data are photographs and drawings."""
    return (picture // 32 * 32).astype(np.uint8)


PAIRS: dict[str, Callable[[Image, int], Image]] = {"derain": rainy, "lowlight": dark, "cartoon": flat}
OTHERS = ("bsr", "bsr-released", "bfr", "saltpepper", "inpaint", "daynight")
QUICK = ("inpaint", "lowlight", "daynight")  # one of each kind of data


def make_corpus(folder: Path, make: Callable[[Image, int], Image] | None = None, first: int = 0) -> Path:
    """Write a corpus of four training pictures and six held-out ones; with `make` also a column of inputs."""
    pictures = {f"p{n}": dead_leaves(72, 11, first + n) for n in range(10)}
    samples = [(key, "png", encode_png(picture), {}) for key, picture in pictures.items()]
    write_corpus(folder, "stand-in", {"train": samples[:4], "held_out": samples[4:]})
    if make is not None:
        inputs = {}
        (folder / "inputs").mkdir()
        for number, (key, picture) in enumerate(pictures.items()):
            (folder / "inputs" / f"{key}.png").write_bytes(encode_png(make(picture, number)))
            inputs[key] = Input(path=str(folder / "inputs" / f"{key}.png"))
        reader = functools.partial(PairReader, inputs, ANY_SHAPE)
        column = ColumnSpec(name="lq", kind="picture", producer={"name": "pairs"}, factory=reader)
        compute_column(folder, column, Pool(workers=0))
    return folder


def inputs_of(task: str, recipe: Any, folder: Path) -> TrainInputs:
    """Write a synthetic corpus for every input of a recipe."""
    corpora = {name: make_corpus(folder / name, PAIRS.get(task)) for name in recipe.sources}
    if recipe.unpaired:
        corpora[recipe.unpaired] = make_corpus(folder / recipe.unpaired, first=50)
    return TrainInputs(corpora=corpora, data_digests=dict.fromkeys(corpora, "0"))


@pytest.mark.parametrize(
    "task", [pytest.param(t, marks=() if t in QUICK else pytest.mark.full) for t in (*OTHERS, *PAIRS)]
)
def test_a_tasks_recipe_trains_on_its_own_kind_of_data(task: str, tmp_path: Path) -> None:
    recipe: Any = load_recipe(f"instarevive-{task}", NANO)
    inputs = inputs_of(task, recipe, tmp_path)
    config = stream_config(recipe, inputs)
    objective = SYSTEMS["instarevive"].build_objective(recipe, {}, None, device="cpu")
    batch = collate(load_columns(config, np.arange(recipe.batch_size)))
    assert (batch.masks is not None) == (task == "inpaint")
    assert bool((batch.lq != batch.hq).any())
    if recipe.prompt:
        assert all(prompt and "{caption}" not in prompt for prompt in batch.prompts)
    optimizers = build_optimizers(objective, recipe.optimizer)
    before = {key: value.clone() for key, value in objective.parts()["generator"].items()}
    noise = Noise(recipe.seed, batch.positions)
    metrics = train_step(objective, [(batch, noise)], optimizers, lr=1e-3, clip_norm=recipe.optimizer.clip_norm)
    assert metrics["bad_steps"] == 0 and all(np.isfinite(value) for value in metrics.values())
    assert ("loss_regression" in metrics) == (task != "daynight") and "loss_dsm" in metrics
    after = objective.parts()["generator"]
    assert any(not bool((before[key] == value).all()) for key, value in after.items())
    heldout = collate_rows(heldout_rows(config, 2))
    sheet = SYSTEMS["instarevive"].look(objective, recipe, heldout.lq, heldout.prompts, 0)  # type: ignore[misc]
    assert sheet.shape == heldout.hq.shape and bool((sheet != heldout.lq).any())


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_pairs_from_two_folders_to_restored_pictures(ray_session: None, tmp_path: Path) -> None:
    """Curate, train and restore as a user does."""
    for side in ("hq", "lq"):
        (tmp_path / side).mkdir()
    for number in range(10):
        picture = dead_leaves(96, 12, number)
        (tmp_path / "hq" / f"p{number}.png").write_bytes(encode_png(picture))
        (tmp_path / "lq" / f"p{number}.png").write_bytes(encode_png(dark(picture, number)))
    folders = [f"sources.0.path={tmp_path / 'hq'}", f"pairs.0.lq={tmp_path / 'lq'}", "split.held_out_fraction=0.3"]
    curate(load_spec("pairs", ["filters.min_side_px=64", *folders]), tmp_path / "corpus")
    recipe = load_recipe("instarevive-lowlight", [*NANO, "steps=4", "sources.lol=0", "sources.corpus=1"])
    stage = train(recipe, TrainInputs(corpora={"corpus": tmp_path / "corpus"}), tmp_path / "out")
    assert sorted(stage.heldout["generator"]) == [0, 2, 4]
    pool = Pool(workers=0)
    result = restore_folder(open_model(stage.model), tmp_path / "lq", tmp_path / "restored", pool=pool)
    assert result.restored == 10 and result.quarantined == 0


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_trained_model_is_distilled_and_passes_a_wide_gate(ray_session: None, tmp_path: Path) -> None:
    """The teacher is an InstantIR with two steps. The gate is wide, since the student trains for two steps only."""
    corpora = {"corpus": make_corpus(tmp_path / "corpus")}
    small = ["resolution=32", "short_side=48", "batch_size=4", "steps=2", "heldout_triples=2", "evaluate_every=2"]
    parents: dict[str, Path] = {}
    for stage in ("dcp", "previewer", "aggregator"):
        teacher = train(
            load_recipe(f"instantir-{stage}-nano", [*small, "steps_at_restore=2"]),
            TrainInputs(corpora=corpora, parents=parents),
            tmp_path / stage,
        ).model
        parents = {stage: teacher}
    wide = [f"teacher={teacher}", *small, "gate.psnr_db=50", "gate.perceptual=100", "gate.pictures=6"]
    recipe = load_recipe("distil-onestep-nano", wide)
    out = tmp_path / "student"
    student = load_model(train(recipe, TrainInputs(corpora=corpora), out).model)
    assert student.info["prior"] == load_model(teacher).info["prior"]
    pass_gate(recipe, corpora, out)
    report = json.loads((out / "gate" / "gate.json").read_text())
    assert report["passed"] and len(report["pictures"]) == 6
    again = pass_gate(recipe, corpora, out, on_ray=False)
    assert [one.loss for one in again.judgements] == [one["loss"] for one in report["judgements"]]


def test_a_student_is_built_on_its_teachers_prior_and_passes_the_gate(tmp_path: Path) -> None:
    """The teacher is an untrained InstantIR with two steps, the student has one step; no Ray."""
    parent: dict[str, Any] = {}
    small = ["resolution=32", "short_side=48", "batch_size=2", "steps=1", "steps_at_restore=2"]
    for stage, sizes in (("dcp", ["resampler_depth=1"]), ("previewer", ["lora_rank=2"]), ("aggregator", [])):
        own: Any = load_recipe(f"instantir-{stage}-nano", [*small, *sizes])
        parent = {stage: save(SYSTEMS["instantir"].build_objective(own, parent), own, tmp_path / stage)}
    teacher = parent["aggregator"].path
    corpora = {"corpus": make_corpus(tmp_path / "corpus")}
    wide = [
        "gate.psnr_db=50",
        "gate.perceptual=100",
        "gate.pictures=6",
        "resolution=32",
        "short_side=48",
        "family=pixart",
    ]
    recipe: Any = load_recipe("distil-onestep-nano", [f"teacher={teacher}", "prior=nowhere", *wide])
    objective = SYSTEMS["instarevive"].build_objective(recipe, {})
    student = save(objective, recipe, tmp_path / "out" / "model")
    assert student.info["prior"] == load_model(teacher).info["prior"], "the recipe's own prior and family do not count"
    assert SYSTEMS["instarevive"].networks().encoded_with(recipe, {}) == "nano"
    result = pass_gate(recipe, corpora, tmp_path / "out", on_ray=False)
    assert result.passed and len(result.pictures) == 6
    prior = load_model("nano", prior=True)
    with pytest.raises(ModelError, match="there is no score to distil"):
        SYSTEMS["instarevive"].build_objective(load_recipe("distil-onestep-nano", [f"teacher={prior.path}"]), {})


def save(objective: Any, recipe: Any, path: Path) -> Model:
    card = ModelCard(
        name=path.name,
        system=recipe.system,
        recipe=as_dict(recipe),
        prior=objective.prior.source,
        config=objective.config,
    )
    return save_model(path, card, objective.parts(), getattr(objective, "files", None))
