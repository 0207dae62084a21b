"""Rows of a part on their way to its file: in batches, so that a tar may hold any number, and kept when a process dies.

Journal: rows measured by one attempt, appended every few seconds to work/partial/<part>.<n>.arrows. The next attempt
reads them; they go when the part's file is there. Known: rows from before, in Arrow until they are asked for. Output:
the part's file, a batch at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROWS = 2048
"""Rows of a batch: what a task holds as objects, and a row group of the part's file."""

JOURNAL_ROWS, JOURNAL_S = 256, 5.0
"""A journal is appended to after so many rows, or so many seconds: what a death may cost."""

KNOWN_ROWS = 512  # turned into objects at a time


def to_batch(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as Arrow; a field that a row lacks is null."""
    return pa.RecordBatch.from_arrays(
        [pa.array([row.get(field.name) for row in rows], field.type) for field in schema], schema=schema
    )


class Journal:
    """Fresh rows of one attempt at a part.

    Args:
        folder: of the journals.
        name: of the part.
        facts: kept with the rows; strings.
        eager: append every row at once, for a part whose process dies.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema, facts: Mapping[str, str], eager: bool) -> None:
        self.folder, self.name, self.eager = folder, name, eager
        self.schema = schema.with_metadata(dict(facts))
        self.rows: list[Mapping[str, Any]] = []
        self.since = time.monotonic()
        self.file: Any = None
        self.writer: Any = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Another row."""
        self.rows.append(row)
        if self.eager or len(self.rows) >= JOURNAL_ROWS or time.monotonic() - self.since > JOURNAL_S:
            self._append()

    def _append(self) -> None:
        if self.writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for number in itertools.count():
                with suppress(FileExistsError):
                    self.file = open(self.folder / f"{self.name}.{number}.arrows", "xb")  # noqa: SIM115 - until close
                    break
            self.writer = pa.ipc.new_stream(self.file, self.schema)
        self.writer.write_batch(to_batch(self.rows, self.schema))
        self.file.flush()  # survives the death of the process; after a power cut the rows are measured again
        self.rows, self.since = [], time.monotonic()

    def close(self, done: bool) -> None:
        """The end of an attempt; with `done` the part's file has everything."""
        if self.file is not None:
            self.file.close()
        if done:
            for path in self.folder.glob(f"{self.name}.*.arrows"):
                path.unlink(missing_ok=True)


def read_journals(
    folder: Path, name: str, facts: Mapping[str, str], retry: Collection[str]
) -> tuple[list[pa.Table], list[pa.Table]]:
    """Rows of earlier attempts by the same rules, oldest first: all, and those at the part as it is now.

    Args:
        facts: "rules", "run" and "part" of this attempt.
        retry: codes of rows that an attempt of another run leaves to this one.
    """
    found, same_part = [], []
    for path in sorted(folder.glob(f"{name}.*.arrows"), key=lambda path: int(path.suffixes[-2][1:])):
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                told = {key.decode(): value.decode() for key, value in (stream.schema.metadata or {}).items()}
                table = pa.Table.from_batches(list(_whole(stream)), stream.schema.remove_metadata())
        except (OSError, pa.ArrowException):  # nothing of it got to the disk
            continue
        if told.get("rules") != facts["rules"]:
            continue
        found.append(table if facts["run"] and told.get("run") == facts["run"] else without(table, retry))
        if told.get("part") == facts["part"]:
            same_part.append(found[-1])
    return found, same_part


def _whole(stream: Any) -> Iterator[pa.RecordBatch]:
    """Batches up to the place where a kill cut the file."""
    while True:
        try:
            batch = stream.read_next_batch()
            batch.validate(full=True)
        except (StopIteration, OSError, pa.ArrowException):
            return
        yield batch


def without(table: pa.Table, codes: Collection[str]) -> pa.Table:
    """The rows that have none of these codes."""
    return table.filter(pc.invert(pc.is_in(table.column("code"), value_set=pa.array(sorted(codes), pa.string()))))


class Known:
    """Rows by id, of several tables of which later ones count; they become objects a few at a time."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.table = pa.concat_tables(tables) if tables else None
        ids = self.table.column("id").to_pylist() if self.table is not None else []
        self.places = {name: place for place, name in enumerate(ids)}
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> dict[str, Any]:
        block, place = divmod(self.places[name], KNOWN_ROWS)
        if self._block[0] != block:  # rows are asked for in about their order
            assert self.table is not None
            self._block = (block, self.table.slice(block * KNOWN_ROWS, KNOWN_ROWS).to_pylist())
        return self._block[1][place]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[name] for name in self.places)


class Output:
    """A part's file, written a batch at a time under another name until `finish`."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self.rows: list[Mapping[str, Any]] = []
        self.count, self.codes, self.content = 0, Counter[str](), hashlib.sha256()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.writer = pq.ParquetWriter(self.temporary, schema, compression="zstd")

    def add(self, row: Mapping[str, Any]) -> None:
        """The next row."""
        self.rows.append(row)
        if row["code"]:
            self.codes[row["code"]] += 1
        if len(self.rows) == ROWS:
            self._put()

    def _put(self) -> None:
        batch = to_batch(self.rows, self.schema)
        self.content.update(batch.serialize())
        self.writer.write_batch(batch)
        self.count, self.rows = self.count + len(self.rows), []

    def finish(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Give the file its name; returns the summary that it holds."""
        if self.rows or not self.count:
            self._put()
        codes = dict(sorted(self.codes.items()))
        summary = {**facts, "rows": self.count, "codes": codes, "content": self.content.hexdigest()}
        self.writer.add_key_value_metadata({"restoray": json.dumps(summary)})
        self.writer.close()
        os.replace(self.temporary, self.path)
        return summary

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError, pa.ArrowException):  # a full disk has been told of
            self.writer.close()
        self.temporary.unlink(missing_ok=True)
