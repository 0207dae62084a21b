"""Measure parts: each candidate of a part becomes one row of work/measured/<part>.parquet. No row is ever missing.

The file appears at once, and names the part and the rules that it was made with. So a killed job repeats only rows of
parts in work that no journal has, and a changed part keeps the rows of the candidates that did not change.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.corpora import CorpusSpec, FilterSpec
from components.fingerprints import WORDS, fingerprint
from components.images import decode, sniff
from components.quality import SCORES, measure_scores
from components.types import SampleError
from components.writing import whole_file
from pipelines.core.places.patience import StoreUnavailable
from pipelines.core.pool import object_column
from pipelines.corpus import shards
from pipelines.curation import journal
from pipelines.curation.sources import Candidate, Part, candidates, remove_bodies
from pipelines.curation.sources.spool import without_spool
from pipelines.curation.watch import Guard

VERSION = 2
"""Version of the measures: a higher one makes old rows stale."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # errors of the run rather than of a picture

Look = Callable[[bytes, FilterSpec, str], dict[str, Any]]
"""(bytes, filters, key) -> measures of a picture: ext, width, height, scores, print; raises SampleError."""

SCORE = "score/"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("source", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("ext", pa.string()),
        ("licence", pa.string()),
        ("credit", pa.string()),
        ("caption", pa.string()),
        ("at", pa.string()),
        ("code", pa.string()),
        ("stage", pa.string()),
        ("detail", pa.string()),
        ("print", pa.binary(8 * WORDS)),
        *((f"{SCORE}{name}", pa.float32()) for name in SCORES),
    ]
)
"""Columns of measured rows. code, stage and detail are "" for an intact picture; else print and scores are null."""


@dataclass(frozen=True, kw_only=True)
class PartAnswer:
    """The summary of a measured part, see measure_part."""

    name: str
    summary: dict[str, Any]


def look(data: bytes, filters: FilterSpec, key: str) -> dict[str, Any]:
    """Decode and measure one picture."""
    limits = filters.limits()
    if len(data) < filters.min_file_kib * 1024:
        raise SampleError("small_file", f"{len(data)} bytes are below {filters.min_file_kib:g} KiB", key)
    picture = decode(data, limits, key)
    kind = sniff(data)
    height, width = picture.shape[:2]
    return {
        "ext": shards.EXTENSIONS[kind],
        "width": width,
        "height": height,
        "scores": measure_scores(picture, data, kind),
        "print": fingerprint(picture).tobytes(),
    }


def rules_of(filters: FilterSpec) -> str:
    """Digest of what decides a measured row besides its bytes; thresholds of scores do not."""
    options = ("pixels_option", "bytes_option")  # words for errors, which decide nothing
    limits = {name: limit for name, limit in asdict(filters.limits()).items() if name not in options}
    limits["min_file_kib"] = filters.min_file_kib
    return hashlib.sha256(json.dumps([VERSION, sorted(SCORES), WORDS, limits], sort_keys=True).encode()).hexdigest()


def measured_path(out: Path, part: Part) -> Path:
    """Path of a part's rows."""
    return out / "work" / "measured" / f"{part.name}.parquet"


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary in a measured file: part, rules, rows, codes, content; None where there is no complete file."""
    try:
        return dict(json.loads(pq.read_metadata(path).metadata[b"restoray"]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def is_complete(summary: Mapping[str, Any] | None, part: Part, rules: str, retry: Collection[str]) -> bool:
    """Whether a part's file needs no further work."""
    return bool(
        summary
        and summary["part"] == part.digest
        and summary["rules"] == rules
        and not any(code in retry for code in summary["codes"])
    )


def sources_with_codes(path: Path, summary: Mapping[str, Any], codes: Collection[str]) -> set[str]:
    """`source` of the rows of a measured part that have one of these codes."""
    if not any(code in codes for code in summary["codes"]):
        return set()
    table = pq.read_table(path, columns=["source", "code"]).to_pydict()
    return {source for source, code in zip(table["source"], table["code"], strict=True) if code in codes}


def measure_batch(
    batch: Mapping[str, np.ndarray], spec: CorpusSpec, out: Path, retry: Collection[str], look_at: Look, run: str
) -> dict[str, np.ndarray]:
    """Ray Data batch {"job": Part objects} -> {"answer": PartAnswer objects}; arguments as measure_part."""
    answers = [
        PartAnswer(name=part.name, summary=measure_part(part, spec, out, retry, look_at, run)) for part in batch["job"]
    ]
    return {"answer": object_column(answers)}


