"""Table 3's script: its arithmetic on invented scores, and all arms at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_ablation_instarevive as bench
import pytest


def result_line(arm: str, seed: int, psnr: list[float], curve: list[float]) -> dict[str, Any]:
    scores = {f"p{n}": {"psnr": value, "ssim": 0.5, "gmsd": 0.1, "piqe": 40.0} for n, value in enumerate(psnr)}
    curves = {"t_max": [[step, value] for step, value in enumerate(curve)]}
    return {"arm": arm, "seed": seed, "scores": scores, "curves": curves}


def test_differences_are_paired_by_picture_and_curves_are_averaged_over_seeds(tmp_path: Path) -> None:
    rows = [result_line("full", 0, [20, 30] * 3, [300, 200]), result_line("full", 1, [22, 32] * 3, [200, 100])]
    rows += [result_line("no-score", 0, [20, 31] * 3, [300, 250]), result_line("no-score", 1, [22, 33] * 3, [300, 250])]
    lines = bench.summary(rows, bench.METRICS)
    (line,) = [each for each in lines if (each["arm"], each["metric"]) == ("no-score", "psnr")]
    assert line["mean"] == 26.5 and line["difference"] == 0.5
    low, high = line["interval"]
    half = 2.570582 * 0.5 / 5**0.5  # Student's t of 5 degrees of freedom: over 6 pictures, not over seeds
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)
    assert "| no-score | 26.50 (25.50 to 27.50)<br>+0.50 [" in bench.table(lines)
    assert bench.mean_curve(rows, "full", "t_max") == ([0, 1], [250, 150], [50, 50])
    assert bench.mean_curve(rows, "full", "alpha") == ([], [], [])
    bench.plot(rows, tmp_path / "images" / "plot.png")
    assert (tmp_path / "images" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_arms_differ_by_one_thing() -> None:
    settings = bench.parse([])
    full = bench.recipe_of("full", 0, settings).distillation
    for arm, name in (("no-score", "score"), ("no-dynamic", "dynamic"), ("no-prompt", "prompt")):
        other = bench.recipe_of(arm, 0, settings).distillation
        assert {key for key, value in vars(full).items() if getattr(other, key) != value} == {name}


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_arm_trains_and_is_scored(tmp_path: Path) -> None:
    """Two steps for each arm; a second call runs no arm again."""
    arguments = ["--out", str(tmp_path), "--size", "32", "--batch", "2", "--seeds", "1", "--threads", "1"]
    arguments += ["--steps", "2", "--measure-every", "1"]
    bench.main(arguments)
    first = (tmp_path / "results.jsonl").read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["arm"] for row in rows] == ["lq", *bench.ARMS]
    means = [sum(score["psnr"] for score in row["scores"].values()) for row in rows]
    assert len(set(means)) == len(rows)
    starts = {row["curves"]["heldout_distance"][0][1] for row in rows[1:] if row["arm"] != "no-prompt"}
    assert len(starts) == 1, "all arms start from one network"
    assert [step for step, _ in rows[1]["curves"]["heldout_regression"]] == [0, 1, 2]
    assert "loss_dsm" in rows[1]["curves"] and rows[2]["curves"]["loss_dsm"] == []
    assert not list((tmp_path / "work").iterdir())
    bench.main(arguments)
    assert (tmp_path / "results.jsonl").read_text() == first
    bench.main(["--out", str(tmp_path), "--report", str(tmp_path / "docs")])
    assert (tmp_path / "docs" / "images" / "ablation-instarevive.png").is_file()
