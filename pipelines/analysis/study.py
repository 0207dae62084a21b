"""A study writes one row of measurements for each picture. The same command resumes a study that was stopped.

    <out>/study.json          {"study": its name, "settings": all settings that determine the rows}
    <out>/values.jsonl        a line per picture: key, source, source_sha256, settings (digest), files, and its values
    <out>/values.csv          the same values in long form, for tables
    <out>/quarantine.jsonl    a line per picture that could not be measured: key, source, stage, code, detail
    <out>/summary.json        means, intervals and sentences
    <out>/report.html         all results on one self-contained page; its plots and sheets are also files next to it
    <out>/strips/             small pictures of single steps; the sheets are made of them

A picture is measured again if its bytes or the settings have changed, or if a file that its row names has changed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from components.images import center_crop, decode, resize_short_side
from components.naming import printable
from components.types import Image, SampleError
from components.writing import replace_file
from pipelines.analysis.model import StudyJob, StudyModel
from pipelines.analysis.page import Page, write_page
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import Failure, UsageError
from pipelines.core.folders import check_output, folder_lock
from pipelines.core.pictures import list_pictures, read_picture
from pipelines.core.rows import end_torn_line, json_text, read_lines, write_lines

VERSION = 1
"""Version of the measurements. Raise it when a change of the code alters the rows."""

Measure = Callable[[str, Image], Mapping[str, Any]]
"""(key, uint8 [S, S, 3]) -> values for JSON. The bytes of its "files" entry, by relative path, are written to files."""


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The pictures of a study.

    Attributes:
        by_key: absolute paths, in order of their names.
        base: folder that the rows' `source` is relative to.
        ignored_count: number of other files in the folder.
    """

    by_key: Mapping[str, Path]
    base: Path
    ignored_count: int = 0


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """The rows of a study.

    Attributes:
        rows: one for each measured picture, in order of the keys.
        fresh_count: number of rows that this run measured; the others are from earlier runs.
        quarantine: one row for each picture that could not be measured.
        ignored_count: see Pictures.
    """

    rows: Sequence[dict[str, Any]]
    fresh_count: int
    quarantine: Sequence[Mapping[str, Any]] = field(default=())
    ignored_count: int = 0


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """The result of a study: counts of pictures, its sentences (`seen`), and the paths of its folder and report."""

    measured: int
    kept: int
    quarantined: int
    ignored: int
    seen: Sequence[str]
    folder: Path
    report: Path


@dataclass(frozen=True, kw_only=True)
class Study:
    """An entry of the dictionary of studies.

    Attributes:
        open: opens the job's model.
        run: (opened model, progress=, and the study's own settings) -> result.
    """

    open: Callable[[StudyJob], StudyModel]
    run: Callable[..., StudyResult]


def list_study_pictures(images: Path, out: Path, limit: int) -> Pictures:
    """The first `limit` pictures by name, or all if it is 0; raises UsageError."""
    if limit < 0:
        raise UsageError(f"--limit must be at least 1 (or 0 for all pictures), got {limit}")
    paths, ignored_count = list_pictures(images, out)
    by_key = dict(list(paths.items())[:limit]) if limit else paths
    base = images if images.is_dir() else images.parent
    return Pictures(by_key=by_key, base=base.absolute(), ignored_count=ignored_count)


