"""The benchmark's own code runs, at a size that takes seconds, and its arms compute the same; nothing here is timed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from components.systems.instantir.fast import Speed


def _by_path(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up, and the other script imports it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> Any:
    return _by_path("bench_instantir")


@pytest.fixture(scope="module")
def training(bench: Any) -> Any:
    return _by_path("bench_instantir_training")


@pytest.mark.slow
def test_both_loops_arrive_at_the_same_latents(bench: Any) -> None:
    obvious, ours, *reused = bench.measure_sampling("nano", rounds=1)
    assert obvious["difference"] < 1e-3
    assert ours["ratio_to_obvious"] > 0
    assert all(15 < row["psnr_to_exact_db"] < 200 for row in reused), reused
    assert [row["arm"] for row in reused] == ["ours, preview_every 2", "ours, preview and aggregator every 2"]


@pytest.mark.slow
@pytest.mark.parametrize("given_latents", [False, True])
def test_both_train_steps_have_the_same_loss(training: Any, given_latents: bool) -> None:
    speed = Speed(checkpoint=True)
    plain, ours = training.measure_training("nano", rounds=1, speed=speed, batch_size=1, given_latents=given_latents)
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    assert plain["tflop"] > 0


@pytest.mark.slow
@pytest.mark.full
def test_the_real_size_costs_what_the_reference_counted(bench: Any) -> None:
    """instantir.md section 10: 40.93 TFLOP a step at 1024 with guidance, by torch's counter on the meta device."""
    assert bench.count_step_flops(bench.sizes()["sdxl"]) == pytest.approx(40.93, rel=0.01)


def test_the_ceiling_is_measured(bench: Any) -> None:
    assert bench.measure_ceiling("cpu", side=64, rounds=2)["tflop_per_s"] >= 0
