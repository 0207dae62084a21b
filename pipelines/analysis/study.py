"""A study: one row of measurements a picture, kept so that the same command goes on where it stopped.

    <out>/study.json          {"study": its name, "settings": all that decides the rows}
    <out>/values.jsonl        a line per picture: key, source, source_sha256, settings (digest), files, and its values
    <out>/values.csv          the same values in long form, for tables
    <out>/quarantine.jsonl    a line per picture that could not be measured: key, source, stage, code, detail
    <out>/summary.json        means, intervals and sentences
    <out>/report.html         everything to look at, self-contained; its plots and sheets lie beside it
    <out>/strips/             small pictures of single steps, which the sheets are put together from

A picture is measured again when its bytes or the settings changed, or when a file that its row names is not as it was.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.images import center_crop, decode, resize_short_side
from components.types import Image, Restorer, SampleError
from pipelines.console import Progress, no_progress
from pipelines.errors import Failure, UsageError
from pipelines.restore import list_pictures
from pipelines.rows import end_torn_line, read_lines, replace_file, write_lines

if TYPE_CHECKING:
    from components.systems.instantir.network import InstantIR
    from components.systems.instantir.options import Options

VERSION = 1
"""Of what studies measure: raise it when a change alters their rows."""

Measure = Callable[[str, Image], Mapping[str, Any]]
"""(key, uint8 [S, S, 3]) -> values for JSON; a "files" entry, relative path -> bytes, is written beside the rows."""


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What every study of a model looks at.

    Attributes:
        model, digest: the model's name, and what names its bytes.
        images, out: folders.
        limit: first so many pictures by name; 0 for all.
        side_px: the middle square of each picture, resized to this side.
        seed: with a picture's name it fixes every random bit.
        device: where the networks are.
    """

    digest: str
    model: str
    images: Path
    out: Path
    limit: int = 0
    side_px: int = 256
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Subject(Looked):
    """The parts of an InstantIR model, and the options of a request to it."""

    network: InstantIR
    options: Options


@dataclass(frozen=True, kw_only=True)
class WholeModel(Looked):
    """A model of any system as its restorer, and the options of every request to it."""

    system: str
    restorer: Restorer
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of all measured pictures in order of their keys, and what became of the rest."""

    rows: Sequence[dict[str, Any]]
    measured: int
    kept: int
    quarantined: Sequence[Mapping[str, Any]]
    ignored: int


def picture_files(images: Path, out: Path, limit: int) -> tuple[dict[str, Path], int]:
    """Pictures by key, the first `limit` of them, and how many other files were passed over; raises UsageError."""
    if limit < 0:
        raise UsageError(f"--limit must be at least 1 (or 0 for all pictures), got {limit}")
    found, ignored = list_pictures(images, out)
    chosen = list(found.items())[:limit] if limit else list(found.items())
    return dict(chosen), ignored


def read_picture(path: Path, key: str) -> bytes:
    """A picture's bytes; SampleError where they cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError("unreadable", f"cannot be read: {error.strerror}", key) from error


def prepared(data: bytes, key: str, side_px: int) -> Image:
    """The picture's middle square, side_px wide: uint8 [S, S, 3]; SampleError where it is no picture."""
    return center_crop(resize_short_side(decode(data, key=key), side_px), side_px, side_px)


def digest_of(settings: Mapping[str, Any]) -> str:
    """Equal for equal settings."""
    return hashlib.sha256(json.dumps({**settings, "version": VERSION}, sort_keys=True).encode()).hexdigest()


