"""Read the finished columns of a corpus. A column holds a value for every sample: a caption, score, embedding or lq.

Files of a column (docs/decisions/0004):

columns/<name>/column.json            {"format", "name", "kind", "corpus", "producer", "producer_digest", "shape",
                                      "dtype", "samples", "given", "quarantined", "splits": {split: [{"name",
                                      "bytes", "sha256", "samples"}]}}; written last: it makes the column complete
columns/<name>/<split>-<shard>.arrow  one record batch {key, value, given}, in the order of the shard's samples; given:
                                      the value came with the corpus
columns/<name>/quarantine.jsonl       {key, source, stage, code, detail, bytes_sha256} of samples whose value is null
columns/<name>/shards.jsonl           one line for each computed shard, so that a later run does not repeat it
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.core.errors import Failure, UsageError, unknown
from pipelines.corpus.columns.spec import FOLDER, FORMAT, Value
from pipelines.corpus.lists import ShardList, open_mapped, read_lists
from pipelines.corpus.recent import Recent
from pipelines.corpus.shards import Corpus
from pipelines.corpus.stored import stored_column, stored_column_file


@dataclass(frozen=True, kw_only=True)
class Column:
    """A finished column, open for reading. Its files are memory-mapped. It can be pickled for workers.

    Attributes:
        name, kind, producer, shape, dtype: see ColumnSpec.
        folder: folder of its files.
        files: file names by split, in shard order, as an array of bytes: a list takes three times its memory.
        starts: by split, the first sample number of each file, and at the end the number of samples.
        stamp: digest of column.json; it changes when the column is computed again.
    """

    name: str
    kind: str
    producer: Mapping[str, Any]
    folder: Path
    shape: tuple[int, ...]
    dtype: str
    files: Mapping[str, np.ndarray] = field(repr=False, compare=False)
    starts: Mapping[str, Sequence[int]] = field(repr=False, compare=False)
    stamp: str = field(repr=False, default="")

    def value(self, split: str, sample: int) -> Value | None:
        """The value of a sample; None if it failed (quarantine.jsonl has the reason). Arrays are read-only views."""
        batch, row = self._row(split, sample)
        cell = batch.column("value")[row]
        if not cell.is_valid:
            return None
        if self.kind != "array":
            value: Value = cell.as_py()
            return value
        size = int(np.prod(self.shape))
        values = batch.column("value").storage.values.to_numpy(zero_copy_only=True)
        return values[row * size : (row + 1) * size].reshape(self.shape)

    def is_given(self, split: str, sample: int) -> bool:
        """Whether a sample's value came with the corpus; otherwise the producer computed it."""
        batch, row = self._row(split, sample)
        return bool(batch.column("given")[row].as_py())

    def provenance(self, split: str, sample: int) -> dict[str, Any]:
        """The source of a sample's text: {"key", "producer", "sha256" of the text}.

        The producer is {"name": "corpus"} if the text came with the corpus. The sha256 is "" if there is no text.

        Raises:
            UsageError: the column holds no text.
        """
        if self.kind != "text":
            raise UsageError(f"column {self.name} holds no text, so its rows have no provenance.")
        batch, row = self._row(split, sample)
        text = batch.column("value")[row].as_py()
        return {
            "key": batch.column("key")[row].as_py(),
            "producer": {"name": "corpus"} if batch.column("given")[row].as_py() else dict(self.producer),
            "sha256": hashlib.sha256(text.encode()).hexdigest() if text is not None else "",
        }

    def _row(self, split: str, sample: int) -> tuple[pa.RecordBatch, int]:
        if split not in self.files:
            raise unknown(f"split of column {self.name}", split, self.files)
        starts = self.starts[split]
        if not 0 <= sample < starts[-1]:
            raise IndexError(f"there is no sample {sample}: split {split} has {starts[-1]} samples")
        shard = bisect.bisect_right(starts, sample) - 1
        path = self.folder / self.files[split][shard].decode()
        return _maps.get((path, self.stamp), lambda: _map_file(path, split, shard)), sample - starts[shard]


_maps: Recent[tuple[Path, str], pa.RecordBatch] = Recent()
"""Mapped files by path and stamp of the column, so that a column computed again is mapped again."""


def _map_file(path: Path, split: str, number: int) -> pa.RecordBatch:
    """Memory-map the file of a shard's values; one in a store is fetched into the node's cache."""
    try:
        if not path.exists():
            path = stored_column_file(path, split, number) or path
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise Failure(f"{path} cannot be read: {error}.") from error


def list_columns(corpus: Corpus) -> list[str]:
    """Names of the finished columns of a corpus, also of those that were computed for another state of the corpus."""
    return sorted(path.parent.name for path in (corpus.folder / FOLDER).glob("*/column.json"))


def open_column(corpus: Corpus, name: str) -> Column:
    """Open a finished column.

    Raises:
        UsageError: there is no such column (the error suggests a similar name), it is not finished, or it was
            computed for another state of the corpus.
    """
    folder = corpus.folder / FOLDER / name
    stored_column(corpus.folder, name)
    try:
        data = (folder / "column.json").read_bytes()
        mapped = open_mapped(folder)
        document = mapped or read_lists(data)
    except FileNotFoundError:
        document = {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / 'column.json'} cannot be read: {error}.") from error
    if not document:
        if (folder / "shards.jsonl").exists():
            raise UsageError(f"column {name} of {corpus.folder} is not finished: run the command that makes it again.")
        raise unknown(f"column of {corpus.folder}", name, list_columns(corpus))
    if document.get("format") != FORMAT:
        raise UsageError(f"{folder / 'column.json'} is not a column of format {FORMAT}.")
    if document["corpus"] != corpus.digest:
        raise UsageError(
            f"column {name} was computed for another state of {corpus.folder}: run the command that made it again "
            "(shards that did not change are kept)."
        )
    splits = {
        split: entries if isinstance(entries, ShardList) else ShardList(entries)
        for split, entries in document["splits"].items()
    }
    return Column(
        name=name,
        kind=document["kind"],
        producer=document["producer"],
        folder=folder,
        shape=tuple(document["shape"]),
        dtype=document["dtype"],
        files={split: rows.names if mapped else rows.names.copy() for split, rows in splits.items()},
        starts={
            split: array("q", itertools.accumulate(entries.samples.tolist(), initial=0))
            for split, entries in splits.items()
        },
        stamp=hashlib.sha256(data).hexdigest(),
    )


def verify_column(corpus: Corpus, name: str) -> list[str]:
    """Check the files of a column: one sentence for each file that differs from column.json; [] if none does."""
    column, problems = open_column(corpus, name), []
    for entry in itertools.chain.from_iterable(read_json(column.folder / "column.json")["splits"].values()):
        path = column.folder / entry["name"]
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                problems.append(f"{path}: sha256 is {digest}, column.json says {entry['sha256']}.")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}.")
    return problems


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file, or if its JSON is not an object.

    Raises:
        UsageError: the file cannot be read or parsed.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    return document if isinstance(document, dict) else {}
