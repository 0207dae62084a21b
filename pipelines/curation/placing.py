"""Where the tasks of a curation run: the needs of its spec's `placement`, for Ray and for the check before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from components.corpora import CorpusSpec
from pipelines.core.joining import ray_is_running
from pipelines.core.placement import check_placement, needs_of


def task_resources(spec: CorpusSpec, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a phase with the needs of the spec's placement; a scorer has its own CPUs and GPUs."""
    needs = needs_of(spec.placement)
    own: dict[str, Any] = needs.options()
    if "compute" not in options:
        own["num_cpus"] = 1.0 if needs.cpus is None else needs.cpus
        if needs.workers:
            own["concurrency"] = needs.workers
    return {**own, **options}


def check_tasks(spec: CorpusSpec) -> None:
    """Check that a node can run the tasks of this spec, and its scorers."""
    if not ray_is_running():
        return
    needs = needs_of(spec.placement)
    check_placement("a task of the curation", needs.or_else(1, 1.0, 0.0))
    for model in spec.filters.models:
        scorer = replace(needs, cpus=0.0 if model.num_gpus else 1.0, gpus=model.num_gpus)
        check_placement(f"the score {model.name}", scorer)
