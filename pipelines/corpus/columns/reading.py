"""Read finished columns of a corpus: captions, scores, embeddings, inputs; a value for every sample (decision 0004).

columns/<name>/column.json            {"format", "name", "kind", "corpus", "producer", "producer_digest", "shape",
                                      "dtype", "samples", "given", "quarantined", "splits": {split: [{"name",
                                      "bytes", "sha256", "samples"}]}}; written last: it makes the column complete
columns/<name>/<split>-<shard>.arrow  one record batch {key, value, given}, aligned with the samples of the shard
columns/<name>/quarantine.jsonl       {key, source, stage, code, detail, bytes_sha256} of rows that are null
columns/<name>/shards.jsonl           a row for each computed shard: a later run does not repeat them
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.core.errors import Failure, UsageError, unknown
from pipelines.corpus.columns.spec import FOLDER, FORMAT, Value
from pipelines.corpus.shards import Corpus


@dataclass(frozen=True, kw_only=True)
class Column:
    """A finished column, opened. Files are mapped, not read. It may travel to workers.

    Attributes:
        name, kind, producer, shape, dtype: see ColumnSpec.
        folder: folder of its files.
        files: file names by split, in shard order.
        starts: first sample number of each file by split, then the number of all samples.
        stamp: digest of column.json: a column that is computed again has another one.
    """

    name: str
    kind: str
    producer: Mapping[str, Any]
    folder: Path
    shape: tuple[int, ...]
    dtype: str
    files: Mapping[str, Sequence[str]] = field(repr=False)
    starts: Mapping[str, Sequence[int]] = field(repr=False)
    stamp: str = field(repr=False, default="")

    def value(self, split: str, sample: int) -> Value | None:
        """The value of a sample; None for a failure (quarantine.jsonl has the reason). Arrays are read-only views."""
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
        """Whether the value came with the corpus rather than from the producer."""
        batch, row = self._row(split, sample)
        return bool(batch.column("given")[row].as_py())

    def provenance(self, split: str, sample: int) -> dict[str, Any]:
        """Where a text comes from: {"key", "producer", "sha256" of the text}.

        The producer is {"name": "corpus"} for a text that came with the corpus.

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
            raise IndexError(f"sample {sample} is not among the {starts[-1]} of split {split}")
        shard = bisect.bisect_right(starts, sample) - 1
        return _mapped(self.folder / self.files[split][shard], self.stamp), sample - starts[shard]


@lru_cache(maxsize=256)
def _mapped(path: Path, stamp: str) -> pa.RecordBatch:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise Failure(f"{path} cannot be read: {error}.") from error


def list_columns(corpus: Corpus) -> list[str]:
    """Names of the finished columns of a corpus; a column may belong to another state of the corpus."""
    return sorted(path.parent.name for path in (corpus.folder / FOLDER).glob("*/column.json"))


def open_column(corpus: Corpus, name: str) -> Column:
    """Open a finished column.

    Raises:
        UsageError: there is no such column (the error suggests a similar name), it is not finished, or it belongs to
            another state of the corpus.
    """
    folder = corpus.folder / FOLDER / name
    document = read_json(folder / "column.json")
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
    files = document["splits"]
    return Column(
        name=name,
        kind=document["kind"],
        producer=document["producer"],
        folder=folder,
        shape=tuple(document["shape"]),
        dtype=document["dtype"],
        files={split: [entry["name"] for entry in entries] for split, entries in files.items()},
        starts={
            split: list(itertools.accumulate((entry["samples"] for entry in entries), initial=0))
            for split, entries in files.items()
        },
        stamp=hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest(),
    )


def verify_column(corpus: Corpus, name: str) -> list[str]:
    """One sentence for every file of a column that differs from column.json; empty for an intact column."""
    column, problems = open_column(corpus, name), []
    for entry in itertools.chain.from_iterable(read_json(column.folder / "column.json")["splits"].values()):
        path = column.folder / entry["name"]
        try:
            with open(path, "rb") as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()
            if digest != entry["sha256"]:
                problems.append(f"{path}: sha256 is {digest}, column.json says {entry['sha256']}.")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}.")
    return problems


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file or it holds something else.

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
