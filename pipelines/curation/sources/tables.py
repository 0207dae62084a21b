"""Tables beside the pictures of a folder: CREDITS.csv, and metadata.jsonl, .csv or .parquet of an "imagefolder".

CREDITS.csv lies in the folder of a source and has the columns file, licence, credit. A metadata table has the form that
the Hugging Face datasets library reads. It may lie in any folder and describes the pictures in and below it. It names
them by the column "file_name" (or another that ends in "file_name"), relative to its own folder.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.corpora import SourceSpec
from components.types import SampleError
from pipelines.core.errors import UsageError, first_line, near_miss
from pipelines.core.places.place import Place, Where
from pipelines.core.tables import json_lines, read_table, read_text
from pipelines.curation.sources.tars import printable_name
from pipelines.curation.sources.texts import (
    CAPTION_FIELDS,
    LICENCE_FIELDS,
    check_text_columns,
    first_caption,
    plain,
    tidy_note,
)

CREDITS = "CREDITS.csv"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of metadata tables; the first one in a folder wins."""

TABLES = frozenset(name.lower() for name in (CREDITS, *METADATA))
TEXT_SUFFIXES = frozenset({".caption", ".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt"})
TEXTS_FOR_PEOPLE = ("readme", "licen", "copying", "notice", "changelog", "citation")
"""How names of files begin that nobody expects to be read."""

FILE_NAME = "file_name"
MAX_NAMES = 5  # pictures that a sentence lists


@dataclass(frozen=True, kw_only=True)
class Note:
    """What a table says of a picture; "" for nothing. A `problem` is (code, detail)."""

    caption: str = ""
    licence: str = ""
    credit: str = ""
    problem: tuple[str, str] | None = None


@dataclass
class _Table:
    """A table: the folder that its names are relative to, its notes by name, and the names that a picture has used."""

    folder: Where
    label: str
    notes: Mapping[str, Note]
    used: set[str] = field(default_factory=set)


class UnreadTexts:
    """Texts and tables in a source that no picture uses, so that a sentence can name them."""

    def __init__(self) -> None:
        self.first: list[str] = []
        self.count = 0

    def add(self, name: str) -> None:
        """Note a file, by its name relative to the source, if it is a text or a table."""
        last = name.rpartition("/")[2].lower()
        if os.path.splitext(last)[1] not in TEXT_SUFFIXES or last.startswith(TEXTS_FOR_PEOPLE):
            return
        self.count += 1
        if len(self.first) < MAX_NAMES:
            self.first.append(name)

    def sentences(self) -> list[str]:
        """One sentence; [] if there is no such file."""
        return [f"Texts that were not read: {_some(self.first, self.count)}."] if self.first else []


