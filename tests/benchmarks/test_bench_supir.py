"""SUPIR's benchmark at nano size: both loops make the same latents, its counts are the reference's, a step trains."""

from __future__ import annotations

import json
from pathlib import Path

import bench_supir as bench
import pytest
import torch
from bench_instantir import sizes


def test_both_loops_make_the_same_latents() -> None:
    from components.systems.supir.fast import FastSupir

    size = sizes()["nano"]
    with torch.inference_mode():
        network = bench.build_network(size, "cpu", torch.float32)
        inputs = bench.make_inputs(network, size, torch.float32, latent_px=16)
        plain = bench.straightforward_loop(network, *inputs, 3)
        ours = bench.our_loop(FastSupir(network), *inputs, 3)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    with torch.inference_mode():
        other = bench.straightforward_loop(network, inputs[0], inputs[0], *inputs[2:], 3)
    assert not torch.allclose(other, plain, atol=1e-2)


def test_the_command_writes_a_row_for_each_arm(tmp_path: Path) -> None:
    out = tmp_path / "bench.jsonl"
    bench.main(["--size", "nano", "--rounds", "1", "--out", str(out)])
    ceiling, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert ceiling["what"] == "ceiling" and [row["arm"] for row in rows] == ["straightforward", "ours"]
    assert rows[0]["difference"] < 1e-3 and rows[1]["difference"] == 0 and rows[0]["tflop"] > 0


def test_a_train_step_is_measured(tmp_path: Path) -> None:
    row = bench.measure_training("nano", "cpu", 1, 1, checkpoint=True)
    assert row["tflop"] > 0 and row["px"] == sizes()["nano"].latent_px // 2 * 4


@pytest.mark.full
def test_the_counts_at_real_size_are_the_references() -> None:
    """supir.md, section 5: one step at 1024 px with guidance, 20.28 TFLOP."""
    assert bench.count_step_tflop(sizes()["sdxl"]) == pytest.approx(20.28, rel=0.01)
