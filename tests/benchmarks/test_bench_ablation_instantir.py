"""The ablation's script: its arithmetic on invented scores, its split, and all arms at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ablation
import bench_ablation_instantir as bench
import pytest


def result_line(arm: str, seed: int, psnr: list[float]) -> dict[str, Any]:
    scores = {f"p{n}": {"psnr": value, "ssim": 0.5, "piqe": 40.0} for n, value in enumerate(psnr)}
    return {"arm": arm, "seed": seed, "scores": scores}


def test_differences_are_paired_by_picture_and_averaged_over_seeds(tmp_path: Path) -> None:
    rows = [result_line("full", 0, [20, 30] * 3), result_line("full", 1, [22, 32] * 3)]
    rows += [result_line("no-time", 0, [20, 31] * 3), result_line("no-time", 1, [22, 33] * 3)]
    lines = bench.summary(rows, bench.METRICS)
    (line,) = [each for each in lines if (each["arm"], each["metric"]) == ("no-time", "psnr")]
    assert line["mean"] == 26.5 and line["seeds"] == [25.5, 27.5]
    assert line["difference"] == 0.5  # pictures differ by 0 and 1, each the mean over two seeds
    low, high = line["interval"]
    half = 2.570582 * 0.5 / 5**0.5  # Student's t of 5 degrees of freedom: over 6 pictures, not over seeds
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)
    assert "| no-time | 26.50 (25.50 to 27.50)<br>+0.50 [" in bench.table(lines)
    bench.plot(lines, tmp_path / "images" / "plot.png")
    assert (tmp_path / "images" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_few_pictures_have_a_difference_without_interval(tmp_path: Path) -> None:
    rows = [result_line("full", 0, [20, 30]), result_line("no-time", 0, [21, 31])]
    rows += [result_line(arm, 0, [20, 30]) for arm in bench.ARMS if arm not in ("full", "no-time")]
    lines = bench.summary(rows, bench.METRICS)
    assert {line["interval"] for line in lines} == {None}
    assert "| no-time | 26.00<br>+1.00 (too few to say) |" in bench.table(lines)
    bench.plot(lines, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()


def test_details_of_held_out_photographs_are_not_in_training() -> None:
    train, heldout = ablation.split()
    names = {path.stem.split("-detail-")[0] for path in train}
    assert len(heldout) >= 6 and len(train) > 2 * len(heldout)
    assert not names & {path.stem for path in heldout}


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_arm_trains_and_is_scored(tmp_path: Path) -> None:
    """One step for each stage; a second call runs no arm again; every arm has other scores."""
    arguments = ["--out", str(tmp_path), "--size", "32", "--batch", "2", "--seeds", "1", "--threads", "1"]
    arguments += ["--dcp", "1", "--previewer", "1", "--aggregator", "1"]
    bench.main(arguments)
    first = (tmp_path / "results.jsonl").read_text()
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["arm"] for row in rows] == ["lq", *bench.ARMS]
    means = [sum(s["psnr"] for s in row["scores"].values()) for row in rows]
    assert len(set(means)) == len(rows)
    assert not list((tmp_path / "work").iterdir())
    bench.main(arguments)
    assert (tmp_path / "results.jsonl").read_text() == first
