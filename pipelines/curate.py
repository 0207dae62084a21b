"""Curation: sources -> verdicts -> shards, index.json, manifest.jsonl and quarantine.jsonl (decision 0001).

Every file of a source ends in exactly one place: the manifest, the quarantine with a reason code, or the count of
skipped sidecar files. Ray tasks get paths and give back verdicts; picture bytes never travel through the object store.
Which picture lands where is decided on the driver in the order of the sources, so the result does not depend on who was
first.

Resuming: verdicts.jsonl and shards.jsonl grow while the work goes on and are flushed to disk, so a run after kill -9
repeats only what was in flight. index.json comes last; a folder that has it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from components.corpora import CorpusSpec, FilterSpec, SplitSpec, load_corpus_spec
from components.images import Limits, decode, sniff
from components.types import SampleError
from pipelines import shards
from pipelines.console import Progress, no_progress
from pipelines.errors import Failure, RetryLater, UsageError, near_miss, unknown
from pipelines.home import shipped
from pipelines.rows import end_torn_line, read_lines, replace_file
from pipelines.sources import Entry, for_folder, list_entries, read_entry

VERSION = 1
"""Of the verdicts: raising it makes old ones stale."""

SYNC_EVERY_S = 1.0
SPARE_BYTES = 16 << 20  # room for manifest, index and logs
RETRIED = frozenset({"unreadable", "crashed"})  # verdicts that another try may change


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
    digest: str
    seconds: float


def load_spec(name: str | Path, overrides: Sequence[str] = ()) -> CorpusSpec:
    """A corpus spec by shipped name ("demo") or by the path of a YAML file; UsageError in one sentence otherwise."""
    known = shipped("datasets")
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else known.get(str(name))
    if path is None:
        raise unknown("dataset", str(name), known)
    try:
        return load_corpus_spec(path, overrides)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def curate(
    spec: CorpusSpec | str | Path, out: Path, progress: Progress | None = None, images: str | Path | None = None
) -> CurateResult:
    """Make a corpus folder. Running it again repeats nothing that is done and gives the same bytes.

    Args:
        spec: what to curate: see components.corpora; a name or path is loaded.
        out: the corpus folder; created.
        progress: told about both phases.
        images: a folder that replaces the spec's sources, with held-out pictures by fraction.

    Raises:
        UsageError: missing or empty source, a source that is `out` itself, unknown held-out name.
        Failure: output cannot be written, too little disk, not one usable picture, a picture that changed meanwhile.
        RetryLater: another process curates into the same folder.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    tell = progress or no_progress
    spec = spec if isinstance(spec, CorpusSpec) else load_spec(spec)
    if images is not None:
        spec = for_folder(spec, Path(images))
    entries, skipped = list_entries(spec, out)
    _check_held_out_names(spec, entries)
    with _locked(out):
        try:
            verdicts, reused = _verdicts(entries, spec.filters, out, tell)
            accepted, quarantine = _decide(entries, verdicts, spec)
            if not accepted:
                replace_file(out / "quarantine.jsonl", _lines(quarantine), sync=True)
                codes = ", ".join(f"{n} {code}" for code, n in Counter(row["code"] for row in quarantine).items())
                raise Failure(f"none of the {len(entries)} pictures of {spec.name} is usable ({codes}); see {out}.")
            index = _write_shards(accepted, spec, out, tell)
            manifest = _lines(_manifest(accepted, index))
            digest = hashlib.sha256(manifest).hexdigest()
            replace_file(out / "quarantine.jsonl", _lines(quarantine), sync=True)
            replace_file(out / "manifest.jsonl", manifest, sync=True)
            document = {"format": shards.FORMAT, "name": spec.name, "digest": digest, "splits": index}
            replace_file(out / "index.json", (json.dumps(document, ensure_ascii=False) + "\n").encode(), sync=True)
            _remove_leftovers(out, index)
        except OSError as error:
            raise Failure(f"{error.filename or out} cannot be written: {error.strerror or error}.") from error
    held_out = sum(row["split"] == "held_out" for row in accepted)
    return CurateResult(
        accepted=len(accepted),
        rejected=len(quarantine),
        train=len(accepted) - held_out,
        held_out=held_out,
        skipped=skipped,
        reused=reused,
        reasons=dict(Counter(row["code"] for row in quarantine)),
        index_path=out / "index.json",
        digest=digest,
        seconds=time.monotonic() - started,
    )


# --- verdicts ---------------------------------------------------------------------------------------------------------


