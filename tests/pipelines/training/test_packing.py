"""Trainings in legs, and packed states: where they stop, what they hold, and how a training goes on from one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from components.fingerprints import fingerprint
from components.images import encode_png
from components.models import load_model
from components.recipes import Recipe
from components.synthetic import dead_leaves
from components.systems import build_restorer
from components.systems.recipes import load_recipe
from components.types import Request
from pipelines.commands.main import build_app
from pipelines.core.errors import EXIT_RETRY, Failure, Unfinished, UsageError
from pipelines.core.metrics import last_step, read_metrics
from pipelines.curation.curate import curate
from pipelines.runs.plan import load_plan
from pipelines.training.inputs import TrainInputs
from pipelines.training.packing import (
    STATE,
    Trained,
    pack_stage,
    packed_start,
    picture_list,
    read_packed,
    recipe_digest,
)
from pipelines.training.train import train

SMALL = [
    "size={widths: [8, 12], blocks: [1, 1, 1], factor: 2}",
    "resolution=32",
    "short_side=64",
    "scale=[1.0, 1.5]",
    "batch_size=4",
    "steps=12",
    "checkpoint_every=4",
    "evaluate_every=4",
    "heldout_triples=4",
    "ema_decay=0.5",
    "precision=fp32",
    "placement.threads=1",
    "placement.workers=1",
]


def recipe(*more: str) -> Recipe:
    return load_recipe("unetres-regression", [*SMALL, *more])


@pytest.fixture(scope="module")
def inputs(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> TrainInputs:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(8):
        (folder / f"leaves-{number}.png").write_bytes(encode_png(dead_leaves(144, 2, number)))
    corpus = tmp_path_factory.mktemp("corpus") / "corpus"
    curate("folder", corpus, images=folder)
    return TrainInputs(corpora={"corpus": corpus})


@pytest.fixture(scope="module")
def leg(inputs: TrainInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage's folder after a first leg, which ended at the first checkpoint."""
    out = tmp_path_factory.mktemp("stage")
    sentence = "4 of 12 steps are done after 0.0001 minutes; the same command continues"
    with pytest.raises(Unfinished, match=sentence) as error:
        train(recipe(), inputs, out, minutes=0.0001)
    assert error.value.exit_code == EXIT_RETRY
    return out


