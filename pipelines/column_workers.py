"""Who computes columns: a worker reads the pictures of a shard, calls the model on batches, and writes the values.

Pictures of the next batch are read and decoded while the model works on this one. What is in flight stands in a file,
so that a picture that kills its process is found: what was in flight then goes one at a time, and a picture over which
MAX_DEATHS processes died alone is quarantined as "crashed".
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.images import Limits, decode, resize_short_side
from components.types import Image, SampleError
from pipelines.columns import ColumnJob, ShardTask, Value, Worker
from pipelines.errors import Failure, RestorayError
from pipelines.rows import replace_file
from pipelines.shards import Corpus, open_corpus, read_sample

STORED_LIMITS = Limits(max_pixels=1 << 40, max_bytes=1 << 40, max_aspect=1e9, max_expansion=1e9)
"""Curation has already applied the corpus's own limits, which may be wider than the decoder's defaults."""
READERS = 4  # threads that read and decode; decoders release Python's lock
MAX_DEATHS = 2
LONGEST_DETAIL = 500  # characters of a quarantine row's sentence
MAX_BLOCKS = 4096  # of Ray Data; a block may hold several shards

Outcome = Value | SampleError


def run_tasks(
    job: ColumnJob, tasks: Sequence[ShardTask], num_cpus: float = 1.0, num_gpus: float = 0.0
) -> Iterator[dict[str, Any]]:
    """The answers of all tasks, in the order in which they come: a row of shards.jsonl, or {"fatal": why}."""
    if not tasks:
        return
    if job.workers == 0:
        worker = ShardWorker(job)
        try:
            yield from map(worker.compute, tasks)
        finally:
            worker.close()
        return
    yield from _through_ray(job, tasks, num_cpus, num_gpus)


def apply_worker(worker: Worker, images: Sequence[Image], keys: Sequence[str]) -> list[Outcome]:
    """A value or an error for each picture: a batch that raises is tried again one picture at a time."""
    try:
        values = list(worker(images, keys))
        if len(values) != len(images):
            raise ValueError(f"{len(values)} values for {len(images)} pictures")
        return values
    except Exception as error:  # noqa: BLE001 - one picture must never cost another, whatever it does to a model
        if len(images) > 1:
            alone = (apply_worker(worker, [image], [key]) for image, key in zip(images, keys, strict=True))
            return [value for values in alone for value in values]
        if isinstance(error, SampleError):
            return [error]
        return [SampleError("failed", f"{type(error).__name__}: {error}", keys[0])]


# --- one shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A sample that was read: its place in the shard, and its uint8 picture or what is wrong with it."""

    place: int
    key: str
    sha256: str
    found: Image | SampleError


