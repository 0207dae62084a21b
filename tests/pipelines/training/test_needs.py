"""What a training needs of Ray: the object store of its workers' data, and the workers' resources."""

from __future__ import annotations

import pytest

from components.systems.recipes import load_recipe
from pipelines.core.home import shipped_files
from pipelines.core.placement import Needs
from pipelines.training.train import store_mib, worker_needs


def test_the_papers_dcp_needs_576_mib_a_rank() -> None:
    """Two tasks run and two wait, each of 24 rows of 6 MiB: hq and lq, six blocks of half a micro-batch."""
    assert store_mib(load_recipe("instantir-dcp", [])) == 576.0
    assert store_mib(load_recipe("instantir-dcp", ["placement.workers=8"])) == 8 * 576.0


@pytest.mark.parametrize("name", sorted(shipped_files("recipes")))
def test_every_recipe_states_its_needs(name: str) -> None:
    recipe = load_recipe(name, [])
    assert 64.0 * recipe.placement.workers <= store_mib(recipe) <= 640.0 * recipe.placement.workers
    assert worker_needs(recipe).workers == recipe.placement.workers


def test_a_placement_is_that_of_the_workers() -> None:
    words = ["gpus_per_worker=1", "memory_gib_per_worker=40", "resources_per_worker.disk=1", "labels.group=gpu"]
    recipe = load_recipe("instantir-dcp-nano", [f"placement.{word}" for word in words])
    assert worker_needs(recipe) == Needs(
        workers=1, cpus=1.0, gpus=1.0, memory_gib=40.0, resources={"disk": 1.0}, labels={"group": "gpu"}
    )
