"""The driver of a column's computation: it finds what is missing, collects the answers, and finishes the column."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from components.writing import replace_file
from pipelines.core.console import Progress, no_progress
from pipelines.core.deaths import Marks, remove_leftovers
from pipelines.core.errors import Failure, UsageError
from pipelines.core.folders import folder_lock
from pipelines.core.pool import Pool
from pipelines.core.rows import end_torn_line, read_lines, write_lines
from pipelines.corpus.columns.reading import read_json
from pipelines.corpus.columns.spec import FORMAT, ColumnJob, ColumnSpec, Runner, ShardAnswer, ShardTask
from pipelines.corpus.columns.workers import IN_WORK, LOADING, run_tasks
from pipelines.corpus.shards import Corpus, open_corpus

Rows = dict[tuple[str, int, str], dict[str, Any]]
"""Rows of shards.jsonl by (split, shard number, sha256 of the tar), as ShardTask.place."""

RETRIED = frozenset({"failed", "missing_shard", "truncated"})
"""Codes of rows that an unfinished column tries again: another run may succeed."""


@dataclass(frozen=True, kw_only=True)
class ColumnResult:
    """The result of a computation.

    Attributes:
        name, folder: of the column.
        samples: number of rows.
        given: rows whose value came with the corpus.
        quarantined: rows that are null.
        reasons: quarantined rows by code.
        shards, reused: number of files, and how many of them an earlier run made.
        seconds: wall time.
    """

    name: str
    folder: Path
    samples: int
    given: int
    quarantined: int
    reasons: Mapping[str, int]
    shards: int
    reused: int
    seconds: float


def compute_column(
    corpus_dir: str | Path,
    column: ColumnSpec,
    pool: Pool = Pool(),
    overwrite: bool = False,
    max_bad_fraction: float = 0.5,
    progress: Progress | None = None,
    run: Runner | None = None,
) -> ColumnResult:
    """Compute a column, or what is missing of it.

    Args:
        corpus_dir: a curated corpus; it does not change.
        column: what is computed.
        pool: where the workers run; its `batch_size` counts shards.
        overwrite: replace a column of another producer.
        max_bad_fraction: largest share of null rows among the computed ones; more end the run.
        progress: called with counts of samples.
        run: computes the tasks in the place of the pool, for example in an engine.

    Raises:
        UsageError: there is no such corpus, or a column of another producer without `overwrite`.
        Failure: the model cannot be loaded or fails on every picture, there are too many bad rows, or nothing can be
            written.
        RetryLater: another process computes this column.
    """
    started = time.monotonic()
    corpus = open_corpus(corpus_dir)
    job = ColumnJob(corpus_dir=Path(corpus_dir).absolute(), column=column)
    tasks = [
        ShardTask(
            split=split, shard=number, samples=part.starts[number + 1] - part.starts[number], sha256=shard["sha256"]
        )
        for split, part in corpus.splits.items()
        for number, shard in enumerate(part.shards)
    ]
    try:
        with folder_lock(job.folder):
            if pool.workers:  # a killed run leaves the marks of its workers; without workers, two such runs are refused
                Marks(job.folder).forget(LOADING)
            complete = _begin(job, corpus, overwrite)
            missing = [task for task in tasks if task.place not in complete]
            answers = (run or functools.partial(run_tasks, pool=pool))(job, missing)
            _collect(job, answers, complete, tasks, progress or no_progress)
            rows = [complete[task.place] for task in tasks]
            _finish(job, corpus, tasks, rows, max_bad_fraction)
    except OSError as error:
        raise Failure(f"{error.filename or job.folder} cannot be written: {error.strerror or error}.") from error
    return ColumnResult(
        name=column.name,
        folder=job.folder,
        samples=sum(row["samples"] for row in rows),
        given=sum(row["given"] for row in rows),
        quarantined=sum(len(row["quarantine"]) for row in rows),
        reasons=dict(Counter(bad["code"] for row in rows for bad in row["quarantine"])),
        shards=len(tasks),
        reused=len(tasks) - len(missing),
        seconds=time.monotonic() - started,
    )


def _begin(job: ColumnJob, corpus: Corpus, overwrite: bool) -> Rows:
    """Rows of the shards that need no work. A column of another producer is refused or removed."""
    log, document = job.folder / "shards.jsonl", read_json(job.folder / "column.json")
    rows, digest = read_lines(log), job.column.producer_digest
    producers = {row.get("producer") for row in rows} | ({document.get("producer_digest")} if document else set())
    if producers - {digest}:
        if not overwrite:
            raise UsageError(
                f"{job.folder} holds a column of another producer ({_producer_name(document)}): give this one another "
                "name, or overwrite that one."
            )
        (job.folder / "column.json").unlink(missing_ok=True)  # first: the next steps make it untrue
        log.unlink(missing_ok=True)
        rows, document = [], {}
    finished = document.get("corpus") == corpus.digest
    if document and not finished:
        (job.folder / "column.json").unlink()
    complete: Rows = {}
    for row in {(row["split"], row["shard"]): row for row in rows}.values():  # the last row of each shard counts
        retry = not finished and any(bad["code"] in RETRIED for bad in row["quarantine"])
        if not retry and _on_disk(job, row):
            complete[row["split"], row["shard"], row["tar"]] = row
    return complete


def _on_disk(job: ColumnJob, row: Mapping[str, Any]) -> bool:
    """Whether the file of a row is there and was made from the row's tar: after a kill it may be newer than the log."""
    path = job.folder / row["name"]
    try:
        if path.stat().st_size != row["bytes"]:
            return False
        with pa.memory_map(str(path)) as source:
            facts = pa.ipc.open_file(source).schema.metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return facts.get(b"tar") == row["tar"].encode() and facts.get(b"producer") == job.column.producer_digest.encode()


