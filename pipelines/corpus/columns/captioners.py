"""Captioners for a training stream: actors with one model each that share batches, and a cache of captions on disk."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.captions.identity import CaptionerError, CaptionerPlan, identity_digest
from components.captions.presets import TAGS, open_captioner, resolve_captioner
from components.captions.text import empty_caption
from components.corpora import CaptionSpec
from components.images import resize_short_side
from components.types import Captioner, Image, SampleError
from components.writing import replace_file
from pipelines.core.errors import Failure, UsageError
from pipelines.core.placement import check_placement, needs_of
from pipelines.core.pool import last_line
from pipelines.core.rows import parse_lines
from pipelines.corpus.columns.line_places import LinePlaces
from pipelines.corpus.columns.spec import Value
from pipelines.corpus.columns.workers import apply_worker, filled_batches

SHA256 = re.compile(r"[0-9a-f]{64}")
CALLS = 32  # concurrent calls of an actor; their pictures share batches
RETRIES = 3  # of a call whose actor died; Ray restarts the actor on any node with room
ANSWER_S = 1800.0  # ours: timeout of one call


def captioner_plan(spec: CaptionSpec) -> CaptionerPlan:
    """The captioner that a spec names; UsageError for a spec that names none."""
    try:
        return resolve_captioner(spec.model, spec.revision, spec.prompt, spec.max_tokens)
    except CaptionerError as error:
        raise UsageError(f"{error}.") from error


def captions_or_errors(captioner: Captioner, images: Sequence[Image]) -> list[Value | SampleError]:
    """Captions of pictures. An empty one is an error, since "" stands for a picture without a captioner."""
    return [text or empty_caption() for text in captioner.caption(images)]


def _is_empty_caption(error: SampleError) -> bool:
    return error.code == empty_caption().code


def picture_sha256(image: Image) -> str:
    """sha256 over a picture's shape, dtype and pixels: its name in caption caches."""
    head = f"{image.shape} {image.dtype.str} ".encode()
    return hashlib.sha256(head + np.ascontiguousarray(image).tobytes()).hexdigest()


class CaptionCache:
    """Captions of one captioner on disk, by the sha256 of their pictures; any number of processes may write.

        <folder>/<16 digits of the captioner's digest>/captioner.json   its identity, for people
        <folder>/<16 digits of the captioner's digest>/<writer>.jsonl   {"picture", "caption", "sha256"} a line

    Every writer appends to its own file and reads the files of all writers. An incomplete line counts as absent. Memory
    holds the place on disk of each caption (16 bytes, see LinePlaces), but no text.

    Args:
        folder: folder of the caches of all captioners; created.
        identity: identity of the captioner.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        self.folder = Path(folder) / identity_digest(identity)[:16]
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._places = LinePlaces()
        self._read_to: dict[Path, int] = {}
        self._own: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"identity": self.identity, "folder": self.folder}  # a copy in another process writes to its own file

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def get(self, sha256s: Sequence[str]) -> list[str | None]:
        """The captions of all writers so far; None for a picture without one."""
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
        """Read what all writers have added since the last look, up to the last complete line of each."""
        for path in sorted(self.folder.glob("*.jsonl")):
            start = self._read_to.get(path, 0)
            with suppress(FileNotFoundError), open(path, "rb") as source:  # somebody may tidy up the cache
                source.seek(start)
                for line in source:
                    if not line.endswith(b"\n"):
                        break  # its writer has not finished it
                    for row in parse_lines(line):
                        self._note(row, path, start)
                    start += len(line)
            self._read_to[path] = start

    def _note(self, row: Mapping[str, Any], path: Path, start: int) -> None:
        picture, caption = row.get("picture"), row.get("caption")
        if isinstance(caption, str) and _sha256(caption) == row.get("sha256") and SHA256.fullmatch(str(picture)):
            self._places.add(bytes.fromhex(str(picture)), path, start)

    def _caption(self, name: bytes) -> str | None:
        place = self._places.find(name)
        if place is None:
            return None
        path, start = place
        try:
            with open(path, "rb") as source:
                source.seek(start)
                rows = parse_lines(source.readline())
        except FileNotFoundError:
            return None
        return str(rows[0]["caption"]) if rows and rows[0].get("picture") == name.hex() else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


class Batcher:
    """Makes batches from the calls of many threads: while one batch is in work, the next one fills.

    Args:
        work: pictures -> an answer each; never raises.
        batch_size: largest number of pictures of one call of `work`.
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
                    for (_, answer), value in zip(batch, self.work([image for image, _ in batch]), strict=True):
                        answer.append(value)
        return [answer[0] for _, answer in tickets]


