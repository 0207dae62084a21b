"""Make negative-quality samples of a corpus (SUPIR section 3.2): a resumable job over a pool of workers.

    <out>/pictures/00012/negative-SEED-0012345.png    the pictures; text chunks say how each was made
    <out>/pictures/00012/negative-SEED-0012345.txt    its caption: the negative prompt
    <out>/records.jsonl       a line per picture: number, key, output, output_sha256, source_key, source_sha256, sample,
                              corpus, seed, prompt, strength, model, model_digest, made_with
    <out>/quarantine.jsonl    a line per number without a picture: number, key, source_key, stage, code, detail
    <out>/negatives.json      settings that all pictures share; a folder never mixes two settings
    <out>/contact.jpg         some sources and results side by side

`<out>/pictures` is a source of kind `folder` for a corpus spec, captions included. Each number has one sample of the
corpus, one prompt and its own noise. Samples are drawn without repetition until all were used. Pictures depend neither
on the number of workers nor on the count, and a larger count continues a smaller one. Workers get numbers and
return records. A picture is renamed into place before its record is written, and its text chunks name its settings, so
a job that was killed at any point repeats no finished file.

How many: SUPIR trained on 100K negatives next to 20M pictures with captions and 70K faces, 1 to 200.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from components.corpora import NegativeSpec
from components.images import decode, encode_png, read_png_text
from components.negatives import (
    ImageToImage,
    ImageToImageSettings,
    build_image_to_image,
    model_folder,
    negative_prompts,
    prior_digest,
    square,
)
from components.randomness import generator
from components.types import SampleError
from components.writing import LEFTOVERS, replace_file, write_error_reason
from pipelines.core.console import Progress, no_progress
from pipelines.core.deaths import MAX_DEATHS, Marks, WorkersDied, remove_leftovers
from pipelines.core.errors import Failure, RestorayError, UsageError
from pipelines.core.folders import check_output, folder_lock
from pipelines.core.placement import needs_of
from pipelines.core.pool import Pool, answers_of, fixed_threads
from pipelines.core.rows import end_torn_line, iter_lines, read_lines, write_lines
from pipelines.corpus.shards import STORED_LIMITS, Corpus, open_corpus, read_sample
from pipelines.pages.sheets import contact_sheet

PER_FOLDER = 1000  # pictures of one folder, for file systems and people
MAX_EQUAL_FAILURES = 3  # equal failures of the first numbers end the job: then the job is wrong, not the pictures
SHEET_PICTURES = 12
MARKS = ".attempts"
TEXT_CHUNKS = (
    *("key", "prompt", "seed", "strength", "model", "model_digest", "source_key", "source_sha256", "made_with"),
)
"""Fields of a record that the picture's text chunks repeat: enough to know that it need not be made again."""


@dataclass(frozen=True, kw_only=True)
class NegativesResult:
    """Counts of numbers, and the places of the files.

    Attributes:
        new: pictures of this run.
        skipped: pictures of earlier runs.
        quarantined: numbers without a picture.
        pictures: folder of the pictures.
        records, quarantine: files of rows.
    """

    new: int
    skipped: int
    quarantined: int
    pictures: Path
    records: Path
    quarantine: Path