def _producer_name(document: Mapping[str, Any]) -> str:
    """The producer of a column.json in a few words."""
    producer = document.get("producer", {})
    return str(producer.get("model") or producer.get("name") or "unfinished")


def _collect(
    job: ColumnJob, answers: Iterator[ShardAnswer], complete: Rows, tasks: Sequence[ShardTask], progress: Progress
) -> None:
    """Log answers as they come, so that a kill costs only the shards in work. The first fatal one ends the job."""
    name = job.column.name
    total = sum(task.samples for task in tasks)
    ready = sum(task.samples for task in tasks if task.place in complete)
    progress(ready, total, name)
    log = job.folder / "shards.jsonl"
    end_torn_line(log)
    with open(log, "a", encoding="utf-8") as target:
        for answer in answers:
            if answer.fatal:
                raise Failure(f"column {name}: {answer.fatal}")
            row = {**answer.row, "producer": job.column.producer_digest}
            target.write(json.dumps(row, ensure_ascii=False) + "\n")
            target.flush()
            complete[row["split"], row["shard"], row["tar"]] = row
            ready += row["samples"]
            progress(ready, total, name)
    lacking = [task for task in tasks if task.place not in complete]
    if lacking:
        raise Failure(f"column {name}: {len(lacking)} shards came back without an answer; the same command continues.")


def _finish(
    job: ColumnJob,
    corpus: Corpus,
    tasks: Sequence[ShardTask],
    rows: Sequence[dict[str, Any]],
    max_bad_fraction: float,
) -> None:
    """Write quarantine.jsonl and column.json, and remove files that neither names."""
    column = job.column
    quarantine = [bad for row in rows for bad in row["quarantine"]]
    write_lines(job.folder / "quarantine.jsonl", quarantine)
    given, samples = sum(row["given"] for row in rows), sum(row["samples"] for row in rows)
    if len(quarantine) > max_bad_fraction * (samples - given):
        codes = ", ".join(f"{n} {code}" for code, n in Counter(bad["code"] for bad in quarantine).most_common())
        raise Failure(
            f"column {column.name}: {len(quarantine)} of {samples - given} rows have no value ({codes}), more than the "
            f"allowed share of {max_bad_fraction:g}; see {job.folder / 'quarantine.jsonl'}."
        )
    files: dict[str, list[dict[str, Any]]] = {split: [] for split in corpus.splits}
    for task, row in zip(tasks, rows, strict=True):
        files[task.split].append({name: row[name] for name in ("name", "bytes", "sha256", "samples")})
    document = {
        "format": FORMAT,
        "name": column.name,
        "kind": column.kind,
        "corpus": corpus.digest,
        "producer": dict(column.producer),
        "producer_digest": column.producer_digest,
        "shape": list(column.shape),
        "dtype": column.dtype,
        "samples": samples,
        "given": given,
        "quarantined": len(quarantine),
        "splits": files,
    }
    write_lines(job.folder / "shards.jsonl", rows)
    replace_file(job.folder / "column.json", (json.dumps(document, ensure_ascii=False) + "\n").encode(), sync=True)
    names = {row["name"] for row in rows}
    for path in (*job.folder.glob("*.arrow"), *job.folder.glob(f"{IN_WORK}*")):
        if path.name not in names:
            path.unlink(missing_ok=True)
    remove_leftovers(job.folder)
