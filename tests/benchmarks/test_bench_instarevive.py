"""The benchmark's code runs at a size that takes seconds, and its arms compute the same; the tests check no times."""

from __future__ import annotations

import bench_instarevive as bench
import pytest


@pytest.mark.parametrize("what", ["generate512", "generate1024"])
def test_both_arms_make_the_same_pictures(what: str) -> None:
    *rows, calls = bench.measure_generate(what, "nano", batches=[1, 2], rounds=1, chunk=1)
    assert [(row["arm"], row["batch"]) for row in rows] == [("plain", 1), ("ours", 1), ("plain", 2), ("ours", 2)]
    assert all(row["difference"] < 1e-3 and row["psnr_db"] > 60 for row in rows if row["arm"] == "ours")
    assert rows[2]["tflop"] == pytest.approx(2 * rows[0]["tflop"], rel=0.2)
    assert min(calls[f"{name}_s"] for name in ("encode", "generate", "decode")) > 0


def test_both_kinds_of_fake_score_are_updated() -> None:
    full = bench.measure_update("nano", rounds=1)
    lora = bench.measure_update("nano", rounds=1, fake="lora", checkpoint=False)
    assert full["trained"]["fake_score"] == full["trained"]["generator"] > lora["trained"]["fake_score"] > 0
    # both kinds of fake score start as the real one, and recomputation changes nothing
    assert lora["losses"] == pytest.approx(full["losses"], rel=1e-3)


def test_real_sizes_have_the_flop_of_the_reference() -> None:
    """instarevive.md section 8, at 512: DiT with 300 tokens 1.289, encoder 1.117, decoder 2.515 TFLOP."""
    tflop = bench.count_flops(bench.cases()["generate512"]["real"])
    assert tflop["generate"] == pytest.approx(1.289, rel=0.01)
    assert tflop["encode"] == pytest.approx(1.117, rel=0.01)
    assert tflop["decode"] == pytest.approx(2.515, rel=0.01)


def test_goals_are_checked_at_the_batches_they_apply_to() -> None:
    case = bench.cases()["generate512"]["real"]
    assert bench._goals(case, 1, 0.02) == {
        "goal_s": 0.025,
        "latency_reached": True,
        "goal_images_per_s": 60,
        "rate_reached": False,
    }
    assert bench._goals(case, 8, 0.1) == {"goal_images_per_s": 60, "rate_reached": True}
    assert bench._goals(bench.cases()["generate512"]["nano"], 1, 9.0) == {}
