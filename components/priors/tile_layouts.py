"""Where the tiles of a feature map lie when a network runs layer by layer over them; see layer_tiles.py.

    Cores        tiles side by side that read their neighbours' borders, for a result equal to the whole
    Overlapping  tiles with halos that are apart from the start, as SUPIR's release cuts

Boxes are (top, left, height, width), in reading order. Shapes: B pictures, G groups of a norm, T tiles.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from components.types import Box


def released_boxes(height: int, width: int, tile: int, pad: int) -> list[tuple[Box, Box]]:
    """The released tool's tiles: (box with its halo, box of the result it gives).

    Along a side of length n, tiles share the n - 2 pad inner pixels; the first and the last also give the border, so
    that all inputs but the last have one size. The length of a share is rounded up, see _share. A grid that is at most
    tile + 2 pad long and wide is one tile, and so is a side of at most 2 pad.
    """
    if max(height, width) <= tile + 2 * pad:
        return [((0, 0, height, width), (0, 0, height, width))]
    rows, columns = (_released_spans(side, tile, pad) for side in (height, width))
    return [(_box(row[0], column[0]), _box(row[1], column[1])) for row in rows for column in columns]


Span = tuple[int, int]
"""(start, end) along one axis."""


def _released_spans(length: int, tile: int, pad: int) -> list[tuple[Span, Span]]:
    """((start, end) of the input, (start, end) of the result) of each tile along one axis."""
    inside = length - 2 * pad
    if inside <= 0:
        return [((0, length), (0, length))]
    count = -(-inside // tile)
    share = _share(-(-inside // count), tile)
    edges = [0, *(pad + i * share for i in range(1, count)), length]
    # the last share may reach into the border, where it is cut
    inputs = [(i * share, min(length, 2 * pad + (i + 1) * share)) for i in range(count)]
    return list(zip(inputs, itertools.pairwise(edges), strict=True))


def _share(shortest: int, tile: int) -> int:
    """`shortest` rounded up to a multiple of 32, or of the next smaller power of two with which it fits the tile."""
    for unit in (32, 16, 8, 4, 2):
        rounded = -(-shortest // unit) * unit
        if rounded <= tile:
            return rounded
    return shortest


def _box(rows: Span, columns: Span) -> Box:
    return rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0]


class Layout(Protocol):
    """Where the tiles of a feature map lie."""

    def boxes(self) -> list[Box]:
        """The parts of the map that are stored."""

    def window(self, parts: Sequence[Tensor], index: int, before: int, after: int) -> tuple[Tensor, list[int]]:
        """A tile with `before` pixels of its neighbours above and left, and `after` below and right.

        Returns: the tile, and how many of these pixels no tile has: left, right, top, bottom, as F.pad takes them.
        """

    def halved(self) -> Self:
        """The layout after a downsampler."""

    def doubled(self) -> Self:
        """The layout after an upsampler."""

    def merge(self, counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [B, G] of the map from its tiles' pixel counts [T], means and variances [T, B, G]."""

    def middle(self) -> Layout:
        """The layout in the middle block."""

    def results(self) -> list[Box]:
        """The part of the result that each tile gives."""


@dataclass(frozen=True)
class Cores:
    """Exact: tiles side by side; `rows` and `columns` are their edges, from 0 to the side of the map."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def even(cls, height: int, width: int, tile: int, unit: int = 1) -> Self:
        """Tiles of nearly equal sides, at most `tile`, that start at multiples of `unit`; all sides are multiples."""
        edges = []
        for side in (height // unit, width // unit):
            count = -(-side // (tile // unit))
            edges.append(tuple(unit * (i * side // count) for i in range(count + 1)))
        return cls(*edges)

    def boxes(self) -> list[Box]:
        rows, columns = itertools.pairwise(self.rows), list(itertools.pairwise(self.columns))
        return [_box(row, column) for row in rows for column in columns]

    def results(self) -> list[Box]:
        return self.boxes()

    def window(self, parts: Sequence[Tensor], index: int, before: int, after: int) -> tuple[Tensor, list[int]]:
        across = len(self.columns) - 1
        spans, missing, touched = list[Span](), list[int](), list[range]()
        for edges, place in ((self.columns, index % across), (self.rows, index // across)):
            start, end = max(0, edges[place] - before), min(edges[-1], edges[place + 1] + after)
            spans.append((start, end))
            missing += [before - (edges[place] - start), after - (end - edges[place + 1])]
            touched.append(range(bisect_right(edges, start) - 1, bisect_left(edges, end)))
        if len(touched[0]) == len(touched[1]) == 1:
            return parts[index], missing
        (left, right), (top, bottom) = spans
        window = parts[index].new_empty(*parts[index].shape[:2], bottom - top, right - left)
        for row, column in itertools.product(touched[1], touched[0]):
            part_top, part_left = self.rows[row], self.columns[column]
            down = slice(max(top, part_top), min(bottom, self.rows[row + 1]))
            along = slice(max(left, part_left), min(right, self.columns[column + 1]))
            _slide(window, down, along, top, left).copy_(
                _slide(parts[row * across + column], down, along, part_top, part_left)
            )
        return window, missing

    def halved(self) -> Self:
        return type(self)(tuple(e // 2 for e in self.rows), tuple(e // 2 for e in self.columns))

    def doubled(self) -> Self:
        return type(self)(tuple(e * 2 for e in self.rows), tuple(e * 2 for e in self.columns))

    def merge(self, counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Exact, as Chan et al. 1979 merge moments: the spread of the tiles' means is part of the variance."""
        shares = (counts / counts.sum())[:, None, None]
        mean = (shares * means).sum(0)
        return mean, (shares * (variances + (means - mean).square())).sum(0)

    def middle(self) -> Layout:
        return type(self)((0, self.rows[-1]), (0, self.columns[-1]))


def _slide(tensor: Tensor, rows: slice, columns: slice, top: int, left: int) -> Tensor:
    """The view of a part of the map, in a tensor that starts at (top, left) of the map."""
    return tensor[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]


@dataclass(frozen=True)
class Overlapping:
    """Released: each tile has its halo from the start and never sees its neighbours again; see released_boxes."""

    inputs: tuple[Box, ...]
    outputs: tuple[Box, ...]

    def boxes(self) -> list[Box]:
        return list(self.inputs)

    def results(self) -> list[Box]:
        return list(self.outputs)

    def window(self, parts: Sequence[Tensor], index: int, before: int, after: int) -> tuple[Tensor, list[int]]:
        return parts[index], [before, after, before, after]

    def halved(self) -> Self:
        return self._scaled(lambda n: n // 2)

    def doubled(self) -> Self:
        return self._scaled(lambda n: n * 2)

    def _scaled(self, scale: Callable[[int], int]) -> Self:
        inputs, outputs = (
            tuple((scale(top), scale(left), scale(height), scale(width)) for top, left, height, width in boxes)
            for boxes in (self.inputs, self.outputs)
        )
        return type(self)(inputs, outputs)

    def merge(self, counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        """Means over tiles, weighted by their pixels; pixels of halos count in every tile that has them."""
        shares = (counts / counts.sum())[:, None, None]
        return (shares * means).sum(0), (shares * variances).sum(0)

    def middle(self) -> Layout:
        return self