def middle_square(data: bytes, key: str, side_px: int) -> Image:
    """The picture's middle square, resized to side_px: uint8 [S, S, 3]; SampleError if the bytes are not a picture."""
    return center_crop(resize_short_side(decode(data, key=key), side_px), side_px, side_px)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Equal settings have equal digests."""
    return hashlib.sha256(json.dumps({**settings, "version": VERSION}, sort_keys=True).encode()).hexdigest()


@contextmanager
def study_folder(out: Path, name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Lock the study's folder for this process, and write study.json.

    Raises:
        UsageError: the folder holds another study.
        RetryLater: another process works in the folder.
        Failure: the folder cannot be written.
    """
    check_output(out, free_mib=0)
    with folder_lock(out):
        try:
            document = json.loads((out / "study.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            document = {}
        if document and document.get("study") != name:
            raise UsageError(f"{out} holds the study {document.get('study')!r}; choose another output folder.")
        try:
            replace_file(out / "study.json", json_bytes({"study": name, "settings": dict(settings)}))
            yield
        except OSError as error:
            raise Failure(f"cannot write to {out}: {error.strerror or error}") from error


def measure_pictures(
    pictures: Pictures,
    out: Path,
    settings: Mapping[str, Any],
    side_px: int,
    measure: Measure,
    progress: Progress = no_progress,
    required_files: Mapping[str, str] | None = None,
) -> Measurements:
    """Measure every picture that has no current row; call it inside `study_folder`.

    Args:
        required_files: by key, a file that the picture's row must name; other pictures need no file.

    Raises:
        Failure: no picture could be measured.
    """
    values, quarantine, digest = out / "values.jsonl", out / "quarantine.jsonl", settings_digest(settings)
    earlier = {row.get("key"): row for row in read_lines(values)}
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    fresh_count = 0
    total = len(pictures.by_key)
    end_torn_line(values)
    progress(0, total)
    with values.open("a", encoding="utf-8") as stream:
        for number, (key, path) in enumerate(pictures.by_key.items(), start=1):
            inside = path.relative_to(pictures.base) if path.is_relative_to(pictures.base) else Path(path.name)
            source = printable(inside.as_posix())
            try:
                data = read_picture(path, key)
                source_sha256, row = hashlib.sha256(data).hexdigest(), earlier.get(key)
                if row is None or not _is_current(row, source_sha256, digest, out, (required_files or {}).get(key, "")):
                    content = _measure(measure, key, data, side_px)
                    files = _write_files(out, content.pop("files", {}))
                    head = {"key": key, "source": source, "source_sha256": source_sha256, "settings": digest}
                    row = {**head, "files": files, **content}
                    stream.write(json_text(row) + "\n")
                    stream.flush()
                    fresh_count += 1
                rows.append(row)
            except SampleError as error:
                bad.append(
                    {"key": key, "source": source, "stage": "analyze", "code": error.code, "detail": error.detail}
                )
            progress(number, total, key)
    rows.sort(key=itemgetter("key"))
    write_lines(values, rows)
    write_lines(quarantine, sorted(bad, key=itemgetter("key")))
    if not rows:
        raise Failure(f"none of the {total} pictures could be measured: {bad[0]['key']}: {bad[0]['detail']}")
    return Measurements(rows=rows, fresh_count=fresh_count, quarantine=bad, ignored_count=pictures.ignored_count)


def _measure(measure: Measure, key: str, data: bytes, side_px: int) -> dict[str, Any]:
    try:
        return dict(measure(key, middle_square(data, key, side_px)))
    except MemoryError as error:
        raise SampleError("out_of_memory", "not enough memory to measure the picture", key) from error


def _write_files(out: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Write the files of a row; returns their sha256."""
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(out / name, data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _is_current(row: Mapping[str, Any], source_sha256: str, digest: str, out: Path, required_file: str) -> bool:
    """Whether an earlier row has the picture's bytes and the settings, and its files have not changed."""
    if row.get("source_sha256") != source_sha256 or row.get("settings") != digest:
        return False
    if required_file and required_file not in row["files"]:
        return False
    try:
        return all(hashlib.sha256((out / n).read_bytes()).hexdigest() == d for n, d in row.get("files", {}).items())
    except OSError:
        return False


# -- results -----------------------------------------------------------------------------------------------------------


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Indented JSON of plain data; a number that is not finite becomes null."""
    return (json_text(finite(document), indent=1) + "\n").encode()


def finite(value: Any) -> Any:
    """The same data in plain types: lists and numbers for numpy's arrays and numbers, None for numbers not finite."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Replace a table; the cell of None and of a number that is not finite is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if finite(cell) is None else cell for cell in row] for row in rows])
    replace_file(path, printable(text.getvalue()).encode())


def numbers(values: Any, digits: int = 6) -> list[Any]:
    """A tensor or array as nested lists of rounded numbers for a row; None for numbers that are not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [numbers(part, digits) for part in array]
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in array.tolist()]


def column(rows: Sequence[Mapping[str, Any]], *path: str) -> Any:
    """One value of every row as float64 [n, ...], NaN for None; `path` leads to it through nested mappings."""

    def value(row: Any) -> Any:
        for name in path:
            row = row[name]
        return row

    return np.asarray([value(row) for row in rows], dtype=np.float64)


def finish(out: Path, measurements: Measurements, page: Page, summary: Mapping[str, Any]) -> StudyResult:
    """Write summary.json and the report; every study ends with this call."""
    findings = [sentence for section in page.sections for sentence in section.findings]
    document = {**summary, "seen": findings, "pictures": len(measurements.rows)}
    replace_file(out / "summary.json", json_bytes(document))
    report = write_page(out, page)
    return StudyResult(
        measured=measurements.fresh_count,
        kept=len(measurements.rows) - measurements.fresh_count,
        quarantined=len(measurements.quarantine),
        ignored=measurements.ignored_count,
        seen=findings,
        folder=out,
        report=report,
    )


def pictures_fact(measurements: Measurements, side_px: int) -> tuple[str, str]:
    """The report's fact about the pictures."""
    return ("Pictures", f"{len(measurements.rows)} (middle squares, {side_px} px)")
