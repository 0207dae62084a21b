"""Columns of a finished corpus: captions, scores, embeddings, inputs; a value for every sample (decision 0004).

    columns/<name>/column.json            {"format", "name", "kind", "corpus", "producer", "producer_digest", "shape",
                                          "dtype", "samples", "given", "quarantined", "splits": {split: [{"name",
                                          "bytes", "sha256", "samples"}]}}; written last: a column that has it is whole
    columns/<name>/<split>-<shard>.arrow  one record batch {key, value, given}, aligned with the samples of the shard
    columns/<name>/quarantine.jsonl       {key, source, stage, code, detail, bytes_sha256} of rows that are null
    columns/<name>/shards.jsonl           what is done: a later run repeats nothing of it

One piece of work is a shard. A worker reads its pictures, calls the model on batches, and writes the file at once, so
values never travel through the object store. A batch that fails is tried again one picture at a time; a picture that
kills its process is known by a file that names what was in flight, and quarantined at the second death. A shard whose
bytes did not change keeps its values when the corpus grows.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.types import Image, SampleError
from pipelines.console import Progress, no_progress
from pipelines.errors import Failure, RetryLater, UsageError, unknown
from pipelines.rows import end_torn_line, read_lines, replace_file, write_lines
from pipelines.shards import Corpus, open_corpus

FORMAT = 1
FOLDER = "columns"
KINDS = ("text", "float", "array", "picture")
UNTYPED = ("text", "picture")  # kinds without a dtype
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
RETRIED = frozenset({"failed", "missing_shard", "truncated"})
"""Codes of rows that an unfinished column tries again: another run may do better."""

Value = str | float | bytes | np.ndarray
Worker = Callable[[Sequence[Image], Sequence[str]], Sequence[Value | SampleError]]
"""(uint8 pictures [H, W, 3], their keys) -> a value each, or why there is none. What it raises costs one picture."""
Given = Callable[[Mapping[str, Any]], Value | None]
"""Row of the corpus' table -> a value that is known already, or None: the picture is then read."""


