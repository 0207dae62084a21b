"""Captions: for every sample of a finished corpus, as a column, and on the fly for a training stream, through a cache.

`caption_corpus` is the verb. Captions that the corpus brought along pass through unless told otherwise; the rest is
written by an actor pool around a captioner of components.captions, or by an engine (pipelines.caption_engine).
`CaptionerPool` answers a stream's questions: from the cache where the same captioner has seen the same picture, else
from its actors.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.captions.presets import (
    TAGS,
    CaptionerError,
    CaptionerPlan,
    identity_digest,
    open_captioner,
    resolve_captioner,
)
from components.captions.text import tidy
from components.captions.views import View, find_view
from components.corpora import CaptionSpec
from components.images import resize_short_side
from components.types import Captioner, Image, SampleError
from pipelines.column_workers import apply_worker
from pipelines.columns import ColumnResult, Runner, Value, Worker, compute_column
from pipelines.console import Progress
from pipelines.errors import Failure, UsageError, unknown
from pipelines.rows import parse_lines, replace_file

ENGINES = ("transformers", "vllm")
EXTRA = "captions-vllm"
SHA256 = re.compile(r"[0-9a-f]{64}")
CALLS = 32  # callers that an actor listens to at once; their pictures share batches
RETRIES = 3  # of a question whose actor died; Ray starts the actor anew, wherever there is room
ANSWER_S = 1800.0  # ours: for the pictures of one question; a captioner that takes longer is not coming back


@dataclass(frozen=True, kw_only=True)
class CaptionResult:
    """What a caption run ended with.

    Attributes:
        column: name of the column.
        folder: where it lies.
        producer: who wrote the captions: the captioner's identity, and the engine.
        samples: rows in all; of these
        given: captions that the corpus brought along, and
        quarantined: pictures without a caption.
        reasons: quarantined by code.
        reused: shards that an earlier run had captioned.
        seconds: wall time.
    """

    column: str
    folder: Path
    producer: Mapping[str, Any]
    samples: int
    given: int
    quarantined: int
    reasons: Mapping[str, int]
    reused: int
    seconds: float


def caption_corpus(
    corpus_dir: str | Path,
    spec: CaptionSpec,
    name: str = "captions",
    progress: Progress | None = None,
    engine: str = "transformers",
    view: str = "hq",
    views: Mapping[str, View] | None = None,
    max_bad_fraction: float = 0.5,
) -> CaptionResult:
    """Caption a finished corpus: column `name` of kind text. Running it again repeats nothing.

    Args:
        corpus_dir: a curated corpus; not changed.
        spec: captioner, prompt, and pool. workers=0 works in this process; overwrite captions also what has a caption,
            and replaces a column of another captioner.
        name: of the column.
        progress: told about samples.
        engine: transformers, or vllm (extra captions-vllm; chat models only; num_gpus is then its tensor parallelism).
        view: which picture is captioned; a corpus picture stands for hq and lq alike.
        views: views of a system, by name.
        max_bad_fraction: largest share of pictures that may stay without a caption.

    Raises:
        UsageError: no corpus, no such captioner or engine, or a column of another captioner.
        Failure, RetryLater: see `compute_column`.
    """
    if engine not in ENGINES:
        raise unknown("caption engine", engine, ENGINES)
    if engine == "vllm" and spec.model == TAGS:
        raise UsageError('the captioner "tags" has no model, so that no engine can run it.')
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UsageError(f'the engine vllm is not installed: pip install "restoray[{EXTRA}]".')
    plan = _resolved(spec)
    try:
        find_view(view, views)
    except ValueError as error:
        raise UsageError(f"{error}") from error
    producer = {**plan.identity, "view": view, "overwrite": spec.overwrite}
    run: Runner | None = None
    if plan.model != TAGS:
        producer["engine"] = engine
    if engine == "vllm":
        from pipelines.caption_engine import run_engine, vllm_processor

        run = functools.partial(run_engine, processor=functools.partial(vllm_processor, plan, spec))
    result = compute_column(
        corpus_dir,
        name,
        "text",
        producer,
        functools.partial(_caption_worker, plan, view, dict(views or {})),
        given=None if spec.overwrite else existing_caption,
        batch_size=spec.batch_size,
        workers=spec.workers,
        num_gpus=spec.num_gpus,
        short_side_px=int(plan.identity["short_side_px"]),
        overwrite=spec.overwrite,
        max_bad_fraction=max_bad_fraction,
        progress=progress,
        run=run,
    )
    return _caption_result(result, producer)


def existing_caption(entry: Mapping[str, Any]) -> Value | None:
    """The caption that a sample brought along, tidied; None where it has none."""
    return tidy(str(entry.get("caption") or "")) or None


def _resolved(spec: CaptionSpec) -> CaptionerPlan:
    try:
        return resolve_captioner(spec.model, spec.revision, spec.prompt, spec.max_tokens)
    except CaptionerError as error:
        raise UsageError(f"{error}.") from error


def _caption_result(result: ColumnResult, producer: Mapping[str, Any]) -> CaptionResult:
    return CaptionResult(
        column=result.name,
        folder=result.folder,
        producer=producer,
        samples=result.samples,
        given=result.given,
        quarantined=result.quarantined,
        reasons=result.reasons,
        reused=result.reused,
        seconds=result.seconds,
    )


def _caption_worker(plan: CaptionerPlan, view: str, views: Mapping[str, View]) -> Worker:
    captioner, look = open_captioner(plan), find_view(view, views)

    def caption(images: Sequence[Image], keys: Sequence[str]) -> list[Value | SampleError]:
        return _captions(captioner, [look(hq=image, lq=image, preview=None) for image in images])

    return caption


def _captions(captioner: Captioner, images: Sequence[Image]) -> list[Value | SampleError]:
    """Captions; nothing said is an error, since "" means that nobody was asked."""
    return [text or unsaid() for text in captioner.caption(images)]


def _is_silence(error: SampleError) -> bool:
    return error.code == unsaid().code


def unsaid() -> SampleError:
    """What stands for a caption without a word."""
    return SampleError("empty_caption", "the captioner said nothing about it")


# --- captions on the fly ----------------------------------------------------------------------------------------------


def picture_sha256(image: Image) -> str:
    """sha256 over a picture's shape, type and pixels: its name in caption caches."""
    head = f"{image.shape} {image.dtype.str} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(image).tobytes()).hexdigest()


