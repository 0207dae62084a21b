"""The benchmark's code runs at a size that takes seconds, and its arms compute the same; the tests check no times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import bench_instantir as bench
import bench_instantir_training as training
import pytest
from torch import Tensor

from components.systems.instantir.fast import Speed


@pytest.mark.slow
def test_both_loops_compute_the_same_latents() -> None:
    obvious, ours, *reuse_rows = bench.measure_sampling("nano", rounds=1)
    assert obvious["difference"] < 1e-3
    assert obvious["ratio_to_obvious"] == 1
    ratio = obvious["median_cpu_s"] / ours["median_cpu_s"]
    assert ours["ratio_to_obvious"] == pytest.approx(ratio, rel=0.01, abs=0.01)  # both are rounded
    assert all(15 < row["psnr_to_exact_db"] < 200 for row in reuse_rows), reuse_rows
    assert [row["arm"] for row in reuse_rows] == ["ours, preview_every 2", "ours, preview and aggregator every 2"]


@pytest.mark.slow
@pytest.mark.parametrize("latents_in_batch", [False, True])
def test_both_train_steps_have_the_same_loss(latents_in_batch: bool) -> None:
    speed = Speed(checkpoint=True)
    plain, ours = training.measure_training(
        "nano", rounds=1, speed=speed, batch_size=1, latents_in_batch=latents_in_batch
    )
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert plain["tflop"] > 0


@pytest.mark.slow
@pytest.mark.full
def test_the_real_size_has_the_flop_of_the_reference() -> None:
    """instantir.md section 10: 40.93 TFLOP a step at 1024 with guidance, by torch's counter on the meta device."""
    assert bench.count_step_flops(bench.sizes()["sdxl"]) == pytest.approx(40.93, rel=0.01)
    # 2.7 % of a step are the LoRA's own products, which a merged Previewer does not need
    assert bench.count_step_flops(bench.sizes()["sdxl"], merged=True) == pytest.approx(39.81, rel=0.001)


def test_the_ceiling_is_two_operations_for_each_product_over_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 x 1024^3 operations in 2 ms are 1.07 TFLOP/s; the clock is replaced, the product is computed."""

    def turns(arms: Mapping[str, Callable[[], Tensor]], device: str, rounds: int) -> tuple[Any, Any]:
        assert device == "cpu" and rounds == 3
        results = {name: run() for name, run in arms.items()}
        shapes.extend(result.shape for result in results.values())
        return {name: [0.001, 0.002, 9.0] for name in arms}, results

    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(bench, "take_turns", turns)
    line = bench.measure_ceiling("cpu", side=1024, rounds=3)
    assert line == {"what": "ceiling", "device": "cpu", "side": 1024, "tflop_per_s": 1.07}
    assert shapes == [(1024, 1024)]
