"""The benchmarks' code runs at a size that takes seconds; the tests check no times."""

from __future__ import annotations

from pathlib import Path

import bench_degradation as bench
import bench_degradation_gpu
import pytest


def test_every_recipe_is_measured_on_the_cpu() -> None:
    results = bench.measure(side=64, pictures=4, rounds=1, seeds=1)
    assert [row["recipe"] for row in results] == list(bench.RECIPES)
    assert all(row["ours_ms"] > 0 for row in results)
    with pytest.raises(SystemExit, match="holds no basicsr"):
        bench.original(Path("nowhere"), 1, "off", bench.crops(None, 1, 64))


def test_batches_are_measured_on_the_cpu() -> None:
    results = bench_degradation_gpu.measure(batch_sizes=(2,), side=64, rounds=1, device="cpu")
    assert all(row["ours_images_per_s"] > 0 for row in results)