@dataclass(frozen=True, kw_only=True)
class NegativesJob:
    """Everything that decides a picture besides its number, and its place. It travels to the workers.

    Attributes:
        corpus, split: folder (absolute) and split of the sources.
        corpus_digest, model_digest: digests of corpus and model when the job began.
        out: folder of the results (absolute).
        spec: settings. Its prior is an absolute path or a name, since workers have another current folder; its prompts
            are texts.
    """

    corpus: Path
    split: str
    corpus_digest: str
    model_digest: str
    out: Path
    spec: NegativeSpec

    @property
    def model(self) -> str:
        """Name of the model in records, without a path of the machine."""
        return Path(self.spec.prior).name if Path(self.spec.prior).is_absolute() else self.spec.prior

    def shared_settings(self) -> dict[str, Any]:
        """Content of negatives.json: a resumed job must have the same."""
        return {
            "corpus": self.corpus_digest,
            "split": self.split,
            "model": self.model,
            "model_digest": self.model_digest,
            "precision": self.spec.precision,
            "seed": self.spec.seed,
            "prompts": list(self.spec.prompts),
            **asdict(settings_of(self.spec)),
        }

    def made_with(self, number: int) -> str:
        """Digest of everything that decides the picture of a number."""
        return hashlib.sha256(json.dumps([self.shared_settings(), number], sort_keys=True).encode()).hexdigest()

    def prompt(self, number: int) -> str:
        """The prompt of a number, drawn from all with equal chance."""
        draw = int(generator(self.spec.seed, number, "prompt").bit_generator.random_raw())
        return self.spec.prompts[draw % len(self.spec.prompts)]

    def key(self, number: int) -> str:
        """Key of a number's picture."""
        return f"negative-{self.spec.seed}-{number:07d}"

    def output(self, number: int) -> str:
        """Path of a number's picture below `out`."""
        return f"pictures/{number // PER_FOLDER:05d}/{self.key(number)}.png"


@dataclass(frozen=True, kw_only=True)
class NegativeTask:
    """One picture of a job.

    Attributes:
        number: of the picture.
        sample: sample number of its source in the corpus.
        sha256: of the picture that a record names; "" for a number without a record.
    """

    number: int
    sample: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class NegativeAnswer:
    """How a task ended, with the row of records.jsonl or quarantine.jsonl.

    Attributes:
        status: "fatal" ends the job with row["detail"].
        usage: whether a fatal answer is a UsageError rather than a Failure.
    """

    status: Literal["new", "skipped", "quarantined", "fatal"]
    row: Mapping[str, Any]
    usage: bool = False


def make_negatives(
    corpus_dir: Path, out: Path, spec: NegativeSpec, split: str = "train", progress: Progress = no_progress
) -> NegativesResult:
    """Make `spec.count` negative samples from a corpus.

    Args:
        corpus_dir: a curated corpus.
        out: folder of the results.
        spec: model, settings and pool; numbers 0 .. count - 1 are made. Each worker loads the model once. 0 workers
            work in this process, with the same bits; num_gpus 0 works on the CPU.
        split: split of the sources.
        progress: called with counts of pictures.

    Raises:
        UsageError: there is no such corpus, split or model, the settings are wrong, or `out` holds pictures of other
            settings.
        RetryLater: another job works on `out`.
        Failure: `out` cannot be written, the model cannot be loaded, or every picture fails for one reason.
    """
    if spec.count < 1:
        raise UsageError(f"the count of negative samples must be at least 1, got {spec.count}.")
    pool = Pool(workers=spec.workers, num_gpus=spec.num_gpus).placed(needs_of(spec.placement))
    corpus = open_corpus(corpus_dir)
    total = len(corpus.split(split))
    if not total:
        raise UsageError(f"split {split} of {corpus_dir} is empty.")
    job = _job(corpus, split, out.absolute(), spec)
    check_output(out, free_mib=0)
    with folder_lock(out):
        try:
            _check_same_settings(job)
            sha256s = _clean_up(out, spec.count)
            samples = choose_samples(total, spec.count, spec.seed)
            tasks = [
                NegativeTask(number=number, sample=int(samples[number]), sha256=sha256s.get(number, ""))
                for number in range(spec.count)
            ]
            answers = answers_of(functools.partial(NegativesWorker, job, pool.others), tasks, pool)
            counts = _collect(out, answers, spec.count, progress)
            _write_sheet(job, corpus)
        except OSError as error:
            raise Failure(f"cannot write to {out}: {error.strerror or error}") from error
    return NegativesResult(
        new=counts["new"],
        skipped=counts["skipped"],
        quarantined=counts["quarantined"],
        pictures=out / "pictures",
        records=out / "records.jsonl",
        quarantine=out / "quarantine.jsonl",
    )


