"""Rounding grows in previews as the formula says, and the recipes' precision is the one that the measure asks for."""

from __future__ import annotations

import math

import bench_instantir
import bench_preview_precision as bench
import pytest
import torch

from components.samplers.schedules import Schedule
from components.systems.recipes import load_recipe, recipe_names


@pytest.mark.slow
def test_half_precision_moves_previews_at_the_end_of_time() -> None:
    size = bench_instantir.sizes()["nano"]
    network = bench_instantir.build_network(size, "cpu", torch.float32)
    arms = ("fp32", "bf16", "fp16")
    rows = bench.measure_precision(network, 32, points=(49, 9), count=1, arms=arms)
    assert [(row["t"], row["arm"]) for row in rows] == [(t, arm) for t in (999, 199) for arm in arms]
    of = {(row["t"], row["arm"]): row for row in rows}
    for t in (999, 199):
        assert of[t, "fp32"]["preview_rms"] == 0
        assert of[t, "fp32"]["huber_cosine"] == of[t, "fp32"]["l2_cosine"] == 1
        # bfloat16 has 8 bits of precision and float16 has 11
        assert 4 < of[t, "bf16"]["preview_rms"] / of[t, "fp16"]["preview_rms"] < 16
    # an error of eps is multiplied by sigma / alpha
    schedule: Schedule = network.prior.schedule
    late, early = (float(value) for value in schedule.sigma(torch.tensor([999, 199])))
    growth = late / early
    assert late == pytest.approx(14.6, rel=0.01)
    assert of[999, "bf16"]["preview_rms"] / of[199, "bf16"]["preview_rms"] == pytest.approx(growth, rel=0.6)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))


def test_no_previewer_recipe_trains_in_bf16() -> None:
    """bench_preview_precision.py: at t = 999 bf16 moves previews by as much as the loss measures."""
    recipes = [load_recipe(name) for name in recipe_names() if "previewer" in name]
    assert len(recipes) >= 3
    assert {recipe.name: recipe.precision for recipe in recipes if recipe.precision == "bf16"} == {}
