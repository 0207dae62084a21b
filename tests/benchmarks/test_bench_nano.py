"""The benchmark's code runs at a size that takes seconds; the test checks no times."""

from __future__ import annotations

import bench_nano as bench
import pytest


@pytest.mark.slow
def test_every_arm_is_measured() -> None:
    results = bench.measure(resolution=32, repeats=1)
    assert len(results) == 5 and all(result["median_s"] > 0 for result in results)
