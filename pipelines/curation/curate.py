"""Curation: sources -> parts -> measured -> decided -> shards, index.json, manifest and quarantine (decision 0004).

Every candidate of a source ends in exactly one place: the manifest, the quarantine with a reason code, or the count of
skipped sidecar files. Ray tasks get parts and write their results to files. Picture bytes never travel through the
object store, and the driver holds a few hundred bytes a part. The order of the sources decides which picture is
accepted, so the result does not depend on the order in which tasks finish.

Resume: the files of each phase name what they were made from, so a run after kill -9 repeats only what was in work.
index.json comes last; a folder that has it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from components.corpora import CorpusSpec, ModelScore, shown_spec
from components.evaluation.metrics import MetricError
from components.overrides import yaml_text
from components.quality_models import build_scorer, check_scorer
from components.writing import LEFTOVERS, replace_file
from pipelines.core.console import Progress, no_progress
from pipelines.core.devices import check_gpus
from pipelines.core.errors import Failure, RestorayError, UsageError, unknown
from pipelines.core.folders import job_lock
from pipelines.core.placement import needs_of
from pipelines.core.places.patience import StoreUnavailable
from pipelines.core.pool import last_line, ray_errors
from pipelines.core.rows import end_torn_line, iter_lines
from pipelines.corpus import shards
from pipelines.corpus.catalogue import load_spec
from pipelines.curation import measure, score, select, write
from pipelines.curation.counting import Count
from pipelines.curation.extras import add_columns
from pipelines.curation.negatives import make_negatives
from pipelines.curation.placing import check_tasks, task_resources
from pipelines.curation.report import write_curate_report
from pipelines.curation.sources import (
    Bytes,
    ComingParts,
    ListedParts,
    Part,
    check_sources,
    for_folder,
    list_again,
    load_listing,
    negatives_folder,
    remove_spool,
    save_listing,
    unfinished_error,
)
from pipelines.curation.sources.fetch import TRANSIENT
from pipelines.curation.watch import forget_candidates_in_work, last_sign_of_life, watch_items

SYNC_EVERY_S = 1.0
SPARE_BYTES = 16 << 20  # room for manifest, index and logs
TASKS = 4096  # largest number of tasks of a phase: Ray keeps a few kilobytes of each on the driver
RETRIED = frozenset({"unreadable", "crashed", "timeout", "out_of_memory"})
"""Codes that another try may change, besides those of downloads."""


@dataclass(frozen=True, kw_only=True)
class CurateResult:
    """The result of a curation.

    Attributes:
        accepted, rejected: pictures in the manifest, and rows in the quarantine.
        train, held_out: accepted pictures by split.
        skipped: sidecar and hidden files, which are not candidates.
        reused: measured rows of an earlier run.
        reasons: rejected candidates by code.
        index_path: path of index.json.
        report: the report.html of the corpus.
        digest: sha256 of the manifest.
        seconds: wall time.
        notes: sentences on tables in folders: pictures without a row, and rows without a picture.
    """

    accepted: int
    rejected: int
    train: int
    held_out: int
    skipped: int
    reused: int
    reasons: Mapping[str, int]
    index_path: Path
    report: Path
    digest: str
    seconds: float
    notes: Sequence[str] = ()


def curate(
    spec: CorpusSpec | str | Path,
    out: Path,
    progress: Progress | None = None,
    images: str | Path | None = None,
    retry: Collection[str] = (),
    look_at: measure.Look = measure.look,
) -> CurateResult:
    """Make a corpus folder. A second run repeats no finished work and gives the same bytes.

    Args:
        spec: a spec of components.corpora, or its name or path.
        out: the corpus folder; created. On a cluster every node must see it.
        progress: called with counts of each phase.
        images: a folder that replaces the spec's sources, with held-out pictures by fraction.
        retry: codes whose rows are tried again, besides the temporary ones.
        look_at: decodes and measures a candidate's bytes.

    Raises:
        UsageError: a source is missing or empty or is `out` itself, or a held-out name or score does not exist.
        Failure: the output cannot be written, the disk has too little space, no picture is usable, too many are broken,
            a picture changed meanwhile, or there was no progress for too long.
        RetryLater: another process curates into the same folder.
    """
    report_progress = progress or no_progress
    spec = spec if isinstance(spec, CorpusSpec) else load_spec(spec)
    if images is not None:
        spec = for_folder(spec, Path(images))
    check_sources(spec, Path(out).absolute())
    check_gpus(spec)

    check_tasks(spec)

    def list_all(out: Path) -> ComingParts:
        _make_negatives(spec, out, report_progress)
        return ComingParts(spec, out, lambda listing: save_listing(listing, out, "curate"))

    return _curate(spec, Path(out).absolute(), list_all, report_progress, frozenset(retry) | _transient(spec), look_at)


def _curate(
    spec: CorpusSpec,
    out: Path,
    list_them: Callable[[Path], ComingParts | ListedParts],
    progress: Progress,
    retry: frozenset[str],
    look_at: measure.Look,
) -> CurateResult:
    """All phases; `list_them` is called when the folder is locked."""
    started = time.monotonic()
    bounds = select.thresholds(spec)
    _check_models(spec)
    with job_lock(out):
        try:
            _check_same(spec, out)
            forget_candidates_in_work(out / "work" / "cursors")
            _save_spec(spec, out / "work" / "spec.yaml")
            with closing(list_them(out)) as coming:
                measured = _measure(coming, spec, out, retry, look_at, progress)
            listing = coming.listing
            assert listing is not None
            contents = [(part.name, measured[part.name].content) for part in listing.parts]
            for model in spec.filters.models:
                _score(model, contents, spec, out, progress)
            selection = _select(contents, spec, out, progress)
            _check_usable(selection, spec, out)
            entries = _write_shards(selection.plans, spec, out, progress)
            digest = write.finish(out, spec, selection.plans, entries)
            write.remove_old_shards(out, entries.values())
            _remove_old_parts(out, {part.name for part in listing.parts})
            _save_spec(spec, out / "spec.yaml")
            add_columns(spec, out, progress)
            report = _report(spec, bounds, [name for name, _ in contents], selection, out, digest, started)
            remove_spool(out)
        except OSError as error:
            raise Failure(f"{error.filename or out} cannot be written: {error.strerror or error}.") from error
    return CurateResult(
        accepted=sum(selection.accepted.values()),
        rejected=sum(selection.codes.values()),
        train=selection.accepted["train"],
        held_out=selection.accepted["held_out"],
        skipped=listing.skipped,
        reused=sum(measured[part.name].rows - measured[part.name].fresh for part in listing.parts),
        reasons=selection.codes,
        index_path=out / "index.json",
        report=report,
        digest=digest,
        seconds=time.monotonic() - started,
        notes=listing.sentences,
    )


def replay(
    out: Path,
    codes: Collection[str] = (),
    progress: Progress | None = None,
    look_at: measure.Look = measure.look,
    overrides: Sequence[str] = (),
) -> CurateResult:
    """Try the quarantined candidates of a corpus again, and no others. Those that are intact now join the corpus.

    The sources are not listed again: a new file waits for the next `curate`. A tar or a table that has changed is read
    as a whole.

    Args:
        codes: only rows with these codes, and those that `curate` tries again. Empty takes all rows whose reading,
            fetching or decoding failed.
        overrides: key=value changes of the saved spec: the secrets of stores, which no file holds.

    Raises:
        UsageError: the folder was not made by a curation, no row has such a code, or its last curation is not finished.
        What `curate` raises.
    """
    out = Path(out).absolute()
    spec = saved_spec(out, overrides)
    reasons = retryable_reasons(out)
    for code in codes:
        if code not in reasons:
            raise unknown(f"code of pictures in {out} that can be tried again", code, reasons)
    retry = frozenset(codes or reasons) | _transient(spec)

    def list_quarantined(out: Path) -> ListedParts:
        listing, by = load_listing(out)
        rules = measure.rules_of(spec.filters)

        def sources_to_retry(part: Part) -> set[str]:
            path = measure.measured_path(out, part)
            summary = measure.read_summary(path)
            if summary is None or summary["rules"] != rules or summary["part"] != part.digest:
                if by == "replay":  # a replay that was killed
                    return set()
                raise unfinished_error(out)
            return measure.sources_with_codes(path, summary, retry)

        listing = list_again(listing, spec, out, sources_to_retry)
        save_listing(listing, out, "replay")
        return ListedParts(listing)

    return _curate(spec, out, list_quarantined, progress or no_progress, retry, look_at)


def retryable_reasons(out: Path) -> dict[str, int]:
    """Codes of a corpus' quarantine that another try may change, with their counts: not those of copies and scores."""
    rows = iter_lines(out / "quarantine.jsonl")
    return dict(Counter(row["code"] for row in rows if row["stage"] in ("list", "fetch", "measure")).most_common())


