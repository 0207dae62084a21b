"""Compute columns in worker processes: read the pictures of a shard, call the model on batches, write the values.

A worker writes the file of a shard itself, so values never travel through the object store. Pictures of the next batch
are read and decoded while the model works on this one. A batch that fails is tried again one picture at a time. A file
lists the pictures in work. After a death the model gets each of them alone. A picture over which MAX_DEATHS processes
died alone is quarantined as "crashed".
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from components.images import decode, resize_short_side
from components.types import Image, SampleError
from components.writing import whole_file
from pipelines.core.deaths import MAX_DEATHS, Attempt, Marks, WorkersDied
from pipelines.core.errors import Failure, RestorayError
from pipelines.core.pool import Pool, answers_of
from pipelines.corpus.columns.spec import ColumnJob, ColumnSpec, ShardAnswer, ShardTask, Value, Worker
from pipelines.corpus.shards import STORED_LIMITS, Corpus, open_corpus, read_sample

READERS = 4  # threads that read and decode; decoders release Python's lock
LONGEST_DETAIL = 500  # characters of a quarantine row's sentence
IN_WORK = ".flight-"
"""Prefix of the files that name what is in work, in the column's folder."""
LOADING = f"{IN_WORK}loading"
"""Name of the mark of processes that load the model."""

Outcome = Value | SampleError
Item = TypeVar("Item")
Result = TypeVar("Result")


def run_tasks(job: ColumnJob, tasks: Sequence[ShardTask], pool: Pool) -> Iterator[ShardAnswer]:
    """Compute shards with the worker of the job's column, see answers_of.

    Args:
        pool: where the workers run; its `batch_size` counts shards.
    """
    return answers_of(functools.partial(ShardWorker, job, pool.others), tasks, pool)


def apply_worker(worker: Worker, images: Sequence[Image], keys: Sequence[str]) -> list[Outcome]:
    """A value or an error for each picture: a batch that raises is tried again one picture at a time."""
    try:
        values = list(worker(images, keys))
        if len(values) != len(images):
            raise ValueError(f"{len(values)} values for {len(images)} pictures")
        return values
    except Exception as error:  # noqa: BLE001 - an error over one picture must not cost the others
        if len(images) > 1:
            alone = (apply_worker(worker, [image], [key]) for image, key in zip(images, keys, strict=True))
            return [value for values in alone for value in values]
        if isinstance(error, SampleError):
            return [error]
        return [SampleError("failed", f"{type(error).__name__}: {error}", keys[0])]


def filled_batches(
    call: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item], rows: int
) -> list[Result]:
    """Call a model on batches of exactly `rows` items; the last batch is filled up with its first item.

    The order in which sums are added follows the shape of a batch. So an item's result does not depend on its batch.
    """
    results: list[Result] = []
    for start in range(0, len(items), rows):
        batch = list(items[start : start + rows])
        results += call([*batch, *[batch[0]] * (rows - len(batch))])[: len(batch)]
    return results


# --- one shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sample of a shard, read and decoded.

    Attributes:
        place: number of the sample in the shard.
        key: key of the sample.
        sha256: of the picture's bytes; "" where they could not be read.
        content: uint8 picture [H, W, 3], or what is wrong with it.
    """

    place: int
    key: str
    sha256: str
    content: Image | SampleError


@dataclass(kw_only=True)
class OpenShard:
    """One shard while its values are computed.

    Attributes:
        job, task: what is computed, and for which shard.
        corpus: the opened corpus.
        source: split and file name of the tar.
        first: sample number of place 0.
        keys: keys of the samples.
        outcomes: values and errors by place.
        existing: places whose value came with the corpus; their outcomes are there from the beginning.
        shas: sha256 of the pictures' bytes by place, for pictures that were read.
    """

    job: ColumnJob
    task: ShardTask
    corpus: Corpus
    source: str
    first: int
    keys: Sequence[str]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    existing: set[int] = field(default_factory=set)
    shas: dict[int, str] = field(default_factory=dict)

    def missing(self) -> list[int]:
        """Places without an outcome."""
        return [place for place in range(len(self.keys)) if place not in self.outcomes]

    def read(self, place: int) -> Picture:
        """The picture at a place, shrunk to the column's `short_side_px`."""
        sha256 = ""
        content: Image | SampleError
        try:
            data = read_sample(self.corpus, self.task.split, self.first + place)
            sha256 = hashlib.sha256(data).hexdigest()
            content = decode(data, STORED_LIMITS, self.keys[place])
            if (limit := self.job.column.short_side_px) and min(content.shape[:2]) > limit:
                content = resize_short_side(content, limit)
        except SampleError as error:
            content = error
        return Picture(place=place, key=self.keys[place], sha256=sha256, content=content)

    def settle(self, place: int, outcome: object, sha256: str = "") -> None:
        """Note the value or error of a place."""
        self.outcomes[place] = checked_value(self.job.column, outcome)
        if sha256:
            self.shas[place] = sha256

    def write(self) -> dict[str, Any]:
        """Write the shard's file, and return its row of shards.jsonl, see ShardAnswer.

        Raises:
            Failure: the model raised on every one of several pictures, so the model is broken and not the pictures.
        """
        computed = [outcome for place, outcome in self.outcomes.items() if place not in self.existing]
        failed = [outcome for outcome in computed if isinstance(outcome, SampleError) and outcome.code == "failed"]
        if len(failed) > 1 and all(isinstance(outcome, SampleError) for outcome in computed):
            raise Failure(f"the model fails on every picture, at last with {failed[-1].detail}")
        quarantine = [
            {
                "key": key,
                "source": self.source,
                "stage": self.job.column.name,
                "code": outcome.code,
                "detail": _line(outcome.detail),
                "bytes_sha256": self.shas.get(place, ""),
            }
            for place, key in enumerate(self.keys)
            if isinstance(outcome := self.outcomes[place], SampleError)
        ]
        outcomes = (self.outcomes[place] for place in range(len(self.keys)))
        values = [None if isinstance(outcome, SampleError) else outcome for outcome in outcomes]
        marks = [place in self.existing and value is not None for place, value in enumerate(values)]
        return {
            "split": self.task.split,
            "shard": self.task.shard,
            "tar": self.task.sha256,
            **_write_file(self.job, self.task, self.keys, values, marks),
            "samples": len(self.keys),
            "given": sum(marks),
            "quarantine": quarantine,
        }