def measure(entry: Entry, limits: Limits, flat_below: float) -> dict[str, Any]:
    """Verdict on one picture: its measures, or {"code", "detail"}; never raises for what a picture may hold."""
    verdict: dict[str, Any] = {"bytes": 0, "sha256": ""}
    try:
        data = read_entry(entry, limits.max_bytes)
        verdict.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        picture = decode(data, limits, entry.key)
        luma_std = float((picture @ np.array([0.299, 0.587, 0.114], np.float32)).std())  # BT.601 luma, 0..255
        height, width = picture.shape[:2]
        verdict.update(ext=shards.EXTENSIONS[sniff(data)], width=width, height=height, luma_std=round(luma_std, 2))
        if luma_std < flat_below:
            raise SampleError("flat", f"luma varies by {luma_std:.1f} of 255, below {flat_below:g}", entry.key)
    except SampleError as error:
        verdict.update(code=error.code, detail=error.detail)
    except Exception as error:  # noqa: BLE001 - one picture must never cost another, whatever it does to a library
        verdict.update(code="crashed", detail=f"{type(error).__name__}: {error}")
    return verdict


Measure = Callable[[Entry, Limits, float], dict[str, Any]]


def measure_all(
    entries: Sequence[Entry], limits: Limits, flat_below: float, measure_one: Measure = measure
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, verdict) of every entry, in any order, from Ray Data tasks.

    A picture that kills its process (a decoder's segmentation fault, the memory guard) is found by measuring what is
    left one by one, and gets the code "crashed".
    """
    import ray
    from ray.util.annotations import RayDeprecationWarning

    work: Callable[..., Any] = _measure_batch
    arguments = {"limits": limits, "flat_below": flat_below, "measure_one": measure_one}
    rows = [{"number": number, "entry": json.dumps(asdict(entry))} for number, entry in enumerate(entries)]
    blocks = min(max(1, -(-len(rows) // 8)), 4096)
    with warnings.catch_warnings():
        # By default Ray Data repeats the task of a dead worker for ever: a picture that kills each of them would never
        # end. 2.60 has no other way to say so than the argument whose removal in 2.64 it announces.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        dataset = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            work, batch_size=8, fn_kwargs=arguments, max_retries=1
        )
    dataset.context.enable_progress_bars = False
    left = set(range(len(entries)))
    try:
        for row in dataset.iter_rows():
            left.discard(int(row["number"]))
            yield int(row["number"]), json.loads(row["verdict"])
    except ray.exceptions.RayError as error:
        if not _process_died(error):
            raise
    alone = ray.remote(max_retries=2)(measure_one)
    for number in sorted(left):
        try:
            yield number, ray.get(alone.remote(entries[number], limits, flat_below))
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
            detail = f"the process that decoded it died three times: {type(error).__name__}"
            yield number, {"bytes": entries[number].size, "sha256": "", "code": "crashed", "detail": detail}


def _process_died(error: BaseException) -> bool:
    """Whether a dead worker process is behind the error, possibly wrapped."""
    import ray

    deaths = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.LocalRayletDiedError)
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, deaths):
            return True
        seen = getattr(seen, "cause", None) or seen.__cause__
    return False


def _measure_batch(batch: Any, limits: Limits, flat_below: float, measure_one: Measure) -> dict[str, Any]:
    """Ray Data batch {"number", "entry"} -> {"number", "verdict"}."""
    verdicts = [json.dumps(measure_one(_entry(text), limits, flat_below)) for text in batch["entry"]]
    return {"number": batch["number"], "verdict": np.array(verdicts, dtype=object)}


def _entry(text: str) -> Entry:
    fields = json.loads(text)
    for name in ("leaves", "refused"):
        fields[name] = tuple(fields[name]) if fields[name] is not None else None
    return Entry(**fields)


def _verdicts(
    entries: Sequence[Entry], filters: FilterSpec, out: Path, tell: Progress
) -> tuple[list[dict[str, Any]], int]:
    """Verdicts by entry number, and how many an earlier run had already reached."""
    rules = json.dumps([VERSION, asdict(filters)], sort_keys=True)
    names = [
        hashlib.sha256(f"{rules}|{e.source}|{e.path}|{e.size}|{e.mtime_ns}".encode()).hexdigest()[:32] for e in entries
    ]
    known = {row["id"]: row for row in read_lines(out / "verdicts.jsonl") if row.get("code") not in RETRIED}
    verdicts: dict[int, dict[str, Any]] = {}
    reused = 0
    for number, entry in enumerate(entries):
        if entry.refused is not None:
            code, detail = entry.refused
            verdicts[number] = {"bytes": entry.size, "sha256": "", "code": code, "detail": detail}
        elif names[number] in known:
            verdicts[number] = known[names[number]]
            reused += 1
    fresh = [number for number in range(len(entries)) if number not in verdicts]
    tell(len(verdicts), len(entries), "verdicts")
    if fresh:
        with _appending(out / "verdicts.jsonl") as log:
            for place, verdict in measure_all([entries[i] for i in fresh], filters.limits(), filters.flat_below):
                number = fresh[place]
                verdicts[number] = verdict
                log.add({"id": names[number], **verdict})
                tell(len(verdicts), len(entries), "verdicts")
    return [verdicts[number] for number in range(len(entries))], reused


def _decide(
    entries: Sequence[Entry], verdicts: Sequence[Mapping[str, Any]], spec: CorpusSpec
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Accepted rows (manifest fields, and the entry under "entry") and quarantine rows, both in source order.

    Of equal files the first in source order stays, so a repeated task changes nothing.
    """
    accepted: list[dict[str, Any]] = []
    quarantine = []
    pictures: dict[str, str] = {}
    for entry, verdict in zip(entries, verdicts, strict=True):
        code, detail, stage = verdict.get("code", ""), verdict.get("detail", ""), "measure"
        if not code and verdict["sha256"] in pictures:
            code, detail, stage = "duplicate", f"same bytes as {pictures[verdict['sha256']]}", "select"
        if code:
            row = {"key": entry.key, "source": entry.source, "stage": stage, "code": code, "detail": detail}
            quarantine.append({**row, "bytes_sha256": verdict["sha256"]})
            continue
        pictures[verdict["sha256"]] = entry.key
        accepted.append(
            {
                "key": entry.key,
                "source": entry.source,
                "sha256": verdict["sha256"],
                "bytes": verdict["bytes"],
                "width": verdict["width"],
                "height": verdict["height"],
                "verdicts": {"luma_std": verdict["luma_std"]},
                "licence": entry.licence,
                "credit": entry.credit,
                "caption": "",
                "ext": verdict["ext"],
                "entry": entry,
            }
        )
    named = {shards.safe_key(name) for name in spec.split.held_out}
    held_out = {row["sha256"] for row in accepted if row["key"] in named}  # before a key may get longer
    _part_equal_keys(accepted)
    if not named:
        chosen = _held_out([row["key"] for row in accepted], spec.split)
        held_out = {row["sha256"] for row in accepted if row["key"] in chosen}
    for row in accepted:
        row["split"] = "held_out" if row["sha256"] in held_out else "train"
    accepted.sort(key=lambda row: row["split"] == "held_out")  # stable: train first, source order within
    return accepted, quarantine


def _part_equal_keys(accepted: Sequence[dict[str, Any]]) -> None:
    """Give each of different pictures with one key ("IMG 1.png", "IMG_1.png") an end made of its own bytes' hash.

    All of them get it, so that no key depends on which came first.
    """
    digits = 8
    while doubled := {key for key, count in Counter(row["key"] for row in accepted).items() if count > 1}:
        for row in accepted:
            if row["key"] in doubled:
                row["key"] = shards.safe_key(f"{row['key']}-{row['sha256'][:digits]}")
                row["entry"] = replace(row["entry"], key=row["key"])
        digits *= 2  # a file may be named like such a key already


def _held_out(keys: Sequence[str], split: SplitSpec) -> set[str]:
    """Keys held out by fraction: at least 2 of 6 or more, 1 of 2 to 5, and none of a single picture."""
    if not split.held_out_fraction:
        return set()
    ranked = sorted(keys, key=_place)
    chosen = sum(_place(key) < split.held_out_fraction for key in ranked)
    return set(ranked[: min(max(chosen, 2 if len(keys) >= 6 else 1), len(keys) - 1)])


def _place(key: str) -> float:
    """A key's fixed place in [0, 1)."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def _check_held_out_names(spec: CorpusSpec, entries: Sequence[Entry]) -> None:
    """A held-out name that no source has would put its picture into training unseen: refuse."""
    keys = {entry.key for entry in entries}
    for name in spec.split.held_out:
        if shards.safe_key(name) not in keys:
            raise UsageError(f'{spec.name}: no source has the held-out picture "{name}".{near_miss(name, keys)}')


# --- shards -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Plan:
    """One shard to be: which samples, and a digest of all that decides its bytes."""

    split: str
    number: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    size: int = 0

    @property
    def digest(self) -> str:
        parts = [self.split, self.number, *([row["ext"], row["sha256"], _info(row)] for row in self.rows)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _info(row: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON member of a sample."""
    names = ("key", "source", "sha256", "width", "height", "split", "licence", "credit", "caption")
    return {name: row[name] for name in names}


def _plan_shards(accepted: Sequence[dict[str, Any]], shard_mib: float) -> list[_Plan]:
    """Fill shards in manifest order up to shard_mib; one larger picture gets a shard of its own."""
    plans: list[_Plan] = []
    for row in accepted:
        size = shards.sample_bytes(shards.Sample(key=row["key"], ext=row["ext"], info=_info(row)), row["bytes"])
        last = plans[-1] if plans and plans[-1].split == row["split"] else None
        if last is None or last.size + size > shard_mib * 2**20:
            plans.append(last := _Plan(split=row["split"], number=last.number + 1 if last else 0))
        last.rows.append(row)
        last.size += size
    return plans


def _write_shards(accepted: Sequence[dict[str, Any]], spec: CorpusSpec, out: Path, tell: Progress) -> dict[str, Any]:
    """Write what is missing and return the "splits" of index.json."""
    plans = _plan_shards(accepted, spec.shard_mib)
    done: dict[str, dict[str, Any]] = {}
    for row in read_lines(out / "shards.jsonl"):
        path = out / row["split"] / row["entry"]["name"]
        if path.is_file() and path.stat().st_size == row["entry"]["bytes"]:
            done[row["plan"]] = row["entry"]
    missing = [plan for plan in plans if plan.digest not in done]
    need, free = sum(plan.size for plan in missing) + SPARE_BYTES, shutil.disk_usage(out).free
    if need > free:
        raise Failure(f"{out} needs {need / 2**20:.0f} MiB for its shards, but only {free / 2**20:.0f} MiB are free.")
    tell(len(plans) - len(missing), len(plans), "shards")
    if missing:
        import ray

        rows = [{"work": json.dumps(_work(plan), default=asdict)} for plan in missing]
        work: Callable[..., Any] = _write_batch
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            work, batch_size=1, fn_kwargs={"out": str(out), "limit_bytes": spec.filters.limits().max_bytes}
        )
        dataset.context.enable_progress_bars = False
        with _appending(out / "shards.jsonl") as log:
            for row in dataset.iter_rows():
                result = json.loads(row["result"])
                if "error" in result:
                    raise Failure(result["error"])
                log.add(result)
                done[result["plan"]] = result["entry"]
                tell(len(plans) - len(missing) + log.count, len(plans), "shards")
    index: dict[str, Any] = {name: {"samples": 0, "shards": []} for name in ("train", "held_out")}
    for plan in plans:
        index[plan.split]["shards"].append(done[plan.digest])
        index[plan.split]["samples"] += len(plan.rows)
    return index