@dataclass(kw_only=True)
class OpenShard:
    """One shard while its values come together.

    Attributes:
        job, task: what is computed, and where.
        corpus: where it is read from.
        source: split and file name of the tar.
        first: sample number of place 0.
        keys: of the samples.
        outcomes: values and errors by place; given values stand there from the beginning.
        given: their places.
        shas: sha256 of the pictures' bytes, of those that were read.
    """

    job: ColumnJob
    task: ShardTask
    corpus: Corpus
    source: str
    first: int
    keys: Sequence[str]
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    given: set[int] = field(default_factory=set)
    shas: dict[int, str] = field(default_factory=dict)

    def missing(self) -> list[int]:
        """Places without an outcome."""
        return [place for place in range(len(self.keys)) if place not in self.outcomes]

    def read(self, place: int) -> Picture:
        """The picture at a place, shrunk as the job says."""
        sha256 = ""
        found: Image | SampleError
        try:
            data = read_sample(self.corpus, self.task.split, self.first + place)
            sha256 = hashlib.sha256(data).hexdigest()
            found = decode(data, STORED_LIMITS, self.keys[place])
            if (limit := self.job.short_side_px) and min(found.shape[:2]) > limit:
                found = resize_short_side(found, limit)
        except SampleError as error:
            found = error
        return Picture(place=place, key=self.keys[place], sha256=sha256, found=found)

    def settle(self, place: int, outcome: object, sha256: str = "") -> None:
        """Note what a worker said of a place."""
        self.outcomes[place] = checked_value(self.job, outcome)
        if sha256:
            self.shas[place] = sha256

    def write(self) -> dict[str, Any]:
        """Write the shard's file at once, and return the answer to the task: a row of shards.jsonl.

        Raises:
            Failure: the model raised on every one of several pictures: then it is broken, and not they.
        """
        tried = [outcome for place, outcome in self.outcomes.items() if place not in self.given]
        failed = [outcome for outcome in tried if isinstance(outcome, SampleError) and outcome.code == "failed"]
        if len(failed) > 1 and all(isinstance(outcome, SampleError) for outcome in tried):
            raise Failure(f"the model fails on every picture, at last with {failed[-1].detail}")
        quarantine = [
            {
                "key": key,
                "source": self.source,
                "stage": self.job.name,
                "code": outcome.code,
                "detail": _line(outcome.detail),
                "bytes_sha256": self.shas.get(place, ""),
            }
            for place, key in enumerate(self.keys)
            if isinstance(outcome := self.outcomes[place], SampleError)
        ]
        found = (self.outcomes[place] for place in range(len(self.keys)))
        values = [None if isinstance(outcome, SampleError) else outcome for outcome in found]
        marks = [place in self.given and value is not None for place, value in enumerate(values)]
        said = {"split": self.task.split, "shard": self.task.shard, "tar": self.task.sha256}
        file = _write_file(self.job, self.task, self.keys, values, marks)
        return {**said, **file, "samples": len(self.keys), "given": sum(marks), "quarantine": quarantine}


def _line(text: str) -> str:
    """One line of valid Unicode: errors of models are long, and may quote anything."""
    return " ".join(text.split())[:LONGEST_DETAIL].encode(errors="replace").decode()


def open_shard(job: ColumnJob, task: ShardTask) -> OpenShard:
    """Begin a shard: its keys, and the values that are given.

    Raises:
        Failure: the corpus was changed since the tasks were made.
    """
    corpus = _corpus(job.corpus_dir)
    part = corpus.split(task.split)
    shard = part.shards[task.shard]
    if shard["sha256"] != task.sha256:
        raise Failure(f"{corpus.folder} was curated again meanwhile: run the same command again.")
    first = part.starts[task.shard]
    entries = [part.locate(first + place)[1] for place in range(task.samples)]
    opened = OpenShard(
        job=job,
        task=task,
        corpus=corpus,
        source=f"{task.split}/{shard['name']}",
        first=first,
        keys=[entry["key"] for entry in entries],
    )
    for place, entry in enumerate(entries):
        value = job.given(entry) if job.given else None
        if value is not None:
            opened.given.add(place)
            opened.settle(place, value)
    return opened


def _corpus(folder: Path) -> Corpus:
    """An opened corpus, kept for as long as its index file stays the same."""
    path = folder / "index.json"
    return _opened(folder, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=2)
def _opened(folder: Path, mtime_ns: int) -> Corpus:
    return open_corpus(folder)


