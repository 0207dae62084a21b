"""The benchmark of restoray.dataset at nano size: every arm reads all samples, and the report is complete."""

from __future__ import annotations

import bench_dataset
import pytest


def test_all_arms_run_at_nano_size() -> None:
    row = bench_dataset.measure(samples=64, shards=2, side=48, crop=32, rounds=1)
    assert all(row[arm]["cpu_ms"] > 0 for arm in ("webdataset", "degraded", "plain", "dataset"))
    ratio = row["dataset"]["cpu_ms"] / row["degraded"]["cpu_ms"]
    assert row["dataset_over_degraded"] == pytest.approx(ratio)
    assert row["void"] is True  # a single round shows no spread
