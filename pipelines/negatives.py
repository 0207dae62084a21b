"""Negative-quality samples of a corpus (SUPIR section 3.2): a resumable job over a pool of workers.

    <out>/pictures/00012/negative-SEED-0012345.png    the pictures; text chunks say how each was made
    <out>/pictures/00012/negative-SEED-0012345.txt    its caption: the negative prompt
    <out>/records.jsonl       a line per picture: number, key, output, output_sha256, source_key, source_sha256, sample,
                              corpus, seed, prompt, strength, model, model_digest, made_with
    <out>/quarantine.jsonl    a line per number without a picture: number, key, source_key, stage, code, detail
    <out>/negatives.json      what all pictures share; a folder never mixes two settings
    <out>/contact.jpg         sources and results side by side, for looking

`<out>/pictures` is a source of kind `folder` for a corpus spec, captions included. Number n stands for one sample of
the corpus, drawn without repetition until all were used, for one prompt, and for its own noise: pictures do not depend
on how many workers there are or on `count`, and a larger count goes on where a smaller one ended. Workers get numbers
and return records. A picture is renamed into place before its record is written, and its text chunks name its
settings, so a job that was killed anywhere repeats no finished file.

How many: SUPIR trained on 100K negatives beside 20M pictures with captions and 70K faces, 1 to 200.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np

from components.images import Limits, decode, encode_png, read_png_text
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
from pipelines.console import Progress, no_progress
from pipelines.errors import Failure, RestorayError, UsageError
from pipelines.restore_worker import THREADS, set_threads
from pipelines.rows import end_torn_line, iter_lines, read_lines, replace_file, write_lines
from pipelines.shards import Corpus, open_corpus, read_sample
from pipelines.sheets import contact_sheet

PER_FOLDER = 1000  # pictures a folder, for file systems and people
MAX_BLOCKS = 2000  # of a Ray dataset: a block is the unit in which records come back, but each costs the scheduler
MAX_DEATHS = 2  # of workers, by one number or by loading the model
HOPELESS = 3  # equal failures from the first number on, none made: the job is wrong, not the pictures
SHEET_PICTURES = 12
STORED_LIMITS = Limits(max_pixels=1 << 40, max_bytes=1 << 40, max_aspect=1e9, max_expansion=1e9)
"""Curation has already applied the corpus' own limits, which may be wider than the decoder's defaults."""


@dataclass(frozen=True, kw_only=True)
class NegativesResult:
    """Counts of numbers, and where things are."""

    made: int
    skipped: int
    quarantined: int
    pictures: Path
    records: Path
    quarantine: Path


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides a picture besides its number, and where it goes.

    Attributes:
        corpus, split: folder and split of the sources.
        corpus_digest, model_digest: what these were when the job began.
        others: workers that may be loading the model at the same time.
    """

    corpus: str
    corpus_digest: str
    split: str
    out: str
    model: str
    model_digest: str
    revision: str
    precision: Literal["fp32", "fp16", "bf16"]
    device: str
    seed: int
    prompts: tuple[str, ...]
    settings: ImageToImageSettings
    others: int = 0

    def shared(self) -> dict[str, Any]:
        """What negatives.json says, and what a resumed job must find there."""
        return {
            "corpus": self.corpus_digest,
            "split": self.split,
            "model": Path(self.model).name if Path(self.model).is_absolute() else self.model,
            "model_digest": self.model_digest,
            "precision": self.precision,
            "seed": self.seed,
            "prompts": list(self.prompts),
            **asdict(self.settings),
        }

    def made_with(self, number: int) -> str:
        """Digest of all that decides the picture of a number."""
        return hashlib.sha256(json.dumps([self.shared(), number], sort_keys=True).encode()).hexdigest()

    def prompt(self, number: int) -> str:
        """The prompt of a number, drawn from all with equal chance."""
        draw = int(generator(self.seed, number, "prompt").bit_generator.random_raw())
        return self.prompts[draw % len(self.prompts)]

    def key(self, number: int) -> str:
        return f"negative-{self.seed}-{number:07d}"

    def output(self, number: int) -> str:
        """Path of a number's picture below `out`."""
        return f"pictures/{number // PER_FOLDER:05d}/{self.key(number)}.png"


