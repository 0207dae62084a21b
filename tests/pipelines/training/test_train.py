"""A training stage under Ray Train: its model, its resume, and the same order on any number of workers."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.images import encode_png
from components.models import load_model
from components.recipes import Recipe
from components.synthetic import dead_leaves
from components.systems.recipes import load_recipe
from pipelines.core.errors import Failure, UsageError
from pipelines.core.metrics import Tail, read_metrics
from pipelines.core.rows import read_lines
from pipelines.curation.curate import curate
from pipelines.training.inputs import TrainInputs, stream_config
from pipelines.training.stage_files import ORDER, is_whole, read_order
from pipelines.training.train import train

TINY = [
    "resolution=32",
    "short_side=48",
    "batch_size=4",
    "steps=4",
    "checkpoint_every=2",
    "evaluate_every=4",
    "heldout_triples=4",
    "steps_at_restore=1",
    "ema_decay=0.5",
]
"""Overrides that shrink a recipe to seconds."""

OWN = {
    "instantir-dcp-nano": [
        "resampler_dim=16",
        "resampler_depth=1",
        "resampler_head_dim=8",
        "resampler_heads=2",
        "resampler_queries=4",
    ],
    "instantir-previewer-nano": ["lora_rank=4"],
}
"""Sizes of a stage's own part; other stages refuse them."""


def recipe(name: str, *more: str) -> Recipe:
    return load_recipe(name, [*TINY, *OWN.get(name, []), *more])