class FolderTables:
    """The tables of a directory tree, opened while it is walked from the top.

    Args:
        root: folder of the source, here or in a store; other paths are of the same kind.
        source: its caption_column names the column of captions; "" for the usual names.
    """

    def __init__(self, root: Where, source: SourceSpec) -> None:
        self.root, self.source = root, source
        self.metadata: list[_Table] = []  # of the present folder and those above it
        self.sentences: list[str] = []
        self.without_credit: list[str] = []
        self.credits: _Table | None = None
        self.unread = UnreadTexts()

    def leave(self, path: Where) -> None:
        """Note a file that is neither a picture nor the caption of one."""
        if path.name.lower() not in TABLES:  # of these, another sentence says whether they were read
            self.unread.add(relative_name(path, self.root))

    def enter(self, folder: Where, files: list[str]) -> None:
        """Open the metadata of a folder and forget that of folders that the walk has left.

        Raises:
            UsageError: the table cannot be read.
        """
        while self.metadata and not _is_below(folder, self.metadata[-1].folder):
            self._close(self.metadata.pop())
        name = _named(CREDITS, files)
        if name and folder == self.root:
            self.credits = _Table(folder, name, read_credits(folder / name))
        elif name:
            label = printable_name(relative_name(folder / name, self.root))
            self.sentences.append(f"{label} was not read: it belongs into the folder of the source.")
        names = list(filter(None, (_named(name, files) for name in METADATA)))
        if not names:
            return
        name = names[0]
        if names[1:]:
            label = printable_name(relative_name(folder / names[1], self.root))
            self.sentences.append(f"{label} was not read: {name} goes before it.")
        notes = read_metadata(folder / name, self.source)
        label = printable_name(relative_name(folder / name, self.root))
        if notes is None:
            self.sentences.append(f'{label} has no column "{FILE_NAME}", so it was not read.')
        else:
            self.metadata.append(_Table(folder, label, notes))

    def note_of(self, path: Where) -> Note:
        """What the tables say of a picture."""
        licence = credit = caption = ""
        problem = None
        for table in reversed(self.metadata):  # the nearest first
            note = _look_up(table, path)
            if note is not None:
                caption, licence, credit, problem = note.caption, note.licence, note.credit, note.problem
                break
        if self.credits is not None:
            note = _look_up(self.credits, path)
            if note is None:
                self.without_credit.append(relative_name(path, self.root))
            else:
                licence, credit = note.licence, note.credit
        return Note(
            caption=caption,
            licence=licence or self.source.licence,
            credit=credit or self.source.credit,
            problem=problem,
        )

    def close(self) -> list[str]:
        """Sentences on rows without a picture, pictures without a row and texts of no picture, after the walk."""
        while self.metadata:
            self._close(self.metadata.pop())
        if self.credits is not None:
            self._close(self.credits)
            if self.without_credit:
                self.sentences.append(f"{CREDITS} has no row for {_some(self.without_credit)}.")
        return [*self.sentences, *self.unread.sentences()]

    def _close(self, table: _Table) -> None:
        unused = [name for name in table.notes if name not in table.used]
        if unused:
            self.sentences.append(f"{table.label} names pictures that are not there: {_some(unused)}.")


def relative_name(path: Where, root: Where) -> str:
    """The name of a file below a folder; both are of this machine, or both of a store."""
    if isinstance(path, Place):
        return path.path.removeprefix(f"{root.path}/") if isinstance(root, Place) else path.path
    assert isinstance(root, Path)
    return path.relative_to(root).as_posix()


def _is_below(folder: Where, other: Where) -> bool:
    if isinstance(folder, Place):
        return isinstance(other, Place) and f"{folder.path}/".startswith(f"{other.path}/")
    return isinstance(other, Path) and folder.is_relative_to(other)


def _named(name: str, files: Collection[str]) -> str:
    """The file of a name, in any case if there is none as written; "" for none."""
    return name if name in files else min((file for file in files if file.lower() == name.lower()), default="")


def _look_up(table: _Table, path: Where) -> Note | None:
    name = _normal(relative_name(path, table.folder))
    note = table.notes.get(name)
    if note is not None:
        table.used.add(name)
    return note


def _normal(name: str) -> str:
    """A relative name in one spelling: "/" between folders, no "./", composed letters."""
    return unicodedata.normalize("NFC", os.path.normpath(name.strip().replace("\\", "/")))


def _some(names: list[str], count: int = 0) -> str:
    """The first names, and how many more there are; `count` if it is more than `names` has."""
    shown = ", ".join(printable_name(name) for name in sorted(names)[:MAX_NAMES])
    more = max(count, len(names)) - MAX_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def read_credits(path: Where) -> dict[str, Note]:
    """Notes by file name from a CREDITS.csv.

    Raises:
        UsageError: it cannot be read, lacks a column, or has two different rows of one file.
    """
    columns = {"file": ("file",), "licence": LICENCE_FIELDS, "credit": ("credit",)}
    notes: dict[str, Note] = {}
    for line, row in read_table(_bytes_of(path), str(path), columns):
        if not row["file"].strip():
            raise UsageError(f"{path}, line {line}: the row names no file.")
        note = Note(licence=tidy_note(row["licence"]), credit=tidy_note(row["credit"]))
        _add(notes, row["file"], note, f"{path}, line {line}")
    return notes