@dataclass(frozen=True, kw_only=True)
class ColumnJob:
    """All that decides a column, and how it is computed; goes to the workers.

    Attributes:
        corpus_dir, name, kind, producer: see `compute_column`.
        shape, dtype: of every array.
        factory, given: see `compute_column`.
        batch_size, short_side_px: pictures a call, and the short side to which larger ones are shrunk (0: never).
        workers: how many processes share the work; 0 is this one.
    """

    corpus_dir: Path
    name: str
    kind: str
    producer: Mapping[str, Any]
    factory: Callable[[], Worker]
    shape: tuple[int, ...] = ()
    dtype: str = ""
    given: Given | None = None
    batch_size: int = 8
    short_side_px: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(f'"{self.name}" cannot name a column: letters a-z, digits, "-" and "_", at most 64.')
        if self.kind not in KINDS:
            raise unknown("kind of column", self.kind, KINDS)
        if self.kind != "array" and (self.shape or (self.kind in UNTYPED and self.dtype)):
            raise UsageError(f"a column of kind {self.kind} has no shape of its own, got {self.shape} {self.dtype}.")
        if self.kind not in UNTYPED and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.kind == "float" and not self.dtype.startswith("float"):
            raise UsageError(f"a column of kind float needs a float dtype, got {self.dtype}.")
        if self.kind == "array" and (not self.shape or min(self.shape) < 1):
            raise UsageError(f"a column of kind array needs the shape of one sample's array, got {self.shape}.")
        if self.batch_size < 1 or self.workers < 0 or self.short_side_px < 0:
            raise UsageError("a column needs batch_size >= 1, workers >= 0 and short_side_px >= 0.")

    @property
    def folder(self) -> Path:
        return self.corpus_dir / FOLDER / self.name

    @property
    def producer_digest(self) -> str:
        """sha256 over what computes the values: equal producers are taken to give equal values."""
        said = [FORMAT, self.kind, list(self.shape), self.dtype, dict(self.producer)]
        return hashlib.sha256(json.dumps(said, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One piece of work: shard number of a split, how many samples it has, and the sha256 of its tar."""

    split: str
    shard: int
    samples: int
    sha256: str

    @property
    def place(self) -> tuple[str, int, str]:
        return self.split, self.shard, self.sha256


Runner = Callable[[ColumnJob, Sequence[ShardTask]], Iterator[dict[str, Any]]]
"""Does the tasks and yields an answer for each, in any order: see pipelines.column_workers."""


@dataclass(frozen=True, kw_only=True)
class ColumnResult:
    """What a computation ended with.

    Attributes:
        name, folder: of the column.
        samples: rows in all; of these
        given: rows whose value was known already, and
        quarantined: rows that are null.
        reasons: quarantined by code.
        shards, reused: files, and how many of them an earlier run had made.
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
    name: str,
    kind: str,
    producer: Mapping[str, Any],
    factory: Callable[[], Worker],
    *,
    shape: Sequence[int] = (),
    dtype: str = "",
    given: Given | None = None,
    batch_size: int = 8,
    workers: int = 1,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    short_side_px: int = 0,
    overwrite: bool = False,
    max_bad_fraction: float = 0.5,
    progress: Progress | None = None,
    run: Runner | None = None,
) -> ColumnResult:
    """Compute a column, or what is missing of it.

    Args:
        corpus_dir: a curated corpus; not changed.
        name: of the column.
        kind: text (str), float (one finite number), array (finite, all of one shape), picture (the bytes of a file).
        producer: what computes the values, as JSON: model, revision, prompt, digest. It decides what is repeated.
        factory: makes the worker, in each process that needs one; picklable.
        shape, dtype: of a sample's array; a float column has a dtype only ("float32" where none is said).
        given: see Given; such rows are marked, and need no model.
        batch_size: pictures a call.
        workers: size of the actor pool; 0 works in this process, without Ray.
        num_cpus, num_gpus: of each worker.
        short_side_px: larger pictures are shrunk to this short side; 0 leaves them.
        overwrite: replace a column of another producer.
        max_bad_fraction: largest share of null rows among those computed; more end the run.
        progress: told about samples.
        run: another way to do the tasks (an engine).

    Raises:
        UsageError: no corpus, wrong settings, or a column of another producer without `overwrite`.
        Failure: the model cannot be loaded or fails on everything, too many bad rows, or nothing can be written.
        RetryLater: another process computes this column.
    """
    started = time.monotonic()
    corpus = open_corpus(corpus_dir)
    job = ColumnJob(
        corpus_dir=Path(corpus_dir).absolute(),
        name=name,
        kind=kind,
        producer=dict(producer),
        factory=factory,
        shape=tuple(shape),
        dtype=dtype or ("float32" if kind == "float" else ""),
        given=given,
        batch_size=batch_size,
        short_side_px=short_side_px,
        workers=workers,
    )
    tasks = [
        ShardTask(
            split=split, shard=number, samples=part.starts[number + 1] - part.starts[number], sha256=shard["sha256"]
        )
        for split, part in corpus.splits.items()
        for number, shard in enumerate(part.shards)
    ]
    try:
        with _locked(job.folder):
            done = _begin(job, corpus, overwrite)
            missing = [task for task in tasks if task.place not in done]
            answers = run or _runner(num_cpus, num_gpus)
            _collect(job, answers(job, missing), done, tasks, progress or no_progress)
            rows = [done[task.place] for task in tasks]
            _finish(job, corpus, tasks, rows, max_bad_fraction)
    except OSError as error:
        raise Failure(f"{error.filename or job.folder} cannot be written: {error.strerror or error}.") from error
    return ColumnResult(
        name=name,
        folder=job.folder,
        samples=sum(row["samples"] for row in rows),
        given=sum(row["given"] for row in rows),
        quarantined=sum(len(row["quarantine"]) for row in rows),
        reasons=dict(Counter(bad["code"] for row in rows for bad in row["quarantine"])),
        shards=len(tasks),
        reused=len(tasks) - len(missing),
        seconds=time.monotonic() - started,
    )


Done = dict[tuple[str, int, str], dict[str, Any]]
"""Rows of shards.jsonl by (split, shard number, sha256 of the tar)."""


def _runner(num_cpus: float, num_gpus: float) -> Runner:
    from pipelines.column_workers import run_tasks

    return lambda job, tasks: run_tasks(job, tasks, num_cpus, num_gpus)


def _begin(job: ColumnJob, corpus: Corpus, overwrite: bool) -> Done:
    """What is done already. A column of another producer is refused, or removed; a finished one is opened again."""
    log, finished = job.folder / "shards.jsonl", _read_json(job.folder / "column.json")
    rows = read_lines(log)
    if any(row.get("producer") != job.producer_digest for row in [*rows, *_producers(finished)]):
        if not overwrite:
            raise UsageError(
                f"{job.folder} holds a column of another producer ({_said(finished)}): give this one another name, or "
                "overwrite that one."
            )
        (job.folder / "column.json").unlink(missing_ok=True)  # first: what follows makes it untrue
        log.unlink(missing_ok=True)
        rows, finished = [], {}
    whole = finished.get("corpus") == corpus.digest
    if finished and not whole:
        (job.folder / "column.json").unlink()
    done: Done = {}
    for row in {(row["split"], row["shard"]): row for row in rows}.values():  # the last word on each shard
        retry = not whole and any(bad["code"] in RETRIED for bad in row["quarantine"])
        if not retry and _on_disk(job, row):
            done[row["split"], row["shard"], row["tar"]] = row
    return done


def _on_disk(job: ColumnJob, row: Mapping[str, Any]) -> bool:
    """Whether the file of a logged row is there and was made from that tar: a kill may leave it newer than the log."""
    path = job.folder / row["name"]
    try:
        if path.stat().st_size != row["bytes"]:
            return False
        with pa.memory_map(str(path)) as source:
            said = pa.ipc.open_file(source).schema.metadata or {}
    except (OSError, pa.ArrowInvalid):
        return False
    return said.get(b"tar") == row["tar"].encode() and said.get(b"producer") == job.producer_digest.encode()


def _producers(finished: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"producer": finished.get("producer_digest")}] if finished else []


