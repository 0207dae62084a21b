"""DRA's benchmark at nano size: its counts are the reference's, its arms agree, a step of each shape is measured."""

from __future__ import annotations

import json
from pathlib import Path

import bench_dra as bench
import pytest
import torch


@pytest.mark.parametrize(
    ("size", "side", "bare", "added"),
    [("sdxl", 512, 1.589, 0.196), ("sd3", 512, 1.803, 0.116)],
)
def test_the_counts_at_real_size_are_the_references(size: str, side: int, bare: float, added: float) -> None:
    """dra.md, section 3: one call of one row. It counts the LQ path, which the product computes once for a picture."""
    counts = bench.count_tflop(size, side)
    assert counts["bare_tflop"] == pytest.approx(bare, abs=6e-4)
    assert counts["adapters_tflop"] + counts["lq_tflop"] == pytest.approx(added, abs=6e-4)


@pytest.mark.full
@pytest.mark.parametrize(("size", "bare", "added"), [("sdxl", 6.761, 0.786), ("sd3", 8.437, 0.464)])
def test_the_counts_at_1024_px(size: str, bare: float, added: float) -> None:
    counts = bench.count_tflop(size, 1024)
    assert counts["bare_tflop"] == pytest.approx(bare, abs=6e-4)
    assert counts["adapters_tflop"] + counts["lq_tflop"] == pytest.approx(added, abs=1.1e-3)


@pytest.mark.parametrize("size", ["nano", "sd3-nano"])
def test_the_arms_agree(size: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.jsonl"
    bench.main(["--size", size, "--side", "64", "--rounds", "1", "--out", str(out)])
    ceiling, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert ceiling["what"] == "ceiling" and [row["arm"] for row in rows] == ["bare", "adapters", "fast"]
    assert rows[0]["cost"] == 1 and rows[1]["difference"] == 0 and rows[2]["difference"] < 1e-4
    assert rows[1]["tflop"] > rows[0]["tflop"] > 0


@pytest.mark.parametrize("size", ["nano", "sd3-nano"])
def test_a_train_step_is_measured(size: str) -> None:
    row = bench.measure_training(size, 64, "cpu", 1, 2, checkpoint=size == "nano")
    assert row["pictures_per_s"] > 0 and row["px"] == 64
    network = bench.build_network(size, "meta", torch.float32)
    assert row["trained"] == sum(value.numel() for part in network.parts().values() for value in part.values())
