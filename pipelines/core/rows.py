"""Files of rows, with one JSON object per line. A running job appends rows; at its end it replaces the whole file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.naming import printable
from pipelines.core.errors import UsageError
from pipelines.core.places.files import put
from pipelines.core.places.place import Where


def read_lines(path: Where) -> list[dict[str, Any]]:
    """Read all rows of a file. A last line that a kill cut off is dropped; a missing file has no rows."""
    try:
        return parse_lines(path.read_bytes())
    except FileNotFoundError:
        return []


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """Parse the rows in a file's bytes; lines that are not a JSON object are dropped."""
    rows = []
    for line in data.split(b"\n"):  # not splitlines: JSON text may hold other line separators
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # a kill or a crash of the machine damaged the line
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def iter_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of any size one at a time; a missing file has no rows."""
    if not path.exists():
        return
    with open(path, "rb") as source:
        for line in source:
            yield from parse_lines(line)


def own_lines(path: Where, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Read the rows of a list that an earlier job of the same command wrote.

    Raises:
        UsageError: a row lacks one of `fields`: it is of another command or program, whose file must stay as it is.
    """
    rows = read_lines(path)
    if any(field not in row for row in rows for field in fields):
        raise UsageError(
            f"{path} is not of an earlier job of this command and would be overwritten; choose another output folder"
        )
    return rows


def end_torn_line(path: Path) -> None:
    """Add a newline to a last line that a kill cut off, so that the next row starts a new line."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def json_text(document: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Return JSON that any reader accepts: names of files that are not UTF-8 stand escaped, see `printable`.

    Args:
        indent, default: of json.dumps.
    """
    text = json.dumps(document, indent=indent, ensure_ascii=False, default=default)
    shown = printable(text)
    return text if shown == text else json.dumps(_printable(json.loads(text)), indent=indent, ensure_ascii=False)


def _printable(document: Any) -> Any:
    if isinstance(document, str):
        return printable(document)
    if isinstance(document, list):
        return [_printable(entry) for entry in document]
    if isinstance(document, dict):
        return {printable(name): _printable(entry) for name, entry in document.items()}
    return document


def write_lines(path: Where, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file by these rows, atomically."""
    put(path, "".join(f"{json_text(row)}\n" for row in rows).encode())
