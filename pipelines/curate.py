"""Curation: sources -> parts -> measured -> decided -> shards, index.json, manifest and quarantine (decision 0004).

Every candidate of a source ends in exactly one place: the manifest, the quarantine with a reason code, or the count of
skipped sidecar files. Ray tasks get parts and write what they found; picture bytes never travel through the object
store, and the driver holds a few hundred bytes a part. Which picture lands where is decided in the order of the
sources, so the result does not depend on who was first.

Resuming: each phase leaves files that say what they were made from, so a run after kill -9 repeats only what was in
flight. index.json comes last; a folder that has it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from components.corpora import CorpusSpec, ModelScore
from pipelines import shards
from pipelines.catalogue import load_spec
from pipelines.console import Progress, no_progress
from pipelines.curation import measure, score, select, write
from pipelines.curation.extras import add_columns
from pipelines.curation.watch import forget_the_living, last_sign_of_life, watched
from pipelines.errors import Failure, RestorayError, RetryLater, UsageError, unknown
from pipelines.rows import end_torn_line, iter_lines, replace_file
from pipelines.sources import (
    Bytes,
    Listing,
    Part,
    check_sources,
    for_folder,
    list_parts,
    list_tried,
    load_listing,
    negatives_folder,
    save_listing,
    unfinished,
)

SYNC_EVERY_S = 1.0
SPARE_BYTES = 16 << 20  # room for manifest, index and logs
TASKS = 4096  # most tasks of a phase: Ray keeps a few kilobytes of each on the driver
RETRIED = frozenset({"unreadable", "crashed", "timeout", "out_of_memory"})
"""Verdicts that another try may change, besides those of downloads."""

NOT_BROKEN = frozenset({"too_small", "too_large", "small_file", "aspect", "animated", "robots"})
"""Codes of whole pictures that a spec does not want; they do not count for max_bad_fraction."""

JUDGED_FROM = 64  # candidates before max_bad_fraction may end a run early; at its end it counts for any number


@dataclass(frozen=True, kw_only=True)
class CurateResult:
    """What a curation ended with.

    Attributes:
        accepted, rejected: pictures in the manifest and rows in the quarantine.
        train, held_out: accepted pictures by split.
        skipped: sidecar and hidden files, which are no candidates.
        reused: verdicts taken from an earlier run.
        reasons: rejected by code.
        index_path: of index.json.
        report: the page to look at.
        digest: sha256 of the manifest.
        seconds: wall time.
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


def curate(
    spec: CorpusSpec | str | Path,
    out: Path,
    progress: Progress | None = None,
    images: str | Path | None = None,
    retry: Collection[str] = (),
    look_at: measure.Look = measure.look,
) -> CurateResult:
    """Make a corpus folder. Running it again repeats nothing that is done and gives the same bytes.

    Args:
        spec: what to curate: see components.corpora; a name or path is loaded.
        out: the corpus folder; created. On a cluster every node must see it.
        progress: told about each phase.
        images: a folder that replaces the spec's sources, with held-out pictures by fraction.
        retry: codes whose rows are tried again, besides those that may have passed.
        look_at: what is done with a candidate's bytes.

    Raises:
        UsageError: missing or empty source, a source that is `out` itself, unknown held-out name or score.
        Failure: output cannot be written, too little disk, not one usable picture, too many broken ones, a picture that
            changed meanwhile, nothing got done for too long.
        RetryLater: another process curates into the same folder.
    """
    tell = progress or no_progress
    spec = spec if isinstance(spec, CorpusSpec) else load_spec(spec)
    if images is not None:
        spec = for_folder(spec, Path(images))
    check_sources(spec, Path(out).absolute())

    def list_all(out: Path) -> Listing:
        _make_negatives(spec, out, tell)
        listing = list_parts(spec, out)
        save_listing(listing, out, "curate")
        return listing

    return _curate(spec, Path(out).absolute(), list_all, tell, frozenset(retry) | _transient(spec), look_at)