class ShardWorker:
    """Computes shards in a worker process. The model is loaded when the first picture needs it.

    Every failure comes back as an answer: an exception would be retried without end.
    """

    def __init__(self, job: ColumnJob) -> None:
        self.job = job
        self.worker: Worker | None = None
        self.readers: ThreadPoolExecutor | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns in: task (JSON text). Columns out: answer (JSON text)."""
        answers = [json.dumps(self.compute(ShardTask(**json.loads(text)))) for text in batch["task"]]
        return {"answer": np.array(answers, dtype=object)}

    def compute(self, task: ShardTask) -> dict[str, Any]:
        """The answer to one task."""
        try:
            shard = open_shard(self.job, task)
            flight = Flight(self.job.folder / f".flight-{task.split}-{task.shard:05d}")
            for place in flight.condemned:
                shard.settle(place, SampleError("crashed", f"{MAX_DEATHS} processes died over this picture alone"))
            for pictures in self._read(shard, flight):
                self._settle(shard, pictures)
            answer = shard.write()
            flight.land()
            return answer
        except OSError as error:
            return {"fatal": f"{error.filename or self.job.folder} cannot be written: {error.strerror or error}."}
        except RestorayError as error:
            return {"fatal": str(error)}

    def close(self) -> None:
        """End the reading threads."""
        if self.readers is not None:
            self.readers.shutdown(cancel_futures=True)
            self.readers = None

    def _settle(self, shard: OpenShard, pictures: Sequence[Picture]) -> None:
        """Ask the model about one batch."""
        for picture in pictures:
            if isinstance(picture.found, SampleError):
                shard.settle(picture.place, picture.found, picture.sha256)
        whole = [(p, p.found) for p in pictures if not isinstance(p.found, SampleError)]
        if whole:
            answers = apply_worker(self._loaded(), [image for _, image in whole], [picture.key for picture, _ in whole])
            for (picture, _), answer in zip(whole, answers, strict=True):
                shard.settle(picture.place, answer, picture.sha256)

    def _read(self, shard: OpenShard, flight: Flight) -> Iterator[list[Picture]]:
        """Batches of read pictures, one batch ahead of the caller; suspects alone."""
        readers = self.readers = self.readers or ThreadPoolExecutor(READERS, "column-reader")
        groups = _groups(shard.missing(), flight.suspects, self.job.batch_size)
        ahead: list[Future[Picture]] = []
        for number, group in enumerate(groups):
            following = groups[number + 1] if number + 1 < len(groups) else []
            if flight.suspects.intersection([*group, *following]):
                following = []
            flight.take_off([*group, *following])
            current = ahead or [readers.submit(shard.read, place) for place in group]
            ahead = [readers.submit(shard.read, place) for place in following]
            yield [future.result() for future in current]

    def _loaded(self) -> Worker:
        """The worker; a Failure where it cannot be made, also where that kills one process after the other."""
        if self.worker is None:
            mark = self.job.folder / ".flight-loading"
            deaths = mark.stat().st_size if mark.exists() else 0
            if deaths >= MAX_DEATHS + self.job.workers:  # the others may be loading right now
                mark.unlink()
                raise Failure("processes died again and again while they loaded the model.")
            with mark.open("ab") as stream:
                stream.write(b".")
            try:
                self.worker = self.job.factory()
            except Exception as error:  # whatever loading may raise ends the job with one sentence
                raise Failure(f"the model cannot be loaded: {type(error).__name__}: {error}") from error
            finally:
                mark.unlink(missing_ok=True)
        return self.worker


class Flight:
    """What is being worked on, on disk: {"flight": places, "deaths": {place: processes that died over it alone}}.

    Attributes:
        suspects: places that were in flight when a process died, or have killed one: they go alone.
        condemned: places that have killed MAX_DEATHS processes alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.deaths: Counter[int] = Counter()
        self.suspects: set[int] = set()
        try:
            left = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return
        self.deaths.update({int(place): count for place, count in left["deaths"].items()})
        if len(left["flight"]) == 1:
            self.deaths[left["flight"][0]] += 1
        self.suspects = set(left["flight"]) | set(self.deaths)

    @property
    def condemned(self) -> list[int]:
        return [place for place, count in self.deaths.items() if count >= MAX_DEATHS]

    def take_off(self, places: Sequence[int]) -> None:
        """Write down what is worked on from now on."""
        replace_file(self.path, json.dumps({"flight": list(places), "deaths": self.deaths}).encode())

    def land(self) -> None:
        """The shard is done."""
        self.path.unlink(missing_ok=True)


def _groups(todo: Sequence[int], suspects: set[int], batch_size: int) -> list[list[int]]:
    """Batches in order; each suspect is one of its own."""
    groups: list[list[int]] = [[]]
    for place in todo:
        if place in suspects:
            groups += [[place], []]
        else:
            if len(groups[-1]) == batch_size:
                groups.append([])
            groups[-1].append(place)
    return [group for group in groups if group]