def _work(plan: _Plan) -> dict[str, Any]:
    samples = [{"ext": r["ext"], "info": _info(r), "entry": r["entry"]} for r in plan.rows]
    return {"split": plan.split, "number": plan.number, "plan": plan.digest, "samples": samples}


def _write_batch(batch: Any, out: str, limit_bytes: int) -> dict[str, Any]:
    """Ray Data batch {"work"} -> {"result"}: {"plan", "split", "entry"} or {"error"}, as JSON."""
    results = []
    for text in batch["work"]:
        work = json.loads(text)
        entries = {row["info"]["key"]: _entry(json.dumps(row["entry"])) for row in work["samples"]}

        def read(sample: shards.Sample, entries: dict[str, Entry] = entries) -> bytes:
            data = read_entry(entries[sample.key], limit_bytes)
            if hashlib.sha256(data).hexdigest() != sample.info["sha256"]:
                raise SampleError("changed", "the file changed while it was curated", sample.key)
            return data

        samples = [shards.Sample(key=row["info"]["key"], ext=row["ext"], info=row["info"]) for row in work["samples"]]
        try:
            prefix = f"{work['split']}-{work['number']:05d}"
            entry = shards.write_shard(Path(out) / work["split"], prefix, samples, read)
            result = {"plan": work["plan"], "split": work["split"], "entry": entry}
        except SampleError as error:
            result = {"error": f"{entries[error.key].path}: {error.detail}; run the same command again."}
        except OSError as error:
            result = {"error": f"{out} cannot be written: {error.strerror or error}."}
        results.append(json.dumps(result))
    return {"result": np.array(results, dtype=object)}


def _manifest(accepted: Sequence[Mapping[str, Any]], index: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Manifest rows: the accepted ones with the shard each lies in."""
    where = {e["key"]: shard["name"] for split in index.values() for shard in split["shards"] for e in shard["samples"]}
    for row in accepted:
        yield {**{k: v for k, v in row.items() if k not in ("entry", "ext")}, "shard": where[row["key"]]}


def _remove_leftovers(out: Path, index: Mapping[str, Any]) -> None:
    """Remove shards of earlier specs and unfinished files; only names that this module gives."""
    for split, content in index.items():
        names = {shard["name"] for shard in content["shards"]}
        for path in (out / split).glob(f"{split}-*.tar"):
            if path.name not in names:
                path.unlink()
        for path in (out / split).glob(f".{split}-*.tmp-*"):
            path.unlink()


# --- files ------------------------------------------------------------------------------------------------------------


def _lines(rows: Any) -> bytes:
    return "".join(map(shards.json_line, rows)).encode()


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
