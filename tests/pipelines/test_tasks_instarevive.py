"""Every task's recipe from its corpora to an optimiser step, at nano size on synthetic stand-ins; two under Ray.

In make test one of each kind goes through stream, collate, builder and step in this process: strokes, pairs, unpaired.
The others, and whole trainings under Ray Train with restoration and gate behind them, are in make test-full.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.images import encode_png, to_float, to_uint8
from components.models import Model, ModelCard, ModelError, load_model, save_model
from components.randomness import Noise
from components.recipes import as_dict, load_recipe
from components.synthetic import dead_leaves
from components.systems import SYSTEMS
from components.tensors import collate
from components.training import build_optimizers, train_step
from components.types import Image
from pipelines.catalogue import load_spec
from pipelines.columns import compute_column
from pipelines.curate import curate
from pipelines.gate import pass_gate
from pipelines.pairs import Input, PairReader
from pipelines.restore import restore_folder
from pipelines.shards import write_corpus
from pipelines.stream import heldout_rows, load_columns
from pipelines.train import TrainInputs, stream_config, train

NANO = [
    *("family=nano", "prior=nano", "coarse=", "warm_start=", "missing_captions.model=", "captioner=tags"),
    *("resolution=48", "short_side=64", "batch_size=2", "accumulation=1", "steps=2", "heldout_triples=2"),
    *("precision=fp32", "placement.gpus_per_worker=0", "gradient_checkpointing=false", "ema_decay=0"),
    *("evaluate_every=2", "checkpoint_every=2", "optimizer.lr=1e-3"),
]
"""A paper's recipe at a size that takes seconds; data, degradation, masks, prompts and losses stay its own."""