def _curate(
    spec: CorpusSpec,
    out: Path,
    list_them: Callable[[Path], Listing],
    tell: Progress,
    retry: frozenset[str],
    look_at: measure.Look,
) -> CurateResult:
    """All phases; `list_them` is called once the folder is ours."""
    started = time.monotonic()
    bounds = select.thresholds(spec)
    _check_models(spec)
    with _locked(out):
        try:
            _check_same(spec, out)
            forget_the_living(out / "work" / "cursors")
            _save_spec(spec, out / "work" / "spec.yaml")
            listing = list_them(out)
            summaries = _measure(listing.parts, spec, out, retry, look_at, tell)
            contents = [(part.name, summaries[part.name]["content"]) for part in listing.parts]
            for model in spec.filters.models:
                _score(model, contents, spec, out, tell)
            chosen = _select(contents, spec, out, tell)
            _check_usable(chosen, spec, out)
            entries = _write_shards(chosen.plans, spec, out, tell)
            digest = write.finish(out, spec, chosen.plans, entries)
            write.remove_leftovers(out, entries.values())
            _remove_stale(out, {part.name for part in listing.parts})
            _save_spec(spec, out / "spec.yaml")
            add_columns(spec, out, tell)
            report = _report(spec, bounds, [name for name, _ in contents], chosen, out, digest, started)
        except OSError as error:
            raise Failure(f"{error.filename or out} cannot be written: {error.strerror or error}.") from error
    return CurateResult(
        accepted=sum(chosen.accepted.values()),
        rejected=sum(chosen.codes.values()),
        train=chosen.accepted["train"],
        held_out=chosen.accepted["held_out"],
        skipped=listing.skipped,
        reused=sum(summary["rows"] - summary.get("fresh", 0) for summary in summaries.values()),
        reasons=chosen.codes,
        index_path=out / "index.json",
        report=report,
        digest=digest,
        seconds=time.monotonic() - started,
    )


def replay(
    out: Path, codes: Collection[str] = (), progress: Progress | None = None, look_at: measure.Look = measure.look
) -> CurateResult:
    """Try the quarantined candidates of a corpus again, and no others; the corpus takes in what is whole now.

    The sources are not listed anew: a file that came since waits for the next `curate`. A tar or a table that changed
    since is read as a whole.

    Args:
        codes: only rows of these, and those that a plain rerun tries; empty takes all whose trouble was with reading,
            fetching or decoding.

    Raises:
        UsageError: the folder is no curation's, no row has such a code, or its last curation is unfinished.
        What `curate` raises.
    """
    out = Path(out).absolute()
    spec = saved_spec(out)
    held = quarantined(out)
    for code in codes:
        if code not in held:
            raise unknown(f"code of pictures in {out} that can be tried again", code, held)
    retry = frozenset(codes or held) | _transient(spec)

    def list_again(out: Path) -> Listing:
        listing, by = load_listing(out)
        rules = measure.rules_of(spec.filters)

        def tried(part: Part) -> set[str]:
            path = measure.measured_path(out, part)
            summary = measure.read_summary(path)
            if summary is None or summary["rules"] != rules or summary["part"] != part.digest:
                if by == "replay":  # one that was killed
                    return set()
                raise unfinished(out)
            return measure.tried_again(path, summary, retry)

        listing = list_tried(listing, spec, out, tried)
        save_listing(listing, out, "replay")
        return listing

    return _curate(spec, out, list_again, progress or no_progress, retry, look_at)


def quarantined(out: Path) -> dict[str, int]:
    """Codes in a corpus' quarantine that another try may change, with their counts; copies and scores are none."""
    rows = iter_lines(out / "quarantine.jsonl")
    return dict(Counter(row["code"] for row in rows if row["stage"] in ("list", "fetch", "measure")).most_common())


def saved_spec(out: Path) -> CorpusSpec:
    """The spec that a corpus folder was curated by."""
    for path in (out / "spec.yaml", out / "work" / "spec.yaml"):  # the second one where no run came to its end
        if path.is_file():
            return load_spec(path)
    raise UsageError(f"{out} was not made by `restoray curate`: it holds no spec.yaml.")


def _save_spec(spec: CorpusSpec, path: Path) -> None:
    from omegaconf import OmegaConf

    path.parent.mkdir(parents=True, exist_ok=True)
    text = OmegaConf.to_yaml(OmegaConf.structured(spec)).replace("${", "\\${")  # a path may hold what looks like one
    replace_file(path, text.encode())