@pytest.fixture(scope="module")
def corpus(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A curated corpus of twelve synthetic pictures."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(12):
        (folder / f"leaves{index}.png").write_bytes(encode_png(dead_leaves(288, 5, index)))
    out = tmp_path_factory.mktemp("corpus")
    curate("folder", out, images=folder)
    return out


@pytest.fixture(scope="module")
def dcp(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's folder after a run on one worker. It takes a minute, so only tests of make test-full use it."""
    out = tmp_path_factory.mktemp("dcp")
    train(recipe("instantir-dcp-nano"), TrainInputs(corpora={"corpus": corpus}), out)
    return out


@dataclass(frozen=True)
class ResumedStage:
    """A stage that ran on two workers, failed at its end, and resumed from step 2 on one worker.

    Attributes:
        out: folder of the stage.
        first, again: rows of order.jsonl from the first and the second run.
        losses, norms: losses and gradient norms of the first run by step.
    """

    out: Path
    first: list[dict[str, Any]]
    again: list[dict[str, Any]]
    losses: dict[int, float]
    norms: dict[int, float]


NORM = "perceptor/grad_norm"


@pytest.fixture(scope="module")
def resumed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> ResumedStage:
    """The first run fails after step 4, since it cannot write its model; its last checkpoint is that of step 2."""
    out, inputs = tmp_path_factory.mktemp("resumed"), TrainInputs(corpora={"corpus": corpus})
    more = ("placement.workers=2", "placement.cpus_per_worker=0.5", "placement.max_failures=0")
    (out / ".model.writing").write_text("in the way")
    with pytest.raises(Failure, match=r"ended early.*run it again to resume"):
        train(recipe("instantir-dcp-nano", *more), inputs, out)
    (out / ".model.writing").unlink()
    first, metrics = read_lines(out / ORDER), read_metrics(out / "metrics.jsonl")
    losses, norms = dict(metrics["loss"]), dict(metrics[NORM])
    train(recipe("instantir-dcp-nano"), inputs, out)
    return ResumedStage(out, first, read_lines(out / ORDER)[len(first) :], losses, norms)


pytestmark = pytest.mark.slow


def test_a_stage_ends_in_a_model_metrics_and_pictures(resumed: ResumedStage) -> None:
    model = load_model(resumed.out / "model")
    assert model.info["system"] == "instantir" and set(model.info["parts"]) == {"perceptor"}
    assert model.info["prior"]["id"] == "nano" and model.info["recipe"]["steps"] == 4
    series = read_metrics(resumed.out / "metrics.jsonl")
    assert sorted(series["loss"]) == [1, 2, 3, 4] and sorted(series["heldout/perceptor"]) == [0, 4]
    assert np.isfinite(list(series["loss"].values())).all()
    assert model.info["metrics"]["heldout/perceptor/end"] == series["heldout/perceptor"][4]
    assert sorted(p.name for p in (resumed.out / "samples").iterdir()) == ["step-000000.png", "step-000004.png"]


def test_the_model_is_the_average_and_the_checkpoint_keeps_both(resumed: ResumedStage) -> None:
    part = load_model(resumed.out / "model").part("perceptor")
    state = torch.load(sorted(resumed.out.glob("ray/**/state.pt"))[-1], weights_only=True)
    assert state["step"] == 4
    raw = state["trainables"]["perceptor"]
    assert set(raw) == set(part) and all(torch.equal(state["ema"][f"perceptor.{k}"], v) for k, v in part.items())
    assert sum(not torch.equal(raw[k], v) for k, v in part.items()) > 0.9 * len(part)


def test_one_worker_resumes_in_the_order_of_two(resumed: ResumedStage) -> None:
    """Two workers took steps 3 and 4 without a checkpoint, and one worker took them again: equal samples and losses.

    The gradient norms are equal too. AdamW takes nearly the same steps with gradients that are summed over the workers
    instead of averaged, so losses alone do not show that.
    """
    assert {row["rank"] for row in resumed.first} == {0, 1}
    assert [(row["step"], row["rank"]) for row in resumed.again] == [(3, 0), (4, 0)]
    assert list(read_order(resumed.out)) == list(range(16))

    def batch_of(rows: list[dict[str, Any]], step: int) -> dict[int, str]:
        of_step = [row for row in rows if row["step"] == step]
        return {p: k for row in of_step for p, k in zip(row["positions"], row["keys"], strict=True)}

    after = read_metrics(resumed.out / "metrics.jsonl")
    for step in (3, 4):
        assert batch_of(resumed.first, step) == batch_of(resumed.again, step)
        # one sum of four gradients against two sums of two: float32 rounding, amplified by a step
        assert after["loss"][step] == pytest.approx(resumed.losses[step], rel=1e-3)
        assert after[NORM][step] == pytest.approx(resumed.norms[step], rel=1e-2)


@pytest.mark.full  # a minute of Ray Train; see above
def test_two_workers_see_the_same_samples_in_the_same_order(dcp: Path, resumed: ResumedStage) -> None:
    assert read_order(resumed.out) == read_order(dcp)
    one = read_metrics(dcp / "metrics.jsonl")
    assert resumed.losses[1] == pytest.approx(one["loss"][1], rel=1e-5)
    assert resumed.losses[4] == pytest.approx(one["loss"][4], rel=1e-3)
    assert resumed.norms[1] == pytest.approx(one[NORM][1], rel=1e-4)
    assert resumed.norms[4] == pytest.approx(one[NORM][4], rel=1e-2)


@pytest.mark.full  # a minute of Ray Train; the test above checks that a rerun resumes
def test_a_resumed_run_gives_the_same_bits(dcp: Path, corpus: Path, tmp_path: Path) -> None:
    """With one worker in both runs the weights are equal."""
    inputs = TrainInputs(corpora={"corpus": corpus})
    bad = recipe("instantir-dcp-nano", "placement.max_failures=0")
    (tmp_path / ".model.writing").write_text("in the way")
    with pytest.raises(Failure, match=r"ended early.*run it again to resume"):
        train(bad, inputs, tmp_path)
    (tmp_path / ".model.writing").unlink()
    train(recipe("instantir-dcp-nano"), inputs, tmp_path)
    expected, model = load_model(dcp / "model"), load_model(tmp_path / "model")
    assert expected.info["parts"] == model.info["parts"]  # sha256 of each part


@pytest.mark.full  # half a minute of Ray Train; test_plans.py checks that a stage with a missing output runs again
def test_a_finished_stage_writes_missing_files_again(dcp: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "dcp"
    shutil.copytree(dcp, out)
    (out / "model" / "parts" / "perceptor.safetensors").write_bytes(b"torn")
    (out / "metrics.jsonl").unlink()
    train(recipe("instantir-dcp-nano"), TrainInputs(corpora={"corpus": corpus}), out)
    assert load_model(out / "model").info["parts"] == load_model(dcp / "model").info["parts"]
    assert is_whole(out)


@pytest.mark.full  # in make test the end-to-end run chains them
def test_the_three_stages_follow_each_other(dcp: Path, corpus: Path, tmp_path: Path) -> None:
    data = {"corpora": {"corpus": corpus}}
    previewer = train(
        recipe("instantir-previewer-nano", "steps=2"),
        TrainInputs(**data, parents={"dcp": dcp / "model"}),
        tmp_path / "previewer",
    )
    aggregator = train(
        recipe("instantir-aggregator-nano", "steps=2", "accumulation=2"),
        TrainInputs(**data, parents={"previewer": previewer.model}),
        tmp_path / "aggregator",
    )
    final = load_model(aggregator.model)
    assert set(final.info["parts"]) == {"perceptor", "previewer", "aggregator"}
    assert final.info["parts"]["perceptor"] == load_model(dcp / "model").info["parts"]["perceptor"]
    assert final.info["parents"] == {"previewer": load_model(previewer.model).digest}


@pytest.mark.full  # each takes half a minute to start Ray Train; tests/components checks that priors learn
@pytest.mark.parametrize("stage", ["autoencoder", "encoder", "denoiser"])
def test_the_priors_stages_train(stage: str, corpus: Path, tmp_path: Path) -> None:
    tiny = [o for o in TINY if not o.startswith(("resampler", "steps_at"))]
    warm = ["warm_start=nano"] if stage != "autoencoder" else []
    result = train(
        load_recipe(f"prior-{stage}-nano", [*tiny, *warm, "steps=2"]), TrainInputs(corpora={"corpus": corpus}), tmp_path
    )
    model = load_model(result.model)
    assert model.info["system"] == "prior" and model.file("tokenizer.json").is_file()
    assert model.info["metrics"]["autoencoder_psnr_heldout"] > 10


def test_a_source_without_an_input_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sources names corpus, and the inputs bring other.*--input corpus=CORPUS"):
        train(recipe("instantir-dcp-nano"), TrainInputs(corpora={"other": corpus}), tmp_path)


def test_the_error_of_a_missing_corpus_has_its_curate_command(corpus: Path, tmp_path: Path) -> None:
    """The message lists all missing corpora of a mixture, each with its command, and no other corpora."""
    inputs = TrainInputs(corpora={"div2k": corpus, "lsdir": corpus})
    with pytest.raises(UsageError) as info:
        stream_config(load_recipe("instantir-aggregator"), inputs)
    message = str(info.value)
    assert "sources names ffhq, flickr2k, and the inputs bring div2k, lsdir." in message
    for name in ("ffhq", "flickr2k"):
        assert f"restoray curate {name} sources.0.path=DIR --out CORPUS" in message
        assert f"--input {name}=CORPUS" in message
    assert "restoray curate div2k" not in message
    complete = TrainInputs(corpora=dict.fromkeys(("div2k", "lsdir", "ffhq", "flickr2k"), corpus))
    assert len(stream_config(load_recipe("instantir-aggregator"), complete).sources) == 4


def test_a_recipe_for_a_gpu_is_refused_without_one(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Ray has none: placement\.gpus_per_worker=0 trains on the CPU"):
        train(
            recipe("instantir-dcp-nano", "placement.gpus_per_worker=1"),
            TrainInputs(corpora={"corpus": corpus}),
            tmp_path,
        )


def test_the_tail_passes_complete_lines_only(tmp_path: Path) -> None:
    path, metrics = tmp_path / "metrics.jsonl", []
    with Tail(path, lambda rows: metrics.extend(rows), every_s=0.01):
        with path.open("a") as stream:
            stream.write('{"step": 1, "name": "a", "value": 2.0, "time": 0}\n{"step": 2, "na')
            stream.flush()
            deadline = time.time() + 5
            while not metrics and time.time() < deadline:
                time.sleep(0.01)
            assert [row[0] for row in metrics] == [1]
            stream.write('me": "a", "value": 3.0, "time": 0}\n')
    assert metrics == [(1, "a", 2.0, 0), (2, "a", 3.0, 0)]