@contextmanager
def study_folder(out: Path, name: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold the study's folder for this process, and say in it what it is.

    Raises:
        UsageError: the folder holds another study.
        RetryLater: another process works on it.
        Failure: it cannot be written.
    """
    from pipelines.plans import check_output, run_lock

    check_output(out, free_mib=0)
    with run_lock(out):
        try:
            known = json.loads((out / "study.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        if known and known.get("study") != name:
            raise UsageError(f"{out} holds the study {known.get('study')!r}; choose another output folder.")
        try:
            replace_file(out / "study.json", json_bytes({"study": name, "settings": dict(settings)}))
            yield
        except OSError as error:
            raise Failure(f"cannot write to {out}: {error.strerror or error}") from error


def measure_pictures(
    files: Mapping[str, Path],
    base: Path,
    out: Path,
    settings: Mapping[str, Any],
    side_px: int,
    measure: Measure,
    progress: Progress = no_progress,
    ignored: int = 0,
    wanted: Mapping[str, str] | None = None,
) -> Rows:
    """Measure every picture that is not up to date; call it inside `study_folder`.

    Args:
        wanted: by key, a file that the picture's row must have; others need none.

    Raises:
        Failure: not one picture could be measured.
    """
    values, quarantine, digest = out / "values.jsonl", out / "quarantine.jsonl", digest_of(settings)
    done = {row.get("key"): row for row in read_lines(values)}
    rows: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    kept = 0
    end_torn_line(values)
    progress(0, len(files))
    with values.open("a", encoding="utf-8") as stream:
        for number, (key, path) in enumerate(files.items(), start=1):
            source = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name
            try:
                data = read_picture(path, key)
                seen, row = hashlib.sha256(data).hexdigest(), done.get(key)
                if row is not None and _stands(row, seen, digest, out, (wanted or {}).get(key, "")):
                    kept += 1
                else:
                    found = _measured(measure, key, data, side_px)
                    written = _write_files(out, found.pop("files", {}))
                    head = {"key": key, "source": source, "source_sha256": seen, "settings": digest, "files": written}
                    row = {**head, **found}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                    stream.flush()
                rows.append(row)
            except SampleError as error:
                bad.append(
                    {"key": key, "source": source, "stage": "analyze", "code": error.code, "detail": error.detail}
                )
            progress(number, len(files), key)
    rows.sort(key=itemgetter("key"))
    write_lines(values, rows)
    write_lines(quarantine, sorted(bad, key=itemgetter("key")))
    if not rows:
        raise Failure(f"none of the {len(files)} pictures could be measured: {bad[0]['key']}: {bad[0]['detail']}")
    return Rows(rows=rows, measured=len(rows) - kept, kept=kept, quarantined=bad, ignored=ignored)


def _measured(measure: Measure, key: str, data: bytes, side_px: int) -> dict[str, Any]:
    try:
        return dict(measure(key, prepared(data, key, side_px)))
    except MemoryError as error:
        raise SampleError("out_of_memory", "not enough memory to measure the picture", key) from error


def _write_files(out: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    """Write the files of a row; returns their sha256."""
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(out / name, data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _stands(row: Mapping[str, Any], seen: str, digest: str, out: Path, wanted: str) -> bool:
    """Whether an earlier row is of this very picture and these settings, and its files are as they were."""
    if row.get("source_sha256") != seen or row.get("settings") != digest or (wanted and wanted not in row["files"]):
        return False
    try:
        return all(hashlib.sha256((out / n).read_bytes()).hexdigest() == d for n, d in row.get("files", {}).items())
    except OSError:
        return False


# -- results -----------------------------------------------------------------------------------------------------------


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """Indented JSON of plain data; a number that is not finite becomes null."""
    return (json.dumps(finite(document), indent=1, ensure_ascii=False) + "\n").encode()


def finite(value: Any) -> Any:
    """The same data with None for numbers that are not finite, numpy's arrays and numbers as plain ones."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Replace a table; what is None or not finite is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if finite(cell) is None else cell for cell in row] for row in rows])
    replace_file(path, text.getvalue().encode())


def numbers(values: Any, digits: int = 6) -> list[Any]:
    """A tensor or array as nested lists of rounded numbers, None where not finite: what a row keeps."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [numbers(part, digits) for part in array]
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in array.tolist()]


def column(rows: Sequence[Mapping[str, Any]], *path: str) -> Any:
    """One value of every row as float64 [n, ...], NaN for None; `path` leads to it through nested mappings."""
    import numpy as np

    def value(row: Any) -> Any:
        for name in path:
            row = row[name]
        return row

    return np.asarray([value(row) for row in rows], dtype=np.float64)