class CaptionerActor:
    """A captioner in its own process: a Ray actor of many threads, so that waiting calls share batches."""

    def __init__(self, plan: CaptionerPlan, batch_size: int) -> None:
        captioner = open_captioner(plan)
        rows = batch_size if captioner.on_gpu or plan.model == TAGS else 1

        def worker(images: Sequence[Image], keys: Sequence[str]) -> list[Value | SampleError]:
            if plan.model == TAGS:  # measured: its captions do not depend on the batch
                return captions_or_errors(captioner, images)
            return in_equal_batches(lambda batch: captions_or_errors(captioner, batch), images, rows)

        self.batcher = Batcher(lambda images: apply_worker(worker, images, [""] * len(images)), batch_size)

    def caption(self, images: Sequence[Image]) -> list[Any]:
        """A caption or a SampleError for each picture."""
        return self.batcher(images)


def in_equal_batches(
    work: Callable[[Sequence[Image]], list[Value | SampleError]], images: Sequence[Image], rows: int
) -> list[Value | SampleError]:
    """`filled_batches` of pictures of one shape: a picture's caption must not depend on its batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(image.shape, []).append(number)
    answers: dict[int, Value | SampleError] = {}
    for numbers in groups.values():
        answers |= zip(numbers, filled_batches(work, [images[number] for number in numbers], rows), strict=True)
    return [answers[number] for number in range(len(images))]


@functools.lru_cache(maxsize=8)
def _shared_cache(folder: str, identity: str) -> CaptionCache:
    """One cache per process for all pools that arrive: each cache of its own would read all captions again."""
    return CaptionCache(folder, json.loads(identity))


@dataclass
class CaptionerPool:
    """A handle of running captioners. It may travel to any worker of the same Ray job. See `start_captioner_pool`.

    Attributes:
        actors: handles of the captioners.
        identity: identity of the captioner.
        cache: cache of captions; None for none.
        batch_size: pictures of one call.
    """

    actors: list[Any]
    identity: Mapping[str, Any]
    cache: CaptionCache | None
    batch_size: int

    def __post_init__(self) -> None:
        self._turns = itertools.count(os.getpid())  # different callers begin with different actors

    def __getstate__(self) -> dict[str, Any]:
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.cache is not None:
            self.cache = _shared_cache(str(self.cache.folder.parent), json.dumps(self.cache.identity))
        self.__post_init__()

    def answers(self, images: Sequence[Image], sha256s: Sequence[str]) -> list[str | SampleError]:
        """A caption or an error for each picture, by its sha256: from the cache, else from the actors.

        The cache keeps captions and empty captions. Other errors are not kept, since another try may succeed.

        Raises:
            Failure: the actors have ended, or do not answer.
        """
        cached = self.cache.get(sha256s) if self.cache else [None] * len(images)
        answers: dict[str, str | SampleError] = {
            name: text or empty_caption() for name, text in zip(sha256s, cached, strict=True) if text is not None
        }
        missing = {name: image for name, image in zip(sha256s, images, strict=True) if name not in answers}
        names = list(missing)
        groups = [names[start : start + self.batch_size] for start in range(0, len(names), self.batch_size)]
        fresh = self._ask([[self._shrunk(missing[name]) for name in group] for group in groups])
        new = dict(zip(names, itertools.chain.from_iterable(fresh), strict=True))
        if self.cache:
            texts = {name: answer for name, answer in new.items() if isinstance(answer, str)}
            errors = {name: answer for name, answer in new.items() if not isinstance(answer, str)}
            self.cache.put({**texts, **{name: "" for name, error in errors.items() if _is_empty_caption(error)}})
        answers |= new
        return [answers[name] for name in sha256s]

    def captions(self, images: Sequence[Image], sha256s: Sequence[str]) -> list[str]:
        """As `answers`, for pictures that must all have a caption.

        Raises:
            SampleError: a picture has no caption; its sha256 is the key. The cache has all others by then.
            Failure: see answers.
        """
        answers = self.answers(images, sha256s)
        for name, answer in zip(sha256s, answers, strict=True):
            if isinstance(answer, SampleError):
                raise SampleError(answer.code, answer.detail, name)
        return [str(answer) for answer in answers]

    def _ask(self, groups: Sequence[Sequence[Image]]) -> list[list[str | SampleError]]:
        """An answer for each picture of each group.

        When a captioner dies over a group, its pictures go one at a time. A picture over which it dies alone is an
        error.
        """
        import ray

        calls = [self._next().caption.remote(list(group)) for group in groups]
        answers: list[list[str | SampleError]] = []
        try:
            for group, call in zip(groups, calls, strict=True):
                try:
                    answers.append(ray.get(call, timeout=ANSWER_S))
                except ray.exceptions.RayActorError as error:
                    ray.get(self._next().caption.remote([]), timeout=ANSWER_S)  # raises where no captioner is alive
                    if len(group) > 1:
                        answers.append([answer for image in group for answer in self._ask([[image]])[0]])
                    else:
                        reason = f"its captioner died {RETRIES + 1} times over it: {last_line(error)}"
                        answers.append([SampleError("crashed", reason)])
        except ray.exceptions.RayError as error:
            raise Failure(f"the captioners have ended: {last_line(error)}") from error
        return answers

    def close(self) -> None:
        """Stop the captioners."""
        import ray

        for actor in self.actors:
            ray.kill(actor)

    def _next(self) -> Any:
        return self.actors[next(self._turns) % len(self.actors)]

    def _shrunk(self, image: Image) -> Image:
        limit = int(self.identity["short_side_px"])  # the captioner would shrink it too: this sends less
        return resize_short_side(image, limit) if limit and min(image.shape[:2]) > limit else image


def start_captioner_pool(spec: CaptionSpec, cache: str | Path | None = None, num_cpus: float = 1.0) -> CaptionerPool:
    """Start captioners in the running Ray. They live until `close`, or as long as this process.

    Args:
        spec: the captioner, and workers (at least one), num_gpus and batch_size of the pool.
        cache: folder of caption caches; None for no cache.
        num_cpus: logical CPUs of each captioner.

    Raises:
        UsageError: there is no such captioner.
        Failure: it cannot be loaded.
    """
    import ray

    plan = captioner_plan(spec)
    needs = needs_of(spec.placement).or_else(max(1, spec.workers), num_cpus, spec.num_gpus)
    check_placement(f"a captioner {spec.model}", needs, together=True)
    actor: Any = ray.remote(CaptionerActor).options(
        num_cpus=needs.cpus,
        num_gpus=needs.gpus or None,
        max_restarts=-1,
        max_task_retries=RETRIES,
        max_concurrency=CALLS,
        scheduling_strategy="SPREAD",  # over the nodes, if Ray has a choice
        **needs.options(),
    )
    actors = [actor.remote(plan, spec.batch_size) for _ in range(needs.workers or 1)]
    try:
        ray.get([actor.caption.remote([]) for actor in actors])
    except ray.exceptions.RayError as error:
        raise Failure(f"the captioner {spec.model} cannot be started: {last_line(error)}") from error
    captions = CaptionCache(cache, plan.identity) if cache is not None else None
    return CaptionerPool(actors, plan.identity, captions, spec.batch_size)
