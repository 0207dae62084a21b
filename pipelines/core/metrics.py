"""Readers of metrics.jsonl, the scalars of a training stage: the whole file, or new lines while it grows."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

OnMetrics = Callable[[Sequence[tuple[int, str, float, float]]], None]

TRAINED_PARAMETERS, PEAK_MEMORY, CPU_SECONDS = "trained_parameters", "peak_memory_mib", "cpu_seconds_per_step"
"""Names of a training's costs in metrics.jsonl: see training.worker."""


class MetricRow(NamedTuple):
    """A line of metrics.jsonl: step, name, value, and time in seconds since 1970."""

    step: int
    name: str
    value: float
    time: float


def tail_metrics(path: Path, offset: int = 0) -> tuple[list[MetricRow], int]:
    """Read the new complete lines of a metrics.jsonl.

    Args:
        path: the file may not exist yet.
        offset: start in bytes; a file that became shorter is read from its start.

    Returns:
        The rows, and the offset for the next call. A last line without a newline is for the next call. A complete line
        that is not a metric is skipped: a kill can tear a line, and a restart continues it.
    """
    try:
        with Path(path).open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            start = offset if offset <= size else 0
            stream.seek(start)
            data = stream.read()
    except FileNotFoundError:
        return [], 0
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for line in whole.splitlines():
        try:
            entry = json.loads(line)
            row = MetricRow(
                int(entry["step"]), str(entry["name"]), float(entry["value"]), float(entry.get("time", 0.0))
            )
        except (ValueError, KeyError, TypeError):
            continue
        rows.append(row)
    return rows, start + len(whole)


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """Read metrics.jsonl as name -> step -> value; if a resume repeats a step, the later value counts."""
    series: dict[str, dict[int, float]] = {}
    for step, name, value, _ in tail_metrics(path)[0]:
        series.setdefault(name, {})[step] = value
    return series


def heldout_losses(path: Path) -> dict[str, dict[int, float]]:
    """Read the held-out losses as trainable -> step -> loss."""
    return {
        name.removeprefix("heldout/"): values
        for name, values in read_metrics(path).items()
        if name.startswith("heldout/")
    }


def last_step(path: Path) -> int:
    """The largest step in metrics.jsonl; 0 without one."""
    return max((row.step for row in tail_metrics(path)[0]), default=0)


class Tail:
    """Context manager with a thread that passes new rows of a metrics file to a callback, the last ones at exit."""

    def __init__(self, path: Path, callback: OnMetrics | None, every_s: float = 0.5) -> None:
        self.path, self.callback, self.every_s = path, callback, every_s
        self.offset = path.stat().st_size if path.is_file() else 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Tail:
        if self.callback:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        if self.callback:
            self.thread.join()
            self._read()

    def _run(self) -> None:
        while not self.stop.wait(self.every_s):
            self._read()

    def _read(self) -> None:
        rows, self.offset = tail_metrics(self.path, self.offset)
        if rows and self.callback:
            self.callback(rows)
