"""`restoray restore`: a folder of pictures through a pool of restoring workers, resumable and with a quarantine.

    <out>/KEY.png             results; text chunks say how each was made
    <out>/records.jsonl       a line per result: key, source, source_sha256, output, output_sha256, width, height,
                              seconds, seed, model_digest, options_digest, reference_sha256, build (if unusual)
    <out>/quarantine.jsonl    a line per picture that could not be restored: key, source, stage, code, detail,
                              bytes_sha256

Workers get paths and return records: pictures never pass through the driver. A result is renamed into place before its
record is written, so a job killed anywhere resumes: a picture is skipped only if its record matches this job's model,
options and seed, and both files have the recorded sha256. A picture that kills its worker twice is quarantined: each
worker leaves a mark beside the results before it starts on a picture and wipes it away afterwards.

Only files of ours are ever overwritten or deleted: those that a record names, or that say that they were made from this
very source. A result is deleted only when its source has changed and cannot be read as a picture any more.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from components.images import Limits, probe, read_png_text
from components.options import OptionCheck
from components.restoring import Ask, Identity, Picture, file_key, parse_ask, picture_seed, restore_batch
from components.types import Restorer, SampleError
from pipelines.console import Progress, no_progress
from pipelines.errors import Failure, RetryLater, UsageError
from pipelines.heldout import prepare_heldout as prepare_heldout  # the step before this one in a plan
from pipelines.rows import read_lines, replace_file, write_lines
from pipelines.sources import SIDECARS, is_output

Factory = Callable[[], Restorer]
"""Makes the restorer inside a worker; picklable."""

THREADS = 1
"""Torch threads of a worker, in batch jobs and in the service: their number can change the last bit of a sum."""

MAX_BLOCKS = 2000  # of a Ray dataset: a block is the unit in which records come back, but each costs the scheduler
MAX_DEATHS = 2  # of workers, by one picture or by loading the model
OF_THE_RESTORER = frozenset({"refused", "failed", "out_of_memory"})
"""Reason codes that say nothing about the source: an earlier result stays as good as it was."""

HOPELESS = 3  # equal failures from the first picture on, none restored: the job is wrong, not the pictures


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    """What a job did: counts of pictures, and where things are.

    Attributes:
        restored: made now. skipped: up to date from an earlier run. quarantined: could not be restored.
        ignored: files that are no pictures by their suffix (lists, notes).
        folder: where the PNGs lie.
    """

    restored: int
    quarantined: int
    skipped: int
    ignored: int
    folder: Path
    records: Path
    quarantine: Path


def load_restorer(model: Path, options: Mapping[str, Any]) -> Restorer:
    """The restorer of a model folder; imported here so that only workers pay for the system's imports."""
    from components.systems import build_restorer

    restorer: Restorer = build_restorer(model, **options)
    return restorer


def model_identity(model: str | Path) -> tuple[Path, Identity]:
    """The folder of a model (a path or a shipped name) and what it says of itself.

    Raises:
        UsageError: there is no such model, its model.json is broken, or its system restores nothing.
    """
    from components.models import ModelError, load_model
    from components.systems import SYSTEMS

    try:
        found = load_model(model)
    except ModelError as error:
        raise UsageError(str(error)) from error
    info = found.info
    system = SYSTEMS.get(str(info["system"]))
    if system is not None and system.check_options is None:
        raise UsageError(f"{model} is a {info['system']} model, which restores nothing: name a restoration model.")
    recipe = info.get("recipe") or {}
    identity = Identity(
        name=str(info["name"]),
        system=str(info["system"]),
        recipe=str(recipe.get("name") or info["name"]),
        digest=found.digest,
        licence=str(info.get("licence", "unstated")),
        permitted_use=str(info.get("permitted_use", "unstated")),
    )
    return found.path.resolve(), identity


def option_check(system: str) -> OptionCheck:
    """What judges the options of a system; one that is not in SYSTEMS takes them as they are until it restores."""
    from components.systems import SYSTEMS

    found = SYSTEMS.get(system)
    return dict if found is None or found.check_options is None else found.check_options