def _said(finished: Mapping[str, Any]) -> str:
    """A producer in a few words."""
    producer = finished.get("producer", {})
    return str(producer.get("model") or producer.get("name") or "unfinished")


def _collect(
    job: ColumnJob, answers: Iterator[dict[str, Any]], done: Done, tasks: Sequence[ShardTask], tell: Progress
) -> None:
    """Log answers as they come, so that a kill costs only what is in flight; the first fatal one ends the job."""
    total = sum(task.samples for task in tasks)
    ready = sum(task.samples for task in tasks if task.place in done)
    tell(ready, total, job.name)
    log = job.folder / "shards.jsonl"
    end_torn_line(log)
    with open(log, "a", encoding="utf-8") as target:
        for answer in answers:
            if "fatal" in answer:
                raise Failure(f"column {job.name}: {answer['fatal']}")
            row = {**answer, "producer": job.producer_digest}
            target.write(json.dumps(row, ensure_ascii=False) + "\n")
            target.flush()
            done[row["split"], row["shard"], row["tar"]] = row
            ready += row["samples"]
            tell(ready, total, job.name)
    lacking = [task for task in tasks if task.place not in done]
    if lacking:
        raise Failure(f"column {job.name}: {len(lacking)} shards were not answered for; the same command goes on.")


def _finish(
    job: ColumnJob,
    corpus: Corpus,
    tasks: Sequence[ShardTask],
    rows: Sequence[dict[str, Any]],
    max_bad_fraction: float,
) -> None:
    """Quarantine, column.json, and no file that neither names."""
    quarantine = [bad for row in rows for bad in row["quarantine"]]
    write_lines(job.folder / "quarantine.jsonl", quarantine)
    given, samples = sum(row["given"] for row in rows), sum(row["samples"] for row in rows)
    if len(quarantine) > max_bad_fraction * (samples - given):
        codes = ", ".join(f"{n} {code}" for code, n in Counter(bad["code"] for bad in quarantine).most_common())
        raise Failure(
            f"column {job.name}: {len(quarantine)} of {samples - given} rows have no value ({codes}), more than the "
            f"allowed share of {max_bad_fraction:g}; see {job.folder / 'quarantine.jsonl'}."
        )
    files: dict[str, list[dict[str, Any]]] = {split: [] for split in corpus.splits}
    for task, row in zip(tasks, rows, strict=True):
        files[task.split].append({name: row[name] for name in ("name", "bytes", "sha256", "samples")})
    document = {
        "format": FORMAT,
        "name": job.name,
        "kind": job.kind,
        "corpus": corpus.digest,
        "producer": dict(job.producer),
        "producer_digest": job.producer_digest,
        "shape": list(job.shape),
        "dtype": job.dtype,
        "samples": samples,
        "given": given,
        "quarantined": len(quarantine),
        "splits": files,
    }
    write_lines(job.folder / "shards.jsonl", rows)
    replace_file(job.folder / "column.json", (json.dumps(document, ensure_ascii=False) + "\n").encode(), sync=True)
    names = {row["name"] for row in rows}
    for path in [*job.folder.glob("*.arrow"), *job.folder.glob(".*.arrow.tmp-*"), *job.folder.glob(".flight-*")]:
        if path.name not in names:
            path.unlink(missing_ok=True)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Column:
    """A finished column, opened. Files are mapped, not read; it may travel to workers.

    Attributes:
        name, kind, producer: as computed.
        folder: of its files.
        shape, dtype: of arrays.
        files: file names by split, in shard order.
        starts: first sample number of each file by split, and the number of all at the end.
        stamp: tells this state of the column from others at the same place.
    """

    name: str
    kind: str
    producer: Mapping[str, Any]
    folder: Path
    shape: tuple[int, ...]
    dtype: str
    files: Mapping[str, Sequence[str]] = field(repr=False)
    starts: Mapping[str, Sequence[int]] = field(repr=False)
    stamp: str = field(repr=False, default="")

    def value(self, split: str, sample: int) -> Value | None:
        """The value of a sample; None where it failed (quarantine.jsonl says why). Arrays are read-only views."""
        batch, row = self._row(split, sample)
        cell = batch.column("value")[row]
        if not cell.is_valid:
            return None
        if self.kind != "array":
            value: Value = cell.as_py()
            return value
        size = int(np.prod(self.shape))
        values = batch.column("value").storage.values.to_numpy(zero_copy_only=True)
        return values[row * size : (row + 1) * size].reshape(self.shape)

    def is_given(self, split: str, sample: int) -> bool:
        """Whether the value came with the corpus, and not from the producer."""
        batch, row = self._row(split, sample)
        return bool(batch.column("given")[row].as_py())

    def provenance(self, split: str, sample: int) -> dict[str, Any]:
        """Where a text comes from: {"key", "producer" ({"name": "corpus"} for a given one), "sha256" of the text}.

        Raises:
            UsageError: the column holds no text.
        """
        if self.kind != "text":
            raise UsageError(f"column {self.name} holds no text, so that it has no provenance a row.")
        batch, row = self._row(split, sample)
        text = batch.column("value")[row].as_py()
        return {
            "key": batch.column("key")[row].as_py(),
            "producer": {"name": "corpus"} if batch.column("given")[row].as_py() else dict(self.producer),
            "sha256": hashlib.sha256(text.encode()).hexdigest() if text is not None else "",
        }

    def _row(self, split: str, sample: int) -> tuple[pa.RecordBatch, int]:
        if split not in self.files:
            raise unknown(f"split of column {self.name}", split, self.files)
        starts = self.starts[split]
        if not 0 <= sample < starts[-1]:
            raise IndexError(f"sample {sample} is not among the {starts[-1]} of split {split}")
        shard = bisect.bisect_right(starts, sample) - 1
        return _mapped(self.folder / self.files[split][shard], self.stamp), sample - starts[shard]