@pytest.fixture(scope="module")
def packed(inputs: TrainInputs, leg: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shipped") / "small"
    pack_stage(
        recipe(), {}, leg, out, files={"CARD.md": "# small\n", "pictures.jsonl": picture_list(inputs.corpora["corpus"])}
    )
    return out


def test_a_leg_ends_at_a_checkpoint_without_a_model(leg: Path) -> None:
    assert not (leg / "model").exists() and last_step(leg / "metrics.jsonl") == 4


@pytest.mark.slow
def test_a_packed_state_holds_half_precision_weights_and_the_curve(leg: Path, packed: Path) -> None:
    state = read_packed(packed)
    assert (state.step, state.recipe) == (4, recipe_digest(recipe()))
    part = load_model(packed).part("regression")
    assert {tensor.dtype for tensor in part.values()} == {torch.float16}
    (checkpoint,) = (leg / "ray" / "run").glob("checkpoint_*/state.pt")
    full = torch.load(checkpoint, weights_only=True)
    for key, value in part.items():
        torch.testing.assert_close(value.float(), full["ema"][f"regression.{key}"], rtol=1e-3, atol=1e-4)
    heldout = read_metrics(leg / "metrics.jsonl")["heldout/regression"]
    assert state.curve == {"heldout/regression": {str(step): value for step, value in heldout.items()}}
    size = sum(path.stat().st_size for path in packed.rglob("*") if path.is_file())
    assert size < 0.4 * checkpoint.stat().st_size


@pytest.mark.slow
def test_the_list_of_pictures_names_each_with_its_fingerprint(inputs: TrainInputs, packed: Path) -> None:
    lines = [json.loads(line) for line in load_model(packed).file("pictures.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == [f"leaves-{number}" for number in range(8)]
    assert {line["split"] for line in lines} == {"train", "held_out"}
    for line in lines:
        own = fingerprint(dead_leaves(144, 2, int(line["key"][-1])))
        assert line["fingerprint"] == [f"{int(word):016x}" for word in own]
    text = picture_list(inputs.corpora["corpus"], {"leaves-0.png": ("CC0-1.0", "me")})
    by_source = {line["source"]: line for line in map(json.loads, text.splitlines())}
    assert {name: by_source["folder:leaves-0.png"][name] for name in ("licence", "credit")} == {
        "licence": "CC0-1.0",
        "credit": "me",
    }
    assert by_source["folder:leaves-1.png"]["credit"] == ""


@pytest.mark.slow
def test_a_training_goes_on_from_a_packed_state_and_ends(inputs: TrainInputs, packed: Path, tmp_path: Path) -> None:
    """It takes steps 5 to 12 with the samples of those positions, and starts at the packed model's loss."""
    start = packed_start(str(packed), recipe())
    assert start == packed
    train(recipe(), inputs, tmp_path, start=start)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert sorted(metrics["loss"]) == list(range(5, 13))
    rows = [json.loads(line) for line in (tmp_path / "order.jsonl").read_text().splitlines()]
    assert rows[0]["positions"] == [16, 17, 18, 19] and rows[-1]["positions"] == [44, 45, 46, 47]
    before = read_packed(packed).curve["heldout/regression"]["4"]
    assert metrics["heldout/regression"][8] == pytest.approx(before, rel=0.2)
    assert load_model(tmp_path / "model").info["metrics"]["psnr_heldout"] > 10


@pytest.mark.slow
def test_the_next_leg_goes_on_from_the_checkpoint(inputs: TrainInputs, leg: Path) -> None:
    train(recipe(), inputs, leg, minutes=60)
    assert sorted(read_metrics(leg / "metrics.jsonl")["loss"]) == list(range(1, 13)) and (leg / "model").is_dir()


@pytest.mark.slow
def test_a_model_may_have_the_state_of_an_earlier_stage(leg: Path, tmp_path: Path) -> None:
    """The model is of a later step than the state."""
    later = tmp_path / "later"
    shutil.copytree(leg, later)
    checkpoint = max((later / "ray" / "run").glob("checkpoint_*/state.pt"))
    state = torch.load(checkpoint, weights_only=True)
    first = next(iter(state["optimizers"]["regression"]["state"].values()))["exp_avg_sq"].clone()
    for entry in state["optimizers"]["regression"]["state"].values():
        entry["exp_avg_sq"] *= 3
    torch.save({**state, "step": state["step"] + 4}, checkpoint)
    earlier = Trained(recipe=recipe(), inputs={}, folder=leg)
    packed = pack_stage(recipe(), {}, later, tmp_path / "out", state_of=earlier)
    name, value = next(iter(state["trainables"]["regression"].items()))
    assert name == "head.weight" and value.ndim == 4
    assert packed.step == state["step"] and packed.model.info["metrics"]["step"] == state["step"] + 4
    rows = packed.tensors()["rows/regression/head.weight"]
    torch.testing.assert_close(rows, first.flatten(1).mean(dim=1))


def test_the_state_of_another_recipe_is_not_used(packed: Path, tmp_path: Path) -> None:
    assert packed_start(str(packed), recipe("seed=1")) is None
    assert packed_start(str(packed), recipe("steps=13")) == packed, "more steps go on with the curve"
    assert packed_start(str(packed), recipe("steps=3")) is None
    assert packed_start(str(packed), recipe("placement.threads=2")) == packed
    assert packed_start("", recipe()) is None
    with pytest.raises(UsageError, match="has no packed state"):
        packed_start(str(tmp_path), recipe())
    (packed / STATE / "state.json").rename(tmp_path / "state.json")
    try:
        with pytest.raises(UsageError, match="has no packed state"):
            read_packed(packed)
    finally:
        (tmp_path / "state.json").rename(packed / STATE / "state.json")
    with pytest.raises(Failure, match="has no checkpoint"):
        pack_stage(recipe(), {}, tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_the_command_packs_a_stage_of_a_run(inputs: TrainInputs, leg: Path, tmp_path: Path) -> None:
    """It finds recipe, parents and corpus by the run's plan.json, as `restoray run` wrote it."""
    document = {
        "stages": [
            {"name": "corpus", "verb": "curate", "spec": "demo"},
            {"name": "first", "verb": "train", "recipe": "unetres-regression", "overrides": SMALL, "needs": ["corpus"]},
        ]
    }
    plan, run = tmp_path / "small.yaml", tmp_path / "run"
    plan.write_text(json.dumps(document))
    folders = {stage.name: stage.folder for stage in load_plan(plan).stages}
    shutil.copytree(inputs.corpora["corpus"], run / folders["corpus"])
    shutil.copytree(leg, run / folders["first"])
    (run / "plan.json").write_text(json.dumps({"plan": "small", "file": str(plan), "overrides": []}))
    (tmp_path / "card.md").write_text("# a card\n")
    (tmp_path / "credits.csv").write_text("file,licence,credit\nleaves-0.png,CC0-1.0,me\n")
    command = ["weights", "pack", str(run), "--to", str(tmp_path / "out"), "--card", str(tmp_path / "card.md")]
    result = CliRunner().invoke(
        build_app(), [*command, "--credits", str(tmp_path / "credits.csv"), "--licence", "CC0-1.0", "--json"]
    )
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    packed = read_packed(tmp_path / "out")
    assert answer == {"model": str(tmp_path / "out"), "digest": packed.model.digest, "step": packed.step}
    assert packed.model.info["licence"] == "CC0-1.0" and str(tmp_path) not in json.dumps(packed.model.info)
    assert packed.model.file("CARD.md").read_text() == "# a card\n"
    lines = [json.loads(line) for line in packed.model.file("pictures.jsonl").read_text().splitlines()]
    assert [line["credit"] for line in lines if line["source"] == "folder:leaves-0.png"] == ["me"]
    assert build_restorer(tmp_path / "out").restore([Request(key="a", image=dead_leaves(40, 0, 0))])[0].image.shape
    for arguments, word in (
        ([*command, "--stage", "frist"], 'Did you mean "first"'),
        ([*command, "--credits", str(tmp_path / "card.md")], "no columns file, licence and credit"),
        (["weights", "pack", str(tmp_path), "--to", str(tmp_path / "x")], "is not a run"),
    ):
        assert word in str(CliRunner().invoke(build_app(), arguments).exception)
    shutil.rmtree(run / folders["first"] / "ray")
    assert "no training stage" in str(CliRunner().invoke(build_app(), command).exception)
