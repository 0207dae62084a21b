"""Measuring: a part's candidates -> work/measured/<part>.parquet, one row each. No row is ever missing.

The file appears at once and says which part and which rules it was made by, so a killed job repeats of the parts that
were in flight what no journal has, and a changed part keeps the rows of the candidates that did not change.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from components.corpora import CorpusSpec, FilterSpec
from components.fingerprints import WORDS, fingerprint
from components.images import decode, sniff
from components.quality import SCORES, measure_scores
from components.types import SampleError
from pipelines import shards
from pipelines.curation import journal
from pipelines.curation.watch import Guard
from pipelines.sources import Candidate, Part, candidates, forget_bodies

VERSION = 2
"""Of the measures: raising it makes old ones stale."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # the run's trouble and not a picture's

Look = Callable[[bytes, FilterSpec, str], dict[str, Any]]
"""(bytes, filters, key) -> what is measured on a picture: ext, width, height, scores, print; or SampleError."""

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
"""Of measured rows: code, stage and detail are "" where nothing is wrong; print and scores null where something is."""


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
    """Digest of what decides a measured row besides its bytes; thresholds of scores are none of it."""
    limits = {**asdict(filters.limits()), "min_file_kib": filters.min_file_kib}
    return hashlib.sha256(json.dumps([VERSION, sorted(SCORES), WORDS, limits], sort_keys=True).encode()).hexdigest()


def measured_path(out: Path, part: Part) -> Path:
    """Where a part's rows lie."""
    return out / "work" / "measured" / f"{part.name}.parquet"


