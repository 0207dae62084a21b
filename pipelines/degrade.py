"""`restoray degrade`: a folder of pictures made poor by a preset, each with the plan that did it; and plans replayed.

    <out>/KEY.png             the degraded pictures
    <out>/records.jsonl       a line per picture: key, source, folder, source_sha256, output, output_sha256,
                              pixels_sha256, preset, options, seed, plan, strength
    <out>/quarantine.jsonl    a line per file that could not be degraded: key, source, code, detail
    <out>/contact.jpg         originals and results side by side, for looking

A picture's plan depends on seed and key alone, so what else lies in the folder changes nothing. A job that was stopped
goes on; a picture is skipped when its record has these settings and both files have the recorded sha256. Pictures are
worked on in threads (the arithmetic is OpenCV's, outside the interpreter's lock).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from components.degradations import build_degradation
from components.degradations.plans import MAX_SIDE_PX, strength
from components.images import Limits, decode, encode_png, read_png_text, to_uint8
from components.restoring import file_key
from components.types import Degradation, Plan, SampleError
from pipelines.console import Progress, no_progress
from pipelines.errors import Failure, UsageError
from pipelines.restore import list_pictures
from pipelines.rows import end_torn_line, parse_lines, read_lines, replace_file, write_lines
from pipelines.sheets import contact_sheet

SHEET_PICTURES = 24
RECORD_FIELDS = {"key": str, "source": str, "folder": str, "source_sha256": str, "pixels_sha256": str, "plan": dict}
LIMITS = Limits(min_side_px=1, max_aspect=float(MAX_SIDE_PX))  # any picture that the engine takes


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture to degrade.

    Attributes:
        plan: what to do; None lets the preset draw.
        expected: of a replay, sha256 of the source and of the pixels that came out then.
    """

    key: str
    path: Path
    source: str
    plan: Plan | None = None
    expected: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class DegradeResult:
    """What a job did: counts of pictures, and where things are.

    Attributes:
        differing: of a replay, keys whose pixels are not those of the record.
        ignored: files that are no pictures by their suffix.
    """

    degraded: int
    skipped: int
    quarantined: int
    ignored: int
    differing: Sequence[str]
    folder: Path
    records: Path
    quarantine: Path
    sheet: Path | None


