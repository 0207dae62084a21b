"""Write the measured rows of a part in batches, so that a tar may have any size and a death costs seconds of work.

Journal: rows of one attempt, appended every few seconds to work/partial/<part>.<n>.arrows. The next attempt reads them;
they are removed when the part's file is complete. EarlierRows: rows of earlier attempts and runs, in Arrow until they
are needed. Output: the part's file, written a batch at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.writing import whole_file

ROWS = 2048
"""Rows of a batch: those that a task holds as objects, and a row group of the part's file."""

JOURNAL_ROWS, JOURNAL_S = 256, 5.0
"""A journal is appended to after this many rows or seconds: a death costs no more work."""

OBJECT_ROWS = 512  # earlier rows that become objects at a time


def to_batch(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as Arrow; a missing field is null."""
    return pa.RecordBatch.from_arrays(
        [pa.array([row.get(field.name) for row in rows], field.type) for field in schema], schema=schema
    )


class Journal:
    """Rows that one attempt at a part has measured.

    Args:
        folder: folder of the journals.
        name: name of the part.
        facts: strings that are stored with the rows.
        eager: append every row at once, for a part over which a process died.
    """

    def __init__(self, folder: Path, name: str, schema: pa.Schema, facts: Mapping[str, str], eager: bool) -> None:
        self.folder, self.name, self.eager = folder, name, eager
        self.schema = schema.with_metadata(dict(facts))
        self.rows: list[Mapping[str, Any]] = []
        self.since = time.monotonic()
        self.file: Any = None
        self.writer: Any = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
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
        self.file.flush()  # the rows survive the death of the process; after a power cut they are measured again
        self.rows, self.since = [], time.monotonic()

    def close(self, complete: bool) -> None:
        """End an attempt; if the part's file is complete, the journals are removed."""
        if self.file is not None:
            self.file.close()
        if complete:
            for path in self.folder.glob(f"{self.name}.*.arrows"):
                path.unlink(missing_ok=True)


def read_journals(
    folder: Path, name: str, facts: Mapping[str, str], retry: Collection[str]
) -> tuple[list[pa.Table], list[pa.Table]]:
    """Rows of earlier attempts with the same rules, oldest first: all of them, and those at the part as it is now.

    Args:
        facts: "rules", "run" and "part" of this attempt.
        retry: codes of rows that are left out, unless an attempt of this run measured them.
    """
    tables, same_part = [], []
    for path in sorted(folder.glob(f"{name}.*.arrows"), key=lambda path: int(path.suffixes[-2][1:])):
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                own = {key.decode(): value.decode() for key, value in (stream.schema.metadata or {}).items()}
                table = pa.Table.from_batches(list(_intact(stream)), stream.schema.remove_metadata())
        except (OSError, pa.ArrowException):  # no row of it reached the disk
            continue
        if own.get("rules") != facts["rules"]:
            continue
        tables.append(table if facts["run"] and own.get("run") == facts["run"] else without(table, retry))
        if own.get("part") == facts["part"]:
            same_part.append(tables[-1])
    return tables, same_part


def _intact(stream: Any) -> Iterator[pa.RecordBatch]:
    """Batches up to the place where a kill cut the file."""
    while True:
        try:
            batch = stream.read_next_batch()
            batch.validate(full=True)
        except (StopIteration, OSError, pa.ArrowException):
            return
        yield batch


def without(table: pa.Table, codes: Collection[str]) -> pa.Table:
    """The rows with none of these codes."""
    return table.filter(pc.invert(pc.is_in(table.column("code"), value_set=pa.array(sorted(codes), pa.string()))))


class EarlierRows:
    """Rows of several tables by id; of equal ids the last one counts. A few rows at a time become objects."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        self.table = pa.concat_tables(tables) if tables else None
        ids = self.table.column("id").to_pylist() if self.table is not None else []
        self.places = {name: place for place, name in enumerate(ids)}
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> dict[str, Any]:
        block, place = divmod(self.places[name], OBJECT_ROWS)
        if self._block[0] != block:  # the callers need rows in about their order
            assert self.table is not None
            self._block = (block, self.table.slice(block * OBJECT_ROWS, OBJECT_ROWS).to_pylist())
        return self._block[1][place]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[name] for name in self.places)


class Output:
    """Rows of a part's file, see write_part.

    Args:
        path: a temporary file.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows: list[Mapping[str, Any]] = []
        self.count, self.codes, self.content = 0, Counter[str](), hashlib.sha256()
        self.writer = pq.ParquetWriter(path, schema, compression="zstd")

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
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
        """Write the last rows and the summary; returns the summary: facts, rows, codes, content."""
        if self.rows or not self.count:
            self._put()
        codes = dict(sorted(self.codes.items()))
        summary = {**facts, "rows": self.count, "codes": codes, "content": self.content.hexdigest()}
        self.writer.add_key_value_metadata({"restoray": json.dumps(summary)})
        self.writer.close()
        return summary


@contextmanager
def write_part(path: Path, schema: pa.Schema) -> Iterator[Output]:
    """Write a part's file, a batch at a time. The block ends with `finish`; then the file gets its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        output = Output(draft.temporary, schema)
        try:
            yield output
        finally:
            with suppress(OSError, pa.ArrowException):  # a full disk has raised already
                output.writer.close()
