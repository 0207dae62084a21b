"""Compute learned scores: one column for each model, in an actor pool, for candidates that no cheaper check refuses.

work/scored/<name>/<part>.parquet holds a value for each measured row of the part. It is null for refused candidates,
and where the score could not be computed; then `failed` has the reason.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.corpora import Bounds, CorpusSpec, ModelScore
from components.images import decode
from components.types import Image, SampleError
from pipelines.core.pool import object_column
from pipelines.curation.measure import SCORE, write_parquet
from pipelines.curation.sources import Bytes
from pipelines.curation.watch import Guard

Scorer = Callable[[Sequence[Image]], list[float]]


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """One part to score: its name, and the digest of its measured rows."""

    part: str
    content: str


@dataclass(frozen=True, kw_only=True)
class ScoreAnswer:
    """Counts of a scored part.

    Attributes:
        part: name of the part.
        pictures: candidates that no cheaper check refuses.
        failed: those without a score.
    """

    part: str
    pictures: int
    failed: int


def scored_path(out: Path, model: ModelScore, part: str) -> Path:
    """Path of a part's scores."""
    return out / "work" / "scored" / model.name / f"{part}.parquet"


def score_rules(model: ModelScore, content: str, bounds: Mapping[str, Bounds]) -> str:
    """Digest of what decides a part's scores: the model, the measured rows, and the bounds of cheaper scores."""
    settings = {
        name: value for name, value in asdict(model).items() if name not in ("bounds", "batch_size", "num_gpus")
    }
    cheap = {name: asdict(bound) for name, bound in bounds.items()}
    return hashlib.sha256(json.dumps([settings, content, cheap], sort_keys=True).encode()).hexdigest()


def is_scored(path: Path, rules: str) -> bool:
    """Whether a part's file has these rules and no failures; failures are worth another try."""
    try:
        metadata = pq.read_metadata(path).metadata
        return bool(metadata[b"rules"] == rules.encode() and metadata[b"failed"] == b"0")
    except (OSError, pa.ArrowException, KeyError, TypeError):
        return False


class ScoreParts:
    """Ray Data actor with one model: batch {"job": ScoreTask objects} -> {"answer": ScoreAnswer objects}."""

    def __init__(
        self, model: ModelScore, spec: CorpusSpec, out: Path, bounds: Mapping[str, Bounds], build: Callable[..., Scorer]
    ) -> None:
        self.model, self.spec, self.out, self.bounds = model, spec, out, bounds
        self.scorer = build(model, device="cuda" if model.num_gpus else "cpu")

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {
            "answer": object_column(
                [score_part(task, self.model, self.spec, self.out, self.bounds, self.scorer) for task in batch["job"]]
            )
        }


def score_part(
    task: ScoreTask, model: ModelScore, spec: CorpusSpec, out: Path, bounds: Mapping[str, Bounds], scorer: Scorer
) -> ScoreAnswer:
    """Score one part."""
    table = pq.read_table(out / "work" / "measured" / f"{task.part}.parquet")
    numbers = accepted_rows(table, bounds)
    rows = table.select(["id", "key", "at"]).to_pylist()
    values: list[float | None] = [None] * len(rows)
    failed = [""] * len(rows)
    reader, limits = Bytes(spec, out), spec.filters.limits()
    patience = spec.sample_timeout_s * max(1, model.batch_size)
    guard = Guard(out / "work" / "cursors", f"{model.name}-{task.part}", patience)
    complete, together = False, 1 if guard.deaths else model.batch_size  # after a death each alone, to find its cause
    try:
        pending: list[int] = []
        pictures: list[Image] = []
        guard.at("")
        for number in numbers:
            row = rows[number]
            refusal = ("crashed", "the process died again and again") if guard.is_lethal else guard.refusal(row["id"])
            if refusal is not None:
                failed[number] = f"[{refusal[0]}] {refusal[1]}"
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
                _score_batch(scorer, pending, pictures, values, failed)
                pending, pictures = [], []
        _score_batch(scorer, pending, pictures, values, failed)
        complete = True
    finally:
        guard.close(complete)
    columns = [pa.array(values, pa.float32()), pa.array(failed, pa.string())]
    result = pa.Table.from_arrays(columns, names=["value", "failed"])
    failures = sum(map(bool, failed))
    facts = {"rules": score_rules(model, task.content, bounds), "failed": str(failures)}
    write_parquet(scored_path(out, model, task.part), result.replace_schema_metadata(facts))
    return ScoreAnswer(part=task.part, pictures=len(numbers), failed=failures)


def accepted_rows(table: pa.Table, bounds: Mapping[str, Bounds]) -> list[int]:
    """Numbers of the rows of a measured part that no cheaper check refuses."""
    codes = table.column("code").to_pylist()
    scores = {name: table.column(SCORE + name).to_pylist() for name in bounds if SCORE + name in table.column_names}
    return [
        number
        for number, code in enumerate(codes)
        if not code
        and all(values[number] is not None and bounds[n].hold(values[number]) for n, values in scores.items())
    ]


def _score_batch(
    scorer: Scorer, numbers: Sequence[int], pictures: Sequence[Image], values: list[float | None], failed: list[str]
) -> None:
    """Score pictures together; if that fails, one by one, so that a picture does not cost another."""
    if not numbers:
        return
    try:
        scores = scorer(pictures)
    except Exception as error:  # noqa: BLE001 - the picture that caused it is found below
        if len(numbers) == 1:
            failed[numbers[0]] = f"{type(error).__name__}: {error}"[:500]
            return
        for number, picture in zip(numbers, pictures, strict=True):
            _score_batch(scorer, [number], [picture], values, failed)
        return
    for number, value in zip(numbers, scores, strict=True):
        if math.isfinite(value):
            values[number] = float(value)
        else:
            failed[number] = f"the score is {value}"
