"""The worth of the shipped restorer's parts: arms differ by what they say, and all of them run at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import bench_ablation_unetres as bench
import numpy as np
import pytest

from components.models import ModelCard, load_model, save_model
from components.systems.unetres.build import DENOISER, REGRESSION, network_of
from components.systems.unetres.config import config_from
from components.systems.unetres.network import build_unetres
from components.systems.unetres.objective import RegressionObjective
from components.systems.unetres.score import DenoiserObjective, score_of

TINY = {"widths": [8, 12], "blocks": [1, 1, 1], "factor": 2}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    config = config_from(TINY)
    regression = build_unetres(config, 0, "regression")
    regression.tail.weight.data.normal_(0, 0.01)
    RegressionObjective(regression)
    objective = DenoiserObjective(score_of(build_unetres(config, 0, "denoiser", level=True)), regression)
    card = ModelCard(name="start", system="unetres", config=objective.config)
    return save_model(tmp_path / "start", card, objective.parts()).path


def test_the_split_is_the_demos() -> None:
    train, heldout = bench.split()
    assert len(heldout) == 9 and "casa-mila" in {path.stem for path in heldout}
    stems = {path.stem.split("-detail-")[0] for path in train}
    assert stems.isdisjoint(path.stem for path in heldout) and any("-detail-" in path.stem for path in train)


def test_arms_differ_by_what_they_say(start: Path, tmp_path: Path) -> None:
    settings = bench.parse(["--start", str(start), "--steps", "1", "--batch", "1", "--size", "32"])
    full = bench.recipe_of("full", "generator", 0, settings)
    assert bench.recipe_of("no-anchor", "generator", 0, settings).distillation.fixed_alpha == 0
    assert not bench.recipe_of("no-score", "generator", 0, settings).distillation.score
    assert full.distillation.score and full.distillation.fixed_alpha > 0
    for arm, other in (("no-coarse", REGRESSION), ("no-prior", DENOISER)):
        mine, model = bench.start_of(arm, 0, tmp_path / arm, settings), load_model(start)
        for part in (REGRESSION, DENOISER):
            same = network_of(mine, part).tail.weight.equal(network_of(model, part).tail.weight)
            assert same == (part != other)
    assert bench.start_of("full", 0, tmp_path, settings).path == start


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_arm_trains_and_is_scored(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps for each arm; a second call runs no arm again."""
    arguments = ["--start", str(start), "--out", str(tmp_path / "out"), "--size", "64", "--batch", "2", "--seeds", "1"]
    arguments += ["--steps", "2", "--pictures", "2", "--threads", "1"]
    bench.main(arguments)
    first = (tmp_path / "out" / "results.jsonl").read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["arm"] for row in rows] == ["lq", *bench.ARMS]
    assert all(len(row["scores"]) == 2 and np.isfinite(next(iter(row["scores"].values()))["psnr"]) for row in rows)
    means = {row["arm"]: sum(score["psnr"] for score in row["scores"].values()) for row in rows}
    assert len(set(means.values())) == len(rows)
    bench.main(arguments)
    assert (tmp_path / "out" / "results.jsonl").read_text() == first
    capsys.readouterr()
    bench.main(["--out", str(tmp_path / "out"), "--report", str(tmp_path)])
    assert "| no-prior |" in capsys.readouterr().out
