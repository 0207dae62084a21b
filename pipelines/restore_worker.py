"""What a restoring job does in its worker processes: pictures in as paths, PNG files and records out."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from components.images import Limits, probe
from components.restoring import Ask, Identity, Picture, as_sample_error, request_of, restore_batch
from components.types import Restorer, SampleError
from pipelines.restore_job import marks_folder
from pipelines.restore_prompts import CaptionWish, PictureCaptioner
from pipelines.rows import replace_file

T = TypeVar("T")

Factory = Callable[[], Restorer]
"""Makes the restorer inside a worker; picklable."""

THREADS = 1
"""Torch threads of a worker, in batch jobs and in the service: their number can change the last bit of a sum."""

MAX_DEATHS = 2  # of workers, by one picture or by loading the model
OF_THE_RESTORER = frozenset({"refused", "failed", "out_of_memory", "no_view", "empty_caption"})
"""Reason codes that say nothing about the source: an earlier result stays as good as it was."""


def set_threads(threads: int) -> None:
    """Fix torch's threads in this process, if a system brought torch in."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _hash(key: str) -> str:
    return hashlib.sha256(f"key:{key}".encode()).hexdigest()[:24]


def _printable(path: str) -> str:
    """A path for JSON that others read: bytes that are no UTF-8 become question marks."""
    return path.encode("utf-8", "replace").decode("utf-8")


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
        captioner: CaptionWish | None = None,
    ) -> None:
        self.factory, self.identity, self.ask, self.limits, self.build = factory, identity, ask, limits, build or {}
        self.out, self.threads, self.others = Path(out), threads, others
        self.restorer: Restorer | None = None
        self.wish = captioner
        self.captioner: PictureCaptioner | None = None
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
                    waiting.append((job, replace(picture, prompt=job.get("prompt", ""))))
            except SampleError as error:
                answers[job["key"]] = self._quarantined(job, error, data)
        wordless = any(not picture.prompt for _, picture in waiting)
        if waiting and not self._loaded(with_captioner=wordless):
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
        answers = {}
        told = []
        for job, picture in group:
            try:
                told.append(self._told(job, picture))
            except Exception as error:  # noqa: BLE001 - a captioner may do anything; one picture never ends a job
                answers[picture.key] = self._quarantined(job, as_sample_error(error, picture.key), picture.data)
        pictures = [picture for _, picture in told]
        results = restore_batch(self.restorer, self.identity, pictures, self.ask, self.limits)
        seconds = (time.perf_counter() - start) / len(group)
        for (job, picture), result in zip(told, results, strict=True):
            if isinstance(result, SampleError):
                answers[picture.key] = self._quarantined(job, result, picture.data)
            else:
                answers[picture.key] = self._written(job, picture, result, seconds)
        for key in keys:
            self._mark_file(key).unlink(missing_ok=True)
        return answers

    def _told(self, job: dict[str, Any], picture: Picture) -> tuple[dict[str, Any], Picture]:
        """A picture with its own prompt, if there is one for it or somebody to write it; the job says who wrote it."""
        assert self.restorer is not None
        if not picture.prompt and self.captioner is None:
            return job, picture
        check_heard = getattr(self.restorer, "check_prompts_heard", None)
        if check_heard is not None:
            check_heard(self.ask.options)
        if picture.prompt or self.wish is None or self.captioner is None:
            return job, picture
        prompt, view = self.captioner.prompt(self.restorer, request_of(picture, self.ask, self.limits))
        return {**job, "captioner": {**self.wish.identity(), "saw": view}}, replace(picture, prompt=prompt)

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
        prompt = job.get("prompt", "")
        if not prompt and self.wish is not None:  # the record's caption is the one that would be written again
            prompt, wrote = str(record.get("prompt", "")), record.get("captioner") or {}
            if not prompt or {**wrote, **self.wish.identity()} != wrote:
                return False
        names = ("model_digest", "options_digest", "seed", "source_sha256", "reference_sha256")
        known = (self.identity.digest, self.ask.saying(prompt).digest(), job["seed"])
        seen = hashlib.sha256(reference).hexdigest() if reference else None
        wanted = (*known, hashlib.sha256(data).hexdigest(), seen)
        if tuple(record.get(name) for name in names) != wanted or (record.get("build") or {}) != self.build:
            return False
        try:
            return hashlib.sha256((self.out / record["output"]).read_bytes()).hexdigest() == record["output_sha256"]
        except OSError:
            return False

    def _loaded(self, with_captioner: bool) -> bool:
        if self.restorer is None:
            self.restorer = self._load(f"the model {self.identity.name}", "loading", self.factory)
        if with_captioner and self.wish is not None and self.captioner is None:
            make = functools.partial(PictureCaptioner, self.wish)
            self.captioner = self._load(f"the captioner {self.wish.plan.model}", "loading-captioner", make)
        return not self.broken

    def _load(self, what: str, marked: str, make: Callable[[], T]) -> T | None:
        if self.broken:
            return None
        mark, made = marks_folder(self.out) / marked, None
        if self._count(mark) >= MAX_DEATHS + self.others:  # the others may be loading right now
            self.broken = f"workers died again and again while loading {what}"
            return None
        self._add(mark)
        try:
            made = make()
            set_threads(self.threads)
        except Exception as error:  # noqa: BLE001 - whatever loading may raise ends the job with one sentence
            self.broken = f"{what} cannot be loaded: {type(error).__name__}: {error}"
        mark.unlink(missing_ok=True)
        return made

    def _written(self, job: Mapping[str, Any], picture: Picture, png: bytes, seconds: float) -> dict[str, Any]:
        output, ask = f"{picture.key}.png", self.ask.saying(picture.prompt)
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
            "options_digest": ask.digest(),
            **({"prompt": ask.prompt} if ask.prompt else {}),
            **({"captioner": job["captioner"]} if "captioner" in job else {}),
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
        return marks_folder(self.out) / _hash(key)

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