def _check_same(spec: CorpusSpec, out: Path) -> None:
    """A corpus of another name is not replaced without a word."""
    try:
        name = json.loads((out / "index.json").read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if name != spec.name:
        raise UsageError(f'{out} holds the corpus "{name}", and this one is "{spec.name}": choose another --out.')


def _check_models(spec: CorpusSpec) -> None:
    """Judge the names of learned scores here, and not in an actor that dies of them."""
    from components.quality_models import check_scorer

    for model in spec.filters.models:
        try:
            check_scorer(model)
        except ValueError as error:
            raise UsageError(f"{spec.name}: score {model.name}: {error}") from error


def _transient(spec: CorpusSpec) -> frozenset[str]:
    if not any(source.kind == "urls" for source in spec.sources):
        return RETRIED
    from pipelines.fetch import TRANSIENT

    return RETRIED | TRANSIENT - {"truncated"}  # a decoder's word as well: such files would be fetched at every rerun


# --- phases -----------------------------------------------------------------------------------------------------------


def _run(
    rows: Sequence[Mapping[str, Any]], task: Any, what: str, spec: CorpusSpec, alive: Callable[[], float], **how: Any
) -> Iterator[dict[str, Any]]:
    """Results of one phase from Ray Data: rows in groups, `task` on each group, one JSON result a row, any order."""
    import ray

    items = ray.data.from_items(list(rows), override_num_blocks=min(len(rows), TASKS))
    dataset = items.map_batches(task, batch_size=None, **how)
    dataset.context.enable_progress_bars = False
    try:
        for row in watched(dataset.iter_rows(), spec.stall_timeout_s, alive, what):
            yield json.loads(row["result"])
    except ray.exceptions.RayError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = getattr(cause, "cause", None) or cause.__cause__
        if cause is None:
            raise
        raise Failure(f"{what}: {getattr(cause, 'strerror', None) or cause}. What is done is kept.") from error


def _measure(
    parts: Sequence[Part], spec: CorpusSpec, out: Path, retry: frozenset[str], look_at: measure.Look, tell: Progress
) -> dict[str, dict[str, Any]]:
    """Summaries of all parts by name; measures those that are not done."""
    rules = measure.rules_of(spec.filters)
    summaries: dict[str, dict[str, Any]] = {}
    missing: list[Part] = []
    count = _Count(spec, len(parts))
    for part in parts:
        summary = measure.read_summary(measure.measured_path(out, part))
        if measure.is_done(summary, part, rules, retry):
            assert summary is not None
            summaries[part.name] = summary
            count.add(summary)
        else:
            missing.append(part)
    tell(len(summaries), len(parts), count.note())
    if missing:
        rows = [{"part": json.dumps(asdict(part))} for part in missing]
        arguments = {"spec": spec, "out": str(out), "retry": sorted(retry), "look_at": look_at}
        arguments["run"] = str(time.time_ns())
        cursors = out / "work" / "cursors"
        results = _run(rows, _measure_batch, "measuring", spec, lambda: last_sign_of_life(cursors), fn_kwargs=arguments)
        for result in results:
            summaries[result["name"]] = result["summary"]
            count.add(result["summary"])
            tell(len(summaries), len(parts), count.note())
            count.check(early=True)
    count.check(early=False)
    return summaries


def _measure_batch(
    batch: Any, spec: CorpusSpec, out: str, retry: list[str], look_at: measure.Look, run: str
) -> dict[str, Any]:
    """Ray Data batch {"part"} -> {"result"}."""
    results = []
    for text in batch["part"]:
        part = Part(**json.loads(text))
        summary = measure.measure_part(part, spec, Path(out), retry, look_at, run)
        results.append(json.dumps({"name": part.name, "summary": summary}))
    return {"result": np.array(results, dtype=object)}


class _Count:
    """Counts of a measuring that goes on: what people see, and when it is too bad to go on."""

    def __init__(self, spec: CorpusSpec, parts: int) -> None:
        self.spec, self.rows, self.codes, self.parts, self.done = spec, 0, Counter[str](), parts, 0

    def add(self, summary: Mapping[str, Any]) -> None:
        """Another part."""
        self.done += 1
        self.rows += summary["rows"]
        self.codes.update(summary["codes"])

    def note(self) -> str:
        """In one line."""
        told = ", ".join(f"{count} {code}" for code, count in self.codes.most_common(4))
        return f"{self.rows} pictures" + (f"; refused: {told}" if told else "")

    def check(self, early: bool) -> None:
        """Failure, with a table of reasons, once too many are broken."""
        broken = sum(count for code, count in self.codes.items() if code not in NOT_BROKEN)
        if broken == self.rows and not early:
            return  # "none is usable" says more
        # Early only where all the rest being whole would not help, so that the end does not depend on who was first.
        expected = self.rows * self.parts / max(1, self.done) if early else self.rows
        if (early and self.rows < JUDGED_FROM) or broken <= self.spec.max_bad_fraction * expected:
            return
        table = "\n".join(f"  {count:>8}  {code}" for code, count in self.codes.most_common())
        raise Failure(
            f"{broken} of the first {self.rows} pictures of {self.spec.name} are broken, over max_bad_fraction "
            f"{self.spec.max_bad_fraction:g}:\n{table}"
        )


def _score(model: ModelScore, contents: Sequence[tuple[str, str]], spec: CorpusSpec, out: Path, tell: Progress) -> None:
    """Run one learned score over the parts that lack it."""
    from components.quality_models import build_scorer

    others = {other.name for other in spec.filters.models}
    bounds = {name: bound for name, bound in select.thresholds(spec).items() if name not in others}
    missing = [
        {"part": name, "content": content}
        for name, content in contents
        if not score.is_scored(score.scored_path(out, model, name), score.score_rules(model, content, bounds))
    ]
    tell(len(contents) - len(missing), len(contents), model.name)
    if not missing:
        return
    from ray.data import ActorPoolStrategy

    arguments = (model, spec, str(out), bounds, build_scorer)
    cursors = out / "work" / "cursors"
    results = _run(
        missing,
        score.ScoreParts,
        f"scoring {model.name}",
        spec,
        lambda: last_sign_of_life(cursors),
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(min_size=1, max_size=64),
        num_gpus=model.num_gpus or None,
        num_cpus=None if model.num_gpus else 1,
    )
    done = len(contents) - len(missing)
    for _ in results:
        done += 1
        tell(done, len(contents), model.name)


def _select(contents: Sequence[tuple[str, str]], spec: CorpusSpec, out: Path, tell: Progress) -> select.Selection:
    """Decide, in one task, or remember what was decided."""
    digest = select.selection_digest(contents, spec)
    names = [name for name, _ in contents]
    known = select.load(out, digest, names)
    if known is not None:
        return known
    (out / "work" / "selected.json").unlink(missing_ok=True)  # what it names is about to be replaced
    tell(0, 1, "select")
    chosen: select.Selection = _in_task(select.select, names, spec, out, digest)
    select.save(chosen, out, digest)
    tell(1, 1, "select")
    return chosen


def _make_negatives(spec: CorpusSpec, out: Path, tell: Progress) -> None:
    """Make, or finish, the pictures of sources of negatives."""
    for source in spec.sources:
        if source.kind != "negatives":
            continue
        from pipelines.negatives import make_negatives

        settings = asdict(source.negatives)
        count, prior = settings.pop("count"), settings.pop("prior")
        make_negatives(Path(source.path), prior, negatives_folder(source, out), count, progress=tell, **settings)


def _in_task(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a Ray task, so that neither its memory nor its crashes are the driver's."""
    import ray

    try:
        return ray.get(ray.remote(max_retries=2)(function).remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RestorayError):
            raise type(error.cause)(str(error.cause)) from None
        raise


def _check_usable(chosen: select.Selection, spec: CorpusSpec, out: Path) -> None:
    if not any(chosen.accepted.values()):
        replace_file(out / "quarantine.jsonl", (out / "work" / "quarantine.jsonl").read_bytes(), sync=True)
        codes = ", ".join(f"{count} {code}" for code, count in chosen.codes.items())
        raise Failure(f"none of the {chosen.candidates} pictures of {spec.name} is usable ({codes}); see {out}.")


def _write_shards(
    plans: Sequence[select.ShardPlan], spec: CorpusSpec, out: Path, tell: Progress
) -> dict[str, dict[str, Any]]:
    """Write what is missing; entries of all shards by their plan's digest."""
    wanted = {plan.digest for plan in plans}
    done: dict[str, dict[str, Any]] = {}
    for row in iter_lines(out / "shards.jsonl"):
        if row.get("plan") in wanted and _is_written(out, row["split"], row["entry"]):
            done[row["plan"]] = row["entry"]
    missing = [plan for plan in plans if plan.digest not in done]
    need, free = sum(plan.size for plan in missing) + SPARE_BYTES, shutil.disk_usage(out).free
    if need > free:
        raise Failure(f"{out} needs {need / 2**20:.0f} MiB for its shards, but only {free / 2**20:.0f} MiB are free.")
    tell(len(done), len(plans), "shards")
    if missing:
        rows = [{"plan": json.dumps(asdict(plan))} for plan in missing]
        arguments = {"spec": spec, "out": str(out)}
        results = _run(rows, write.write_many, "writing shards", spec, lambda: _newest(out), fn_kwargs=arguments)
        with _appending(out / "shards.jsonl") as log:
            for result in results:
                if "error" in result:
                    raise Failure(result["error"])
                log.add(result)
                done[result["plan"]] = result["entry"]
                tell(len(done), len(plans), "shards")
    return done


def _is_written(out: Path, split: str, entry: Mapping[str, Any]) -> bool:
    path, pieces = out / split / entry["name"], out / "work" / "pieces"
    sizes = {path: entry["bytes"]}
    sizes |= {pieces / f"{entry['name']}.{kind}": size for kind, size in entry.get("pieces", {"": -1}).items()}
    return all(file.is_file() and file.stat().st_size == size for file, size in sizes.items())


def _newest(out: Path) -> float:
    """When a shard that is being written was last added to."""
    files: Iterable[Path] = (path for split in select.SPLITS for path in (out / split).glob(".*.tmp-*"))
    try:
        return max((path.stat().st_mtime for path in files), default=0.0)
    except OSError:
        return 0.0


def _remove_stale(out: Path, names: set[str]) -> None:
    """Measured and scored rows of parts that the sources no longer have."""
    for path in (*(out / "work" / "measured").glob("*.parquet"), *(out / "work" / "scored").glob("*/*.parquet")):
        if path.stem not in names:
            path.unlink()
    for path in (out / "work" / "partial").glob("*.arrows"):  # of parts that there were when a run was killed
        path.unlink()


def _report(
    spec: CorpusSpec,
    bounds: Mapping[str, Any],
    names: Sequence[str],
    chosen: select.Selection,
    out: Path,
    digest: str,
    started: float,
) -> Path:
    """Write the page in a task: it decodes pictures again, and it must not weigh on the driver."""
    import ray

    facts = {
        "corpus digest": digest,
        "candidates": chosen.candidates,
        "shards": len(chosen.plans),
        "bytes": sum(plan.size for plan in chosen.plans),
        "seconds": round(time.monotonic() - started, 1),
    }
    try:
        return _in_task(_write_report, spec, bounds, list(names), out, facts, True)  # type: ignore[no-any-return]
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):  # a page without pictures, then
        return _in_task(_write_report, spec, bounds, list(names), out, facts, False)  # type: ignore[no-any-return]


def _write_report(
    spec: CorpusSpec, bounds: Mapping[str, Any], names: list[str], out: Path, facts: Mapping[str, Any], pictures: bool
) -> Path:
    from pipelines.curate_report import write_curate_report

    def nothing(at: str) -> bytes:
        raise OSError("pictures are left out")

    decided = [out / "work" / "decided" / f"{name}.parquet" for name in names]
    return write_curate_report(out, spec, bounds, decided, Bytes(spec, out).read if pictures else nothing, facts)


# --- files ------------------------------------------------------------------------------------------------------------


class _Log:
    """An append-only JSON-lines file, flushed to disk at most every SYNC_EVERY_S seconds."""

    def __init__(self, target: TextIO) -> None:
        self.target, self.count, self.synced = target, 0, time.monotonic()

    def add(self, row: Mapping[str, Any]) -> None:
        self.target.write(shards.json_line(row))
        self.target.flush()  # survives kill -9 from here on; the sync below is for power cuts
        self.count += 1
        if time.monotonic() - self.synced > SYNC_EVERY_S:
            os.fsync(self.target.fileno())
            self.synced = time.monotonic()


@contextmanager
def _appending(path: Path) -> Iterator[_Log]:
    end_torn_line(path)
    with open(path, "a", encoding="utf-8") as target:
        yield _Log(target)
        target.flush()
        os.fsync(target.fileno())


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the output folder against a second curation; the lock goes with the process, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115 - held over the yield
    except OSError as error:
        raise Failure(f"{out} cannot be written: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RetryLater(f"another process is curating into {out}.") from None
        yield
