"""The batch job behind `restoray restore`: pictures (sources.py) through a pool of workers. A rerun resumes.

    <out>/KEY.png             results, in the folders of their sources ("sub/b.png"), also in other formats; their text
                              (components.picture_files) holds model, recipe, seed, options and the source's sha256;
                              or tars and tables of them, see shards.py
    <out>/records.jsonl       one line per result: key, source, source_sha256, output, output_sha256, width, height,
                              seconds, seed, model_digest, options_digest; where they apply also prompt, captioner
                              (who wrote the prompt), reference_sha256, build (device, precision, speed), file (format
                              and others, where not the default), notes (what was dropped or changed), and in a job
                              with several models `model`, the name
    <out>/quarantine.jsonl    one line per picture that could not be restored: key, source, stage, code, detail,
                              bytes_sha256

The driver lists the pictures and sends paths to the workers, with the records of earlier jobs. A worker (worker.py)
reads its pictures, skips those with an up-to-date result, restores the others and writes their files. Its answers
are rows, which the driver (books.py) appends to the two lists. Pixels never pass through the driver.

A picture is up to date if its record has this job's model, options and seed, and both files have the recorded sha256.
A worker renames a result into place before the driver writes the record. So a job can be killed at any time, and the
next one restores what has no record. Marks (core/deaths.py) show which picture killed a worker. A picture that kills
MAX_DEATHS workers is quarantined.

A job overwrites and deletes only its own files: those with a record, or with a text that names the same key and
source. It deletes a result only if the source has changed and is no longer readable as a picture.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from components.images import ANY_SHAPE, Limits
from components.picture_files import SUFFIXES
from components.restoring import Ask, Picture, picture_seed
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import UsageError
from pipelines.core.folders import job_lock
from pipelines.core.pictures import list_pictures
from pipelines.core.places.place import Where
from pipelines.core.pool import Pool, answers_of
from pipelines.restoration.books import Books
from pipelines.restoration.models import OpenedModel
from pipelines.restoration.prompts import JobCaptioner
from pipelines.restoration.shards import ShardWorker, check_form, shard_names, shards_of
from pipelines.restoration.sources import Sources, list_sources
from pipelines.restoration.worker import Answer, RestoreWorker, Task, WorkerSettings

MAX_BATCHES_PER_CALL, CALLS_PER_WORKER = 8, 4  # ours


@dataclass(frozen=True, kw_only=True)
class RestoreJob:
    """Settings of a job, for all its pictures.

    Attributes:
        ask: prompt, size and the system's own options, with types; see OpenedModel.request_options.
        seed: seed of the job; a picture gets the seed `picture_seed(seed, key)`.
        seeds: seeds by key that replace this.
        references: folder of second pictures by key, for options that need one.
        prompts: prompts by key, see prompts.read_prompts. A picture without one gets the captioner's text, or without a
            captioner the prompt in `ask`.
        captioner: writes missing prompts, see prompts.job_captioner. A rerun does not caption an unchanged picture
            again.
        limits: larger inputs are refused.
        routes: digest of the model by key, see routes.read_routes; a picture without one gets the first model.
        out_form: "files"; or "tar" or "parquet", if the input is such files: see shards.py.
    """

    ask: Ask = field(default_factory=Ask)
    seed: int = 0
    seeds: Mapping[str, int] | None = None
    references: Where | None = None
    prompts: Mapping[str, str] | None = None
    captioner: JobCaptioner | None = None
    limits: Limits = ANY_SHAPE
    routes: Mapping[str, str] | None = None
    out_form: str = "files"


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    """Result of a job.

    Attributes:
        restored: pictures restored by this job. quarantined: pictures that could not be restored.
        skipped: pictures with an up-to-date result of an earlier job.
        ignored: files that are not pictures: hidden files, and sidecars by their suffix.
        unprompted: pictures without their own prompt; 0 if the job has no `prompts`.
        folder: folder of the PNG files. records, quarantine: paths of the two lists.
    """

    restored: int
    quarantined: int
    skipped: int
    ignored: int
    folder: Where
    records: Where
    quarantine: Where
    unprompted: int = 0


def batches_per_call(pictures: int, pool: Pool) -> int:
    """Number of batches in one call of a worker, so that one is encoded while the next is restored.

    Small jobs have calls of one batch: each worker should get CALLS_PER_WORKER calls at least, and a kill costs the
    pictures of a call.
    """
    batches = -(-pictures // pool.batch_size)
    return max(1, min(MAX_BATCHES_PER_CALL, batches // (CALLS_PER_WORKER * max(1, pool.workers))))


def restore_folder(
    model: OpenedModel,
    src: str | Where | Sources,
    out: Where,
    job: RestoreJob = RestoreJob(),
    pool: Pool = Pool(),
    progress: Progress | None = None,
) -> RestoreResult:
    """Restore every picture of `src` into `out`.

    Args:
        model: see models.open_model.
        src: what list_sources takes, or its answer for the same `out`.
        out: folder for results and records; here or in a store.
        job: settings for all pictures.
        pool: the workers; `batch_size` is the number of pictures per call of the restorer.
        progress: counts pictures.

    Raises:
        UsageError: there are no pictures or references, a prompt has no picture, or a result would overwrite a file of
            another program.
        RetryLater: another job works on `out`, or a store does not answer.
        Failure: `out` cannot be written, the model cannot be loaded, or all pictures fail for the same reason.
    """
    listing = src if isinstance(src, Sources) else list_sources(src, out)
    sources, ignored, root = listing.pictures, listing.ignored, listing.root
    references = list_pictures(job.references)[0] if job.references is not None else {}
    if job.references is not None and not set(references) & set(sources):
        raise UsageError(f"no picture in {job.references} has the name of one in {root}")
    if unknown_keys := sorted(set(job.prompts or {}) - set(sources)):
        raise UsageError(f"no picture in {root} has the key of a prompt: {', '.join(unknown_keys[:5])}")
    check_form(job.out_form, sources)
    routes = {key: digest for key, digest in (job.routes or {}).items() if digest != model.identity.digest}
    with job_lock(out) as lease:
        format = job.ask.file.format  # noqa: A001
        suffixes = (SUFFIXES[format],) if format in SUFFIXES else tuple(SUFFIXES.values())
        books = Books(out.absolute(), lease, suffixes)
        whole = job.out_form != "files"
        records = books.open(sources, shard_names(sources, root, job.out_form) if whole else None)
        tasks = [
            Task(
                picture=Picture(
                    key=key,
                    seed=(job.seeds or {}).get(key, picture_seed(job.seed, key)),
                    prompt=(job.prompts or {}).get(key, ""),
                ),
                source=path,
                reference=references.get(key),
                record=records.get(key, {}),
                model=routes.get(key, ""),
            )
            for key, path in sources.items()
        ]
        if routes and not whole:  # few switches between models
            tasks.sort(key=lambda task: task.model)
        settings = WorkerSettings(
            factory=model.factory,
            identity=model.identity,
            ask=job.ask,
            limits=job.limits,
            out=books.out,
            marks=books.marks,
            fence=lease.fence if lease is not None else None,
            batch_size=pool.batch_size,
            others=pool.others,
            build=model.build,
            captioner=job.captioner,
            siblings={each.identity.digest: each.identity for each in model.siblings},
        )
        answers: Iterator[Answer]
        if whole:
            shards = shards_of(tasks, root, job.out_form, books.rejects)
            make = functools.partial(ShardWorker, settings, job.out_form)
            answers = itertools.chain.from_iterable(answers_of(make, shards, replace(pool, batch_size=1)))
        else:
            calls = replace(pool, batch_size=pool.batch_size * batches_per_call(len(tasks), pool))
            answers = answers_of(functools.partial(RestoreWorker, settings), tasks, calls)
        counts = books.collect(answers, len(tasks), progress or no_progress)
    return RestoreResult(
        restored=counts["restored"],
        quarantined=counts["quarantined"],
        skipped=counts["skipped"],
        ignored=ignored,
        folder=books.out,
        records=books.records,
        quarantine=books.quarantine,
        unprompted=len(sources) - len(job.prompts) if job.prompts is not None else 0,
    )