def restore_folder(
    model: str | Path,
    src: Path,
    out: Path,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    factory: Factory | None = None,
    batch_size: int = 1,
    actors: int = 1,
    progress: Progress | None = None,
    on_ray: bool = True,
    *,
    build_options: Mapping[str, Any] | None = None,
    limits: Limits = Limits(),
    num_gpus: float = 0.0,
    threads: int = THREADS,
    seeds: Mapping[str, int] | None = None,
    references: Path | None = None,
) -> RestoreResult:
    """Restore every picture below `src` (or the one picture that it is) into `out`.

    Args:
        model: model folder or shipped name.
        options: prompt, negative_prompt, width, height, and the system's own options, for every picture.
        seed: the job's; a picture's own seed is `picture_seed(seed, key)` unless `seeds` gives one by key.
        factory: makes the restorer in each worker; the default builds the model's own system.
        batch_size: pictures restored together.
        actors: workers at most; they start as needed.
        on_ray: False runs in this process, with the same results.
        build_options: given to the system when the restorer is built (device, precision).
        num_gpus: GPUs of one worker, a fraction allowed.
        threads: torch threads of one worker. references: folder of second pictures by key, if options ask for them.

    Raises:
        UsageError: no such model, no pictures or references, bad options, or a result would overwrite a foreign file.
        RetryLater: another job works on `out`.
        Failure: `out` cannot be written, the model cannot be loaded, or nothing could be restored for one and the
            same reason.
    """
    if batch_size < 1 or actors < 1:
        raise UsageError(f"batch_size and actors must be at least 1, got {batch_size} and {actors}")
    folder, identity = model_identity(model)
    try:
        ask = parse_ask(options or {}, option_check(identity.system))
    except ValueError as error:
        raise UsageError(str(error)) from error
    sources, ignored = list_pictures(src, out)
    beside = list_pictures(references)[0] if references is not None else {}
    if references is not None and not set(beside) & set(sources):
        raise UsageError(f"no picture in {references} has the name of one in {src}")
    with _own_folder(out):
        job = Job(out.absolute())
        entries = [
            {"key": key, "path": str(path), "seed": (seeds or {}).get(key, picture_seed(seed, key))}
            | ({"reference": str(beside[key])} if key in beside else {})
            for key, path in sources.items()
        ]
        done = job.open(sources)
        rows = [{"job": json.dumps({**entry, "record": done.get(str(entry["key"]))})} for entry in entries]
        worker = {
            "factory": factory or functools.partial(load_restorer, folder, dict(build_options or {})),
            "identity": identity,
            "ask": ask,
            "limits": limits,
            "out": str(job.out),
            "threads": threads,
            "others": actors - 1,
            "build": dict(build_options or {}),
        }
        if on_ray:
            answers = _through_ray(rows, worker, batch_size, actors, num_gpus)
        else:
            answers = _in_process(rows, worker, batch_size)
        counts = job.collect(answers, len(rows), progress or no_progress)
        return RestoreResult(
            restored=counts["restored"],
            quarantined=counts["quarantined"],
            skipped=counts["skipped"],
            ignored=ignored,
            folder=job.out,
            records=job.records,
            quarantine=job.quarantine,
        )


def list_pictures(src: Path, out: Path | None = None) -> tuple[dict[str, Path], int]:
    """Pictures by key, in order of their names, and how many other files were passed over.

    The key is the name without its suffix, folders joined by two underscores; where two files would share a key (also
    on file systems that ignore case) each keeps its suffix. Hidden files, sidecars and everything below `out`, or below
    a folder inside `src` that another run of ours wrote, stay out.

    Raises:
        UsageError: `src` does not exist, holds no picture, or is `out` itself.
    """
    if not src.exists():
        raise UsageError(f"{src} does not exist")
    if src.is_file():
        return {file_key(src.stem): src.absolute()}, 0
    if out is not None and out.resolve() == src.resolve():
        raise UsageError(f"{src} is both input and output; choose another output folder")
    found: list[Path] = []
    ignored = 0
    for here, folders, names in os.walk(src):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not is_output(Path(here) / f, out))
        for name in sorted(names):
            path = Path(here) / name
            if name.startswith(".") or path.suffix.lower() in SIDECARS or not path.is_file():
                ignored += 1
            else:
                found.append(path)
    if not found:
        raise UsageError(f"{src} holds no pictures")
    names_of = {path: "__".join(path.relative_to(src).parts) for path in found}
    short = {path: file_key(name[: len(name) - len(path.suffix)]) for path, name in names_of.items()}
    shared: dict[str, int] = {}
    for key in short.values():
        shared[key.casefold()] = shared.get(key.casefold(), 0) + 1
    keys: dict[str, Path] = {}
    for path, key in short.items():
        if shared[key.casefold()] > 1:
            key = file_key(names_of[path])
        if key in keys:  # a.jpg and A.JPG folded, or names that differ only in what file_key replaces
            key = file_key(f"{key}-{hashlib.sha256(os.fsencode(path.relative_to(src))).hexdigest()[:8]}")
        keys[key] = path.absolute()
    return keys, ignored


