"""The benchmark's own code runs, at a size that takes seconds, and its arms compute the same; nothing here is timed."""

from __future__ import annotations

import bench_instantir as bench
import bench_instantir_training as training
import pytest

from components.systems.instantir.fast import Speed


@pytest.mark.slow
def test_both_loops_arrive_at_the_same_latents() -> None:
    obvious, ours, *reused = bench.measure_sampling("nano", rounds=1)
    assert obvious["difference"] < 1e-3
    assert ours["ratio_to_obvious"] > 0
    assert all(15 < row["psnr_to_exact_db"] < 200 for row in reused), reused
    assert [row["arm"] for row in reused] == ["ours, preview_every 2", "ours, preview and aggregator every 2"]


@pytest.mark.slow
@pytest.mark.parametrize("given_latents", [False, True])
def test_both_train_steps_have_the_same_loss(given_latents: bool) -> None:
    speed = Speed(checkpoint=True)
    plain, ours = training.measure_training("nano", rounds=1, speed=speed, batch_size=1, given_latents=given_latents)
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert plain["tflop"] > 0


@pytest.mark.slow
@pytest.mark.full
def test_the_real_size_costs_what_the_reference_counted() -> None:
    """instantir.md section 10: 40.93 TFLOP a step at 1024 with guidance, by torch's counter on the meta device."""
    assert bench.count_step_flops(bench.sizes()["sdxl"]) == pytest.approx(40.93, rel=0.01)
    # 2.7 % of a step are the LoRA's own products, which a merged Previewer does not need
    assert bench.count_step_flops(bench.sizes()["sdxl"], merged=True) == pytest.approx(39.81, rel=0.001)


def test_the_ceiling_is_measured() -> None:
    assert bench.measure_ceiling("cpu", side=64, rounds=2)["tflop_per_s"] >= 0
