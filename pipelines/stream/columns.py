"""Precomputed latents and embeddings in the rows of the stream (corpus/columns/precompute.py computes them).

    latents float16 [C, h, w], latents_known bool
    embeddings_text float16 [L, D], embeddings_pooled float16 [P], embeddings_known bool

Some rows have no value: a sample whose value is null because the column's quarantine has it, dead leaves, and a prompt
that a captioner wrote during training. Their fields hold zeros, `*_known` is false, and the trainer encodes that row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import numpy as np

from pipelines.core.errors import UsageError
from pipelines.corpus.columns.fitting import WHAT, check_precomputed, split_embeddings
from pipelines.corpus.columns.reading import Column

KNOWN_FIELD = {"latents": "latents_known", "embeddings": "embeddings_known"}


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """Precomputed columns of a stream; false if there are none.

    Attributes:
        latents, embeddings: column by corpus folder.
    """

    latents: Mapping[str, Column] = field(default_factory=dict)
    embeddings: Mapping[str, Column] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.latents or self.embeddings)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each float16 field of a row."""
        shapes: dict[str, tuple[int, ...]] = {}
        for column in list(self.latents.values())[:1]:
            shapes["latents"] = tuple(column.shape)
        for column in list(self.embeddings.values())[:1]:
            layout = column.producer["layout"]
            shapes |= {"embeddings_text": tuple(layout["text"]), "embeddings_pooled": tuple(layout["pooled"])}
        return shapes

    @property
    def row_bytes(self) -> int:
        """Bytes of these fields in a row."""
        return sum(2 * prod(shape) for shape in self.shapes.values())

    def empty(self, count: int) -> dict[str, np.ndarray]:
        """Fields of `count` rows without values."""
        arrays = {name: np.zeros((count, *shape), np.float16) for name, shape in self.shapes.items()}
        return arrays | {KNOWN_FIELD[what]: np.zeros(count, bool) for what in WHAT if getattr(self, what)}

    def values(self, source: str, split: str, sample: int) -> dict[str, Any]:
        """Fields of one row; `sample` is its number in the split. A source without columns gives zeros."""
        row: dict[str, Any] = {}
        for what in WHAT:
            columns = getattr(self, what)
            if not columns:
                continue
            value = columns[source].value(split, sample) if source in columns else None
            has_value = isinstance(value, np.ndarray)
            row[KNOWN_FIELD[what]] = np.bool_(has_value)
            if not has_value:
                row |= {
                    name: np.zeros(shape, np.float16) for name, shape in self.shapes.items() if name.startswith(what)
                }
            elif what == "latents":
                row[what] = value
            else:
                parts = split_embeddings(columns[source].producer, cast(np.ndarray, value))
                row |= {f"embeddings_{name}": part for name, part in parts.items()}
        return row


def check_columns(
    precomputed: Precomputed,
    settings: Mapping[str, Any],
    captioners: Mapping[str, str],
    column_of: Callable[[str, str], Column],
    model_digest: str = "",
) -> None:
    """Check that the columns hold the values that the trainer would compute from the stream's rows.

    Args:
        precomputed: the columns.
        settings: settings of the stream, see `check_precomputed`.
        captioners: captioner by corpus folder.
        column_of: (corpus folder, name) -> a column.
        model_digest: digest of the trainer's prior; "" skips its check.

    Raises:
        UsageError: one sentence with all differences.
    """
    for what in WHAT:
        for source, column in getattr(precomputed, what).items():
            if column.kind != "array" or column.producer.get("name") != what:
                raise UsageError(f"{what}={column.name}: that column of {source} holds no precomputed {what}.")
            own = {"sources": [(source, 1.0)], "captioner": captioners[source]}
            check_precomputed(column.producer, {**settings, **own}, model_digest)
            captions = column.producer.get("captions") or {}
            if captions and dict(column_of(source, captions["column"]).producer) != captions["producer"]:
                raise UsageError(
                    f"{what}={column.name}: the captions of {source} in column {captions['column']} have changed: "
                    "compute the embeddings again."
                )
        if len({(tuple(column.shape), column.dtype) for column in getattr(precomputed, what).values()}) > 1:
            raise UsageError(f"{what}: the corpora's columns have values of different shapes.")
