"""Fixtures for tests of pipelines: curation without Ray, and a tiny InstantIR."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.core.pool import object_column


def phase_in_process(
    jobs: Sequence[Any], task: Any, what: str, spec: Any, alive: Callable[[], float], **options: Any
) -> Iterator[Any]:
    """`pipelines.curation.curate._run` without Ray: one job after the other, in this process."""
    if isinstance(task, type):
        call = task(*options.get("fn_constructor_args", ()))
    else:
        call = functools.partial(task, **options.get("fn_kwargs", {}))
    for job in jobs:
        yield from call({"job": object_column([job])})["answer"]


def task_in_process(spec: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """`pipelines.curation.curate._in_task` without Ray."""
    return function(*arguments)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the phases of a curation as plain calls, in order.

    With Ray a phase takes one or two seconds more, and most tests curate several times. Tests with the fixture
    `ray_session`, here and in tests/cluster, run the phases under Ray.
    """
    from pipelines.curation import curate as curating

    monkeypatch.setattr(curating, "_run", phase_in_process)
    monkeypatch.setattr(curating, "_in_task", task_in_process)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained InstantIR on the shipped nano prior, with random numbers in all zero weights."""
    import torch

    from components.models import ModelCard, save_model
    from components.priors.opening import load_prior
    from components.randomness import generator
    from components.systems.instantir.network import InstantIR

    prior = load_prior("nano")
    resampler = {"dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "num_queries": 4, "ff_mult": 2}
    network = InstantIR(prior, resampler, {"rank": 2, "alpha": 1}, aggregator=True)
    parts: dict[str, dict[str, Any]] = {}
    for part, tensors in network.parts().items():
        parts[part] = {name: value.clone() for name, value in tensors.items()}
        for name, value in parts[part].items():
            if not bool(value.any()):
                noise = generator(5, part, name).standard_normal(tuple(value.shape), dtype=np.float32)
                parts[part][name] = 0.05 * torch.from_numpy(noise)
    card = ModelCard(
        name="tiny",
        system="instantir",
        recipe={"name": "tiny", "steps_at_restore": 2, "cfg_scale": 2.0},
        prior={"id": "nano", "digest": prior.digest},
        config=network.config(),
    )
    return save_model(tmp_path_factory.mktemp("tiny") / "model", card, parts).path
