"""Files of rows that grow during a job: appended to on this machine, written piece by piece in a store.

    <folder>/records.jsonl                          all rows, written at the end of a job
    <folder>/.journal/records.jsonl-TOKEN-NNNNNN    rows of a job in a store; TOKEN is the number of its lease

An object cannot be appended to. So a job in a store writes a piece with its new rows every FLUSH_S seconds. A job that
is killed leaves its pieces, and the next one reads them after the file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from pipelines.core.places.files import put, read, remove
from pipelines.core.places.leases import Lease
from pipelines.core.places.place import Place, Where
from pipelines.core.rows import json_text, own_lines, parse_lines, read_lines, write_lines

JOURNAL = ".journal"
FLUSH_S = 5.0
"""Longest time that rows wait for their piece; a killed job loses them. Ours."""


class Rows(Protocol):
    """A growing file of rows."""

    def append(self, row: Any) -> None:
        """Add a row."""


class Journal:
    """One file of rows of a job.

    Args:
        path: the file.
        lease: the job's lease; None on a disk of this machine.
    """

    def __init__(self, path: Where, lease: Lease | None) -> None:
        self.path, self.lease = path, lease

    def read(self, fields: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """All rows, also those of a killed job; UsageError if the file's rows lack one of `fields`."""
        rows = own_lines(self.path, fields) if fields else read_lines(self.path)
        for name in self._pieces():
            assert isinstance(self.path, Place)
            rows += parse_lines(read(self.path.parent / JOURNAL / name))
        return rows

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Replace the file by these rows, and drop the pieces."""
        if self.lease is not None:
            self.lease.check()
        pieces = self._pieces()
        write_lines(self.path, rows)
        for name in pieces:
            assert isinstance(self.path, Place)
            remove(self.path.parent / JOURNAL / name)

    @contextmanager
    def open(self) -> Iterator[Rows]:
        """Append rows inside a `with` block; at its end, also after an error, all of them are written."""
        if not isinstance(self.path, Place):
            with self.path.open("a", encoding="utf-8") as file:
                yield _Appended(file)
            return
        assert self.lease is not None
        pieces = _Pieces(self.path, self.lease)
        try:
            yield pieces
        finally:
            pieces.flush()

    def _pieces(self) -> list[str]:
        if not isinstance(self.path, Place):
            return []
        names = (name for name, _ in (self.path.parent / JOURNAL).files())
        return sorted(name for name in names if name.startswith(f"{self.path.name}-"))


class _Appended:
    """Rows at the end of a local file, each of them at once."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def append(self, row: Any) -> None:
        self.file.write(json_text(row) + "\n")
        self.file.flush()


class _Pieces:
    """Rows as objects in a store."""

    def __init__(self, path: Place, lease: Lease) -> None:
        self.path, self.lease = path, lease
        self.rows: list[str] = []
        self.count, self.flushed = 0, time.monotonic()

    def append(self, row: Any) -> None:
        self.rows.append(json_text(row) + "\n")
        if time.monotonic() - self.flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            self.lease.check()
            name = f"{self.path.name}-{self.lease.fence.token:08d}-{self.count:06d}"
            put(self.path.parent / JOURNAL / name, "".join(self.rows).encode())
            self.rows, self.count = [], self.count + 1
        self.flushed = time.monotonic()