class Job:
    """The driver's books of one output folder: what was made there, and the files that say so."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.records, self.quarantine = out / "records.jsonl", out / "quarantine.jsonl"

    def open(self, sources: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        """Tidy up after an earlier job; returns the newest record by key. A record stays until another replaces it.

        Raises:
            UsageError: a file that is not ours stands where a result would go.
        """
        try:
            records = {record["key"]: record for record in read_lines(self.records)}
            self._check_places(sources, records)
            marks = _marks(self.out)
            marks.mkdir(exist_ok=True)
            for stale in (*marks.iterdir(), *self.out.glob(".*.tmp-*")):
                stale.unlink()
            write_lines(self.records, list(records.values()))
            write_lines(self.quarantine, [q for q in read_lines(self.quarantine) if q["key"] not in sources])
        except OSError as error:
            raise Failure(f"cannot write to {self.out}: {error.strerror or error}") from error
        return records

    def _check_places(self, sources: Mapping[str, Path], records: Mapping[str, Any]) -> None:
        for key, source in sources.items():
            place = self.out / f"{key}.png"
            if not os.path.lexists(place):
                continue
            if place.resolve() == source.resolve() or (key not in records and not _made_from(place, key, source)):
                raise UsageError(
                    f"{place} would be overwritten, and no record says that it is a result made there; "
                    "choose another output folder"
                )

    def collect(self, answers: Iterator[dict[str, Any]], of: int, progress: Progress) -> dict[str, int]:
        """Write down what the workers say, as they say it; returns counts by status."""
        counts = {"restored": 0, "quarantined": 0, "skipped": 0}
        reasons: list[str] = []
        progress(0, of)
        try:
            with (
                self.records.open("a", encoding="utf-8") as records,
                self.quarantine.open("a", encoding="utf-8") as quarantine,
            ):
                for number, answer in enumerate(answers, start=1):
                    status, row = answer["status"], answer["row"]
                    if status == "fatal":
                        raise Failure(row["detail"])
                    counts[status] += 1
                    if status != "skipped":
                        target = records if status == "restored" else quarantine
                        target.write(json.dumps(row, ensure_ascii=False) + "\n")
                        target.flush()
                    if status == "quarantined":
                        reasons.append(f"{row['code']}: {row['detail']}")
                        self._check_hope(counts, reasons, of, row)
                    progress(number, of, row["key"])
        except OSError as error:
            raise Failure(f"cannot write to {self.out}: {error.strerror or error}") from error
        told = counts["restored"] + counts["skipped"] + counts["quarantined"]
        if told != of:
            raise Failure(f"{of - told} of {of} pictures came back without an answer; the same command continues")
        self._tidy()
        return counts

    def _tidy(self) -> None:
        """One line a key, in order: arrival depends on timing, the finished files should not."""
        quarantine = sorted(read_lines(self.quarantine), key=itemgetter("key"))
        bad = {row["key"] for row in quarantine}
        every = {row["key"]: row for row in read_lines(self.records)}
        records = {key: row for key, row in every.items() if key not in bad or (self.out / row["output"]).exists()}
        write_lines(self.records, sorted(records.values(), key=itemgetter("key")))
        write_lines(self.quarantine, quarantine)

    def _check_hope(self, counts: Mapping[str, int], reasons: Sequence[str], of: int, row: Mapping[str, Any]) -> None:
        """End a job whose every picture fails in the restorer for one reason, such as a misspelt option."""
        if row["code"] not in ("refused", "failed") or counts["restored"] + counts["skipped"] or len(set(reasons)) > 1:
            return
        if len(reasons) >= min(HOPELESS, of):
            kind = UsageError if row["code"] == "refused" else Failure
            raise kind(f"nothing can be restored: {row['detail']}")


class RestoreWorker:
    """Restores batches of jobs in a worker process. The model is loaded when the first picture needs it.

    Every failure comes back as a row: an exception would end the whole job, or be retried without end.
    """

    def __init__(
        self,
        factory: Factory,
        identity: Identity,
        ask: Ask,
        limits: Limits,
        out: str,
        threads: int = THREADS,
        others: int = 0,
        build: Mapping[str, Any] | None = None,
    ) -> None:
        self.factory, self.identity, self.ask, self.limits, self.build = factory, identity, ask, limits, build or {}
        self.out, self.threads, self.others = Path(out), threads, others
        self.restorer: Restorer | None = None
        self.broken = ""

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns in: job (JSON text). Columns out: answer (JSON text), one for each job, in order."""
        jobs = [json.loads(text) for text in batch["job"]]
        answers = self.restore(jobs)
        return {"answer": np.array([json.dumps(answer) for answer in answers], dtype=object)}

    def restore(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers {status, row} in the order of the jobs."""
        answers: dict[str, dict[str, Any]] = {}
        waiting: list[tuple[dict[str, Any], Picture]] = []
        for job in jobs:
            data = b""
            try:
                data = self._read(Path(job["path"]))
                reference = self._read(Path(job["reference"])) if "reference" in job else b""
                if self._up_to_date(job, data, reference):
                    answers[job["key"]] = {"status": "skipped", "row": {"key": job["key"]}}
                else:
                    probe(data, self.limits, job["key"])  # so that broken pictures do not wait for a model
                    picture = Picture(key=job["key"], data=data, seed=job["seed"], reference=reference)
                    waiting.append((job, picture))
            except SampleError as error:
                answers[job["key"]] = self._quarantined(job, error, data)
        if waiting and not self._loaded():
            answers.update({job["key"]: self._fatal(job, self.broken) for job, _ in waiting})
            waiting = []
        suspects = any(self._deaths(job["key"]) for job, _ in waiting)  # one of them killed a worker: one at a time
        for group in [[pair] for pair in waiting] if suspects else [waiting] if waiting else []:
            answers.update(self._restore_group(group))
        return [answers[job["key"]] for job in jobs]

    def _restore_group(self, group: Sequence[tuple[dict[str, Any], Picture]]) -> dict[str, dict[str, Any]]:
        assert self.restorer is not None
        keys = [picture.key for _, picture in group]
        if len(group) == 1 and self._deaths(keys[0]) >= MAX_DEATHS:
            job, picture = group[0]
            error = SampleError("worker_died", f"{MAX_DEATHS} workers died over this picture", picture.key)
            return {picture.key: self._quarantined(job, error, picture.data)}
        for key in keys:
            self._mark(key)
        start = time.perf_counter()
        pictures = [picture for _, picture in group]
        results = restore_batch(self.restorer, self.identity, pictures, self.ask, self.limits)
        seconds = (time.perf_counter() - start) / len(group)
        answers = {}
        for (job, picture), result in zip(group, results, strict=True):
            if isinstance(result, SampleError):
                answers[picture.key] = self._quarantined(job, result, picture.data)
            else:
                answers[picture.key] = self._written(job, picture, result, seconds)
            self._mark_file(picture.key).unlink(missing_ok=True)
        return answers

    def _read(self, path: Path) -> bytes:
        """The file's bytes, refused by size before they are read."""
        try:
            size = path.stat().st_size
            if size > self.limits.max_bytes:
                raise SampleError("too_large", f"{size} bytes exceed the limit of {self.limits.max_bytes}")
            return path.read_bytes()
        except OSError as error:
            raise SampleError("unreadable", error.strerror or str(error)) from error

    def _up_to_date(self, job: Mapping[str, Any], data: bytes, reference: bytes) -> bool:
        record = job["record"] or {}
        names = ("model_digest", "options_digest", "seed", "source_sha256", "reference_sha256")
        known = (self.identity.digest, self.ask.digest(), job["seed"])
        seen = hashlib.sha256(reference).hexdigest() if reference else None
        wanted = (*known, hashlib.sha256(data).hexdigest(), seen)
        if tuple(record.get(name) for name in names) != wanted or (record.get("build") or {}) != self.build:
            return False
        try:
            return hashlib.sha256((self.out / record["output"]).read_bytes()).hexdigest() == record["output_sha256"]
        except OSError:
            return False

    def _loaded(self) -> bool:
        if self.restorer is None and not self.broken:
            mark = _marks(self.out) / "loading"
            if self._count(mark) >= MAX_DEATHS + self.others:  # the others may be loading right now
                self.broken = f"workers died again and again while loading the model {self.identity.name}"
                return False
            self._add(mark)
            try:
                self.restorer = self.factory()
                set_threads(self.threads)
            except Exception as error:  # noqa: BLE001 - whatever loading may raise ends the job with one sentence
                self.broken = f"the model {self.identity.name} cannot be loaded: {type(error).__name__}: {error}"
            mark.unlink(missing_ok=True)
        return not self.broken

    def _written(self, job: Mapping[str, Any], picture: Picture, png: bytes, seconds: float) -> dict[str, Any]:
        output = f"{picture.key}.png"
        try:
            replace_file(self.out / output, png)
        except OSError as error:
            full = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            return self._fatal(job, f"cannot write {self.out / output}: {full}")
        row = {
            "key": picture.key,
            "source": _printable(job["path"]),
            "source_sha256": hashlib.sha256(picture.data).hexdigest(),
            "output": output,
            "output_sha256": hashlib.sha256(png).hexdigest(),
            "width": int.from_bytes(png[16:20], "big"),  # IHDR
            "height": int.from_bytes(png[20:24], "big"),
            "seconds": round(seconds, 3),
            "seed": picture.seed,
            "model_digest": self.identity.digest,
            "options_digest": self.ask.digest(),
            **({"build": self.build} if self.build else {}),
        }
        if picture.reference:
            row["reference_sha256"] = hashlib.sha256(picture.reference).hexdigest()
        return {"status": "restored", "row": row}

    def _quarantined(self, job: Mapping[str, Any], error: SampleError, data: bytes) -> dict[str, Any]:
        seen = hashlib.sha256(data).hexdigest() if data or error.code == "empty" else ""
        made_from = (job["record"] or {}).get("source_sha256", seen)
        if seen and seen != made_from and error.code not in OF_THE_RESTORER:
            (self.out / f"{job['key']}.png").unlink(missing_ok=True)
        row = {
            "key": job["key"],
            "source": _printable(job["path"]),
            "stage": "restore",
            "code": error.code,
            "detail": error.detail,
            "bytes_sha256": seen,
        }
        return {"status": "quarantined", "row": row}

    def _fatal(self, job: Mapping[str, Any], detail: str) -> dict[str, Any]:
        return {"status": "fatal", "row": {"key": job["key"], "detail": detail}}

    def _mark_file(self, key: str) -> Path:
        return _marks(self.out) / _hash(key)

    def _mark(self, key: str) -> None:
        self._add(self._mark_file(key))

    def _deaths(self, key: str) -> int:
        return self._count(self._mark_file(key))

    @staticmethod
    def _add(mark: Path) -> None:
        with mark.open("ab") as stream:
            stream.write(b".")

    @staticmethod
    def _count(mark: Path) -> int:
        return mark.stat().st_size if mark.exists() else 0


def set_threads(threads: int) -> None:
    """Fix torch's threads in this process, if a system brought torch in."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _in_process(rows: Sequence[dict[str, str]], worker: dict[str, Any], batch_size: int) -> Iterator[dict[str, Any]]:
    restorer = RestoreWorker(**worker)
    for start in range(0, len(rows), batch_size):
        yield from restorer.restore([json.loads(row["job"]) for row in rows[start : start + batch_size]])


def _through_ray(
    rows: Sequence[dict[str, str]], worker: dict[str, Any], batch_size: int, actors: int, num_gpus: float
) -> Iterator[dict[str, Any]]:
    """Answers in the order in which they come."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    from pipelines.cluster import local_ray

    batches = -(-len(rows) // batch_size)
    with local_ray():
        context = DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, False  # the console shows its own
        try:
            dataset = ray.data.from_items(list(rows), override_num_blocks=min(batches, MAX_BLOCKS)).map_batches(
                RestoreWorker,  # type: ignore[arg-type]
                fn_constructor_kwargs=worker,
                batch_size=batch_size,
                batch_format="numpy",
                # Elastic: a fixed pool as large as the cluster hung when a node was lost.
                compute=ActorPoolStrategy(min_size=1, max_size=min(actors, batches)),
                num_cpus=1,
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


@contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """Hold `out` for this process; the kernel lets go when the process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".restore.lock").open("a")
    except OSError as error:
        raise Failure(f"cannot write to {out}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RetryLater(f"another restore is working on {out}") from error
        yield


def _made_from(place: Path, key: str, source: Path) -> bool:
    """Whether a PNG says that it is this key's result from this source: a job was killed before it wrote the record."""
    try:
        text = read_png_text(place.read_bytes())
        made_from = hashlib.sha256(source.read_bytes()).hexdigest()
    except (OSError, SampleError):
        return False
    return (text.get("software"), text.get("key"), text.get("source_sha256")) == ("restoray", key, made_from)


def _marks(out: Path) -> Path:
    return out / ".attempts"


def _hash(key: str) -> str:
    return hashlib.sha256(f"key:{key}".encode()).hexdigest()[:24]


def _printable(path: str) -> str:
    """A path for JSON that others read: bytes that are no UTF-8 become question marks."""
    return path.encode("utf-8", "replace").decode("utf-8")