def saved_spec(out: Path, overrides: Sequence[str] = ()) -> CorpusSpec:
    """The spec of a corpus folder, with key=value changes; the secrets of stores are not in it."""
    for path in (out / "spec.yaml", out / "work" / "spec.yaml"):  # the second one is of a run that did not finish
        if path.is_file():
            return load_spec(path, overrides)
    raise UsageError(f"{out} was not made by `restoray curate`: it holds no spec.yaml.")


def _save_spec(spec: CorpusSpec, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, yaml_text(shown_spec(spec)).encode())


def _check_same(spec: CorpusSpec, out: Path) -> None:
    """Refuse to replace a corpus of another name."""
    try:
        name = json.loads((out / "index.json").read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if name != spec.name:
        raise UsageError(f'{out} holds the corpus "{name}", and this one is "{spec.name}": choose another --out.')


def _check_models(spec: CorpusSpec) -> None:
    """Check the names of learned scores before an actor fails over them."""
    for model in spec.filters.models:
        try:
            check_scorer(model)
        except ValueError as error:
            raise UsageError(f"{spec.name}: score {model.name}: {error}") from error


def _transient(spec: CorpusSpec) -> frozenset[str]:
    if not any(source.kind == "urls" for source in spec.sources):
        return RETRIED
    return RETRIED | TRANSIENT - {"truncated"}  # a code of decoders too: such files would be fetched at every rerun


# --- phases -----------------------------------------------------------------------------------------------------------


def _run(
    jobs: Sequence[Any], task: Any, what: str, spec: CorpusSpec, alive: Callable[[], float], **options: Any
) -> Iterator[Any]:
    """Answers of one phase from Ray Data, in any order.

    Not `answers_of`: tasks without actors, a block of jobs per call, and a watch for jobs that stop without an error.

    Args:
        jobs: jobs, one dataclass each.
        task: a function or an actor class; it turns a batch {"job": objects} into {"answer": objects}.
        what: name of the phase, for errors.
        alive: see watch_items.
        options: further arguments of map_batches.
    """
    import ray

    items = ray.data.from_items([{"job": job} for job in jobs], override_num_blocks=min(len(jobs), TASKS))
    dataset = items.map_batches(task, batch_size=None, batch_format="numpy", **task_resources(spec, options))
    dataset.context.enable_progress_bars = False
    with ray_errors(what):
        try:
            for row in watch_items(dataset.iter_rows(), spec.stall_timeout_s, alive, what):
                yield row["answer"]
        except ray.exceptions.RayError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = getattr(cause, "cause", None) or cause.__cause__
            _, is_metric, advice = last_line(error).partition(f"{MetricError.__name__}: ")
            if is_metric:
                raise Failure(f"{what}: {advice}. Finished work is kept.") from error
            _, is_away, sentence = last_line(error).partition(f"{StoreUnavailable.__name__}: ")
            if is_away:
                raise StoreUnavailable(sentence) from None
            if cause is None:
                raise
            raise Failure(f"{what}: {getattr(cause, 'strerror', None) or cause}. Finished work is kept.") from error


@dataclass(frozen=True, slots=True)
class _Measured:
    """What the driver keeps of a measured part: its digest of content, its rows, and how many are new in this run."""

    content: str
    rows: int
    fresh: int


def _measure(
    coming: ComingParts | ListedParts,
    spec: CorpusSpec,
    out: Path,
    retry: frozenset[str],
    look_at: measure.Look,
    progress: Progress,
) -> dict[str, _Measured]:
    """Facts of all parts by name; measures those that need it, in rounds of what has been listed meanwhile."""
    rules = measure.rules_of(spec.filters)
    measured: dict[str, _Measured] = {}
    count = Count(spec)
    arguments = {"spec": spec, "out": out, "retry": sorted(retry), "look_at": look_at, "run": str(time.time_ns())}
    cursors = out / "work" / "cursors"

    def add(name: str, summary: Mapping[str, Any]) -> None:
        if name not in measured:  # a listing that was begun again gives a part again
            count.add(summary)
        fresh = summary.get("fresh", 0) + (measured[name].fresh if name in measured else 0)
        measured[name] = _Measured(summary["content"], summary["rows"], fresh)
        progress(len(measured), max(count.parts, len(measured)), count.note())

    while parts := coming.take():
        missing: list[Part] = []
        count.parts += len(parts)
        count.has_all = coming.listing is not None
        for part in parts:
            summary = measure.read_summary(measure.measured_path(out, part))
            if measure.is_complete(summary, part, rules, retry):
                assert summary is not None
                add(part.name, summary)
            else:
                missing.append(part)
        progress(len(measured), max(count.parts, len(measured)), count.note())
        if missing:
            answers: Iterator[measure.PartAnswer] = _run(
                missing,
                measure.measure_batch,
                "measuring",
                spec,
                lambda: last_sign_of_life(cursors),
                fn_kwargs=arguments,
            )
            for answer in answers:
                add(answer.name, answer.summary)
                count.check(early=True)
    count.check(early=False)
    return measured


def _score(
    model: ModelScore, contents: Sequence[tuple[str, str]], spec: CorpusSpec, out: Path, progress: Progress
) -> None:
    """Compute one learned score for the parts that lack it."""
    others = {other.name for other in spec.filters.models}
    bounds = {name: bound for name, bound in select.thresholds(spec).items() if name not in others}
    missing = [
        score.ScoreTask(part=name, content=content)
        for name, content in contents
        if not score.is_scored(score.scored_path(out, model, name), score.score_rules(model, content, bounds))
    ]
    progress(len(contents) - len(missing), len(contents), model.name)
    if not missing:
        return
    from ray.data import ActorPoolStrategy

    arguments = (model, spec, out, bounds, build_scorer)
    cursors = out / "work" / "cursors"
    answers = _run(
        missing,
        score.ScoreParts,
        f"scoring {model.name}",
        spec,
        lambda: last_sign_of_life(cursors),
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(min_size=1, max_size=needs_of(spec.placement).workers or 64),
        num_gpus=model.num_gpus or None,
        num_cpus=None if model.num_gpus else 1,
    )
    for number, _ in enumerate(answers, start=len(contents) - len(missing) + 1):
        progress(number, len(contents), model.name)


def _select(contents: Sequence[tuple[str, str]], spec: CorpusSpec, out: Path, progress: Progress) -> select.Selection:
    """Select in one task, or load an earlier selection."""
    digest = select.selection_digest(contents, spec)
    names = [name for name, _ in contents]
    earlier = select.load(out, digest, names)
    if earlier is not None:
        return earlier
    (out / "work" / "selected.json").unlink(missing_ok=True)  # the files that it names will be replaced
    progress(0, 1, "select")
    selection: select.Selection = _in_task(spec, select.select, names, spec, out, digest)
    select.save(selection, out, digest)
    progress(1, 1, "select")
    return selection


def _make_negatives(spec: CorpusSpec, out: Path, progress: Progress) -> None:
    """Make, or finish, the pictures of sources of negatives."""
    for source in spec.sources:
        if source.kind == "negatives":
            make_negatives(Path(source.path), negatives_folder(source, out), source.negatives, progress=progress)


def _in_task(spec: CorpusSpec, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a Ray task, so that its memory and its crashes do not affect the driver."""
    import ray

    options = task_resources(spec, {})
    options.pop("concurrency", None)
    try:
        return ray.get(ray.remote(max_retries=2, **options)(function).remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RestorayError):
            raise type(error.cause)(str(error.cause)) from None
        raise


def _check_usable(selection: select.Selection, spec: CorpusSpec, out: Path) -> None:
    if not any(selection.accepted.values()):
        replace_file(out / "quarantine.jsonl", (out / "work" / "quarantine.jsonl").read_bytes(), sync=True)
        codes = ", ".join(f"{count} {code}" for code, count in selection.codes.items())
        raise Failure(f"none of the {selection.candidates} pictures of {spec.name} is usable ({codes}); see {out}.")


def _write_shards(
    plans: Sequence[select.ShardPlan], spec: CorpusSpec, out: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Write the missing shards; returns the entries of all shards by the digests of their plans."""
    digests = {plan.digest for plan in plans}
    entries: dict[str, dict[str, Any]] = {}
    for row in iter_lines(out / "shards.jsonl"):
        if row.get("plan") in digests and _is_on_disk(out, row["split"], row["entry"]):
            entries[row["plan"]] = row["entry"]
    missing = [plan for plan in plans if plan.digest not in entries]
    need, free = sum(plan.size for plan in missing) + SPARE_BYTES, shutil.disk_usage(out).free
    if need > free:
        raise Failure(f"{out} needs {need / 2**20:.0f} MiB for its shards, but only {free / 2**20:.0f} MiB are free.")
    progress(len(entries), len(plans), "shards")
    if missing:
        answers: Iterator[write.WriteAnswer] = _run(
            missing,
            write.write_many,
            "writing shards",
            spec,
            lambda: _last_write(out),
            fn_kwargs={"spec": spec, "out": out},
        )
        with _append_to(out / "shards.jsonl") as log:
            for answer in answers:
                if answer.error:
                    raise Failure(answer.error)
                log.add({"plan": answer.plan.digest, "split": answer.plan.split, "entry": answer.entry})
                entries[answer.plan.digest] = answer.entry
                progress(len(entries), len(plans), "shards")
    return entries


def _is_on_disk(out: Path, split: str, entry: Mapping[str, Any]) -> bool:
    path, pieces = out / split / entry["name"], out / "work" / "pieces"
    sizes = {path: entry["bytes"]}
    sizes |= {pieces / f"{entry['name']}.{kind}": size for kind, size in entry.get("pieces", {"": -1}).items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in sizes.items())


def _last_write(out: Path) -> float:
    """Time of the last write to an unfinished shard, seconds of the epoch."""
    files: Iterable[Path] = (path for split in select.SPLITS for path in (out / split).glob(LEFTOVERS))
    try:
        return max((path.stat().st_mtime for path in files), default=0.0)
    except OSError:
        return 0.0


def _remove_old_parts(out: Path, names: set[str]) -> None:
    """Remove measured and scored rows of parts that the sources no longer have."""
    for path in (*(out / "work" / "measured").glob("*.parquet"), *(out / "work" / "scored").glob("*/*.parquet")):
        if path.stem not in names:
            path.unlink()
    for path in (out / "work" / "partial").glob("*.arrows"):  # journals of parts that existed when a run was killed
        path.unlink()


def _report(
    spec: CorpusSpec,
    bounds: Mapping[str, Any],
    names: Sequence[str],
    selection: select.Selection,
    out: Path,
    digest: str,
    started: float,
) -> Path:
    """Write the report in a task, since it decodes pictures again."""
    import ray

    facts = {
        "corpus digest": digest,
        "candidates": selection.candidates,
        "shards": len(selection.plans),
        "bytes": sum(plan.size for plan in selection.plans),
        "seconds": round(time.monotonic() - started, 1),
    }
    try:
        return _in_task(spec, _write_report, spec, bounds, list(names), out, facts, True)  # type: ignore[no-any-return]
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):  # try again without pictures
        return _in_task(spec, _write_report, spec, bounds, list(names), out, facts, False)  # type: ignore[no-any-return]


def _write_report(
    spec: CorpusSpec, bounds: Mapping[str, Any], names: list[str], out: Path, facts: Mapping[str, Any], pictures: bool
) -> Path:
    def no_bytes(at: str) -> bytes:
        raise OSError("pictures are left out")

    decided = [out / "work" / "decided" / f"{name}.parquet" for name in names]
    return write_curate_report(out, spec, bounds, decided, Bytes(spec, out).read if pictures else no_bytes, facts)


# --- files ------------------------------------------------------------------------------------------------------------


class _Log:
    """An append-only JSON-lines file, flushed to disk at most every SYNC_EVERY_S seconds."""

    def __init__(self, target: TextIO) -> None:
        self.target, self.last_sync = target, time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self.target.write(shards.json_line(row))
        self.target.flush()  # the row survives kill -9 from here on; the sync below is for power cuts
        if time.monotonic() - self.last_sync > SYNC_EVERY_S:
            os.fsync(self.target.fileno())
            self.last_sync = time.monotonic()


@contextmanager
def _append_to(path: Path) -> Iterator[_Log]:
    end_torn_line(path)
    with open(path, "a", encoding="utf-8") as target:
        yield _Log(target)
        target.flush()
        os.fsync(target.fileno())
