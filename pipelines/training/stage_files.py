"""Files of a training stage: metrics, order of samples, model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.core.rows import end_torn_line, read_lines

MODEL, METRICS, SAMPLES, ORDER = "model", "metrics.jsonl", "samples", "order.jsonl"


class Sample(NamedTuple):
    """A row of a training batch.

    Attributes:
        position, key: of the row.
        replaced: errors of the samples that this row replaces; "" for none.
        uncaptioned: why the captioner wrote no prompt; "" if it wrote one or was not needed.
    """

    position: int
    key: str
    replaced: str
    uncaptioned: str


def is_whole(out: Path) -> bool:
    """Whether a stage's folder has its metrics and a complete model: all files of model.json, and undamaged parts."""
    from components.models import file_sha256, load_model

    try:
        model = load_model(out / MODEL)
        for name in model.info["files"]:
            model.file(name)
        parts = model.info["parts"].values()
        return (out / METRICS).is_file() and all(file_sha256(model.path / p["file"]) == p["sha256"] for p in parts)
    except (OSError, ValueError):
        return False


class Log:
    """Writer of the stage's metrics.jsonl. It appends complete lines, so a reader never sees half a row."""

    def __init__(self, out: Path, active: bool) -> None:
        self.path, self.active = out / METRICS, active
        if active:
            for name in (METRICS, ORDER):
                end_torn_line(out / name)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        now = time.time()
        lines = [json.dumps({"step": step, "name": k, "value": v, "time": now}) + "\n" for k, v in values.items()]
        with self.path.open("a") as stream:
            stream.write("".join(lines))


def log_order(out: Path, rank: int, step: int, samples: Sequence[Sample]) -> None:
    """Append one line per step and rank: the samples in order, the replacements, and the samples without a caption."""
    row: dict[str, object] = {
        "step": step,
        "rank": rank,
        "positions": [sample.position for sample in samples],
        "keys": [sample.key for sample in samples],
    }
    if replaced := {sample.key: sample.replaced for sample in samples if sample.replaced}:
        row["replaced"] = replaced
    if uncaptioned := {sample.key: sample.uncaptioned for sample in samples if sample.uncaptioned}:
        row["uncaptioned"] = uncaptioned
    with (out / ORDER).open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_order(out: Path) -> dict[int, str]:
    """Read the order of the samples of a finished stage over all ranks: position -> key."""
    order: dict[int, str] = {}
    for row in read_lines(out / ORDER):
        order.update(zip(row["positions"], row["keys"], strict=True))
    return dict(sorted(order.items()))