class CaptionCache:
    """Captions by the sha256 of their pictures, on disk, for one captioner; any number of processes may write.

        <folder>/<16 digits of the captioner's digest>/captioner.json       its identity, for people
        <folder>/<16 digits of the captioner's digest>/<one a writer>.jsonl {"picture", "caption", "sha256"} a line

    Every writer appends to a file of its own, and reads those of all. A line that a kill tore is as good as absent. In
    memory there is a place on disk for each caption (about 250 bytes), and no text.

    Args:
        folder: of the caches of all captioners; created.
        identity: of the captioner.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        self.folder = Path(folder) / identity_digest(identity)[:16]
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._read_to: dict[Path, int] = {}
        self._own: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"identity": self.identity, "folder": self.folder}  # another process writes to another file

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def get(self, sha256s: Sequence[str]) -> list[str | None]:
        """The captions that any writer has written so far; None where there is none."""
        names = [bytes.fromhex(sha256) for sha256 in sha256s]
        with self._lock:
            if any(name not in self._places for name in names):
                self._look()
            return [self._caption(name) for name in names]

    def put(self, captions: Mapping[str, str]) -> None:
        """Add captions by their pictures' sha256.

        Raises:
            Failure: the folder cannot be written.
        """
        lines = []
        for picture, caption in captions.items():
            row = {"picture": picture, "caption": caption, "sha256": hashlib.sha256(caption.encode()).hexdigest()}
            lines.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        if not lines:
            return
        with self._lock:
            try:
                if self._own is None:
                    self._begin()
                assert self._own is not None
                with open(self._own, "ab") as target:
                    target.write(b"".join(lines))
            except OSError as error:
                raise Failure(f"{error.filename or self.folder} cannot be written: {error.strerror}.") from error

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "captioner.json").exists():
            document = json.dumps(self.identity, ensure_ascii=False, indent=1) + "\n"
            replace_file(self.folder / "captioner.json", document.encode())
        self._own = self.folder / f"{socket.gethostname()[:32]}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"

    def _look(self) -> None:
        """Read what all writers have added since the last look, up to the last whole line of each."""
        for path in sorted(self.folder.glob("*.jsonl")):
            start = self._read_to.get(path, 0)
            with open(path, "rb") as source:
                source.seek(start)
                for line in source:
                    if not line.endswith(b"\n"):
                        break  # its writer is not done with it
                    for row in parse_lines(line):
                        self._note(row, path, start)
                    start += len(line)
            self._read_to[path] = start

    def _note(self, row: Mapping[str, Any], path: Path, start: int) -> None:
        picture, caption = row.get("picture"), row.get("caption")
        if isinstance(caption, str) and _sha256(caption) == row.get("sha256") and SHA256.fullmatch(str(picture)):
            self._places.setdefault(bytes.fromhex(str(picture)), (path, start))

    def _caption(self, name: bytes) -> str | None:
        if name not in self._places:
            return None
        path, start = self._places[name]
        with open(path, "rb") as source:
            source.seek(start)
            rows = parse_lines(source.readline())
        return str(rows[0]["caption"]) if rows and rows[0].get("picture") == name.hex() else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


class Batcher:
    """Makes batches of what many threads ask for: while one batch is worked on, the next one gathers.

    Args:
        work: pictures -> an answer each; never raises.
        batch_size: most pictures a call.
    """

    def __init__(self, work: Callable[[Sequence[Image]], Sequence[Any]], batch_size: int) -> None:
        self.work, self.batch_size = work, batch_size
        self._turn, self._gate = threading.Lock(), threading.Lock()
        self._waiting: list[tuple[Image, list[Any]]] = []

    def __call__(self, images: Sequence[Image]) -> list[Any]:
        tickets: list[tuple[Image, list[Any]]] = [(image, []) for image in images]
        with self._gate:
            self._waiting.extend(tickets)
        while not all(answer for _, answer in tickets):
            with self._turn:
                with self._gate:
                    batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
                if batch:
                    for (_, answer), found in zip(batch, self.work([image for image, _ in batch]), strict=True):
                        answer.append(found)
        return [answer[0] for _, answer in tickets]


class CaptionerActor:
    """A captioner in a process of its own (a Ray actor of many threads: calls that wait share batches)."""

    def __init__(self, plan: CaptionerPlan, batch_size: int) -> None:
        captioner = open_captioner(plan)
        on_gpu = getattr(getattr(captioner, "device", None), "type", "cpu") != "cpu"
        rows = batch_size if on_gpu or plan.model == TAGS else 1

        def worker(images: Sequence[Image], keys: Sequence[str]) -> list[Value | SampleError]:
            if plan.model == TAGS:  # measured: nothing adds up differently in a batch
                return _captions(captioner, images)
            return in_equal_batches(lambda batch: _captions(captioner, batch), images, rows)

        self.batcher = Batcher(lambda images: apply_worker(worker, images, [""] * len(images)), batch_size)

    def caption(self, images: Sequence[Image]) -> list[Any]:
        """A text or a SampleError for each picture."""
        return self.batcher(images)


def in_equal_batches(
    work: Callable[[Sequence[Image]], list[Value | SampleError]], images: Sequence[Image], rows: int
) -> list[Value | SampleError]:
    """Batches of exactly `rows` pictures of one shape, the last one filled up: a picture's answer is then its own.

    The way in which sums are added follows a batch's shape, and who else asks at that moment must not tip a word.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image.shape, []).append(number)
    answers: dict[int, Value | SampleError] = {}
    for numbers in groups.values():
        for start in range(0, len(numbers), rows):
            part = numbers[start : start + rows]
            filled = [*part, *[part[0]] * (rows - len(part))]
            answers |= zip(part, work([images[number] for number in filled]), strict=False)
    return [answers[number] for number in range(len(images))]