def measure_part(
    part: Part, spec: CorpusSpec, out: Path, retry: Collection[str] = (), look_at: Look = look, run: str = ""
) -> dict[str, Any]:
    """Measure the candidates of a part without a row; returns its summary with "fresh", the rows of this call.

    Memory holds one batch of rows, and the death of a process costs the last seconds of its work.

    Args:
        retry: codes whose rows are measured again.
        look_at: decodes and measures a picture's bytes.
        run: name of this curation. Rows of its own attempts are not tried again, with any code.
    """
    cv2.setNumThreads(1)  # a task has one core; OpenCV would use all
    rules, path = rules_of(spec.filters), measured_path(out, part)
    before = read_summary(path)
    if before is not None and is_complete(before, part, rules, retry):  # an earlier try of this task has finished it
        return {**before, "fresh": 0}
    is_urls = spec.sources[part.source].kind == "urls"
    patience = spec.sample_timeout_s + (spec.download.attempts * (spec.download.total_s + 60) if is_urls else 0)
    guard = Guard(out / "work" / "cursors", part.name, patience)
    journals = out / "work" / "partial"
    facts = {"rules": rules, "run": run, "part": part.digest}
    attempts, at_this_part = journal.read_journals(journals, part.name, facts, retry)
    tables = _earlier_tables(path, before, rules, retry)
    earlier = journal.EarlierRows([*tables, *attempts])
    if guard.is_lethal:  # the part is not read again, so only rows of its present state count
        earlier = journal.EarlierRows([*(tables if before and before["part"] == part.digest else []), *at_this_part])
    log = journal.Journal(journals, part.name, SCHEMA, facts, eager=bool(guard.deaths))
    complete, fresh, bodies = False, 0, set()
    try:
        with journal.write_part(path, SCHEMA) as output:
            for row, is_fresh in _rows(part, spec, out, guard, earlier, log, look_at):
                output.add(row)
                fresh += is_fresh
                if is_urls and row["at"]:
                    bodies.add(json.loads(row["at"]).get("fetched"))
            summary = output.finish({"part": part.digest, "rules": rules})
        complete = True
        if is_urls:
            remove_bodies(out, part.name, bodies)
    finally:
        log.close(complete)
        guard.close(complete)
    return {**summary, "fresh": fresh}


def _rows(
    part: Part,
    spec: CorpusSpec,
    out: Path,
    guard: Guard,
    earlier: journal.EarlierRows,
    log: journal.Journal,
    look_at: Look,
) -> Iterator[tuple[dict[str, Any], bool]]:
    """(row, whether this call measured it) of all candidates of a part, in their order."""
    if guard.is_lethal:
        yield from ((row, False) for row in earlier)
        problem = SampleError("crashed", "the process that read it died again and again", part.name)
        yield _row(Candidate(id=part.name[:24], key=part.name, source=part.name, problem=problem)), True
        return
    guard.at("")
    for candidate in _with_reading_errors(part, candidates(part, spec, out, earlier.__contains__)):
        if candidate.id in earlier:
            yield _with_new_listing(earlier[candidate.id], candidate), False
            continue
        refusal = guard.refusal(candidate.id)
        if refusal is not None:
            candidate.problem, candidate.stage = SampleError(*refusal, candidate.key), "measure"
        else:
            guard.at(candidate.id)
        row = _measure(candidate, spec.filters, look_at)
        log.add(row)
        guard.at("")
        yield row, True


def _with_reading_errors(part: Part, items: Iterator[Candidate]) -> Iterator[Candidate]:
    """The candidates. If reading them raises an unexpected error, one more candidate has it as its problem."""
    try:
        yield from items
    except (OSError, StoreUnavailable):
        raise  # a full disk or a lost store is not the fault of the part
    except Exception as error:  # noqa: BLE001 - the candidates before it stay, and other parts are not affected
        problem = SampleError("crashed", f"reading it failed: {type(error).__name__}: {error}"[:1000], part.name)
        yield Candidate(id=f"!{part.name}"[:24], key=part.name, source=f"part:{part.name}", problem=problem)


def _earlier_tables(path: Path, before: Mapping[str, Any] | None, rules: str, retry: Collection[str]) -> list[pa.Table]:
    """Rows of an earlier run, without those that are measured again."""
    if before is None or before["rules"] != rules:
        return []
    return [journal.without(pq.read_table(path).replace_schema_metadata(None), retry)]


def _with_new_listing(row: Mapping[str, Any], candidate: Candidate) -> dict[str, Any]:
    """An earlier row with the facts of the present listing."""
    facts = {name: getattr(candidate, name) for name in ("key", "source", "licence", "credit", "caption")}
    is_kept = '"spool"' in row["at"] and without_spool(row["at"]) == without_spool(candidate.at)
    return {**row, **facts, "at": row["at"] if is_kept else candidate.at or row["at"]}


def _measure(candidate: Candidate, filters: FilterSpec, look_at: Look) -> dict[str, Any]:
    """One row. A picture may make a library fail in any way; that must not cost another picture."""
    row = _row(candidate)
    if candidate.problem is not None or candidate.load is None:
        return row
    try:
        data = candidate.load()
        row.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        facts = look_at(data, filters, candidate.key)
        row.update({name: facts[name] for name in ("ext", "width", "height", "print")})
        row.update({SCORE + name: value for name, value in facts["scores"].items()})
        if candidate.keep is not None:
            candidate.keep(data)
        row["at"] = candidate.at
    except SampleError as error:
        row.update(code=error.code, stage="measure", detail=error.detail)
    except StoreUnavailable:
        raise  # the job ends, and continues later
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        row.update(code="unreadable", stage="measure", detail=f"{error.strerror or error}"[:1000])
    except MemoryError:
        row.update(code="out_of_memory", stage="measure", detail="decoding it needs more memory than there is")
    except Exception as error:  # noqa: BLE001 - see above
        row.update(code="crashed", stage="measure", detail=f"{type(error).__name__}: {error}"[:1000])
    return row


def _row(candidate: Candidate) -> dict[str, Any]:
    problem = candidate.problem
    names = ("id", "key", "source", "licence", "credit", "caption", "at")
    return {
        **{name: getattr(candidate, name) for name in names},
        "sha256": "",
        "bytes": candidate.size,
        "width": 0,
        "height": 0,
        "ext": "",
        "code": problem.code if problem else "",
        "stage": candidate.stage if problem else "",
        "detail": problem.detail if problem else "",
    }


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a parquet file as `whole_file` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        pq.write_table(table, draft.temporary, compression="zstd")
