"""What the tests of pipelines share: curation without Ray, and a tiny InstantIR."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def phase_in_process(
    rows: Sequence[Mapping[str, Any]], task: Any, what: str, spec: Any, alive: Callable[[], float], **how: Any
) -> Iterator[dict[str, Any]]:
    """What `pipelines.curate._run` does, without Ray: every row in turn, in this process."""
    if isinstance(task, type):
        call = task(*how.get("fn_constructor_args", ()))
    else:
        call = functools.partial(task, **how.get("fn_kwargs", {}))
    for row in rows:
        batch = {name: np.array([value], dtype=object) for name, value in row.items()}
        yield from (json.loads(result) for result in call(batch)["result"])


def task_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `pipelines.curate._in_task` does, without Ray."""
    return function(*arguments)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The phases of a curation as plain calls, in order: for tests of what they do.

    How Ray runs them is shown by the tests that ask for `ray_session`, in tests/cluster too. A phase costs Ray a
    second or two, and most tests curate several times.
    """
    from pipelines import curate as curating

    monkeypatch.setattr(curating, "_run", phase_in_process)
    monkeypatch.setattr(curating, "_in_task", task_in_process)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained InstantIR on the shipped nano prior, with every part awake."""
    import torch

    from components.models import ModelCard, save_model
    from components.priors.sdxl import load_prior
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
                drawn = generator(5, part, name).standard_normal(tuple(value.shape), dtype=np.float32)
                parts[part][name] = 0.05 * torch.from_numpy(drawn)
    card = ModelCard(
        name="tiny",
        system="instantir",
        recipe={"name": "tiny", "steps_at_restore": 2, "cfg_scale": 2.0},
        prior={"id": "nano", "digest": prior.digest},
        config=network.config(),
    )
    return save_model(tmp_path_factory.mktemp("tiny") / "model", card, parts).path
