"""Small tables that people write: CSV in any usual encoding, with commas, semicolons or tabs, as Excel saves them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from components.text_files import decode_text
from components.types import SampleError
from pipelines.core.errors import UsageError, near_miss

SEPARATORS = (",", ";", "\t", "|")
MAX_CELL_CHARS = 1 << 24  # ours: captions may be longer than the csv module's 128 KiB


def read_text(data: bytes, label: str) -> str:
    """The text of a file that a person wrote; UsageError with its name if it cannot be decoded."""
    try:
        return decode_text(data).lstrip("\ufeff").rstrip("\x1a")  # a second mark; the end of a file in DOS
    except SampleError as error:
        raise UsageError(f"{label}: {error.detail}.") from error


def json_lines(lines: Iterable[str], label: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number from 1, object) of each line that is not blank; UsageError for a line that is no object."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"{label}, line {number}: not a JSON object.")
        yield number, row


def separator_of(text: str, names: Collection[str]) -> tuple[str, str]:
    """(the separator of a CSV text, the text without Excel's line "sep=;").

    Args:
        names: names of columns, in lower case; the separator that gives most of them in the header wins.
    """
    first, _, rest = text.partition("\n")
    if first.strip().strip('"').lower().startswith("sep=") and len(first.strip().strip('"')) == 5:
        return first.strip().strip('"')[4], f"\n{rest}"  # the line stays, so that errors name the right ones

    def columns(separator: str) -> tuple[int, bool]:
        header = next(csv.reader(io.StringIO(text.lstrip(), newline=""), delimiter=separator), [])
        return sum(cell.strip().lower() in names for cell in header), len(header) > 1

    return max(SEPARATORS, key=columns), text  # the first one where they are equal


def read_table(data: bytes, label: str, columns: dict[str, tuple[str, ...]]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells by the names in the header) of a CSV table with a header.

    Args:
        data: the file's bytes.
        label: name of the table, for errors.
        columns: for each column that the table needs, its spellings in lower case. Its cells have that name.

    Raises:
        UsageError: the table cannot be read, lacks a column, or a row has not as many cells as the header.
    """
    spellings = {spelling: name for name, others in columns.items() for spelling in others}
    separator, text = separator_of(read_text(data, label), spellings)
    csv.field_size_limit(MAX_CELL_CHARS)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    header: list[str] = []
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if not header:
                header = _header(row, label, columns, spellings)
                continue
            extra = row[len(header) :]
            if len(row) < len(header) or any(cell.strip() for cell in extra):
                raise UsageError(
                    f"{label}, line {rows.line_num}: {len(row)} cells where the header has {len(header)}; a cell that "
                    f'holds "{separator if separator.isprintable() else "a tab"}" needs quotes.'
                )
            yield rows.line_num, dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise UsageError(f"{label}, line {rows.line_num}: {error}.") from error
    if columns and not header:
        raise UsageError(f"{label} is empty: it needs columns {', '.join(columns)}.")


def _header(row: list[str], label: str, columns: dict[str, tuple[str, ...]], spellings: dict[str, str]) -> list[str]:
    cells = [cell.strip() for cell in row]
    names = [spellings.get(cell.lower(), cell) for cell in cells]
    for column in columns:
        if column not in names:
            near = next((near for other in columns[column] if (near := near_miss(other, cells))), "")
            raise UsageError(f'{label} has no column "{column}".{near} It needs columns {", ".join(columns)}.')
        if names.count(column) > 1:
            raise UsageError(f'{label} has the column "{column}" twice.')
    return names