def _through_ray(
    job: ColumnJob, tasks: Sequence[ShardTask], num_cpus: float, num_gpus: float
) -> Iterator[dict[str, Any]]:
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    from pipelines.cluster import local_ray

    rows = [{"task": json.dumps(vars(task))} for task in tasks]
    with local_ray():
        context = DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, False  # the console shows its own
        try:
            dataset = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
                ShardWorker,  # type: ignore[arg-type]
                fn_constructor_kwargs={"job": job},
                batch_size=1,
                batch_format="numpy",
                # Elastic: a fixed pool as large as the cluster hung when a node was lost.
                compute=ActorPoolStrategy(min_size=1, max_size=min(job.workers, len(rows))),
                num_cpus=num_cpus,
                num_gpus=num_gpus or None,
            )
            for row in dataset.iter_rows():
                yield json.loads(row["answer"])
        except RayError as error:
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise Failure(
                f"Ray ended the job ({type(error).__name__}: {reason}); the same command continues"
            ) from error
        finally:
            context.enable_progress_bars = bars


# --- values -----------------------------------------------------------------------------------------------------------


def checked_value(job: ColumnJob, value: object) -> Outcome:
    """A worker's value as the column stores it, or why not: not_text, not_bytes, wrong_shape, not_finite, out_of_range.

    The bytes of a picture are the worker's to judge.
    """
    if isinstance(value, SampleError):
        return value
    if job.kind == "picture":
        return value if isinstance(value, bytes) else SampleError("not_bytes", f"got {type(value).__name__}")
    if job.kind == "text":
        if not isinstance(value, str):
            return SampleError("not_text", f"expected text, got {type(value).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            return SampleError("not_text", "the text holds half a character (a lone surrogate)")
        return value
    array = np.asarray(value)
    if array.shape != job.shape or array.dtype.kind not in "fiu":
        return SampleError("wrong_shape", f"expected numbers of shape {job.shape}, got {array.dtype} {array.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(job.dtype)
    if not np.isfinite(array).all():
        return SampleError("not_finite", "the value holds NaN or infinity")
    if not np.isfinite(cast).all() or (cast.dtype.kind in "iu" and (cast != array).any()):
        return SampleError("out_of_range", f"the value holds a number that {job.dtype} cannot")
    return float(cast) if job.kind == "float" else cast


def _write_file(
    job: ColumnJob, task: ShardTask, keys: Sequence[str], values: Sequence[Value | None], given: Sequence[bool]
) -> dict[str, Any]:
    """Write an Arrow file that readers see old or whole: {"name", "bytes", "sha256"}."""
    columns = [pa.array(keys, pa.string()), _arrow_values(job, values), pa.array(given, pa.bool_())]
    batch = pa.RecordBatch.from_arrays(columns, names=["key", "value", "given"])
    batch = batch.replace_schema_metadata({"tar": task.sha256, "producer": job.producer_digest})
    path = job.folder / f"{task.split}-{task.shard:05d}.arrow"
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as target:
            with pa.ipc.new_file(target, batch.schema) as writer:
                writer.write_batch(batch)
            target.flush()
            os.fsync(target.fileno())
        with open(temporary, "rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        size = temporary.stat().st_size
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": path.name, "bytes": size, "sha256": digest}


def _arrow_values(job: ColumnJob, values: Sequence[Value | None]) -> pa.Array:
    """Values of one shard as an Arrow array with nulls."""
    if job.kind == "text":
        return pa.array(values, pa.string())
    if job.kind == "picture":
        return pa.array(values, pa.large_binary())  # a shard of inputs may exceed 2 GiB
    kind = pa.from_numpy_dtype(np.dtype(job.dtype))
    if job.kind == "float":
        return pa.array([None if value is None else np.dtype(job.dtype).type(value) for value in values], kind)
    blank = np.zeros(job.shape, job.dtype)
    flat = np.concatenate([np.ravel(blank if value is None else value) for value in values]).astype(job.dtype)
    missing = pa.array([value is None for value in values])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(flat, kind), int(np.prod(job.shape)), mask=missing)
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(kind, job.shape), storage)
