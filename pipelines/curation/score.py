"""Learned scores: one column for each model, in an actor pool, for candidates that nothing cheaper has refused.

work/scored/<name>/<part>.parquet holds a value for each measured row of the part, null where it was not asked for or
could not be computed; then `failed` says why.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.corpora import Bounds, CorpusSpec, ModelScore
from components.images import decode
from components.types import Image, SampleError
from pipelines.curation.measure import SCORE, write_parquet
from pipelines.curation.watch import Guard
from pipelines.sources import Bytes

Scorer = Callable[[Sequence[Image]], list[float]]


def scored_path(out: Path, model: ModelScore, part: str) -> Path:
    """Where a part's scores lie."""
    return out / "work" / "scored" / model.name / f"{part}.parquet"


def score_rules(model: ModelScore, content: str, bounds: Mapping[str, Bounds]) -> str:
    """Digest of what decides a part's scores: the model, the measured rows, and which of them the cheap bounds keep."""
    told = {name: value for name, value in asdict(model).items() if name not in ("bounds", "batch_size", "num_gpus")}
    cheap = {name: asdict(bound) for name, bound in bounds.items()}
    return hashlib.sha256(json.dumps([told, content, cheap], sort_keys=True).encode()).hexdigest()


def is_scored(path: Path, rules: str) -> bool:
    """Whether a part's file is of these rules, and nothing failed when it was made: that is worth another try."""
    try:
        metadata = pq.read_metadata(path).metadata
        return bool(metadata[b"rules"] == rules.encode() and metadata[b"failed"] == b"0")
    except (OSError, pa.ArrowException, KeyError, TypeError):
        return False


class ScoreParts:
    """Ray Data actor: holds one model; batch {"part", "content"} -> {"result"}."""

    def __init__(
        self, model: ModelScore, spec: CorpusSpec, out: str, bounds: Mapping[str, Bounds], build: Callable[..., Scorer]
    ) -> None:
        self.model, self.spec, self.out, self.bounds = model, spec, Path(out), bounds
        self.score = build(model, device="cuda" if model.num_gpus else "cpu")

    def __call__(self, batch: Any) -> dict[str, Any]:
        import numpy as np

        results = [
            json.dumps(score_part(part, content, self.model, self.spec, self.out, self.bounds, self.score))
            for part, content in zip(batch["part"], batch["content"], strict=True)
        ]
        return {"result": np.array(results, dtype=object)}


def score_part(
    part: str,
    content: str,
    model: ModelScore,
    spec: CorpusSpec,
    out: Path,
    bounds: Mapping[str, Bounds],
    score: Scorer,
) -> dict[str, Any]:
    """Score one part; returns {"part", "scored", "failed"}."""
    table = pq.read_table(out / "work" / "measured" / f"{part}.parquet")
    wanted = alive(table, bounds)
    rows = table.select(["id", "key", "at"]).to_pylist()
    values: list[float | None] = [None] * len(rows)
    failed = [""] * len(rows)
    reader, limits = Bytes(spec, out), spec.filters.limits()
    guard = Guard(out / "work" / "cursors", f"{model.name}-{part}", spec.sample_timeout_s * max(1, model.batch_size))
    done, together = False, 1 if guard.deaths else model.batch_size  # after a death each alone, to learn whose it was
    try:
        pending: list[int] = []
        pictures: list[Image] = []
        guard.at("")
        for number in wanted:
            row = rows[number]
            verdict = ("crashed", "the process died again and again") if guard.hopeless else guard.sentence(row["id"])
            if verdict is not None:
                failed[number] = f"[{verdict[0]}] {verdict[1]}"
                continue
            guard.at(row["id"] if together == 1 else "")
            try:
                picture = decode(reader.read(row["at"], row["key"]), limits, row["key"])
            except SampleError as error:
                failed[number] = str(error)
                continue
            pending.append(number)
            pictures.append(picture)
            if len(pending) == together:
                _score_batch(score, pending, pictures, values, failed)
                pending, pictures = [], []
        _score_batch(score, pending, pictures, values, failed)
        done = True
    finally:
        guard.close(done)
    columns = [pa.array(values, pa.float32()), pa.array(failed, pa.string())]
    result = pa.Table.from_arrays(columns, names=["value", "failed"])
    told = {"rules": score_rules(model, content, bounds), "failed": str(sum(map(bool, failed)))}
    write_parquet(scored_path(out, model, part), result.replace_schema_metadata(told))
    return {"part": part, "scored": len(wanted), "failed": sum(map(bool, failed))}


def alive(table: pa.Table, bounds: Mapping[str, Bounds]) -> list[int]:
    """Rows of a measured part that no cheap check refuses."""
    codes = table.column("code").to_pylist()
    scores = {name: table.column(SCORE + name).to_pylist() for name in bounds if SCORE + name in table.column_names}
    return [
        number
        for number, code in enumerate(codes)
        if not code
        and all(values[number] is not None and bounds[n].hold(values[number]) for n, values in scores.items())
    ]


def _score_batch(
    score: Scorer, numbers: Sequence[int], pictures: Sequence[Image], values: list[float | None], failed: list[str]
) -> None:
    """Score pictures together; where that fails, one by one, so that none costs another."""
    if not numbers:
        return
    try:
        found = score(pictures)
    except Exception as error:  # noqa: BLE001 - which picture it was is found below
        if len(numbers) == 1:
            failed[numbers[0]] = f"{type(error).__name__}: {error}"[:500]
            return
        for number, picture in zip(numbers, pictures, strict=True):
            _score_batch(score, [number], [picture], values, failed)
        return
    for number, value in zip(numbers, found, strict=True):
        if math.isfinite(value):
            values[number] = float(value)
        else:
            failed[number] = f"the score is {value}"
