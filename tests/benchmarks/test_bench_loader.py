"""The loader's benchmark at nano size: every arm returns whole epochs, and the report is complete."""

from __future__ import annotations

import bench_loader as loader
import pytest


@pytest.mark.full
def test_all_arms_run_at_nano_size() -> None:
    # enough samples for every arm to take more than the hundredth of a second that CPU times resolve
    row = loader.measure(samples=512, shards=2, side=96, crop=64, rounds=1, epochs=3)
    for arm in ("decode", "webdataset", "ours"):
        assert row[arm]["cpu_ms"] > 0
        assert len(row[arm]["peak_mb"]) == 3
    assert row["ours_over_decode"] == pytest.approx(row["ours"]["cpu_ms"] / row["decode"]["cpu_ms"], rel=0.01)
    assert row["void"] is True  # a single round shows no spread


def test_the_pictures_of_the_benchmark_are_the_same_every_time() -> None:
    first, second = (list(loader.jpegs(3, 64, None)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 3