def _line(text: str) -> str:
    """One line of valid Unicode: errors of models are long, and may quote anything."""
    return " ".join(text.split())[:LONGEST_DETAIL].encode(errors="replace").decode()


def open_shard(job: ColumnJob, task: ShardTask) -> OpenShard:
    """Begin a shard: its keys, and the values that came with the corpus.

    Raises:
        Failure: the corpus has changed since the tasks were made.
    """
    corpus = _corpus(job.corpus_dir)
    part = corpus.split(task.split)
    tar = part.shards[task.shard]
    if tar["sha256"] != task.sha256:
        raise Failure(f"{corpus.folder} was curated again meanwhile: run the same command again.")
    first = part.starts[task.shard]
    entries = [part.locate(first + place)[1] for place in range(task.samples)]
    shard = OpenShard(
        job=job,
        task=task,
        corpus=corpus,
        source=f"{task.split}/{tar['name']}",
        first=first,
        keys=[entry["key"] for entry in entries],
    )
    for place, entry in enumerate(entries):
        value = job.column.existing(entry) if job.column.existing else None
        if value is not None:
            shard.existing.add(place)
            shard.settle(place, value)
    return shard


def _corpus(folder: Path) -> Corpus:
    """An opened corpus; it is kept until its index file changes."""
    path = folder / "index.json"
    return _open_corpus(folder, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=2)
def _open_corpus(folder: Path, mtime_ns: int) -> Corpus:
    return open_corpus(folder)


def answer_of(job: ColumnJob, compute: Callable[[], Mapping[str, Any]]) -> ShardAnswer:
    """The answer with the row that `compute` returns; errors that end the job become a fatal answer."""
    try:
        return ShardAnswer(row=compute())
    except OSError as error:
        return ShardAnswer(fatal=f"{error.filename or job.folder} cannot be written: {error.strerror or error}.")
    except RestorayError as error:
        return ShardAnswer(fatal=str(error))


class ShardWorker:
    """Computes shards in a worker process. The model is loaded when the first picture needs it.

    Every failure comes back as an answer: an exception would end the whole job.

    Args:
        job: what is computed.
        others: workers that may load the model at the same time.
    """

    def __init__(self, job: ColumnJob, others: int = 0) -> None:
        self.job, self.others = job, others
        self.worker: Worker | None = None

    def __call__(self, tasks: Sequence[ShardTask]) -> list[ShardAnswer]:
        """The answers in the order of the tasks."""
        return [answer_of(self.job, functools.partial(self._compute, task)) for task in tasks]

    def _compute(self, task: ShardTask) -> dict[str, Any]:
        """The row of one task."""
        shard = open_shard(self.job, task)
        attempt = Attempt(self.job.folder / f"{IN_WORK}{task.stem}")
        for place in attempt.lethal:
            shard.settle(place, SampleError("crashed", f"{MAX_DEATHS} processes died over this picture alone"))
        readers = ThreadPoolExecutor(READERS, "column-reader")
        try:
            for pictures in self._read(shard, attempt, readers):
                self._settle(shard, pictures)
        finally:
            readers.shutdown(cancel_futures=True)
        row = shard.write()
        attempt.finish()
        return row

    def _settle(self, shard: OpenShard, pictures: Sequence[Picture]) -> None:
        """Call the model on one batch."""
        for picture in pictures:
            if isinstance(picture.content, SampleError):
                shard.settle(picture.place, picture.content, picture.sha256)
        intact = [(p, p.content) for p in pictures if not isinstance(p.content, SampleError)]
        if intact:
            values = apply_worker(
                self._loaded_worker(), [image for _, image in intact], [picture.key for picture, _ in intact]
            )
            for (picture, _), value in zip(intact, values, strict=True):
                shard.settle(picture.place, value, picture.sha256)

    def _read(self, shard: OpenShard, attempt: Attempt, readers: ThreadPoolExecutor) -> Iterator[list[Picture]]:
        """Batches of pictures, read one batch ahead of the caller. A suspect goes alone, without reading ahead."""
        groups = _groups(shard.missing(), attempt.suspects, self.job.column.batch_size)
        ahead: list[Future[Picture]] = []
        for number, group in enumerate(groups):
            following = groups[number + 1] if number + 1 < len(groups) else []
            if attempt.suspects.intersection([*group, *following]):
                following = []
            attempt.work_on([*group, *following])
            current = ahead or [readers.submit(shard.read, place) for place in group]
            ahead = [readers.submit(shard.read, place) for place in following]
            yield [future.result() for future in current]

    def _loaded_worker(self) -> Worker:
        """The column's worker; a Failure where it cannot be made, or where processes die while they make it."""
        if self.worker is None:
            assert self.job.column.factory is not None, "a column without a factory needs another Runner"
            marks = Marks(self.job.folder)
            try:
                self.worker = marks.load(LOADING, self.others, self.job.column.factory)
            except (WorkersDied, KeyboardInterrupt):
                marks.forget(LOADING)  # the next run tries again; an interrupt by the user is not a death
                raise
            except RestorayError:
                raise
            except Exception as error:  # any error while loading ends the job with one sentence
                raise Failure(f"the model cannot be loaded: {type(error).__name__}: {error}") from error
        return self.worker