@lru_cache(maxsize=256)
def _mapped(path: Path, stamp: str) -> pa.RecordBatch:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise Failure(f"{path} cannot be read: {error}.") from error


def list_columns(corpus: Corpus) -> list[str]:
    """Names of the finished columns of a corpus, for this or another state of it."""
    return sorted(path.parent.name for path in (corpus.folder / FOLDER).glob("*/column.json"))


def open_column(corpus: Corpus, name: str) -> Column:
    """Open a finished column.

    Raises:
        UsageError: no such column (with the near one), an unfinished one, or one of another state of the corpus.
    """
    folder = corpus.folder / FOLDER / name
    document = _read_json(folder / "column.json")
    if not document:
        if (folder / "shards.jsonl").exists():
            raise UsageError(f"column {name} of {corpus.folder} is not finished: run the command that makes it again.")
        raise unknown(f"column of {corpus.folder}", name, list_columns(corpus))
    if document.get("format") != FORMAT:
        raise UsageError(f"{folder / 'column.json'} is not a column of format {FORMAT}.")
    if document["corpus"] != corpus.digest:
        raise UsageError(
            f"column {name} was computed for another state of {corpus.folder}: run the command that made it again "
            "(shards that did not change are kept)."
        )
    files = document["splits"]
    return Column(
        name=name,
        kind=document["kind"],
        producer=document["producer"],
        folder=folder,
        shape=tuple(document["shape"]),
        dtype=document["dtype"],
        files={split: [entry["name"] for entry in entries] for split, entries in files.items()},
        starts={
            split: list(itertools.accumulate((entry["samples"] for entry in entries), initial=0))
            for split, entries in files.items()
        },
        stamp=hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest(),
    )


def verify_column(corpus: Corpus, name: str) -> list[str]:
    """One sentence for every file of a column that is not as column.json says; empty where all is well."""
    column, problems = open_column(corpus, name), []
    for entry in itertools.chain.from_iterable(_read_json(column.folder / "column.json")["splits"].values()):
        path = column.folder / entry["name"]
        try:
            with open(path, "rb") as source:
                found = hashlib.file_digest(source, "sha256").hexdigest()
            if found != entry["sha256"]:
                problems.append(f"{path}: sha256 is {found}, column.json says {entry['sha256']}.")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}.")
    return problems


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    return document if isinstance(document, dict) else {}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the column against a second computation; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RetryLater(f"another process is computing {folder}.") from None
        yield
