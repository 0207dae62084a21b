"""The benchmark's own code runs, at a size that takes seconds; nothing here is timed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_arm_is_measured() -> None:
    spec = importlib.util.spec_from_file_location("bench_nano", Path(__file__).with_name("bench_nano.py"))
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    results = bench.measure(resolution=32, repeats=1)
    assert len(results) == 5 and all(result["median_s"] > 0 for result in results)
