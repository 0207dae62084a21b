"""A column that is to be computed: its spec, and the tasks and answers of its computation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from components.types import Image, SampleError
from pipelines.core.errors import UsageError, unknown

FORMAT = 1
FOLDER = "columns"
KINDS = ("text", "float", "array", "picture")
WITHOUT_DTYPE = ("text", "picture")
DTYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")

Value = str | float | bytes | np.ndarray
Worker = Callable[[Sequence[Image], Sequence[str]], Sequence[Value | SampleError]]
"""(uint8 pictures [H, W, 3], their keys) -> a value or an error for each. An exception costs one picture."""
ExistingValue = Callable[[Mapping[str, Any]], Value | None]
"""Row of the corpus' table -> the value that the sample brought along; with None the picture is read."""


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """What a column holds, and how its values are computed.

    Attributes:
        name: letters a-z, digits, "-" and "_", at most 64.
        kind: text (str), float (one finite number), array (finite numbers, one shape for all samples) or picture (the
            bytes of a file).
        producer: what computes the values, as JSON: model, revision, prompt, digest. It decides which files are reused.
        factory: makes the worker, in each process that needs one; picklable. None where a Runner needs no worker.
        shape: shape of one sample's array; () for the other kinds.
        dtype: type of the numbers, "float32" by default for kind float; "" for text and pictures.
        existing: values that the corpus brought along. Their rows are marked, and they need no model.
        batch_size: pictures of one call of the worker.
        short_side_px: larger pictures are shrunk to this short side; 0 leaves them.
    """

    name: str
    kind: str
    producer: Mapping[str, Any]
    factory: Callable[[], Worker] | None = None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    existing: ExistingValue | None = None
    batch_size: int = 8
    short_side_px: int = 0

    def __post_init__(self) -> None:
        if self.kind == "float" and not self.dtype:
            object.__setattr__(self, "dtype", "float32")
        if not NAME.fullmatch(self.name):
            raise UsageError(f'"{self.name}" cannot name a column: letters a-z, digits, "-" and "_", at most 64.')
        if self.kind not in KINDS:
            raise unknown("kind of column", self.kind, KINDS)
        if self.kind != "array" and (self.shape or (self.kind in WITHOUT_DTYPE and self.dtype)):
            raise UsageError(f"a column of kind {self.kind} has no shape of its own, got {self.shape} {self.dtype}.")
        if self.kind not in WITHOUT_DTYPE and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.kind == "float" and not self.dtype.startswith("float"):
            raise UsageError(f"a column of kind float needs a float dtype, got {self.dtype}.")
        if self.kind == "array" and (not self.shape or min(self.shape) < 1):
            raise UsageError(f"a column of kind array needs the shape of one sample's array, got {self.shape}.")
        if self.batch_size < 1 or self.short_side_px < 0:
            raise UsageError("a column needs batch_size >= 1 and short_side_px >= 0.")

    @property
    def producer_digest(self) -> str:
        """sha256 over what computes the values: equal producers must give equal values."""
        document = [FORMAT, self.kind, list(self.shape), self.dtype, dict(self.producer)]
        return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ColumnJob:
    """The computation of one column of a corpus. It travels to the workers.

    Attributes:
        corpus_dir: the corpus, absolute: workers have another current folder.
        column: what is computed.
    """

    corpus_dir: Path
    column: ColumnSpec

    @property
    def folder(self) -> Path:
        """Where the column's files are written."""
        return self.corpus_dir / FOLDER / self.column.name


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """The unit of work: one shard of a split.

    Attributes:
        split, shard: name of the split, and number of the shard in it.
        samples: samples of the shard.
        sha256: of its tar.
    """

    split: str
    shard: int
    samples: int
    sha256: str

    @property
    def place(self) -> tuple[str, int, str]:
        """What names the task in shards.jsonl."""
        return self.split, self.shard, self.sha256

    @property
    def stem(self) -> str:
        """Name of the shard's files, without suffix."""
        return f"{self.split}-{self.shard:05d}"


@dataclass(frozen=True, kw_only=True)
class ShardAnswer:
    """How a task ended.

    Attributes:
        row: of shards.jsonl, without the producer: split, shard, tar (sha256), name, bytes, sha256, samples, given,
            quarantine.
        fatal: why the job must end; "" where the shard is complete.
    """

    row: Mapping[str, Any] = field(default_factory=dict)
    fatal: str = ""


Runner = Callable[[ColumnJob, Sequence[ShardTask]], Iterator[ShardAnswer]]
"""Computes the tasks and yields an answer for each, in any order: see workers.run_tasks."""
