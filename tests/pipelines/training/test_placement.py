"""CPUs of the data tasks: each rank can run one, and a placement that leaves none is refused."""

from __future__ import annotations

import pytest

from components.systems.recipes import load_recipe
from pipelines.core.errors import UsageError
from pipelines.training.train import data_cpus


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
