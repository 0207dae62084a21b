"""A training stage under Ray Train: it ends in a model, resumes, and sees one order on any number of workers."""

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
from components.recipes import Recipe, load_recipe
from components.synthetic import dead_leaves
from pipelines.curate import curate
from pipelines.errors import Failure, UsageError
from pipelines.rows import read_lines
from pipelines.train import ORDER, Tail, TrainInputs, is_whole, read_metrics, read_order, stream_config, train

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
"""The real recipe at a size that takes seconds."""

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
"""Sizes of what a stage makes; other stages refuse them."""


def recipe(name: str, *more: str) -> Recipe:
    return load_recipe(name, [*TINY, *OWN.get(name, []), *more])


@pytest.fixture(scope="module")
def corpus(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen synthetic pictures, curated."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(12):
        (folder / f"leaves{index}.png").write_bytes(encode_png(dead_leaves(288, 5, index)))
    out = tmp_path_factory.mktemp("corpus")
    curate("folder", out, images=folder)
    return out


@pytest.fixture(scope="module")
def dcp(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's folder after one run on one worker; a minute of Ray Train, so for tests of make test-full only."""
    out = tmp_path_factory.mktemp("dcp")
    train(recipe("instantir-dcp-nano"), TrainInputs(corpora={"corpus": corpus}), out)
    return out


@dataclass(frozen=True)
class Resumed:
    """A stage that ran on two workers, failed at its very end, and went on from step 2 on one worker."""

    out: Path
    first: list[dict[str, Any]]
    again: list[dict[str, Any]]
    losses: dict[int, float]


@pytest.fixture(scope="module")
def resumed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """The fault is injected after step 4: its model cannot be written, and the last checkpoint is step 2's."""
    out, inputs = tmp_path_factory.mktemp("resumed"), TrainInputs(corpora={"corpus": corpus})
    more = ("placement.workers=2", "placement.cpus_per_worker=0.5", "placement.max_failures=0")
    (out / ".model.writing").write_text("in the way")
    with pytest.raises(Failure, match=r"ended early.*run it again to resume"):
        train(recipe("instantir-dcp-nano", *more), inputs, out)
    (out / ".model.writing").unlink()
    first, losses = read_lines(out / ORDER), dict(read_metrics(out / "metrics.jsonl")["loss"])
    train(recipe("instantir-dcp-nano"), inputs, out)
    return Resumed(out, first, read_lines(out / ORDER)[len(first) :], losses)


pytestmark = pytest.mark.slow


def test_a_stage_ends_in_a_model_metrics_and_pictures(resumed: Resumed) -> None:
    model = load_model(resumed.out / "model")
    assert model.info["system"] == "instantir" and set(model.info["parts"]) == {"perceptor"}
    assert model.info["prior"]["id"] == "nano" and model.info["recipe"]["steps"] == 4
    series = read_metrics(resumed.out / "metrics.jsonl")
    assert sorted(series["loss"]) == [1, 2, 3, 4] and sorted(series["heldout/perceptor"]) == [0, 4]
    assert np.isfinite(list(series["loss"].values())).all()
    assert model.info["metrics"]["heldout/perceptor/end"] == series["heldout/perceptor"][4]
    assert sorted(p.name for p in (resumed.out / "samples").iterdir()) == ["step-000000.png", "step-000004.png"]


def test_the_model_is_the_average_and_the_checkpoint_keeps_both(resumed: Resumed) -> None:
    saved = load_model(resumed.out / "model").part("perceptor")
    state = torch.load(sorted(resumed.out.glob("ray/**/state.pt"))[-1], weights_only=True)
    assert state["step"] == 4
    raw = state["trainables"]["perceptor"]
    assert set(raw) == set(saved) and all(torch.equal(state["ema"][f"perceptor.{k}"], v) for k, v in saved.items())
    assert sum(not torch.equal(raw[k], v) for k, v in saved.items()) > 0.9 * len(saved)


def test_two_workers_stop_and_one_goes_on_in_the_same_order(resumed: Resumed) -> None:
    """Steps 3 and 4 were taken by two workers, lost, and taken again by one: the same samples, the same losses."""
    assert {row["rank"] for row in resumed.first} == {0, 1}
    assert [(row["step"], row["rank"]) for row in resumed.again] == [(3, 0), (4, 0)]
    assert list(read_order(resumed.out)) == list(range(16))

    def batch_of(rows: list[dict[str, Any]], step: int) -> dict[int, str]:
        taken = [row for row in rows if row["step"] == step]
        return {p: k for row in taken for p, k in zip(row["positions"], row["keys"], strict=True)}

    after = read_metrics(resumed.out / "metrics.jsonl")["loss"]
    for step in (3, 4):
        assert batch_of(resumed.first, step) == batch_of(resumed.again, step)
        # sums of four samples' gradients against two sums of two: float32 rounding, grown over a step
        assert after[step] == pytest.approx(resumed.losses[step], rel=1e-3)


@pytest.mark.full  # a minute of Ray Train; see above
def test_two_workers_see_the_same_samples_in_the_same_order(dcp: Path, resumed: Resumed) -> None:
    assert read_order(resumed.out) == read_order(dcp)
    one = read_metrics(dcp / "metrics.jsonl")["loss"]
    assert resumed.losses[1] == pytest.approx(one[1], rel=1e-5)
    assert resumed.losses[4] == pytest.approx(one[4], rel=1e-3)


@pytest.mark.full  # a minute of Ray Train; that a rerun goes on where the first stopped is in the test above
def test_a_run_that_stopped_goes_on_to_the_same_bits(dcp: Path, corpus: Path, tmp_path: Path) -> None:
    """As above on one worker throughout: the same weights."""
    inputs = TrainInputs(corpora={"corpus": corpus})
    bad = recipe("instantir-dcp-nano", "placement.max_failures=0")
    (tmp_path / ".model.writing").write_text("in the way")
    with pytest.raises(Failure, match=r"ended early.*run it again to resume"):
        train(bad, inputs, tmp_path)
    (tmp_path / ".model.writing").unlink()
    train(recipe("instantir-dcp-nano"), inputs, tmp_path)
    first, resumed = load_model(dcp / "model"), load_model(tmp_path / "model")
    assert first.info["parts"] == resumed.info["parts"]  # sha256 of each part


@pytest.mark.full  # half a minute of Ray Train; a missing output makes a stage undone is in test_plans.py
def test_what_a_finished_stage_lost_is_made_again(dcp: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "dcp"
    shutil.copytree(dcp, out)
    (out / "model" / "parts" / "perceptor.safetensors").write_bytes(b"torn")
    (out / "metrics.jsonl").unlink()
    train(recipe("instantir-dcp-nano"), TrainInputs(corpora={"corpus": corpus}), out)
    assert load_model(out / "model").info["parts"] == load_model(dcp / "model").info["parts"]
    assert is_whole(out)


@pytest.mark.full  # the end-to-end run chains them in make test
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


@pytest.mark.full  # each costs half a minute of starting Ray Train; that priors learn is in tests/components
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


def test_a_source_that_is_no_input_dies_at_once(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"sources names corpus, and the inputs bring other.*--input corpus=CORPUS"):
        train(recipe("instantir-dcp-nano"), TrainInputs(corpora={"other": corpus}), tmp_path)


def test_a_missing_corpus_of_the_catalogue_says_how_to_curate_it(corpus: Path, tmp_path: Path) -> None:
    """All of a mixture's missing corpora at once, each with its command; those that are there are not told."""
    given = TrainInputs(corpora={"div2k": corpus, "lsdir": corpus})
    with pytest.raises(UsageError) as told:
        stream_config(load_recipe("instantir-aggregator"), given)
    said = str(told.value)
    assert "sources names ffhq, flickr2k, and the inputs bring div2k, lsdir." in said
    for name in ("ffhq", "flickr2k"):
        assert f"restoray curate {name} sources.0.path=DIR --out CORPUS" in said and f"--input {name}=CORPUS" in said
    assert "restoray curate div2k" not in said
    both = TrainInputs(corpora=dict.fromkeys(("div2k", "lsdir", "ffhq", "flickr2k"), corpus))
    assert len(stream_config(load_recipe("instantir-aggregator"), both).sources) == 4


def test_a_recipe_that_asks_for_a_gpu_dies_where_there_is_none(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Ray sees none: placement\.gpus_per_worker=0 trains on the CPU"):
        train(
            recipe("instantir-dcp-nano", "placement.gpus_per_worker=1"),
            TrainInputs(corpora={"corpus": corpus}),
            tmp_path,
        )


def test_the_tail_hands_over_whole_lines_only(tmp_path: Path) -> None:
    path, got = tmp_path / "metrics.jsonl", []
    with Tail(path, lambda rows: got.extend(rows), every_s=0.01):
        with path.open("a") as stream:
            stream.write('{"step": 1, "name": "a", "value": 2.0, "time": 0}\n{"step": 2, "na')
            stream.flush()
            deadline = time.time() + 5
            while not got and time.time() < deadline:
                time.sleep(0.01)
            assert [row[0] for row in got] == [1]
            stream.write('me": "a", "value": 3.0, "time": 0}\n')
    assert got == [(1, "a", 2.0, 0), (2, "a", 3.0, 0)]