@functools.lru_cache(maxsize=8)
def _shared_cache(folder: str, identity: str) -> CaptionCache:
    """One cache a process, whatever number of pools arrives: each would read all captions from the beginning."""
    return CaptionCache(folder, json.loads(identity))


@dataclass
class CaptionerPool:
    """A handle on running captioners; may travel to any worker of the same Ray job. See `start_captioner_pool`.

    Attributes:
        actors: handles of the captioners.
        identity: who they are.
        cache: where captions are kept; None keeps none.
        batch_size: pictures a call.
    """

    actors: list[Any]
    identity: Mapping[str, Any]
    cache: CaptionCache | None
    batch_size: int

    def __post_init__(self) -> None:
        self._turns = itertools.count(os.getpid())  # callers begin with different actors

    def __getstate__(self) -> dict[str, Any]:
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.cache is not None:
            self.cache = _shared_cache(str(self.cache.folder.parent), json.dumps(self.cache.identity))
        self.__post_init__()

    def answers(self, images: Sequence[Image], sha256s: Sequence[str]) -> list[str | SampleError]:
        """For each picture by its sha256 a caption, or why there is none: from the cache, else from the actors.

        What is kept in the cache is what another look would not change: captions, and that nothing was said.

        Raises:
            Failure: the actors are gone, or do not answer.
        """
        known = self.cache.get(sha256s) if self.cache else [None] * len(images)
        found: dict[str, str | SampleError] = {
            name: text or unsaid() for name, text in zip(sha256s, known, strict=True) if text is not None
        }
        wanted = {name: image for name, image in zip(sha256s, images, strict=True) if name not in found}
        asked = list(wanted)
        groups = [asked[start : start + self.batch_size] for start in range(0, len(asked), self.batch_size)]
        fresh = self._ask([[self._shrunk(wanted[name]) for name in group] for group in groups])
        new = dict(zip(asked, itertools.chain.from_iterable(fresh), strict=True))
        if self.cache:
            lasting = {name: answer for name, answer in new.items() if isinstance(answer, str)}
            silent = {name: "" for name, answer in new.items() if not isinstance(answer, str) and _is_silence(answer)}
            self.cache.put({**lasting, **silent})
        found |= new
        return [found[name] for name in sha256s]

    def captions(self, images: Sequence[Image], sha256s: Sequence[str]) -> list[str]:
        """As `answers`, where every picture must have a caption.

        Raises:
            SampleError: there is none for a picture (its sha256 is the key); all others are in the cache by then.
            Failure: see answers.
        """
        answers = self.answers(images, sha256s)
        for name, answer in zip(sha256s, answers, strict=True):
            if isinstance(answer, SampleError):
                raise SampleError(answer.code, answer.detail, name)
        return [str(answer) for answer in answers]

    def captions_of(
        self,
        view: View,
        hqs: Sequence[Image | None],
        lqs: Sequence[Image | None],
        previews: Sequence[Image | None] | None = None,
    ) -> list[str]:
        """The captions of what a view makes of targets, inputs and coarse restorations; errors as `captions`."""
        rows = zip(hqs, lqs, previews or [None] * len(hqs), strict=True)
        images = [view(hq=hq, lq=lq, preview=preview) for hq, lq, preview in rows]
        return self.captions(images, [picture_sha256(image) for image in images])

    def _ask(self, groups: Sequence[Sequence[Image]]) -> list[list[str | SampleError]]:
        """An answer for each picture of each group. A group whose captioner dies with it is asked picture by picture:
        what dies alone is the culprit."""
        import ray

        calls = [self._next().caption.remote(list(group)) for group in groups]
        answers: list[list[str | SampleError]] = []
        try:
            for group, call in zip(groups, calls, strict=True):
                try:
                    answers.append(ray.get(call, timeout=ANSWER_S))
                except ray.exceptions.RayActorError as error:
                    ray.get(self._next().caption.remote([]), timeout=ANSWER_S)  # some captioner lives, or all is over
                    if len(group) > 1:
                        answers.append([answer for image in group for answer in self._ask([[image]])[0]])
                    else:
                        reason = f"its captioner died {RETRIES + 1} times over it: {_reason(error)}"
                        answers.append([SampleError("crashed", reason)])
        except ray.exceptions.RayError as error:
            raise Failure(f"the captioners cannot be asked any more: {_reason(error)}") from error
        return answers

    def close(self) -> None:
        """Stop the captioners."""
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def _next(self) -> Any:
        return self.actors[next(self._turns) % len(self.actors)]

    def _shrunk(self, image: Image) -> Image:
        limit = int(self.identity["short_side_px"])  # as the captioner would do: less to send
        return resize_short_side(image, limit) if limit and min(image.shape[:2]) > limit else image


