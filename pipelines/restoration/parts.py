"""Pictures inside larger files: members of tars, and cells of a parquet table's column.

The driver lists them, a worker reads one when its turn comes: a member is one ranged read, a cell one row group of one
column, which the worker keeps for the next cells. Both work on this machine's files and in stores.
"""

from __future__ import annotations

import functools
import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.images import Limits
from components.naming import printable
from components.types import SampleError
from pipelines.core.errors import UsageError, unknown
from pipelines.core.pictures import SIDECARS, is_system_name, read_picture
from pipelines.core.places.files import read, stat
from pipelines.core.places.place import Where

TARS, TABLES = (".tar",), (".parquet", ".pq")
PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
KEY_COLUMNS = ("key", "__key__", "file_name")
"""Columns of a table that name its pictures, the first one that exists; else the path in the cell, else the row."""

BYTES_FIELD, PATH_FIELD = "bytes", "path"
"""Fields of a column of structures, as Hugging Face's `datasets` writes pictures."""

BUFFER_BYTES = 1 << 16  # of a read of tar headers


@dataclass(frozen=True, kw_only=True)
class Part:
    """One picture inside a file.

    Attributes:
        container: the tar or the table.
        inner: its path inside, or its row.
        offset, size: of a member's bytes in the tar.
        column, group, row: of a cell: the column, the row group and the row in it.
    """

    container: Where
    inner: str
    offset: int = 0
    size: int = 0
    column: str = ""
    group: int = 0
    row: int = 0

    def __str__(self) -> str:
        return f"{self.container}/{self.inner}"

    @property
    def name(self) -> str:
        return PurePosixPath(self.inner).name

    def read_bytes(self) -> bytes:
        """The picture's bytes.

        Raises:
            OSError: as of a file or a place.
        """
        if not self.column:
            return read(self.container, self.offset, self.size)
        value = read_group(self.container, self.column, self.group)[self.row].as_py()
        value = value.get(BYTES_FIELD) if isinstance(value, dict) else value
        return value if isinstance(value, bytes) else b""


Source = Where | Part
"""Where a picture is."""


def read_source(source: Source, key: str, limits: Limits) -> bytes:
    """Bytes of a picture, like core.pictures.read_picture."""
    if not isinstance(source, Part):
        return read_picture(source, key, limits)
    limits.check_bytes(source.size)
    try:
        data = source.read_bytes()
    except (OSError, ValueError) as error:  # pyarrow's errors of broken tables are ValueErrors
        raise SampleError(
            "unreadable", f"cannot be read from {printable(str(source.container))}: {error}", key
        ) from error
    if len(data) < source.size:
        raise SampleError("truncated", f"{printable(str(source.container))} ends inside the picture", key)
    limits.check_bytes(len(data))
    return data


class _Stream(io.RawIOBase):
    """A file or object as a seekable stream of ranged reads."""

    def __init__(self, where: Where) -> None:
        self.where, self.size, self.at = where, stat(where).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = read(self.where, self.at, min(len(buffer), max(0, self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def open_stream(where: Where) -> io.BufferedReader:
    """A file or object to read from anywhere."""
    return io.BufferedReader(_Stream(where), BUFFER_BYTES)


# --- tars -------------------------------------------------------------------------------------------------------------


def list_tar(tar: Where) -> tuple[list[Part], int]:
    """Pictures of a tar in its order, and the number of its other files; hidden files do not count as pictures.

    Only plain files are listed: no links, devices or sparse files. A tar that is cut short gives the members before.

    Raises:
        UsageError: it cannot be opened, or is no tar.
    """
    parts, others = [], 0
    try:
        with open_stream(tar) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in _members(archive):
                path = PurePosixPath(member.name)
                if not member.isreg() or member.issparse():
                    others += not member.isdir()
                elif path.suffix.lower() in SIDECARS or any(map(is_system_name, {*path.parts} - {".", ".."})):
                    others += 1
                else:
                    parts.append(Part(container=tar, inner=member.name, offset=member.offset_data, size=member.size))
    except tarfile.TarError as error:
        raise UsageError(f"{printable(str(tar))} is no tar: {error}") from error
    except OSError as error:
        raise UsageError(f"{printable(str(tar))} cannot be read: {error.strerror or error}") from error
    return parts, others


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members up to the first broken header."""
    try:
        while (member := archive.next()) is not None:
            yield member
            archive.members.clear()  # type: ignore[attr-defined]  # else a million headers stay in memory
    except tarfile.ReadError:
        return


# --- tables -----------------------------------------------------------------------------------------------------------


def list_table(table: Where, column: str) -> list[Part]:
    """Cells of a table's column, in order; those that are null too, which are then refused as empty.

    Raises:
        UsageError: it cannot be read, or has no such column of bytes.
    """

    label = printable(str(table))
    try:
        with open_stream(table) as stream, pq.ParquetFile(stream) as file:
            schema = file.schema_arrow
            if not column:
                raise UsageError(
                    f"{label}: name the column of the pictures: --column NAME. It has {', '.join(schema.names)}."
                )
            if column not in schema.names:
                raise unknown(f"column of {label}", column, schema.names)
            kind = schema.field(column).type
            nested = pa.types.is_struct(kind)
            fields = [field.name for field in kind] if nested else []
            content = kind.field(BYTES_FIELD).type if BYTES_FIELD in fields else kind
            if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
                raise UsageError(f"{label}: the column {column} holds {kind} and no bytes of pictures.")
            own = next((name for name in KEY_COLUMNS if name in schema.names), "")
            paths = own or (f"{column}.{PATH_FIELD}" if PATH_FIELD in fields else "")
            parts, number = [], 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                values = _names(file, group, paths) if paths else [None] * rows
                for row, value in enumerate(values):
                    inner = str(value) if value not in (None, "") else f"{number:09d}"
                    parts.append(Part(container=table, inner=inner, column=column, group=group, row=row))
                    number += 1
            return parts
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{label} cannot be read as parquet: {error}") from error


def _names(file: Any, group: int, column: str) -> list[Any]:
    values = file.read_row_group(group, columns=[column]).column(0).to_pylist()
    return [value.get(PATH_FIELD) if isinstance(value, dict) else value for value in values]


@functools.lru_cache(maxsize=1)
def read_group(table: Where, column: str, group: int) -> Any:
    """A column's values in one row group, a pyarrow ChunkedArray; the last one stays in memory."""

    with open_stream(table) as stream, pq.ParquetFile(stream) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def distinct(names: Iterable[str]) -> list[str]:
    """Names, each once: a repeated one gets its number, "a~2.jpg"."""
    counts: Counter[str] = Counter()
    result = []
    for name in names:
        counts[name] += 1
        path = PurePosixPath(name)
        result.append(name if counts[name] == 1 else f"{name.removesuffix(path.suffix)}~{counts[name]}{path.suffix}")
    return result
