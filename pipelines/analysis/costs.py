"""What the training of a model cost, from the metrics.jsonl beside its folder, for the tables of studies."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.core.metrics import CPU_SECONDS, PEAK_MEMORY, TRAINED_PARAMETERS, read_metrics
from pipelines.pages.numbers import digits_text

COSTS: Mapping[str, str] = {
    TRAINED_PARAMETERS: "trained parameters",
    PEAK_MEMORY: "peak memory of the training, MiB",
    CPU_SECONDS: "CPU time of a step, s",
}
"""Columns by the names of the metrics, see training.worker. Memory and time are those of one worker."""


def training_costs(models: Sequence[str | Path]) -> dict[str, float]:
    """Costs by name: the largest number of parameters and memory, and the median step's CPU time.

    Args:
        models: folders of the trainings of one kind. A cost that one of them does not have is left out: shipped models
            and trainings of earlier versions have none.
    """
    folders = [Path(model) for model in models]  # a shipped name is no folder
    series = [read_metrics(path.parent / "metrics.jsonl") if path.is_dir() else {} for path in folders]
    values = {name: [value for each in series for value in each.get(name, {}).values()] for name in COSTS}
    whole = [name for name in COSTS if all(each.get(name) for each in series)]
    return {name: statistics.median(values[name]) if name == CPU_SECONDS else max(values[name]) for name in whole}


def cost_text(name: str, costs: Mapping[str, float]) -> str:
    """A cell of the table; "" for an unknown cost."""
    if name not in costs:
        return ""
    return digits_text(costs[name]) if name == CPU_SECONDS else f"{costs[name]:,.0f}"
