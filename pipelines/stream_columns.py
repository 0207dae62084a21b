"""What rows of the stream bring along of precomputed latents and embeddings (pipelines.precompute makes the columns).

    latents float16 [C, h, w], latents_known bool
    embeddings_text float16 [L, D], embeddings_pooled float16 [P], embeddings_known bool

A sample whose value is null (it stands in the column's quarantine), dead leaves, and a prompt that a captioner wrote
while training runs have no value: zeros stand there, `known` is false, and the trainer's encoder works on that row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import numpy as np

from pipelines.columns import Column
from pipelines.errors import UsageError
from pipelines.precompute import WHAT, check_precomputed, split_embeddings

KNOWN = {"latents": "latents_known", "embeddings": "embeddings_known"}


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """Opened columns by corpus folder; falsy where there are none.

    Attributes:
        latents, embeddings: of each corpus.
    """

    latents: Mapping[str, Column] = field(default_factory=dict)
    embeddings: Mapping[str, Column] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.latents or self.embeddings)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each float16 field of a row."""
        found: dict[str, tuple[int, ...]] = {}
        for column in list(self.latents.values())[:1]:
            found["latents"] = tuple(column.shape)
        for column in list(self.embeddings.values())[:1]:
            layout = column.producer["layout"]
            found |= {"embeddings_text": tuple(layout["text"]), "embeddings_pooled": tuple(layout["pooled"])}
        return found

    @property
    def row_bytes(self) -> int:
        """What they add to a row."""
        return sum(2 * prod(shape) for shape in self.shapes.values())

    def empty(self, count: int) -> dict[str, np.ndarray]:
        """Fields of `count` rows, nothing known yet."""
        arrays = {name: np.zeros((count, *shape), np.float16) for name, shape in self.shapes.items()}
        return arrays | {KNOWN[what]: np.zeros(count, bool) for what in WHAT if getattr(self, what)}

    def values(self, source: str, split: str, sample: int) -> dict[str, Any]:
        """Fields of one row; `sample` is its number in the split of a corpus, of any other source there are none."""
        row: dict[str, Any] = {}
        for what in WHAT:
            columns = getattr(self, what)
            if not columns:
                continue
            value = columns[source].value(split, sample) if source in columns else None
            known = isinstance(value, np.ndarray)
            row[KNOWN[what]] = np.bool_(known)
            if not known:
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
    found: Precomputed,
    settings: Mapping[str, Any],
    captioners: Mapping[str, str],
    column_of: Callable[[str, str], Column],
    model_digest: str = "",
) -> None:
    """Refuse columns that are not what the stream's rows would be encoded to.

    Args:
        found: the columns.
        settings: of the stream, see `check_precomputed`.
        captioners: whose words the rows of each corpus carry.
        column_of: (corpus folder, name) -> a column.
        model_digest: of the prior in training; "" where it is not known.

    Raises:
        UsageError: one sentence with everything that does not fit.
    """
    for what in WHAT:
        for source, column in getattr(found, what).items():
            if column.kind != "array" or column.producer.get("name") != what:
                raise UsageError(f"{what}={column.name}: that column of {source} holds no precomputed {what}.")
            own = {"sources": [(source, 1.0)], "captioner": captioners[source]}
            check_precomputed(column.producer, {**settings, **own}, model_digest)
            made_of = column.producer.get("captions") or {}
            if made_of and dict(column_of(source, made_of["column"]).producer) != made_of["producer"]:
                raise UsageError(
                    f"{what}={column.name}: the captions of {source} in column {made_of['column']} are others by now: "
                    "compute the embeddings again."
                )
        if len({(tuple(column.shape), column.dtype) for column in getattr(found, what).values()}) > 1:
            raise UsageError(f"{what}: the corpora's columns have values of different shapes.")
