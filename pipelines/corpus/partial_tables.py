"""A large table of samples in a store, of which a node fetches only the parts that it reads.

    <split>.arrow           a sparse file of the table's size: its head, its footer, and the record batches so far
    .<split>.arrow.parts    a byte for each record batch: 1 when its bytes are in the file; all processes map it

The table of 20 million samples has gigabytes, and a batch of a training's rows needs some kilobytes of it. Every
process maps the sparse file as if it were whole. What is checked: the footer's form, and that a batch has as many rows
as the index says. What is not: the sha256 of the whole table, which needs all of its bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pipelines.core.errors import Failure
from pipelines.core.places.place import Place
from pipelines.corpus.spans import merged

LARGE_BYTES = 64 << 20
"""Tables above this size are fetched in parts; ours."""

TAIL_BYTES = 1 << 16
HEAD_BYTES = 1 << 16  # Arrow's first bytes and the schema
REQUESTS = 16  # at the same time; ours
MAGIC = b"ARROW1"


def is_large(size: int) -> bool:
    """Whether a table of so many bytes is fetched in parts."""
    return size > LARGE_BYTES


class PartialTable:
    """The parts of a table.

    Args:
        place: the table.
        path: the sparse file.
    """

    def __init__(self, place: Place, path: Path) -> None:
        self.place, self.path = place, path
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(size - 10)
            length = int.from_bytes(file.read(4), "little")
            file.seek(size - 10 - length)
            self.blocks = read_blocks(file.read(length))
        self.parts = np.memmap(parts_of(path), np.uint8, "r+")

    @classmethod
    def make(cls, place: Place, path: Path, size: int) -> PartialTable:
        """Fetch head and footer of a table of `size` bytes; the caller excludes other processes."""
        if path.is_file():
            return cls(place, path)
        draft = path.with_name(f".{path.name}.draft")
        tail = place.read_bytes(size - min(size, TAIL_BYTES))
        if len(tail) < 10 or tail[-6:] != MAGIC:
            raise Failure(f"{place} is no table of samples.")
        length = int.from_bytes(tail[-10:-6], "little") + 10
        if length > len(tail):
            tail = place.read_bytes(size - length)
        head = place.read_bytes(0, min(size, HEAD_BYTES))
        with draft.open("wb") as file:
            file.truncate(size)
            file.write(head)
            file.seek(size - len(tail))
            file.write(tail)
        parts_of(path).write_bytes(bytes(len(read_blocks(tail[len(tail) - length : -10]))))
        draft.replace(path)
        return cls(place, path)

    @classmethod
    def opened(cls, place: Place, path: Path) -> PartialTable | None:
        """The parts of a table on the disk; None if the table is whole."""
        return cls(place, path) if parts_of(path).is_file() else None

    def fetch(self, batches: Iterable[int]) -> None:
        """Fetch the bytes of record batches that are missing, neighbours in one request.

        Raises:
            OSError, StoreUnavailable: as of a place.
        """
        missing = [number for number in dict.fromkeys(batches) if not self.parts[number]]
        if not missing:
            return
        spans = merged([(int(offset), int(length)) for offset, length in self.blocks[missing].tolist()])
        with self.path.open("r+b") as file:

            def fetch(span: tuple[int, int]) -> None:
                data = self.place.read_bytes(*span)
                if len(data) != span[1]:
                    raise Failure(f"{self.place} ends before its footer says.")
                os.pwrite(file.fileno(), data, span[0])

            if len(spans) == 1:
                fetch(spans[0])
            else:
                with ThreadPoolExecutor(min(REQUESTS, len(spans)), "table") as pool:
                    list(pool.map(fetch, spans))
        self.parts[missing] = 1


def parts_of(path: Path) -> Path:
    """The file that says which parts of a sparse table are there."""
    return path.with_name(f".{path.name}.parts")


def read_blocks(footer: bytes) -> np.ndarray:
    """Offset and length of each record batch: int64 [batches, 2], from the footer of an Arrow file.

    The footer is a FlatBuffer (Apache Arrow's File.fbs): field 3 is a vector of blocks {offset int64, metadata length
    int32, padding, body length int64}.

    Raises:
        Failure: the footer is damaged.
    """
    try:
        table = struct.unpack_from("<I", footer, 0)[0]
        fields = table - struct.unpack_from("<i", footer, table)[0]
        place = struct.unpack_from("<H", footer, fields + 4 + 2 * 3)[0]
        if not place:
            return np.empty((0, 2), np.int64)
        vector = table + place + struct.unpack_from("<I", footer, table + place)[0]
        count = struct.unpack_from("<I", footer, vector)[0]
        kinds = [("offset", "<i8"), ("metadata", "<i4"), ("padding", "<i4"), ("body", "<i8")]
        blocks = np.frombuffer(footer, kinds, count, vector + 4)
    except (struct.error, ValueError) as error:
        raise Failure(f"the footer of a table is damaged: {error}.") from error
    return np.stack([blocks["offset"], blocks["metadata"] + blocks["body"]], axis=1)