def degrade_folder(
    source: Path,
    out: Path,
    preset: str = "realesrgan",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> DegradeResult:
    """Degrade every picture of a folder.

    Raises:
        UsageError: an unknown preset or option, no pictures, or a file that is not ours where a result would go.
        Failure: `out` cannot be written.
    """
    options = json.loads(json.dumps(dict(options or {})))  # as a record will hold them
    try:
        degradation = build_degradation(preset, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    found, ignored = list_pictures(source, out)
    base = source if source.is_dir() else source.parent
    jobs = [Job(key=key, path=path, source=os.path.relpath(path, base)) for key, path in found.items()]
    settings = {"preset": preset, "options": options, "seed": seed}
    return _run(jobs, base, out, degradation, settings, ignored, progress)


def replay(record: Path, source: Path | None, out: Path, progress: Progress = no_progress) -> DegradeResult:
    """Apply recorded plans to the pictures that they were drawn for, and compare.

    Args:
        record: a records.jsonl, or a JSON file with one record or a list of them.
        source: the folder of originals; None takes each record's own.
        out: where the results go.

    Raises:
        UsageError: no readable records, or `out` is the folder of the records.
    """
    rows = read_records(record)
    if out.resolve() == record.parent.resolve():
        raise UsageError(f"{out} holds the records themselves; choose another output folder.")
    jobs = [
        Job(
            key=row["key"],
            path=(source or Path(row["folder"])) / row["source"],
            source=row["source"],
            plan=row["plan"],
            expected=(row["source_sha256"], row["pixels_sha256"]),
        )
        for row in rows
    ]
    folder = source or Path(rows[0]["folder"])
    degradation = build_degradation("none")  # plans execute themselves
    return _run(jobs, folder, out, degradation, {"replay": str(record.absolute())}, 0, progress)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of an earlier job; raises UsageError where there are none, or one lacks a field."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    rows = parse_lines(data)
    if not rows:
        try:
            document = json.loads(data)
        except ValueError:
            document = None
        rows = [row for row in document if isinstance(row, dict)] if isinstance(document, list) else rows
        rows = [document] if isinstance(document, dict) else rows
    if not rows:
        raise UsageError(f"{path} holds no records: give a records.jsonl that `restoray degrade` wrote.")
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        wrong = [name for name, kind in RECORD_FIELDS.items() if not isinstance(row.get(name), kind)]
        if wrong:
            raise UsageError(f"{path}: record {number} lacks {', '.join(wrong)}, or they are of a wrong type.")
        if file_key(row["key"]) != row["key"]:
            raise UsageError(f"{path}: record {number} has the key {row['key']!r}, which no picture gets.")
        if row["key"] in seen:
            raise UsageError(f"{path}: record {number} has the key of an earlier one, {row['key']!r}.")
        if Path(row["source"]).is_absolute() or ".." in Path(row["source"]).parts:
            raise UsageError(f"{path}: the source of record {number} leaves its folder: {row['source']!r}.")
        seen.add(row["key"])
    return rows


def _run(
    jobs: Sequence[Job],
    folder: Path,
    out: Path,
    degradation: Degradation,
    settings: Mapping[str, Any],
    ignored: int,
    progress: Progress,
) -> DegradeResult:
    """Work through the jobs; one line is written as each is finished."""
    import cv2

    from pipelines.plans import check_output, run_lock

    check_output(out, free_mib=0)
    records, quarantine = out / "records.jsonl", out / "quarantine.jsonl"
    counts, differing = {"degraded": 0, "skipped": 0, "quarantined": 0}, []
    threads = cv2.getNumThreads()
    with run_lock(out):
        done = {row["key"]: row for row in read_lines(records)}
        for job in jobs:
            place = out / f"{job.key}.png"
            if os.path.lexists(place) and job.key not in done and not _ours(place, job.key):
                raise UsageError(f"{place} would be overwritten, and no record says that it was made here.")
        try:
            end_torn_line(records)
            quarantine.unlink(missing_ok=True)
            cv2.setNumThreads(1)  # one picture a thread
            progress(0, len(jobs))
            with records.open("a", encoding="utf-8") as good, quarantine.open("a", encoding="utf-8") as bad:
                answers = _answers(jobs, folder, out, degradation, settings, done)
                for number, (status, row, same) in enumerate(answers, 1):
                    counts[status] += 1
                    if status != "skipped":
                        target = bad if status == "quarantined" else good
                        target.write(json.dumps(row, ensure_ascii=False) + "\n")
                        target.flush()
                    differing += [] if same else [row["key"]]
                    progress(number, len(jobs), row["key"])
            newest = {row["key"]: row for row in read_lines(records)}
            write_lines(records, sorted(newest.values(), key=itemgetter("key")))
            write_lines(quarantine, sorted(read_lines(quarantine), key=itemgetter("key")))
            sheet = _sheet(list(newest.values()), {job.key: job.path for job in jobs}, out)
        except OSError as error:
            raise Failure(f"cannot write to {out}: {error.strerror or error}") from error
        finally:
            cv2.setNumThreads(threads)
    return DegradeResult(
        **counts,
        ignored=ignored,
        differing=sorted(differing),
        folder=out,
        records=records,
        quarantine=quarantine,
        sheet=sheet,
    )


def _answers(
    jobs: Sequence[Job],
    folder: Path,
    out: Path,
    degradation: Degradation,
    settings: Mapping[str, Any],
    done: Mapping[str, Mapping[str, Any]],
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(status, row, whether a replay gave the recorded pixels) of each job, in order."""
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(lambda job: _one(job, folder, out, degradation, settings, done.get(job.key)), jobs)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _one(
    job: Job,
    folder: Path,
    out: Path,
    degradation: Degradation,
    settings: Mapping[str, Any],
    before: Mapping[str, Any] | None,
) -> tuple[str, dict[str, Any], bool]:
    """Degrade one picture, or say why not."""
    try:
        try:
            data = job.path.read_bytes()
        except OSError as error:
            raise SampleError("unreadable", f"cannot be read: {error.strerror}", job.key) from error
        seen, place = hashlib.sha256(data).hexdigest(), out / f"{job.key}.png"
        if job.expected and seen != job.expected[0]:
            raise SampleError("changed", "the original is not the one of the record", job.key)
        known = {**settings, **({"plan": dict(job.plan)} if job.plan is not None else {})}
        if before is not None and _stands(before, seen, known, place):
            same = not job.expected or before["pixels_sha256"] == job.expected[1]
            return "skipped", dict(before), same
        hq = decode(data, LIMITS, key=job.key)
        plan = job.plan if job.plan is not None else degradation.draw(settings["seed"], job.key, 0)
        try:
            pixels, found = to_uint8(degradation.apply(hq, plan)), strength(plan)
        except (ValueError, MemoryError, ArithmeticError) as error:  # a plan from a file may ask for anything
            raise SampleError("plan", f"the plan cannot be executed: {error}", job.key) from error
    except SampleError as error:
        why = {"stage": "degrade", "code": error.code, "detail": error.detail}
        return "quarantined", {"key": job.key, "source": job.source, **why}, True
    png = encode_png(pixels, {"software": "restoray", "key": job.key})
    replace_file(place, png)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    row: dict[str, Any] = {
        "key": job.key,
        "source": job.source,
        "folder": str(folder.absolute()),
        "source_sha256": seen,
        "output": place.name,
        "output_sha256": hashlib.sha256(png).hexdigest(),
        "pixels_sha256": digest,
        **settings,
        "plan": dict(plan),
        "strength": {name: round(value, 3) for name, value in found.items()},
    }
    return "degraded", row, not job.expected or digest == job.expected[1]


def _ours(place: Path, key: str) -> bool:
    """Whether a file without a record is one of ours: a picture is renamed into place before its record is written."""
    try:
        text = read_png_text(place.read_bytes())
    except (OSError, SampleError):
        return False
    return (text.get("software"), text.get("key")) == ("restoray", key)


def _stands(before: Mapping[str, Any], seen: str, settings: Mapping[str, Any], place: Path) -> bool:
    """Whether an earlier result has these settings and source, and is still what was written."""
    if before.get("source_sha256") != seen or any(before.get(name) != value for name, value in settings.items()):
        return False
    try:
        return hashlib.sha256(place.read_bytes()).hexdigest() == before["output_sha256"]
    except OSError:
        return False


def _sheet(rows: Sequence[Mapping[str, Any]], sources: Mapping[str, Path], out: Path) -> Path | None:
    """Originals beside results, spread evenly over the folder."""
    rows = sorted((row for row in rows if row["key"] in sources), key=itemgetter("key"))
    chosen = [rows[k * len(rows) // SHEET_PICTURES] for k in range(SHEET_PICTURES)] if rows else []
    cells = []
    for row in rows if len(rows) <= SHEET_PICTURES else chosen:
        try:
            pair = [
                decode(path.read_bytes(), LIMITS, key=row["key"]) for path in (sources[row["key"]], out / row["output"])
            ]
        except (OSError, SampleError):
            continue  # gone since
        cells.append((pair, f"{row['key'][:56]}\n{_words(row['strength'])}"))
    if not cells:
        return None
    replace_file(out / "contact.jpg", contact_sheet(cells))
    return out / "contact.jpg"


def _words(found: Mapping[str, float]) -> str:
    """A strength in one line."""
    words = [
        f"blur {found['blur_px']:.1f} px" if found["blur_px"] >= 0.05 else "",
        f"side x {found['smallest']:.2f}" if found["smallest"] < 1 else "",
        f"noise {found['noise']:.0f}" if found["noise"] >= 0.5 else "",
        f"JPEG {found['quality']:.0f}" if found["quality"] < 100 else "",
        f"lost {100 * found['lost']:.0f} %" if found["lost"] else "",
    ]
    return ", ".join(word for word in words if word) or "unchanged"
