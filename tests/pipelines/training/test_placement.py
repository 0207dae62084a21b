"""CPUs of the data tasks: each rank can run one, and a placement that leaves none is refused. The costs of a rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from components.systems.recipes import load_recipe
from pipelines.core.errors import UsageError
from pipelines.training.train import data_cpus
from pipelines.training.worker import peak_memory_mib, trained_parameters


@pytest.mark.parametrize(
    ("workers", "cpus_per_worker", "captioner", "expected"),
    [
        (1, 1.0, "", 1.0),  # 3 of 4 CPUs are free, and a task takes at most 1
        (3, 1.0, "", 0.3333),  # three tasks share one CPU
        (4, 0.75, "", 0.25),
        (2, 1.0, "moondream2", 0.5),  # the captioner takes one
        (4, 1.0, "", None),
        (2, 1.5, "moondream2", None),
        (5, 1.0, "", None),
    ],
)
def test_each_rank_can_run_a_data_task(
    workers: int, cpus_per_worker: float, captioner: str, expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    recipe = load_recipe(
        "instantir-dcp-nano",
        [
            "batch_size=60",
            f"placement.workers={workers}",
            f"placement.cpus_per_worker={cpus_per_worker}",
            f"missing_captions.model={captioner}" if captioner else "steps=3",
        ],
    )
    if expected is None:
        with pytest.raises(UsageError, match=r"Ray has 4, and the data tasks need some too: lower placement"):
            data_cpus(recipe)
    else:
        assert data_cpus(recipe) == expected
        assert workers * (cpus_per_worker + data_cpus(recipe)) + bool(captioner) <= 4


def test_parameters_of_all_optimisers_count_once() -> None:
    shared, own = torch.nn.Linear(3, 4), torch.nn.Linear(4, 5, bias=False)
    modules = {"a": [shared], "b": [shared, own]}
    optimizers = {
        name: torch.optim.SGD([p for module in each for p in module.parameters()], lr=1.0)
        for name, each in modules.items()
    }
    state: Any = SimpleNamespace(optimizers=optimizers)
    assert trained_parameters(state) == 3 * 4 + 4 + 4 * 5


def test_the_peak_of_the_memory_stays_after_its_release() -> None:
    block = np.ones(16 * 2**20)
    held = psutil.Process().memory_info().rss / 2**20
    del block
    assert 128 < held <= peak_memory_mib("cpu") + 1 < 100 * held