def _groups(places: Sequence[int], suspects: set[int], batch_size: int) -> list[list[int]]:
    """Batches in order; each suspect is a batch of its own."""
    groups: list[list[int]] = [[]]
    for place in places:
        if place in suspects:
            groups += [[place], []]
        else:
            if len(groups[-1]) == batch_size:
                groups.append([])
            groups[-1].append(place)
    return [group for group in groups if group]


# --- values -----------------------------------------------------------------------------------------------------------


def checked_value(column: ColumnSpec, value: object) -> Outcome:
    """A worker's value as the column stores it, or an error.

    Codes: not_text, not_bytes, wrong_shape, not_finite, out_of_range. The worker itself must judge the bytes of a
    picture.
    """
    if isinstance(value, SampleError):
        return value
    if column.kind == "picture":
        return value if isinstance(value, bytes) else SampleError("not_bytes", f"got {type(value).__name__}")
    if column.kind == "text":
        if not isinstance(value, str):
            return SampleError("not_text", f"expected text, got {type(value).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            return SampleError("not_text", "the text holds half a character (a lone surrogate)")
        return value
    array = np.asarray(value)
    if array.shape != column.shape or array.dtype.kind not in "fiu":
        return SampleError("wrong_shape", f"expected numbers of shape {column.shape}, got {array.dtype} {array.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(column.dtype)
    if not np.isfinite(array).all():
        return SampleError("not_finite", "the value holds NaN or infinity")
    if not np.isfinite(cast).all() or (cast.dtype.kind in "iu" and (cast != array).any()):
        return SampleError("out_of_range", f"the value holds a number that {column.dtype} cannot")
    return float(cast) if column.kind == "float" else cast


def _write_file(
    job: ColumnJob, task: ShardTask, keys: Sequence[str], values: Sequence[Value | None], marks: Sequence[bool]
) -> dict[str, Any]:
    """Write the Arrow file of a shard; returns {"name", "bytes", "sha256"}.

    Args:
        marks: whether a value came with the corpus.
    """
    columns = [pa.array(keys, pa.string()), _arrow_values(job.column, values), pa.array(marks, pa.bool_())]
    batch = pa.RecordBatch.from_arrays(columns, names=["key", "value", "given"])
    batch = batch.replace_schema_metadata({"tar": task.sha256, "producer": job.column.producer_digest})
    path = job.folder / f"{task.stem}.arrow"
    with whole_file(path, sync=True) as draft:
        with open(draft.temporary, "wb") as target, pa.ipc.new_file(target, batch.schema) as writer:
            writer.write_batch(batch)
        with open(draft.temporary, "rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        size = draft.temporary.stat().st_size
    return {"name": path.name, "bytes": size, "sha256": digest}


def _arrow_values(column: ColumnSpec, values: Sequence[Value | None]) -> pa.Array:
    """Values of one shard as an Arrow array with nulls."""
    if column.kind == "text":
        return pa.array(values, pa.string())
    if column.kind == "picture":
        return pa.array(values, pa.large_binary())  # a shard of inputs may exceed 2 GiB
    kind = pa.from_numpy_dtype(np.dtype(column.dtype))
    if column.kind == "float":
        return pa.array([None if value is None else np.dtype(column.dtype).type(value) for value in values], kind)
    blank = np.zeros(column.shape, column.dtype)
    flat = np.concatenate([np.ravel(blank if value is None else value) for value in values]).astype(column.dtype)
    missing = pa.array([value is None for value in values])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat, kind), int(np.prod(column.shape)), mask=missing)
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(kind, column.shape), storage)