def settings_of(spec: NegativeSpec) -> ImageToImageSettings:
    """Settings of the model's function; ValueError for a value out of range."""
    return ImageToImageSettings(
        strength=spec.strength, steps=spec.steps, cfg_scale=spec.cfg_scale, resolution=spec.resolution
    )


def _job(corpus: Corpus, split: str, out: Path, spec: NegativeSpec) -> NegativesJob:
    """The job of a spec; UsageError where the model or a setting is wrong."""
    from components.models import ModelError

    try:
        settings_of(spec)
        prompts, digest = negative_prompts(spec.prompts), prior_digest(spec.prior, spec.revision)
        folder, _ = model_folder(spec.prior, spec.revision)
    except (ValueError, ModelError) as error:
        raise UsageError(str(error)) from error
    prior = str(folder.absolute()) if folder == Path(spec.prior) else spec.prior
    return NegativesJob(
        corpus=corpus.folder.absolute(),
        split=split,
        corpus_digest=corpus.digest,
        model_digest=digest,
        out=out,
        spec=replace(spec, prior=prior, prompts=prompts),
    )


def choose_samples(total: int, count: int, seed: int) -> np.ndarray:
    """Sample numbers of the pictures 0 .. count - 1, int64: each of `total` once, then each once more, and so on.

    A larger count begins with those of a smaller one.
    """
    rounds = []
    for epoch in range(-(-count // total)):
        # raw Philox words: numpy promises those bits for all versions
        words = generator(seed, "negatives", epoch).bit_generator.random_raw(total)
        rounds.append(np.argsort(words, kind="stable")[: count - epoch * total])
    return np.concatenate(rounds)


def _check_same_settings(job: NegativesJob) -> None:
    """Write negatives.json, or refuse a folder with pictures of other settings."""
    out, shared = job.out, job.shared_settings()
    place = out / "negatives.json"
    before: Any = None
    if place.exists():
        try:
            before = json.loads(place.read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UsageError(f"{place} was not written by this command: choose another output folder.")
        differing = sorted(name for name in {*before, *shared} if before.get(name) != shared.get(name))
        if differing:
            raise UsageError(f"{out} holds negatives of another {', '.join(differing)}: choose another output folder.")
    elif (out / "pictures").exists():
        raise UsageError(f"{out / 'pictures'} was not made by this job: choose another output folder.")
    replace_file(place, (json.dumps(shared, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def _clean_up(out: Path, count: int) -> dict[int, str]:
    """Remove marks and temporary files of an interrupted job; returns the sha256 of each recorded picture by number."""
    Marks(out / MARKS).clear()
    remove_leftovers(out, LEFTOVERS, f"pictures/*/{LEFTOVERS}")
    end_torn_line(out / "records.jsonl")
    beyond = [row for row in read_lines(out / "quarantine.jsonl") if row["number"] >= count]
    write_lines(out / "quarantine.jsonl", beyond)  # the other numbers are tried again
    return {row["number"]: row["output_sha256"] for row in iter_lines(out / "records.jsonl")}


def _collect(out: Path, answers: Iterator[NegativeAnswer], of: int, progress: Progress) -> dict[str, int]:
    """Write the rows of the answers as they come; returns counts by status."""
    counts = {"new": 0, "skipped": 0, "quarantined": 0}
    reasons: list[tuple[str, str]] = []
    records, quarantine = out / "records.jsonl", out / "quarantine.jsonl"
    progress(0, of)
    with records.open("a", encoding="utf-8") as good, quarantine.open("a", encoding="utf-8") as bad:
        for number, answer in enumerate(answers, start=1):
            status, row = answer.status, answer.row
            if status == "fatal":
                raise UsageError(row["detail"]) if answer.usage else Failure(row["detail"])
            counts[status] += 1
            if status != "skipped":
                target = bad if status == "quarantined" else good
                target.write(json.dumps(row, ensure_ascii=False) + "\n")
                target.flush()
            if status == "quarantined":
                reasons.append((row["code"], row["detail"]))
            if (
                len(reasons) == number == min(MAX_EQUAL_FAILURES, of)
                and len(set(reasons)) == 1
                and row["stage"] == "make"
            ):
                raise Failure(f"no negative sample can be made: {row['detail']}")
            progress(number, of, row["key"])
    missing = of - sum(counts.values())
    if missing:
        raise Failure(f"{missing} of {of} numbers came back without an answer; the same command continues.")
    # the order of arrival depends on timing; the finished files must not
    bad_rows = {row["number"]: row for row in read_lines(quarantine)}
    good_rows = {row["number"]: row for row in read_lines(records) if row["number"] not in bad_rows}
    for path, newest in ((records, good_rows), (quarantine, bad_rows)):
        write_lines(path, sorted(newest.values(), key=itemgetter("number")))
    return counts


class NegativesWorker:
    """Makes pictures in a worker process. The model is loaded when the first picture needs it.

    Every failure comes back as an answer: an exception would end the whole job.

    Args:
        job: what is made.
        others: workers that may load the model at the same time.
    """

    def __init__(self, job: NegativesJob, others: int = 0) -> None:
        self.job, self.others, self.marks = job, others, Marks(job.out / MARKS)
        self.corpus: Corpus | None = None
        self.change: ImageToImage | None = None
        self.broken: tuple[str, bool] | None = None  # why the model cannot be loaded, and whether that is a UsageError

    def __call__(self, tasks: Sequence[NegativeTask]) -> list[NegativeAnswer]:
        """The answers in the order of the tasks."""
        return [self._answer(task) for task in tasks]

    def _answer(self, task: NegativeTask) -> NegativeAnswer:
        job, number = self.job, task.number
        key, place = job.key(number), job.out / job.output(number)
        stage, source_key = "read", ""
        try:
            before = place.read_bytes() if place.exists() else b""
            if before and _sha256(before) == task.sha256:
                self._write_caption(number)
                return NegativeAnswer(status="skipped", row={"number": number, "key": key})
            self.corpus = self.corpus or open_corpus(job.corpus)
            source_key = str(self.corpus.split(job.split).locate(task.sample)[1]["key"])
            data = read_sample(self.corpus, job.split, task.sample)
            row = self._row(task, source_key, data)
            if before and _is_picture_of(before, row):  # a job was killed before it wrote the record
                self._write_caption(number)
                return NegativeAnswer(status="new", row={**row, "output_sha256": _sha256(before)})
            image = decode(data, STORED_LIMITS, source_key)
            stage = "make"
            self._load()
            if self.broken is not None:
                detail, usage = self.broken
                return self._fatal(number, detail, usage)
            png = encode_png(self._make_picture(image, row), _text_chunks(row))
        except SampleError as error:
            row = {"number": number, "key": key, "source_key": source_key, "stage": stage}
            return NegativeAnswer(status="quarantined", row={**row, "code": error.code, "detail": error.detail})
        except RestorayError as error:  # the corpus has changed meanwhile
            return self._fatal(number, str(error))
        except OSError as error:
            return self._unwritable(number, place, error)
        try:
            self._write_caption(number)
            replace_file(place, png)
        except OSError as error:
            return self._unwritable(number, place, error)
        return NegativeAnswer(status="new", row={**row, "output_sha256": _sha256(png)})

    def _row(self, task: NegativeTask, source_key: str, data: bytes) -> dict[str, Any]:
        """The record of a picture, but for the sha256 of its file.

        Args:
            data: bytes of the source.
        """
        job, number = self.job, task.number
        return {
            "number": number,
            "key": job.key(number),
            "output": job.output(number),
            "source_key": source_key,
            "source_sha256": _sha256(data),
            "sample": task.sample,
            "corpus": job.corpus_digest,
            "seed": job.spec.seed,
            "prompt": job.prompt(number),
            "strength": job.spec.strength,
            "model": job.model,
            "model_digest": job.model_digest,
            "made_with": job.made_with(number),
        }

    def _write_caption(self, number: int) -> None:
        """Write the caption of a number. It goes before the picture, so that no picture is without one."""
        place = (self.job.out / self.job.output(number)).with_suffix(".txt")
        text = self.job.prompt(number).encode()
        if not place.exists() or place.read_bytes() != text:
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(place, text)

    def _make_picture(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        """The model's picture, uint8 [S, S, 3]. Any error of the model becomes a SampleError of this number."""
        assert self.change is not None
        number = row["number"]
        if self.marks.deaths(str(number)) >= MAX_DEATHS:
            raise SampleError("worker_died", f"{MAX_DEATHS} workers died over this number")
        with self.marks.work_on(str(number)):  # outside of the try: a full disk ends the job
            try:
                with fixed_threads():
                    return self.change(image, row["prompt"], self.job.spec.seed, number)
            except SampleError:
                raise
            except Exception as error:
                if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                    raise SampleError("out_of_memory", "not enough memory to make the picture") from error
                raise SampleError("failed", f"{type(error).__name__}: {error}") from error

    def _load(self) -> None:
        """Load the model once; where that fails, `broken` has the reason."""
        if self.change is not None or self.broken is not None:
            return
        spec = self.job.spec
        make = functools.partial(
            build_image_to_image,
            spec.prior,
            settings_of(spec),
            "cuda" if spec.num_gpus else "cpu",
            spec.revision,
            spec.precision,
        )
        try:
            self.change = self.marks.load("loading", self.others, make)
        except WorkersDied:
            self.broken = f"workers died again and again while loading {spec.prior}", False
        except ValueError as error:
            self.broken = str(error), True
        except Exception as error:  # noqa: BLE001 - any error while loading ends the job with one sentence
            self.broken = f"{spec.prior} cannot be loaded: {type(error).__name__}: {error}", False

    def _unwritable(self, number: int, place: Path, error: OSError) -> NegativeAnswer:
        return self._fatal(number, f"{place}: {write_error_reason(error)}")

    def _fatal(self, number: int, detail: str, usage: bool = False) -> NegativeAnswer:
        row = {"number": number, "key": self.job.key(number), "detail": detail}
        return NegativeAnswer(status="fatal", row=row, usage=usage)


def _text_chunks(row: Mapping[str, Any]) -> dict[str, str]:
    """Text chunks of the picture of a record."""
    return {"software": "restoray", **{name: str(row[name]) for name in TEXT_CHUNKS}}


def _is_picture_of(png: bytes, row: Mapping[str, Any]) -> bool:
    """Whether a PNG is intact and has the text chunks of a record."""
    try:
        return read_png_text(png) == _text_chunks(row)
    except SampleError:
        return False


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_sheet(job: NegativesJob, corpus: Corpus) -> None:
    """Write contact.jpg: sources next to results, spread evenly over the numbers."""
    rows = read_lines(job.out / "records.jsonl")
    if len(rows) > SHEET_PICTURES:
        rows = [rows[k * len(rows) // SHEET_PICTURES] for k in range(SHEET_PICTURES)]
    cells = []
    for row in rows:
        try:
            data = read_sample(corpus, job.split, row["sample"])
            source = square(decode(data, STORED_LIMITS), job.spec.resolution)
            result = decode((job.out / row["output"]).read_bytes())
        except (OSError, SampleError):
            continue  # removed since
        cells.append(([source, result], f"{row['key']}\n{row['prompt'][:56]}"))
    if cells:
        replace_file(job.out / "contact.jpg", contact_sheet(cells))