def rainy(picture: Image, index: int) -> Image:
    """Slanted bright streaks."""
    draw = np.random.default_rng(index)
    height, width = picture.shape[:2]
    made = to_float(picture).copy()
    for _ in range(40):
        top, left = int(draw.integers(0, height - 12)), int(draw.integers(4, width))
        for step in range(12):
            made[top + step, left - step // 4] = 0.6 * made[top + step, left - step // 4] + 0.4
    return to_uint8(made)


def dark(picture: Image, index: int) -> Image:
    """A fifth of the light, and noise."""
    noise = np.random.default_rng(index).normal(0, 0.02, picture.shape).astype(np.float32)
    return to_uint8((to_float(picture) * 0.2 + noise).clip(0, 1))


def flat(picture: Image, index: int) -> Image:
    """Eight levels a channel: a drawing's photograph stands in for the photograph's drawing."""
    return (picture // 32 * 32).astype(np.uint8)


PAIRS: dict[str, Callable[[Image, int], Image]] = {"derain": rainy, "lowlight": dark, "cartoon": flat}
OTHERS = ("bsr", "bsr-released", "bfr", "saltpepper", "inpaint", "daynight")
QUICK = ("inpaint", "lowlight", "daynight")  # one of each kind of data


def make_corpus(folder: Path, make: Callable[[Image, int], Image] | None = None, first: int = 0) -> Path:
    """Four pictures to train on and three held out; with `make` a column of inputs, without curation."""
    pictures = {f"p{n}": dead_leaves(72, 11, first + n) for n in range(7)}
    samples = [(key, "png", encode_png(picture), {}) for key, picture in pictures.items()]
    write_corpus(folder, "stand-in", {"train": samples[:4], "held_out": samples[4:]})
    if make is not None:
        inputs = {}
        (folder / "inputs").mkdir()
        for number, (key, picture) in enumerate(pictures.items()):
            (folder / "inputs" / f"{key}.png").write_bytes(encode_png(make(picture, number)))
            inputs[key] = Input(path=str(folder / "inputs" / f"{key}.png"))
        compute_column(folder, "lq", "picture", {"name": "pairs"}, lambda: PairReader(inputs), workers=0)
    return folder


def inputs_of(task: str, recipe: Any, folder: Path) -> TrainInputs:
    """A stand-in corpus for every input that a recipe names."""
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
    held = collate(heldout_rows(config, 2))
    sheet = SYSTEMS["instarevive"].look(objective, recipe, held.lq, held.prompts, 0)  # type: ignore[misc]
    assert sheet.shape == held.hq.shape and bool((sheet != held.lq).any())


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_pairs_from_two_folders_to_restored_pictures(ray_session: None, tmp_path: Path) -> None:
    """Curated, trained and restored as a user does it."""
    for side in ("hq", "lq"):
        (tmp_path / side).mkdir()
    for number in range(10):
        picture = dead_leaves(96, 12, number)
        (tmp_path / "hq" / f"p{number}.png").write_bytes(encode_png(picture))
        (tmp_path / "lq" / f"p{number}.png").write_bytes(encode_png(dark(picture, number)))
    given = [f"sources.0.path={tmp_path / 'hq'}", f"pairs.0.lq={tmp_path / 'lq'}", "split.held_out_fraction=0.3"]
    curate(load_spec("pairs", ["filters.min_side_px=64", *given]), tmp_path / "corpus")
    recipe = load_recipe("instarevive-lowlight", [*NANO, "steps=4", "sources.lol=0", "sources.corpus=1"])
    made = train(recipe, TrainInputs(corpora={"corpus": tmp_path / "corpus"}), tmp_path / "out")
    assert sorted(made.heldout["generator"]) == [0, 2, 4]
    result = restore_folder(made.model, tmp_path / "lq", tmp_path / "restored", on_ray=False)
    assert result.restored == 10 and result.quarantined == 0


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_a_trained_model_is_distilled_and_judged(ray_session: None, tmp_path: Path) -> None:
    """The teacher is InstantIR, of several steps; the gate is wide, for a student that has hardly learnt."""
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
    wide = [f"teacher={teacher}", *small, "gate.psnr_db=50", "gate.perceptual=100", "gate.pictures=2"]
    recipe = load_recipe("distil-onestep-nano", wide)
    out = tmp_path / "student"
    student = load_model(train(recipe, TrainInputs(corpora=corpora), out).model)
    assert student.info["prior"] == load_model(teacher).info["prior"]
    told = json.loads((out / "gate" / "gate.json").read_text())
    assert told["passed"] and len(told["pictures"]) == 2
    again = pass_gate(recipe, TrainInputs(corpora=corpora), out, on_ray=False)
    assert [one.loss for one in again.judgements] == [one["loss"] for one in told["judgements"]]


def test_a_student_is_built_on_its_teachers_prior_and_passes_the_gate(tmp_path: Path) -> None:
    """InstantIR as it starts, of several steps, and a student of one: without Ray, all else as it is."""
    parent: dict[str, Any] = {}
    small = ["resolution=32", "short_side=48", "batch_size=2", "steps=1", "steps_at_restore=2"]
    for stage, sizes in (("dcp", ["resampler_depth=1"]), ("previewer", ["lora_rank=2"]), ("aggregator", [])):
        own: Any = load_recipe(f"instantir-{stage}-nano", [*small, *sizes])
        parent = {stage: saved(SYSTEMS["instantir"].build_objective(own, parent), own, tmp_path / stage)}
    teacher = parent["aggregator"].path
    corpora = {"corpus": make_corpus(tmp_path / "corpus")}
    wide = [
        "gate.psnr_db=50",
        "gate.perceptual=100",
        "gate.pictures=2",
        "resolution=32",
        "short_side=48",
        "family=pixart",
    ]
    recipe: Any = load_recipe("distil-onestep-nano", [f"teacher={teacher}", "prior=nowhere", *wide])
    objective = SYSTEMS["instarevive"].build_objective(recipe, {})
    student = saved(objective, recipe, tmp_path / "out" / "model")
    assert student.info["prior"] == load_model(teacher).info["prior"], "the recipe's own prior and family do not count"
    assert SYSTEMS["instarevive"].encoded_with(recipe, {}) == "nano"
    result = pass_gate(recipe, TrainInputs(corpora=corpora), tmp_path / "out", on_ray=False)
    assert result.passed and len(result.pictures) == 2
    unsound = load_model("nano")
    with pytest.raises(ModelError, match="there is no score to distil"):
        SYSTEMS["instarevive"].build_objective(load_recipe("distil-onestep-nano", [f"teacher={unsound.path}"]), {})


def saved(objective: Any, recipe: Any, path: Path) -> Model:
    card = ModelCard(
        name=path.name,
        system=recipe.system,
        recipe=as_dict(recipe),
        prior=objective.prior.source,
        config=objective.config,
    )
    return save_model(path, card, objective.parts(), getattr(objective, "files", None))