def read_metadata(path: Where, source: SourceSpec) -> dict[str, Note] | None:
    """Notes by file name, relative to its folder, from a metadata table; None if it names no files.

    Raises:
        UsageError: it cannot be read, lacks the column that the source names, or has two different rows of one file.
    """
    notes: dict[str, Note] = {}
    has_column, missing = not source.caption_column, ""
    rows = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix.lower()](path, source)
    for line, row in rows:
        names = [name for name in row if _names_files(name)]
        if not names and not notes:  # another kind of table
            return None
        if not names:
            raise UsageError(f'{path}, line {line}: no "{FILE_NAME}".{near_miss(FILE_NAME, map(str, row))}')
        if source.caption_column in row:
            has_column = True
        elif not has_column and not missing:
            near = near_miss(source.caption_column, map(str, row))
            missing = f'{path}, line {line}: no "{source.caption_column}".{near}'
        note = _metadata_note(row, source, f"{path.name}, line {line}")
        for name in names:
            files = row[name] if isinstance(row[name], list) else [row[name]]
            for file in files:
                if file is None or file == "":
                    continue
                if not isinstance(file, str):
                    raise UsageError(f'{path}, line {line}: "{name}" must be text, got {file!r:.80}.')
                _add(notes, file, note, f"{path}, line {line}")
    if missing and not has_column:  # JSON leaves out what a picture has not
        raise UsageError(missing)
    return notes


def _names_files(column: str) -> bool:
    """Whether a column of a metadata table holds names of files, or lists of them."""
    return column in (FILE_NAME, f"{FILE_NAME}s") or column.endswith((f"_{FILE_NAME}", f"_{FILE_NAME}s"))


def _metadata_note(row: Mapping[str, Any], source: SourceSpec, where: str) -> Note:
    fields = (source.caption_column,) if source.caption_column else CAPTION_FIELDS
    licence = next(filter(None, (_scalar(row.get(name)) for name in LICENCE_FIELDS)), "")
    credit = _scalar(row.get("credit"))
    try:
        caption, problem = first_caption(row, fields, where), None
    except SampleError as error:
        caption, problem = "", (error.code, error.detail)
    return Note(caption=caption, licence=licence, credit=credit, problem=problem)


def _scalar(value: Any) -> str:
    return tidy_note(plain(value, "")) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def _add(notes: dict[str, Note], file: str, note: Note, where: str) -> None:
    name = _normal(file)
    if notes.get(name, note) != note:
        raise UsageError(f"{where}: {file} has another row with other values.")
    notes[name] = note


def _bytes_of(path: Where) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}.") from error


def _json_rows(path: Where, source: SourceSpec) -> Iterator[tuple[int, Mapping[str, Any]]]:
    return json_lines(read_text(_bytes_of(path), str(path)).split("\n"), str(path))


def _csv_rows(path: Where, source: SourceSpec) -> Iterator[tuple[int, Mapping[str, Any]]]:
    yield from read_table(_bytes_of(path), str(path), {})


def _parquet_rows(path: Where, source: SourceSpec) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        table = pq.ParquetFile(path if isinstance(path, Path) else pa.BufferReader(path.read_bytes()))
        if source.caption_column in table.schema_arrow.names:
            check_text_columns(path.name, table.schema_arrow, source.caption_column)
        fields = (source.caption_column, *CAPTION_FIELDS, *LICENCE_FIELDS, "credit")
        columns = [name for name in table.schema_arrow.names if _names_files(name) or name in fields]
        line = 0
        for batch in table.iter_batches(batch_size=4096, columns=columns):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} is not a readable parquet file: {first_line(error)}.") from error