def read_summary(path: Path) -> dict[str, Any] | None:
    """What a measured file says of itself: part, rules, rows, codes, content; None where there is no whole file."""
    try:
        return dict(json.loads(pq.read_metadata(path).metadata[b"restoray"]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def is_done(summary: Mapping[str, Any] | None, part: Part, rules: str, retry: Collection[str]) -> bool:
    """Whether a part's file needs no further work."""
    return bool(
        summary
        and summary["part"] == part.digest
        and summary["rules"] == rules
        and not any(code in retry for code in summary["codes"])
    )


def tried_again(path: Path, summary: Mapping[str, Any], retry: Collection[str]) -> set[str]:
    """`source` of a measured part's rows that have one of these codes."""
    if not any(code in retry for code in summary["codes"]):
        return set()
    table = pq.read_table(path, columns=["source", "code"]).to_pydict()
    return {source for source, code in zip(table["source"], table["code"], strict=True) if code in retry}


def measure_part(
    part: Part, spec: CorpusSpec, out: Path, retry: Collection[str] = (), look_at: Look = look, run: str = ""
) -> dict[str, Any]:
    """Measure what is not known of a part, and return its summary with "fresh", the rows measured now.

    Rows are in memory a batch at a time, and a process that dies costs the last seconds of its work.

    Args:
        retry: codes whose rows are measured again.
        look_at: what is done with a picture's bytes.
        run: names this curation: what an attempt of its own has measured is not tried again, whatever its code.
    """
    cv2.setNumThreads(1)  # a task has one core; OpenCV would take them all
    rules, path = rules_of(spec.filters), measured_path(out, part)
    before = read_summary(path)
    if before is not None and is_done(before, part, rules, retry):  # a retried task whose first attempt got that far
        return {**before, "fresh": 0}
    is_urls = spec.sources[part.source].kind == "urls"
    patience = spec.sample_timeout_s + (spec.download.attempts * (spec.download.total_s + 60) if is_urls else 0)
    guard = Guard(out / "work" / "cursors", part.name, patience)
    journals = out / "work" / "partial"
    facts = {"rules": rules, "run": run, "part": part.digest}
    attempts, at_this = journal.read_journals(journals, part.name, facts, retry)
    earlier = _earlier_rows(path, before, rules, retry)
    known = journal.Known([*earlier, *attempts])
    if guard.hopeless:  # what was seen of it is all that there will be
        known = journal.Known([*(earlier if before and before["part"] == part.digest else []), *at_this])
    seen = journal.Journal(journals, part.name, SCHEMA, facts, eager=bool(guard.deaths))
    done, fresh, bodies = False, 0, set()
    try:
        with journal.Output(path, SCHEMA) as output:
            for row, is_fresh in _rows(part, spec, out, guard, known, seen, look_at):
                output.add(row)
                fresh += is_fresh
                if is_urls and row["at"]:
                    bodies.add(json.loads(row["at"]).get("fetched"))
            summary = output.finish({"part": part.digest, "rules": rules})
        done = True
        if is_urls:
            forget_bodies(out, part.name, bodies)
    finally:
        seen.close(done)
        guard.close(done)
    return {**summary, "fresh": fresh}


def _rows(
    part: Part,
    spec: CorpusSpec,
    out: Path,
    guard: Guard,
    known: journal.Known,
    seen: journal.Journal,
    look_at: Look,
) -> Iterator[tuple[dict[str, Any], bool]]:
    """(row, whether it was measured now) of all candidates of a part, in its order."""
    if guard.hopeless:
        yield from ((row, False) for row in known)
        problem = SampleError("crashed", "the process that read it died again and again", part.name)
        yield _row(Candidate(id=part.name[:24], key=part.name, source=part.name, problem=problem)), True
        return
    guard.at("")
    for candidate in _whatever_happens(part, candidates(part, spec, out, known.__contains__)):
        if candidate.id in known:
            yield _renewed(known[candidate.id], candidate), False
            continue
        verdict = guard.sentence(candidate.id)
        if verdict is not None:
            candidate.problem, candidate.stage = SampleError(*verdict, candidate.key), "measure"
        else:
            guard.at(candidate.id)
        row = _measure(candidate, spec.filters, look_at)
        seen.add(row)
        guard.at("")
        yield row, True


def _whatever_happens(part: Part, found: Iterator[Candidate]) -> Iterator[Candidate]:
    """The candidates; and should reading them raise what nobody foresaw, one more that says so."""
    try:
        yield from found
    except OSError:
        raise  # a full disk or a lost store is no fault of the part
    except Exception as error:  # noqa: BLE001 - what comes before it is kept, and no other part suffers
        problem = SampleError("crashed", f"reading it failed: {type(error).__name__}: {error}"[:1000], part.name)
        yield Candidate(id=f"!{part.name}"[:24], key=part.name, source=f"part:{part.name}", problem=problem)


def _earlier_rows(path: Path, before: Mapping[str, Any] | None, rules: str, retry: Collection[str]) -> list[pa.Table]:
    """Rows of an earlier run, less those to be measured again."""
    if before is None or before["rules"] != rules:
        return []
    return [journal.without(pq.read_table(path).replace_schema_metadata(None), retry)]


def _renewed(row: Mapping[str, Any], candidate: Candidate) -> dict[str, Any]:
    """A known row with what listing says today."""
    today = {name: getattr(candidate, name) for name in ("key", "source", "licence", "credit", "caption")}
    return {**row, **today, "at": candidate.at or row["at"]}


def _measure(candidate: Candidate, filters: FilterSpec, look_at: Look) -> dict[str, Any]:
    """One row; whatever a picture may do to a library, it costs no other."""
    row = _row(candidate)
    if candidate.problem is not None or candidate.load is None:
        return row
    try:
        data = candidate.load()
        row.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        found = look_at(data, filters, candidate.key)
        row.update({name: found[name] for name in ("ext", "width", "height", "print")})
        row.update({SCORE + name: value for name, value in found["scores"].items()})
        if candidate.keep is not None:
            candidate.keep(data)
        row["at"] = candidate.at
    except SampleError as error:
        row.update(code=error.code, stage="measure", detail=error.detail)
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
    """A parquet file that is old or whole, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