def make_negatives(
    corpus_dir: Path,
    prior: str,
    out: Path,
    count: int,
    strength: float = 0.5,
    seed: int = 0,
    prompts: Sequence[str] = ("supir-samples",),
    progress: Progress = no_progress,
    *,
    split: str = "train",
    resolution: int = 1024,
    steps: int = 50,
    cfg_scale: float = 5.0,
    revision: str = "",
    precision: Literal["fp32", "fp16", "bf16"] = "fp32",
    workers: int = 1,
    num_gpus: float = 0.0,
    on_ray: bool = True,
) -> NegativesResult:
    """Make `count` negative samples from a corpus.

    Args:
        corpus_dir: a curated corpus.
        prior: a shipped prior, a prior's model folder, or a diffusers folder or hub id (with `revision`).
        out: where the pictures go.
        count: numbers 0 .. count - 1 are made.
        strength, resolution, steps, cfg_scale: see components.negatives.ImageToImageSettings.
        prompts: names of NEGATIVE_PROMPTS or texts; each number draws one.
        precision: of a diffusers model's weights.
        workers: at most; each loads the model once.
        num_gpus: of one worker; 0 works on the CPU.
        on_ray: False runs in this process, with the same bits.

    Raises:
        UsageError: no such corpus, split or model, wrong settings, or `out` holds pictures of other settings.
        RetryLater: another job works on `out`.
        Failure: `out` cannot be written, the model cannot be loaded, or every picture fails for one reason.
    """
    from components.models import ModelError
    from pipelines.plans import check_output, run_lock

    if count < 1 or workers < 1:
        raise UsageError(f"count and workers must be at least 1, got {count} and {workers}.")
    corpus = open_corpus(corpus_dir)
    total = len(corpus.split(split))
    if not total:
        raise UsageError(f"split {split} of {corpus_dir} is empty.")
    try:
        settings = ImageToImageSettings(strength=strength, steps=steps, cfg_scale=cfg_scale, resolution=resolution)
        texts, digest = negative_prompts(prompts), prior_digest(prior, revision)
        folder, _ = model_folder(prior, revision)
    except (ValueError, ModelError) as error:
        raise UsageError(str(error)) from error
    job = Job(
        corpus=str(Path(corpus_dir).absolute()),
        corpus_digest=corpus.digest,
        split=split,
        out=str(out.absolute()),
        model=str(folder.absolute()) if folder == Path(prior) else prior,  # workers have another current folder
        model_digest=digest,
        revision=revision,
        precision=precision,
        device="cuda" if num_gpus else "cpu",
        seed=seed,
        prompts=tuple(texts),
        settings=settings,
        others=workers - 1,
    )
    check_output(out, free_mib=0)
    with run_lock(out):
        try:
            _check_same_settings(out, job)
            done = _tidied_up(out, count)
            samples = choose_samples(total, count, seed)
            rows = [
                {"job": json.dumps({"number": number, "sample": int(samples[number]), "sha256": done.get(number, "")})}
                for number in range(count)
            ]
            answers = _through_ray(job, rows, workers, num_gpus) if on_ray else _in_process(job, rows)
            counts = _collect(out, answers, count, progress)
            _sheet(out, corpus, split, settings.resolution)
        except OSError as error:
            raise Failure(f"cannot write to {out}: {error.strerror or error}") from error
    return NegativesResult(
        **counts,
        pictures=out / "pictures",
        records=out / "records.jsonl",
        quarantine=out / "quarantine.jsonl",
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


def _check_same_settings(out: Path, job: Job) -> None:
    """Write negatives.json, or refuse a folder in which other settings worked before."""
    place, shared = out / "negatives.json", job.shared()
    before: Any = None
    if place.exists():
        try:
            before = json.loads(place.read_bytes())
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise UsageError(f"{place} is no file of ours: choose another output folder.")
        differing = sorted(name for name in {*before, *shared} if before.get(name) != shared.get(name))
        if differing:
            raise UsageError(f"{out} holds negatives of another {', '.join(differing)}: choose another output folder.")
    elif (out / "pictures").exists():
        raise UsageError(f"{out / 'pictures'} was not made by this job: choose another output folder.")
    replace_file(place, (json.dumps(shared, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def _tidied_up(out: Path, count: int) -> dict[int, str]:
    """Clear what an interrupted job left; sha256 of each recorded picture by its number."""
    marks = out / ".attempts"
    marks.mkdir(exist_ok=True)
    for stale in (*marks.iterdir(), *out.glob(".*.tmp-*"), *out.glob("pictures/*/.*.tmp-*")):
        stale.unlink()
    end_torn_line(out / "records.jsonl")
    old = [row for row in read_lines(out / "quarantine.jsonl") if row["number"] >= count]
    write_lines(out / "quarantine.jsonl", old)  # the others are tried again
    return {row["number"]: row["output_sha256"] for row in iter_lines(out / "records.jsonl")}


def _collect(out: Path, answers: Iterator[dict[str, Any]], of: int, progress: Progress) -> dict[str, int]:
    """Write down what the workers say, as they say it; returns counts by status."""
    counts = {"made": 0, "skipped": 0, "quarantined": 0}
    reasons: list[tuple[str, str]] = []
    records, quarantine = out / "records.jsonl", out / "quarantine.jsonl"
    progress(0, of)
    with records.open("a", encoding="utf-8") as good, quarantine.open("a", encoding="utf-8") as bad:
        for done, answer in enumerate(answers, 1):
            status, row = answer["status"], answer["row"]
            if status == "fatal":
                raise UsageError(row["detail"]) if row["usage"] else Failure(row["detail"])
            counts["made" if status == "found" else status] += 1
            if status != "skipped":
                target = bad if status == "quarantined" else good
                target.write(json.dumps(row, ensure_ascii=False) + "\n")
                target.flush()
            if status == "quarantined":
                reasons.append((row["code"], row["detail"]))
            if len(reasons) == done == min(HOPELESS, of) and len(set(reasons)) == 1 and row["stage"] == "make":
                raise Failure(f"no negative sample can be made: {row['detail']}")
            progress(done, of, row["key"])
    if sum(counts.values()) != of:
        raise Failure(
            f"{of - sum(counts.values())} of {of} numbers came back without an answer; the same command goes on."
        )
    # arrival depends on timing, the finished files should not
    refused = {row["number"]: row for row in read_lines(quarantine)}
    made = {row["number"]: row for row in read_lines(records) if row["number"] not in refused}
    for path, newest in ((records, made), (quarantine, refused)):
        write_lines(path, sorted(newest.values(), key=itemgetter("number")))
    return counts


class NegativesWorker:
    """Makes pictures in a worker process. The model is loaded when the first picture needs it.

    Every failure comes back as a row: an exception would end the whole job, or be retried without end.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.out = job, Path(job.out)
        self.corpus: Corpus | None = None
        self.change: ImageToImage | None = None
        self.broken: dict[str, Any] | None = None

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns in: job (JSON text). Columns out: answer (JSON text), one for each job, in order."""
        answers = [self.make(**json.loads(text)) for text in batch["job"]]
        return {"answer": np.array([json.dumps(answer) for answer in answers], dtype=object)}

    def make(self, number: int, sample: int, sha256: str) -> dict[str, Any]:
        """Answer {status, row} for a number: made, found (made before, and not recorded), skipped, quarantined, fatal.

        Args:
            sample: sample number in the corpus.
            sha256: of the picture that a record names; "" where there is no record.
        """
        key, place = self.job.key(number), self.out / self.job.output(number)
        stage, source_key = "read", ""
        try:
            before = place.read_bytes() if place.exists() else b""
            if before and hashlib.sha256(before).hexdigest() == sha256:
                self._write_caption(number)
                return {"status": "skipped", "row": {"number": number, "key": key}}
            self.corpus = self.corpus or open_corpus(self.job.corpus)
            source_key = str(self.corpus.split(self.job.split).locate(sample)[1]["key"])
            data = read_sample(self.corpus, self.job.split, sample)
            row = self._row(number, sample, source_key, data)
            if before and self._says(before, row):
                self._write_caption(number)
                return {"status": "found", "row": {**row, "output_sha256": hashlib.sha256(before).hexdigest()}}
            image = decode(data, STORED_LIMITS, source_key)
            stage = "make"
            if not self._loaded():
                return {"status": "fatal", "row": {"number": number, "key": key, **(self.broken or {})}}
            pixels = self._changed(image, row)
        except SampleError as error:
            row = {"number": number, "key": key, "source_key": source_key, "stage": stage}
            return {"status": "quarantined", "row": {**row, "code": error.code, "detail": error.detail}}
        except RestorayError as error:  # the corpus was changed meanwhile
            return {"status": "fatal", "row": {"number": number, "key": key, "usage": False, "detail": str(error)}}
        except OSError as error:
            return self._unwritable(number, place, error)
        png = encode_png(pixels, self._text(row))
        try:
            self._write_caption(number)
            replace_file(place, png)
        except OSError as error:
            return self._unwritable(number, place, error)
        return {"status": "made", "row": {**row, "output_sha256": hashlib.sha256(png).hexdigest()}}

    def _row(self, number: int, sample: int, source_key: str, data: bytes) -> dict[str, Any]:
        job = self.job
        return {
            "number": number,
            "key": job.key(number),
            "output": job.output(number),
            "source_key": source_key,
            "source_sha256": hashlib.sha256(data).hexdigest(),
            "sample": sample,
            "corpus": job.corpus_digest,
            "seed": job.seed,
            "prompt": job.prompt(number),
            "strength": job.settings.strength,
            "model": job.shared()["model"],
            "model_digest": job.model_digest,
            "made_with": job.made_with(number),
        }

    @staticmethod
    def _text(row: Mapping[str, Any]) -> dict[str, str]:
        """Text chunks of a picture: enough to know that it need not be made again."""
        names = (
            "key",
            "prompt",
            "seed",
            "strength",
            "model",
            "model_digest",
            "source_key",
            "source_sha256",
            "made_with",
        )
        return {"software": "restoray", **{name: str(row[name]) for name in names}}

    def _says(self, png: bytes, row: Mapping[str, Any]) -> bool:
        """Whether a whole PNG says that it is this row's picture: a job was killed before it wrote the record."""
        try:
            return read_png_text(png) == self._text(row)
        except SampleError:
            return False

    def _write_caption(self, number: int) -> None:
        """Before the picture, so that no picture is ever without."""
        place = (self.out / self.job.output(number)).with_suffix(".txt")
        text = self.job.prompt(number).encode()
        if not place.exists() or place.read_bytes() != text:
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(place, text)

    def _changed(self, image: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
        """The model's answer; whatever it raises becomes this number's reason."""
        assert self.change is not None
        number, mark = row["number"], self.out / ".attempts" / str(row["number"])
        if _deaths(mark) >= MAX_DEATHS:
            raise SampleError("worker_died", f"{MAX_DEATHS} workers died over this number")
        _add_death(mark)
        try:
            return self.change(image, row["prompt"], self.job.seed, number)
        except SampleError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise SampleError("out_of_memory", "not enough memory to make the picture") from error
            raise SampleError("failed", f"{type(error).__name__}: {error}") from error
        finally:
            mark.unlink(missing_ok=True)

    def _loaded(self) -> bool:
        if self.change is None and self.broken is None:
            mark = self.out / ".attempts" / "loading"
            if _deaths(mark) >= MAX_DEATHS + self.job.others:  # the others may be loading right now
                self.broken = {"usage": False, "detail": f"workers died again and again while loading {self.job.model}"}
                return False
            _add_death(mark)
            try:
                job = self.job
                self.change = build_image_to_image(job.model, job.settings, job.device, job.revision, job.precision)
                set_threads(THREADS)
            except Exception as error:  # noqa: BLE001 - whatever loading may raise ends the job with one sentence
                usage = isinstance(error, ValueError)
                detail = str(error) if usage else f"{job.model} cannot be loaded: {type(error).__name__}: {error}"
                self.broken = {"usage": usage, "detail": detail}
            mark.unlink(missing_ok=True)
        return self.broken is None

    def _unwritable(self, number: int, place: Path, error: OSError) -> dict[str, Any]:
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        row = {"number": number, "key": self.job.key(number), "usage": False, "detail": f"{place}: {why}"}
        return {"status": "fatal", "row": row}


def _deaths(mark: Path) -> int:
    return mark.stat().st_size if mark.exists() else 0


def _add_death(mark: Path) -> None:
    """Counts as one until it is taken away: a worker that dies takes nothing away."""
    with mark.open("ab") as stream:
        stream.write(b".")


def _in_process(job: Job, rows: Sequence[Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    import torch

    worker, threads = NegativesWorker(job), torch.get_num_threads()
    try:
        for row in rows:
            yield worker.make(**json.loads(row["job"]))
    finally:
        set_threads(threads)


def _through_ray(job: Job, rows: Sequence[dict[str, str]], workers: int, num_gpus: float) -> Iterator[dict[str, Any]]:
    """Answers in the order in which they come."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    from pipelines.cluster import local_ray

    with local_ray():
        context = DataContext.get_current()
        bars, context.enable_progress_bars = context.enable_progress_bars, False  # the console shows its own
        try:
            dataset = ray.data.from_items(list(rows), override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
                NegativesWorker,  # type: ignore[arg-type]
                fn_constructor_kwargs={"job": job},
                batch_size=1,
                batch_format="numpy",
                # Elastic: a fixed pool as large as the cluster hung when a node was lost.
                compute=ActorPoolStrategy(min_size=1, max_size=min(workers, len(rows))),
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


def _sheet(out: Path, corpus: Corpus, split: str, resolution: int) -> None:
    """Sources beside results, spread evenly over the numbers."""
    rows = read_lines(out / "records.jsonl")
    chosen = [rows[k * len(rows) // SHEET_PICTURES] for k in range(SHEET_PICTURES)] if rows else []
    cells = []
    for row in rows if len(rows) <= SHEET_PICTURES else chosen:
        try:
            source = square(decode(read_sample(corpus, split, row["sample"]), STORED_LIMITS), resolution)
            result = decode((out / row["output"]).read_bytes())
        except (OSError, SampleError):
            continue  # gone since
        cells.append(([source, result], f"{row['key']}\n{row['prompt'][:56]}"))
    if cells:
        replace_file(out / "contact.jpg", contact_sheet(cells))
