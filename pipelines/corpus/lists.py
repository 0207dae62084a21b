"""The lists of files in index.json and column.json as arrays, in memory or mapped from a file.

A row is {"name", "bytes", "sha256", "samples"}. At 20 million samples in small shards a list has 156,000 rows: as
dictionaries they take 114 MB in every process, as arrays 12 MB, and mapped they take no memory of a process' own.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from components.writing import replace_file, whole_file

FIELDS = frozenset({"name", "bytes", "sha256", "samples"})
MAPPED, DOCUMENT = ".lists.npy", ".lists.json"
RANGE = "rows of the list"


class ShardList(Sequence[Mapping[str, Any]]):
    """The rows of a list, held as arrays.

    Args:
        rows: rows, or a structured array with the fields `name` (bytes), `sha256` (32 bytes), `bytes` and `samples`.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]] | np.ndarray) -> None:
        if not isinstance(rows, np.ndarray):
            rows = _array(
                [str(row["name"]).encode() for row in rows],
                b"".join(bytes.fromhex(row["sha256"]) for row in rows),
                [row["bytes"] for row in rows],
                [row["samples"] for row in rows],
            )
        self.rows = rows

    @property
    def names(self) -> np.ndarray:
        """Names as bytes."""
        return self.rows["name"]

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of the files, int64."""
        return self.rows["bytes"]

    @property
    def samples(self) -> np.ndarray:
        """Samples of the files, int64."""
        return self.rows["samples"]

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Mapping[str, Any]]: ...

    def __getitem__(self, place: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        row = self.rows[place]
        return {
            "name": row["name"].decode(),
            "bytes": int(row["bytes"]),
            "sha256": row["sha256"].tobytes().hex(),
            "samples": int(row["samples"]),
        }


def _array(names: Sequence[bytes], digests: bytes, sizes: Sequence[int], samples: Sequence[int]) -> np.ndarray:
    width = max((len(name) for name in names), default=1)
    kinds = [("name", f"S{width}"), ("sha256", "V32"), ("bytes", np.int64), ("samples", np.int64)]
    rows = np.empty(len(names), kinds)
    rows["name"], rows["sha256"] = names, np.frombuffer(digests, "V32")
    rows["bytes"], rows["samples"] = sizes, samples
    return rows


def read_lists(data: bytes) -> dict[str, Any]:
    """A JSON document whose lists of files are ShardLists.

    Raises:
        ValueError: it is no JSON.
    """
    names, digests, sizes, samples = bytearray(), bytearray(), array("q"), array("q")

    def row_number(document: dict[str, Any]) -> Any:
        """A row's number instead of its dictionary: so many dictionaries at once take ten times the arrays' memory."""
        if document.keys() != FIELDS:
            return document
        names.extend(document["name"].encode() + b"\n")
        digests.extend(bytes.fromhex(document["sha256"]))
        sizes.append(document["bytes"])
        samples.append(document["samples"])
        return _Row(len(sizes) - 1)

    document = json.loads(data, object_hook=row_number)
    rows = _array(bytes(names).split(b"\n")[:-1], bytes(digests), sizes, samples)
    return _with_lists(document, rows) if isinstance(document, dict) else {}


class _Row(int):
    """The number of a row."""


def _with_lists(node: Any, rows: np.ndarray) -> Any:
    if isinstance(node, dict):
        return {name: _with_lists(value, rows) for name, value in node.items()}
    if isinstance(node, list) and node and isinstance(node[0], _Row):
        return ShardList(rows[node[0] : node[-1] + 1])
    return node


def write_mapped(folder: Path, data: bytes) -> None:
    """Write a document's lists beside it, for open_mapped. The document must not change afterwards."""
    document, parts, length = read_lists(data), [], 0

    def ranges(node: Any) -> Any:
        nonlocal length
        if isinstance(node, ShardList):
            parts.append(node.rows)
            length += len(node)
            return {RANGE: [length - len(node), length]}
        return {name: ranges(value) for name, value in node.items()} if isinstance(node, dict) else node

    document = ranges(document)
    with whole_file(folder / MAPPED) as draft, open(draft.temporary, "wb") as target:
        np.save(target, np.concatenate(parts) if parts else _array([], b"", [], []))
    replace_file(folder / DOCUMENT, json.dumps(document).encode())  # comes last


def open_mapped(folder: Path) -> dict[str, Any]:
    """The document as read_lists returns it, with mapped lists; {} if the folder has none.

    Raises:
        ValueError, OSError: a file is damaged.
    """
    try:
        document = json.loads((folder / DOCUMENT).read_bytes())
    except FileNotFoundError:
        return {}
    rows = np.load(folder / MAPPED, mmap_mode="r").view(np.ndarray)

    def lists(node: Any) -> Any:
        if isinstance(node, dict):
            if RANGE in node:
                first, last = node[RANGE]
                return ShardList(rows[first:last])
            return {name: lists(value) for name, value in node.items()}
        return node

    return dict(lists(document))
