"""`restoray restore`: a folder of pictures through a pool of restoring workers, resumable and with a quarantine.

    <out>/KEY.png             results; text chunks say how each was made
    <out>/records.jsonl       a line per result: key, source, source_sha256, output, output_sha256, width, height,
                              seconds, seed, model_digest, options_digest, prompt (if any), captioner (who wrote it),
                              reference_sha256, build (if unusual)
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

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.images import Limits
from components.options import OptionCheck
from components.restoring import Identity, file_key, parse_ask, picture_seed
from components.types import Restorer
from pipelines.console import Progress, no_progress
from pipelines.errors import Failure, UsageError
from pipelines.heldout import prepare_heldout as prepare_heldout  # the step before this one in a plan
from pipelines.restore_job import Job, own_folder
from pipelines.restore_prompts import CaptionWish
from pipelines.restore_worker import THREADS, Factory, RestoreWorker
from pipelines.sources import SIDECARS, is_output

MAX_BLOCKS = 2000  # of a Ray dataset: a block is the unit in which records come back, but each costs the scheduler


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    """What a job did: counts of pictures, and where things are.

    Attributes:
        restored: made now. skipped: up to date from an earlier run. quarantined: could not be restored.
        ignored: files that are no pictures by their suffix (lists, notes).
        unprompted: pictures without a prompt of their own, where prompts were given.
        folder: where the PNGs lie.
    """

    restored: int
    quarantined: int
    skipped: int
    ignored: int
    folder: Path
    records: Path
    quarantine: Path
    unprompted: int = 0


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
        frame=str(recipe.get("prompt") or ""),
        defaults=recipe_defaults(str(info["system"]), recipe),
    )
    return found.path.resolve(), identity


def recipe_defaults(system: str, recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Restorer options that a resolved recipe settles for its model."""
    from components.systems import SYSTEMS

    return SYSTEMS[system].restore_defaults(recipe) if system in SYSTEMS else {}


def option_check(system: str, defaults: Mapping[str, Any]) -> OptionCheck:
    """What judges a request's options; a system that is not in SYSTEMS takes them as they are until it restores.

    Args:
        defaults: options of the model's own, see Identity.
    """
    from components.systems import SYSTEMS

    found = SYSTEMS.get(system)
    if found is None or found.check_options is None:
        return dict
    return functools.partial(found.check_options, defaults=dict(defaults))


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
    prompts: Mapping[str, str] | None = None,
    captioner: CaptionWish | None = None,
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
        prompts: a picture's own by key, see restore_prompts.read_prompts; before what the captioner says, and that
            before the job's in `options`.
        captioner: see restore_prompts.caption_wish; asked once for a picture that stays the same.

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
        ask = parse_ask(options or {}, option_check(identity.system, identity.defaults))
    except ValueError as error:
        raise UsageError(str(error)) from error
    sources, ignored = list_pictures(src, out)
    beside = list_pictures(references)[0] if references is not None else {}
    if references is not None and not set(beside) & set(sources):
        raise UsageError(f"no picture in {references} has the name of one in {src}")
    if strange := sorted(set(prompts or {}) - set(sources)):
        raise UsageError(f"no picture in {src} has the key of a prompt: {', '.join(strange[:5])}")
    with own_folder(out):
        job = Job(out.absolute())
        entries = [
            {"key": key, "path": str(path), "seed": (seeds or {}).get(key, picture_seed(seed, key))}
            | ({"reference": str(beside[key])} if key in beside else {})
            | ({"prompt": prompts[key]} if prompts and key in prompts else {})
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
            "captioner": captioner,
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
            unprompted=len(sources) - len(prompts) if prompts is not None else 0,
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
