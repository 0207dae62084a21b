"""The worker of a restoration job: reads pictures by path, writes results, returns records."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal, TypeVar

from components.images import Limits
from components.naming import printable
from components.picture_files import SUFFIXES, Encoded, probe_file
from components.restoring import Ask, Identity, Picture, Result, as_sample_error, request_of, restore_pictures
from components.types import Restorer, SampleError
from components.writing import write_error_reason
from pipelines.core.deaths import MAX_DEATHS, WorkersDied, marks_in
from pipelines.core.errors import RetryLater
from pipelines.core.places.files import put, remove
from pipelines.core.places.leases import Fence
from pipelines.core.places.place import Where
from pipelines.core.pool import THREADS, set_threads
from pipelines.restoration.models import Factory
from pipelines.restoration.parts import Source, read_source
from pipelines.restoration.prompts import JobCaptioner, PictureCaptioner

T = TypeVar("T")

RESTORER_CODES = frozenset({"refused", "failed", "not_finite", "out_of_memory", "no_view", "empty_caption"})
"""Reason codes that are not about the source: an earlier result stays valid."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One picture of a job.

    Attributes:
        picture: key, seed and prompt; the worker reads its bytes.
        source: where the picture is.
        reference: path of a second picture, for options that need one.
        record: the picture's record of an earlier job; empty for a new picture.
        captioner: captioner that wrote the prompt, and its view; empty if no captioner did.
        model: digest of the model that restores it; "" for the job's first.
    """

    picture: Picture
    source: Source
    reference: Where | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    captioner: Mapping[str, str] = field(default_factory=dict)
    model: str = ""

    @property
    def key(self) -> str:
        return self.picture.key


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Result of a task, with its row of records.jsonl or quarantine.jsonl; "fatal" ends the job with row["detail"]."""

    status: Literal["restored", "skipped", "quarantined", "fatal"]
    row: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Settings that all tasks of a job share.

    Attributes:
        factory: builds the restorer.
        identity: information about the model.
        ask: options of every picture.
        limits: larger inputs are refused.
        out: folder of the results.
        marks: folder of the marks, see core/deaths.py.
        fence: the job's lease in a store, which another job may have taken.
        batch_size: pictures per call of the restorer; 0: all of a call's.
        others: number of other workers that may load the model at the same time.
        build: settings of the restorer, for the records.
        captioner: writes missing prompts; None: they stay empty.
        siblings: further models that `factory` builds, by digest.
    """

    factory: Factory
    identity: Identity
    ask: Ask
    limits: Limits
    out: Where
    marks: Where
    fence: Fence | None = None
    batch_size: int = 0
    others: int = 0
    build: Mapping[str, Any] = field(default_factory=dict)
    captioner: JobCaptioner | None = None
    siblings: Mapping[str, Identity] = field(default_factory=dict)

    def identity_of(self, task: Task) -> Identity:
        """The model that restores a picture."""
        return self.siblings.get(task.model, self.identity)


class RestoreWorker:
    """Restores batches of tasks in a worker process. It loads the model when the first picture needs it.

    A thread encodes and writes a batch while the networks work on the next one of the call.

    It returns every failure as an answer: an exception would end the whole job.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings, self.marks = settings, marks_in(settings.marks)
        self.restorer: Restorer | None = None
        self.captioner: PictureCaptioner | None = None
        self.broken = ""

    def __call__(self, tasks: Sequence[Task]) -> list[Answer]:
        """Return the answers in the order of the tasks."""
        try:
            return self._answers(tasks)
        except RetryLater as error:  # a store that is away, or a lease that is lost: the job ends and can be resumed
            return [Answer(status="fatal", row={"key": t.key, "detail": str(error), "later": True}) for t in tasks]

    def _answers(self, tasks: Sequence[Task]) -> list[Answer]:
        answers: dict[str, Answer] = {}
        remaining: list[Task] = []
        for task in tasks:
            data = b""
            try:
                data = self.read(task.source)
                reference = self.read_reference(task.reference) if task.reference is not None else b""
                task = replace(task, picture=replace(task.picture, data=data, reference=reference))
                if self._up_to_date(task):
                    answers[task.key] = Answer(status="skipped", row={"key": task.key})
                else:
                    probe_file(data, self.settings.limits, task.key)  # a broken picture needs no model
                    remaining.append(task)
            except SampleError as error:
                answers[task.key] = self._quarantine(task, error, data)
        lacks_prompt = any(not task.picture.prompt for task in remaining)
        if remaining and not self._load(with_captioner=lacks_prompt):
            answers.update({task.key: _fatal(task, self.broken) for task in remaining})
            remaining = []
        suspects = any(self.marks.deaths(_mark(task)) for task in remaining)  # one of them killed a worker
        size = 1 if suspects else self.settings.batch_size or max(1, len(remaining))
        groups = [
            group[first : first + size]
            for model in dict.fromkeys(task.model for task in remaining)
            for group in [[task for task in remaining if task.model == model]]
            for first in range(0, len(group), size)
        ]
        with ThreadPoolExecutor(1, "encode") as encoder:
            last: Future[dict[str, Answer]] | None = None
            for group in groups:
                write = self._restore_group(group)
                if last is not None:  # one group is encoded while the next is restored; further ones would fill memory
                    answers.update(last.result())
                last = encoder.submit(write)
                if suspects:
                    wait([last])  # a mark must name the picture that kills
            if last is not None:
                answers.update(last.result())
        return [answers[task.key] for task in tasks]

    def _restore_group(self, group: Sequence[Task]) -> Callable[[], dict[str, Answer]]:
        """Restore a batch of one model.

        The returned function encodes and writes it, removes its marks and gives its answers.
        """
        restorer, identity = self._restorer_of(group[0]), self.settings.identity_of(group[0])
        if len(group) == 1 and self.marks.deaths(_mark(group[0])) >= MAX_DEATHS:
            error = SampleError("worker_died", f"{MAX_DEATHS} workers died over this picture", group[0].key)
            answer = self._quarantine(group[0], error, group[0].picture.data)
            return lambda: {group[0].key: answer}
        answers: dict[str, Answer] = {}
        settings = self.settings
        with ExitStack() as stack:
            for task in group:
                stack.enter_context(self.marks.work_on(_mark(task)))
            start = perf_counter()
            ready: list[Task] = []
            for task in group:
                try:
                    ready.append(self._with_prompt(task))
                except Exception as error:  # noqa: BLE001 - a captioner may raise any error; the job goes on
                    answers[task.key] = self._quarantine(task, as_sample_error(error, task.key), task.picture.data)
            pictures = [task.picture for task in ready]
            results = restore_pictures(restorer, identity, pictures, settings.ask, settings.limits)
            seconds = (perf_counter() - start) / len(group)
            marks = stack.pop_all()

        def write() -> dict[str, Answer]:
            with marks:
                for task, result in zip(ready, results, strict=True):
                    answers[task.key] = self._encode(task, result, seconds)
            return answers

        return write

    def _encode(self, task: Task, result: Result | SampleError, seconds: float) -> Answer:
        """Encode and write a result; `seconds` is the time of its restoration."""
        if isinstance(result, SampleError):
            return self._quarantine(task, result, task.picture.data)
        start = perf_counter()
        try:
            encoded = result.encode()
        except Exception as error:  # noqa: BLE001 - out of memory, for example; the job goes on
            return self._quarantine(task, as_sample_error(error, task.key), task.picture.data)
        return self._write(task, result, encoded, seconds + perf_counter() - start)

    def _with_prompt(self, task: Task) -> Task:
        """Return the task with the picture's own prompt, from the job or from the captioner, if there is one."""
        restorer, settings = self._restorer_of(task), self.settings
        if not task.picture.prompt and self.captioner is None:
            return task
        restorer.check_prompts_used(settings.ask.options)
        if task.picture.prompt or settings.captioner is None or self.captioner is None:
            return task
        request = request_of(task.picture, settings.ask, settings.limits)
        prompt, view = self.captioner.prompt(restorer, request)
        captioner = {**settings.captioner.identity(), "saw": view}
        return replace(task, picture=replace(task.picture, prompt=prompt), captioner=captioner)

    def _restorer_of(self, task: Task) -> Restorer:
        assert self.restorer is not None, "loaded before"
        return (
            self.restorer.of_model(self.settings.identity_of(task).digest) if self.settings.siblings else self.restorer
        )

    def read(self, path: Source) -> bytes:
        """Read a picture's bytes; one above the limit is refused before it is read."""
        return read_source(path, "", self.settings.limits)

    def read_reference(self, path: Where) -> bytes:
        """Read a second picture's bytes; the error names it."""
        try:
            return self.read(path)
        except SampleError as error:
            raise SampleError(error.code, f"of the reference {printable(path.name)}: {error.detail}") from error

    def _up_to_date(self, task: Task) -> bool:
        """Whether the record matches, and its result is still there."""
        try:
            record = task.record
            return (
                self.matches(task)
                and _sha256((self.settings.out / record["output"]).read_bytes()) == (record["output_sha256"])
            )
        except OSError:
            return False

    def matches(self, task: Task) -> bool:
        """Whether the record has this model, these options and these bytes."""
        record, picture, settings = task.record, task.picture, self.settings
        prompt = picture.prompt
        if not prompt and settings.captioner is not None:  # the captioner would write the record's caption again
            prompt, author = str(record.get("prompt", "")), record.get("captioner") or {}
            if not prompt or {**author, **settings.captioner.identity()} != author:
                return False
        reference = _sha256(picture.reference) if picture.reference else None
        expected = {
            "model_digest": settings.identity_of(task).digest,
            "options_digest": settings.ask.with_prompt(prompt).digest(),
            "seed": picture.seed,
            "source_sha256": _sha256(picture.data),
            "reference_sha256": reference,
        }
        if any(record.get(name) != value for name, value in expected.items()):
            return False
        return (record.get("build") or {}) == settings.build and (
            (record.get("file") or {}) == settings.ask.file.document()
        )

    def _load(self, with_captioner: bool) -> bool:
        """Load the model, and the captioner if a picture needs it; after a failure `broken` holds the reason."""
        settings = self.settings
        if self.restorer is None:
            self.restorer = self._load_one(_models(settings), "loading", settings.factory)
        if with_captioner and settings.captioner is not None and self.captioner is None:
            make = functools.partial(PictureCaptioner, settings.captioner)
            self.captioner = self._load_one(f"the captioner {settings.captioner.plan.model}", "loading-captioner", make)
        return not self.broken

    def _load_one(self, what: str, mark: str, make: Callable[[], T]) -> T | None:
        if self.broken:
            return None
        try:
            model = self.marks.load(mark, self.settings.others, make)
            set_threads(THREADS)
            return model
        except RetryLater:
            raise
        except WorkersDied:
            self.broken = f"workers died again and again while loading {what}"
        except Exception as error:  # noqa: BLE001 - any error while loading ends the job with one sentence
            self.broken = f"{what} cannot be loaded: {type(error).__name__}: {error}"
        return None

    def _write(self, task: Task, result: Result, encoded: Encoded, seconds: float) -> Answer:
        picture, settings = task.picture, self.settings
        output, ask = f"{picture.key}{encoded.suffix}", settings.ask.with_prompt(picture.prompt)
        try:
            if settings.fence is not None:
                settings.fence.check()
            (settings.out / output).parent.mkdir(parents=True, exist_ok=True)
            put(settings.out / output, encoded.data)
            self._remove_earlier(task, output)
        except OSError as error:
            return _fatal(task, f"cannot write {settings.out / output}: {write_error_reason(error)}")
        row = {
            "key": picture.key,
            "source": printable(str(task.source)),
            "source_sha256": _sha256(picture.data),
            "output": output,
            "output_sha256": _sha256(encoded.data),
            "width": result.image.shape[1],
            "height": result.image.shape[0],
            "seconds": round(seconds, 3),
            "seed": picture.seed,
            "model_digest": settings.identity_of(task).digest,
            **({"model": settings.identity_of(task).name} if settings.siblings else {}),
            "options_digest": ask.digest(),
            **({"prompt": ask.prompt} if ask.prompt else {}),
            **({"captioner": dict(task.captioner)} if task.captioner else {}),
            **({"build": dict(settings.build)} if settings.build else {}),
            **({"file": ask.file.document()} if ask.file.document() else {}),
            **({"notes": [*result.source.notes, *encoded.notes]} if result.source.notes or encoded.notes else {}),
        }
        if picture.reference:
            row["reference_sha256"] = _sha256(picture.reference)
        return Answer(status="restored", row=row)

    def _remove_earlier(self, task: Task, output: str) -> None:
        """Remove an earlier result of the picture that has another name than the new one."""
        earlier = str(task.record.get("output", output))
        if earlier != output and earlier in {f"{task.key}{suffix}" for suffix in SUFFIXES.values()}:
            remove(self.settings.out / earlier)

    def _quarantine(self, task: Task, error: SampleError, data: bytes) -> Answer:
        """Return the quarantine row; remove an earlier result if the source changed and is no longer readable."""
        sha256 = _sha256(data) if data or error.code == "empty" else ""
        earlier_sha256 = task.record.get("source_sha256", sha256)
        if sha256 and sha256 != earlier_sha256 and error.code not in RESTORER_CODES:
            self._remove_earlier(task, "")
        row = {
            "key": task.key,
            "source": printable(str(task.source)),
            "stage": "restore",
            "code": error.code,
            "detail": error.detail,
            "bytes_sha256": sha256,
        }
        return Answer(status="quarantined", row=row)


def _models(settings: WorkerSettings) -> str:
    """The model or models, for errors."""
    names = [settings.identity.name, *(identity.name for identity in settings.siblings.values())]
    return f"the model {names[0]}" if len(names) == 1 else f"the models {', '.join(names)}"


def _fatal(task: Task, detail: str) -> Answer:
    return Answer(status="fatal", row={"key": task.key, "detail": detail})


def _mark(task: Task) -> str:
    """Name of a picture's mark: a hash of its key, which differs from the names of the other marks."""
    return hashlib.sha256(f"key:{task.key}".encode()).hexdigest()[:24]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
