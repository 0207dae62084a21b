"""`restoray degrade`: degrades a folder of pictures, records each picture's plan, and replays recorded plans.

    <out>/KEY.png             the degraded pictures; a key holds the folders of its picture ("sub/b")
    <out>/records.jsonl       one line per picture: key, source, folder, source_sha256, output, output_sha256,
                              pixels_sha256, preset, options, seed, plan, strength
    <out>/quarantine.jsonl    one line per file that could not be degraded: key, source, code, detail
    <out>/contact.jpg         originals and results side by side

A picture's plan depends only on seed and key, not on the other pictures of the folder. The same command continues a
stopped job: a picture is skipped if its record has these settings and both files have the recorded sha256. Threads
degrade the pictures, because OpenCV releases the interpreter's lock.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import cv2

from components.degradations import build_degradation
from components.degradations.plans import strength
from components.images import ANY_SHAPE, PNG_LEVEL, Limits, check_png_level, decode, encode_png, read_png_text, to_uint8
from components.naming import printable
from components.restoring import picture_key
from components.types import Degradation, Plan, SampleError
from components.writing import replace_file
from pipelines.core.console import Progress, no_progress
from pipelines.core.environment import cores
from pipelines.core.errors import Failure, UsageError
from pipelines.core.folders import check_output, folder_lock
from pipelines.core.pictures import SHEET, list_pictures, read_picture
from pipelines.core.rows import end_torn_line, json_text, own_lines, parse_lines, read_lines, write_lines
from pipelines.pages.sheets import contact_sheet

SHEET_PICTURES = 24
LIMITS = ANY_SHAPE
RECORD_FIELDS = {"key": str, "source": str, "folder": str, "source_sha256": str, "pixels_sha256": str, "plan": dict}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One picture to degrade.

    Attributes:
        plan: the plan of a replay; None draws one from the preset.
        expected: in a replay, the recorded sha256 of the source and of the degraded pixels.
    """

    key: str
    path: Path
    source: str
    plan: Plan | None = None
    expected: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class DegradeResult:
    """The result of a job: numbers of pictures, and paths.

    Attributes:
        skipped: pictures with an up-to-date result of an earlier job.
        ignored: hidden files and files with the suffix of a sidecar.
        differing: in a replay, keys whose pixels differ from the record.
        sheet: contact.jpg; None without a picture on it.
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
    limits: Limits = LIMITS,
    png_level: int = PNG_LEVEL,
) -> DegradeResult:
    """Degrade every picture of a folder; larger inputs than `limits` are quarantined.

    Raises:
        UsageError: an unknown preset or option, no pictures, or a result would overwrite a foreign file.
        Failure: `out` cannot be written.
    """
    try:
        check_png_level(png_level)
    except ValueError as error:
        raise UsageError(str(error)) from error
    # records are JSON, which holds lists and no tuples
    options = {name: list(v) if isinstance(v, tuple) else v for name, v in (options or {}).items()}
    try:
        degradation = build_degradation(preset, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    paths, ignored = list_pictures(source, out)
    base = source if source.is_dir() else source.parent
    jobs = [Job(key=key, path=path, source=printable(os.path.relpath(path, base))) for key, path in paths.items()]
    settings = {"preset": preset, "options": options, "seed": seed}
    return _run(jobs, base, out, degradation, settings, ignored, progress, limits, png_level)


def replay(
    record: Path, source: Path | None, out: Path, progress: Progress = no_progress, limits: Limits = LIMITS
) -> DegradeResult:
    """Apply recorded plans to their original pictures and compare the pixels with the records.

    Args:
        record: a records.jsonl, or a JSON file with one record or a list of them.
        source: the folder of originals; None takes the folder of each record.
        out: the folder of the results.
        limits: larger inputs are quarantined.

    Raises:
        UsageError: there are no readable records, or `out` is the folder of the records.
    """
    rows = read_records(record)
    by_key = functools.cache(lambda folder: list_pictures(folder)[0])
    if out.resolve() == record.parent.resolve():
        raise UsageError(f"{out} holds the records themselves; choose another output folder.")
    jobs = [
        Job(
            key=row["key"],
            path=_original(source or Path(row["folder"]), row, by_key),
            source=row["source"],
            plan=row["plan"],
            expected=(row["source_sha256"], row["pixels_sha256"]),
        )
        for row in rows
    ]
    folder = source or Path(rows[0]["folder"])
    degradation = build_degradation("none")  # the plans hold everything
    return _run(jobs, folder, out, degradation, {"replay": str(record.absolute())}, 0, progress, limits)


def _original(folder: Path, row: Mapping[str, Any], by_key: Callable[[Path], Mapping[str, Path]]) -> Path:
    """The path of a record's original. A name that is no text stands escaped in the record; the key finds its file."""
    path: Path = folder / row["source"]
    if path.exists() or "\\" not in row["source"] or not folder.is_dir():
        return path
    return by_key(folder).get(row["key"], path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of an earlier job. Raises UsageError if there are none or one is malformed."""
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
    keys: set[str] = set()
    for number, row in enumerate(rows, 1):
        bad_fields = [name for name, kind in RECORD_FIELDS.items() if not isinstance(row.get(name), kind)]
        if bad_fields:
            raise UsageError(f"{path}: record {number} lacks {', '.join(bad_fields)}, or their type is wrong.")
        if picture_key(row["key"]) != row["key"]:
            raise UsageError(f"{path}: record {number} has the key {row['key']!r}, which is not a valid key.")
        if row["key"] in keys:
            raise UsageError(f"{path}: record {number} has the key of an earlier record, {row['key']!r}.")
        if Path(row["source"]).is_absolute() or ".." in Path(row["source"]).parts:
            raise UsageError(f"{path}: the source of record {number} lies outside its folder: {row['source']!r}.")
        keys.add(row["key"])
    return rows


def _run(
    jobs: Sequence[Job],
    folder: Path,
    out: Path,
    degradation: Degradation,
    settings: Mapping[str, Any],
    ignored: int,
    progress: Progress,
    limits: Limits,
    png_level: int = PNG_LEVEL,
) -> DegradeResult:
    """Work through the jobs. Each job's line is written as soon as it ends."""
    check_output(out, free_mib=0)
    records, quarantine = out / "records.jsonl", out / "quarantine.jsonl"
    counts, differing = {"degraded": 0, "skipped": 0, "quarantined": 0}, []
    threads = cv2.getNumThreads()
    with folder_lock(out):
        earlier_rows = {
            row["key"]: row for row in own_lines(records, ("key", "output", "output_sha256", "pixels_sha256"))
        }
        own_lines(quarantine, ("key", "code"))
        if not earlier_rows and os.path.lexists(out / SHEET):
            raise UsageError(
                f"{out / SHEET} would be overwritten, and there are no records of an earlier job beside it."
            )
        for job in jobs:
            output = out / f"{job.key}.png"
            if os.path.lexists(output) and job.key not in earlier_rows and not _is_own(output, job.key):
                raise UsageError(
                    f"{output} would be overwritten, and it is not an earlier result; choose another output folder."
                )
        try:
            end_torn_line(records)
            quarantine.unlink(missing_ok=True)
            cv2.setNumThreads(1)  # each thread works on one picture
            progress(0, len(jobs))
            with (
                records.open("a", encoding="utf-8") as records_file,
                quarantine.open("a", encoding="utf-8") as quarantine_file,
            ):
                answers = _answers(jobs, folder, out, degradation, settings, earlier_rows, limits, png_level)
                for number, (status, row, same) in enumerate(answers, 1):
                    counts[status] += 1
                    if status != "skipped":
                        target = quarantine_file if status == "quarantined" else records_file
                        target.write(json_text(row) + "\n")
                        target.flush()
                    differing += [] if same else [row["key"]]
                    progress(number, len(jobs), row["key"])
            newest = {row["key"]: row for row in read_lines(records)}
            write_lines(records, sorted(newest.values(), key=itemgetter("key")))
            write_lines(quarantine, sorted(read_lines(quarantine), key=itemgetter("key")))
            sheet = _sheet(list(newest.values()), {job.key: job.path for job in jobs}, out, limits)
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
    earlier_rows: Mapping[str, Mapping[str, Any]],
    limits: Limits,
    png_level: int,
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(status, row, whether a replay gave the recorded pixels) of each job, in the order of the jobs."""
    workers = cores()
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(
                lambda job: _degrade_one(
                    job, folder, out, degradation, settings, earlier_rows.get(job.key), limits, png_level
                ),
                jobs,
            )
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _degrade_one(
    job: Job,
    folder: Path,
    out: Path,
    degradation: Degradation,
    settings: Mapping[str, Any],
    earlier: Mapping[str, Any] | None,
    limits: Limits,
    png_level: int,
) -> tuple[str, dict[str, Any], bool]:
    """Degrade one picture. Returns (status, row, whether a replay gave the recorded pixels)."""
    try:
        data = read_picture(job.path, job.key, limits)
        source_sha256, output = hashlib.sha256(data).hexdigest(), out / f"{job.key}.png"
        if job.expected and source_sha256 != job.expected[0]:
            raise SampleError("changed", "the original differs from the record's", job.key)
        recorded_settings = {**settings, **({"plan": dict(job.plan)} if job.plan is not None else {})}
        if earlier is not None and _is_current(earlier, source_sha256, recorded_settings, output):
            same = not job.expected or earlier["pixels_sha256"] == job.expected[1]
            return "skipped", dict(earlier), same
        hq = decode(data, limits, key=job.key)
        plan = job.plan if job.plan is not None else degradation.draw(settings["seed"], job.key, 0)
        try:
            pixels, amounts = to_uint8(degradation.apply(hq, plan)), strength(plan)
        except (ValueError, MemoryError, ArithmeticError) as error:  # a plan from a file may hold any value
            raise SampleError("plan", f"the plan cannot be executed: {error}", job.key) from error
    except SampleError as error:
        reason = {"stage": "degrade", "code": error.code, "detail": error.detail}
        return "quarantined", {"key": job.key, "source": job.source, **reason}, True
    png = encode_png(pixels, {"software": "restoray", "key": job.key}, png_level)
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, png)
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    row: dict[str, Any] = {
        "key": job.key,
        "source": job.source,
        "folder": printable(str(folder.absolute())),
        "source_sha256": source_sha256,
        "output": f"{job.key}.png",
        "output_sha256": hashlib.sha256(png).hexdigest(),
        "pixels_sha256": digest,
        **settings,
        "plan": dict(plan),
        "strength": {name: round(value, 3) for name, value in amounts.items()},
    }
    return "degraded", row, not job.expected or digest == job.expected[1]


def _is_own(place: Path, key: str) -> bool:
    """Whether a file without a record is an earlier result: a picture is written before its record."""
    try:
        text = read_png_text(place.read_bytes())
    except (OSError, SampleError):
        return False
    return (text.get("software"), text.get("key")) == ("restoray", key)


def _is_current(earlier: Mapping[str, Any], source_sha256: str, settings: Mapping[str, Any], output: Path) -> bool:
    """Whether an earlier result has these settings and this source, and its file is unchanged."""
    if earlier.get("source_sha256") != source_sha256 or any(
        earlier.get(name) != value for name, value in settings.items()
    ):
        return False
    try:
        return hashlib.sha256(output.read_bytes()).hexdigest() == earlier["output_sha256"]
    except OSError:
        return False


def _sheet(rows: Sequence[Mapping[str, Any]], sources: Mapping[str, Path], out: Path, limits: Limits) -> Path | None:
    """Write contact.jpg: originals and results side by side, of pictures spread evenly over the keys."""
    rows = sorted((row for row in rows if row["key"] in sources), key=itemgetter("key"))
    spread_rows = [rows[k * len(rows) // SHEET_PICTURES] for k in range(SHEET_PICTURES)] if rows else []
    cells = []
    for row in rows if len(rows) <= SHEET_PICTURES else spread_rows:
        try:
            pair = [
                decode(path.read_bytes(), limits, key=row["key"]) for path in (sources[row["key"]], out / row["output"])
            ]
        except (OSError, SampleError):
            continue  # the file was removed meanwhile
        cells.append((pair, f"{row['key'][:56]}\n{_strength_text(row['strength'])}"))
    if not cells:
        return None
    replace_file(out / SHEET, contact_sheet(cells))
    return out / SHEET


def _strength_text(amounts: Mapping[str, float]) -> str:
    """The strength of a plan in one line."""
    parts = [
        f"blur {amounts['blur_px']:.1f} px" if amounts["blur_px"] >= 0.05 else "",
        f"side x {amounts['smallest']:.2f}" if amounts["smallest"] < 1 else "",
        f"noise {amounts['noise']:.0f}" if amounts["noise"] >= 0.5 else "",
        f"JPEG {amounts['quality']:.0f}" if amounts["quality"] < 100 else "",
        f"lost {100 * amounts['lost']:.0f} %" if amounts["lost"] else "",
    ]
    return ", ".join(word for word in parts if word) or "unchanged"
