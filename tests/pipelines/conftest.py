"""What the tests of curation share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
