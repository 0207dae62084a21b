"""Files with a line for each of a job's pictures: JSON lines, or a table, with the picture's name and one value.

A table has a header with the names of both columns, or two columns without a header. Its encoding and separator may be
those of Excel. `key` or `file_name` names the picture.
"""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from components.naming import printable
from pipelines.core.errors import UsageError, unknown
from pipelines.core.places.place import Place, Where
from pipelines.core.tables import read_text, separator_of
from pipelines.restoration.parts import Part, Source

NAMES = ("key", "file_name")
KINDS = (".jsonl", ".csv")
MAX_NAMES = 5  # pictures that an error lists

_Row = tuple[int, str, str, Any]
"""(line number, key or file name of the picture, name of the value's column, value)."""


@dataclass(frozen=True, kw_only=True)
class PictureLine:
    """One line: its number, the picture's key and its name in the file, and the value with its column's name."""

    number: int
    key: str
    name: str
    column: str
    value: Any


def read_picture_lines(
    path: Path, sources: Mapping[str, Source], src: Where, columns: tuple[str, ...], what: str
) -> Iterator[PictureLine]:
    """Yield the lines of a file; errors about pictures that are not there come last.

    Args:
        path: the file.
        sources: the job's pictures by key, from list_pictures(src).
        src: the job's folder or picture.
        columns: names that the value's column may have; the first one is that of a table without a header.
        what: the values, for the error of an unknown kind of file.

    Raises:
        UsageError: a line is malformed or repeats a picture, or pictures are not in `src`. The message names the line
            or the pictures.
    """
    if path.suffix.lower() not in KINDS:
        raise unknown(f"kind of {what} file", path.suffix, KINDS)
    rows = _json_lines(path, columns) if path.suffix.lower() == ".jsonl" else _table_lines(path, columns)
    keys_by_name = _keys_by_name(sources, src)
    line_of: dict[str, int] = {}
    absent = []
    for number, name, column, value in rows:
        spellings = (name, unicodedata.normalize("NFC", name), _posix_name(name))
        keys = next((keys_by_name[each] for each in spellings if each in keys_by_name), set())
        if not keys:
            absent.append(f"{name} (line {number})")
            continue
        if len(keys) > 1:
            listing = ", ".join(sorted(keys)[:MAX_NAMES])
            raise line_error(path, number, f"{name} may be any of {listing}; name one of these")
        (key,) = keys
        if key in line_of:
            raise line_error(path, number, f"{name} has a {column} already, in line {line_of[key]}")
        line_of[key] = number
        yield PictureLine(number=number, key=key, name=name, column=column, value=value)
    if absent:
        more = f" and {len(absent) - MAX_NAMES} more" if len(absent) > MAX_NAMES else ""
        raise UsageError(f"{path} names pictures that are not in {src}: {', '.join(absent[:MAX_NAMES])}{more}")


def line_error(path: Path, number: int, reason: str) -> UsageError:
    return UsageError(f"{path}, line {number}: {reason}")


def _keys_by_name(sources: Mapping[str, Source], src: Where) -> dict[str, set[str]]:
    """Keys of the pictures by each name that a file may use: key, path below `src`, file name; earlier kinds win.

    A path without its suffix comes last; it differs from the key where a name holds joiners, "x:y" or a rival's stem.
    Names that are no text stand escaped. A name in NFC form stands for all its forms, and "sub__b" for the key "sub/b",
    as earlier versions wrote it, unless a picture has just that name.
    """
    exact: list[dict[str, set[str]]] = [{}, {}, {}, {}]
    is_folder = src.is_dir() or any(isinstance(path, Part) for path in sources.values())
    for key, path in sources.items():
        below = _below(path, src) if is_folder else PurePosixPath(path.name)
        exact[0].setdefault(printable(below.with_suffix("").as_posix()), set()).add(key)
        exact[1].setdefault(printable(path.name), set()).add(key)
        if is_folder:
            exact[2][printable(below.as_posix())] = {key}
        exact[3][key] = {key}
    names: dict[str, set[str]] = {}
    for kind in exact:
        for name, keys in kind.items():
            for other in {unicodedata.normalize("NFC", name), name.replace("/", "__")} - {name}:
                names.setdefault(other, set()).update(keys)
    return names | exact[0] | exact[1] | exact[2] | exact[3]


def _below(path: Source, src: Where) -> PurePosixPath:
    if isinstance(path, Part):
        inner = PurePosixPath(path.inner)
        folder = _below(path.container, src).with_suffix("") if path.container != src else PurePosixPath()
        return folder / inner
    if isinstance(path, Place):
        return path.relative_to(src) if isinstance(src, Place) else PurePosixPath(path.name)
    return PurePosixPath(path.relative_to(str(src.absolute())).as_posix())


def _posix_name(name: str) -> str:
    """A name as tables of Windows and of `find` have it: "sub\\b.png", "./b.png"."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./")


def _text(path: Path) -> str:
    try:
        return read_text(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_lines(path: Path, columns: tuple[str, ...]) -> Iterator[_Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):  # not splitlines: JSON text may hold others
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise line_error(path, number, "no JSON") from error
        if not isinstance(row, dict):
            raise line_error(path, number, "no JSON object")
        name, text = (_only_field(path, number, row, names) for names in (NAMES, columns))
        if not isinstance(row[name], str):
            raise line_error(path, number, f"{name} must be text, got {row[name]!r:.80}")
        yield number, row[name], text, row[text]


def _only_field(path: Path, number: int, row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """Return the one of these names that is a field of the row."""
    fields = [name for name in names if name in row]
    if len(fields) != 1:
        raise line_error(path, number, f"needs one of {', '.join(names)}, and has {' and '.join(fields) or 'none'}")
    return fields[0]


def _table_lines(path: Path, names_of_values: tuple[str, ...]) -> Iterator[_Row]:
    separator, table = separator_of(_text(path), {*NAMES, *names_of_values})
    rows = csv.reader(io.StringIO(table, newline=""), delimiter=separator, strict=True)
    columns: list[str] = []
    try:
        for row in rows:
            number, cells = rows.line_num, [cell.strip() for cell in row]
            if not any(cells):
                continue
            if not columns:
                has_header = not {*NAMES}.isdisjoint(cells) and not {*names_of_values}.isdisjoint(cells)
                columns = cells if has_header else ["key", names_of_values[0]]
                if has_header:
                    continue
            if len(cells) != len(columns):
                raise line_error(path, number, f"{len(cells)} columns where there should be {len(columns)}")
            values = dict(zip(columns, cells, strict=True))
            name, text = (_only_field(path, number, values, names) for names in (NAMES, names_of_values))
            yield number, values[name], text, values[text]
    except csv.Error as error:
        raise line_error(path, rows.line_num, f"{error}") from error