def start_captioner_pool(spec: CaptionSpec, cache: str | Path | None = None, num_cpus: float = 1.0) -> CaptionerPool:
    """Start captioners in the Ray that runs already; they live until `close`, or as long as this process.

    Args:
        spec: captioner, and workers (at least one), num_gpus and batch_size of the pool.
        cache: folder of caption caches; None keeps none.
        num_cpus: logical CPUs of each captioner.

    Raises:
        UsageError: no such captioner.
        Failure: it cannot be loaded.
    """
    import ray

    plan = _resolved(spec)
    actor: Any = ray.remote(CaptionerActor).options(
        num_cpus=num_cpus,
        num_gpus=spec.num_gpus or None,
        max_restarts=-1,
        max_task_retries=RETRIES,
        max_concurrency=CALLS,
        scheduling_strategy="SPREAD",  # over the nodes, where Ray has a choice
    )
    actors = [actor.remote(plan, spec.batch_size) for _ in range(max(1, spec.workers))]
    try:
        ray.get([actor.caption.remote([]) for actor in actors])
    except ray.exceptions.RayError as error:
        raise Failure(f"the captioner {spec.model} cannot be started: {_reason(error)}") from error
    kept = CaptionCache(cache, plan.identity) if cache is not None else None
    return CaptionerPool(actors, plan.identity, kept, spec.batch_size)


def _reason(error: Exception) -> str:
    """The last line of what Ray says, which names the error behind its own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
