"""A denoiser of one size for latents of any size: overlapping tiles, blended with Gaussian weights at every step.

    clean(z) = sum_i w_i clean_i(z_i) / sum_i w_i        (Bar-Tal et al. 2023, Eq. 5, with weights instead of a mean)

The sampler runs on the whole latents: its noise covers all of them, so overlapping tiles see the same noise, and each
step uses the blended prediction. SUPIR steps each tile alone and blends the results. For DDIM this is the same, since
its step is linear in the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from components.types import Box, Cancellation, Cancelled

VARIANCE = 0.01
"""Variance of the weights in squares of the tile's side, from SUPIR. A tile's edge has 4e-6 of the largest weight."""


class Tileable(Protocol):
    """A denoiser that can be cut: `tile` returns a denoiser with only its part of the spatial conditions."""

    @property
    def __call__(self) -> Callable[..., Tensor]: ...

    def tile(self, box: Box) -> Callable[..., Tensor]: ...


def tile_boxes(height: int, width: int, tile: tuple[int, int], overlap: float = 0.25, multiple: int = 1) -> list[Box]:
    """Boxes of one size that cover a grid, in reading order, evenly spaced; the last box ends at the border.

    Args:
        height, width: sides of the grid.
        tile: largest (height, width) of a tile; one tile covers a shorter side of the grid.
        overlap: smallest share of a tile that neighbours share, 0 to 0.9.
        multiple: boxes start at multiples of it, so a network that halves its input has the same grid in every tile.
            The sides of the grid and of the tile must be multiples too.

    Raises:
        ValueError: a side is not a multiple, or the overlap is out of range.
    """
    if not 0 <= overlap <= 0.9:
        raise ValueError(f"overlap must be between 0 and 0.9, got {overlap}")
    rows = _starts(height, min(tile[0], height), overlap, multiple)
    columns = _starts(width, min(tile[1], width), overlap, multiple)
    return [(top, left, min(tile[0], height), min(tile[1], width)) for top in rows for left in columns]


def _starts(length: int, tile: int, overlap: float, multiple: int) -> list[int]:
    if tile < 1 or length % multiple or tile % multiple:
        raise ValueError(f"sides must be positive multiples of {multiple}, got {length} in tiles of {tile}")
    units, tile_units = length // multiple, tile // multiple
    step = max(1, int(tile_units * (1 - overlap)))  # largest distance of two starts
    count = -(-(units - tile_units) // step)
    return [multiple * (i * (units - tile_units) // max(1, count)) for i in range(count + 1)]


def gaussian_weights(height: int, width: int, variance: float = VARIANCE) -> Tensor:
    """Weights of a tile, float64 [height, width], symmetric, at most 1.

    SUPIR centres its columns at (w - 1) / 2 but its rows at h / 2. Here both are centred, so that a picture rotated by
    180 degrees gets the same weights.
    """
    sides = []
    for side in (height, width):
        place = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) / side
        sides.append(torch.exp(-place.square() / (2 * variance)))
    return sides[0][:, None] * sides[1][None]


def released_weights(height: int, width: int, variance: float = VARIANCE) -> Tensor:
    """SUPIR's weights as released: densities of a normal distribution whose rows are centred at h / 2."""
    sides = []
    for side, centre in ((height, height / 2), (width, (width - 1) / 2)):
        place = (torch.arange(side, dtype=torch.float64) - centre) / side
        sides.append(torch.exp(-place.square() / (2 * variance)) / (2 * torch.pi * variance) ** 0.5)
    return sides[0][:, None] * sides[1][None]


def strided_boxes(height: int, width: int, tile: int, stride: int) -> list[Box]:
    """Square boxes at every multiple of the stride, the last one moved back to the border, as SUPIR's release cuts.

    Raises:
        ValueError: a side is shorter than a tile.
    """
    if min(height, width) < tile or not 1 <= stride <= tile:
        raise ValueError(f"tiles of {tile} with stride {stride} do not fit {height} x {width}")
    rows, columns = (
        [min(i * stride, side - tile) for i in range(-(-(side - tile) // stride) + 1)] for side in (height, width)
    )
    return [(top, left, tile, tile) for top in rows for left in columns]


def equal_weights(height: int, width: int) -> Tensor:
    """Ones, float64 [height, width]: a plain mean where tiles overlap, as in InstaRevive's released tools."""
    return torch.ones(height, width, dtype=torch.float64)


def tiled(
    denoise: Tileable,
    height: int,
    width: int,
    boxes: Sequence[Box],
    cancelled: Cancelled | None = None,
    weigh: Callable[[int, int], Tensor] = gaussian_weights,
) -> Callable[..., Tensor]:
    """A denoiser over [B, C, height, width] that calls the tiles of `denoise` one after the other.

    Memory grows with the latents and with the state of each tile, not with a network's activations. For a single box
    that covers everything this is `denoise` itself.

    Args:
        denoise: cut with `denoise.tile(box)`, once for each box; the parts serve all steps.
        height, width: sides of the latents.
        boxes: boxes of one size that cover the latents, see tile_boxes.
        cancelled: called before each tile, since a step over many tiles takes long.
        weigh: (height, width) of a tile -> its positive weights, float64.

    Raises:
        ValueError: the boxes differ in size, reach outside, or leave a gap.
    """
    if len(boxes) == 1 and boxes[0] == (0, 0, height, width):
        return denoise
    if len({box[2:] for box in boxes}) != 1:
        raise ValueError(f"tiles must have one size, got {sorted({box[2:] for box in boxes})}")
    weights = weigh(*boxes[0][2:])
    total = torch.zeros(height, width, dtype=torch.float64)
    for box in boxes:
        if min(box) < 0 or box[0] + box[2] > height or box[1] + box[3] > width:
            raise ValueError(f"tile {box} reaches outside {height} x {width}")
        _part(total, box).add_(weights)
    if not (total > 0).all():
        raise ValueError(f"the tiles leave gaps in {height} x {width}")
    parts = [denoise.tile(box) for box in boxes]
    # divide in float64: a float32 quotient of two weights of 1e-11 is inexact
    shares = [(weights / _part(total, box)).to(torch.float32) for box in boxes]

    def run(latents: Tensor, sigma: Tensor, *rest: Tensor) -> Tensor:
        blended = torch.zeros_like(latents)
        for box, part, share in zip(boxes, parts, shares, strict=True):
            if cancelled is not None and cancelled():
                raise Cancellation("cancelled between two tiles")
            _part(blended, box).add_(part(_part(latents, box).contiguous(), sigma, *rest) * share.to(latents))
        return blended

    return run


def _part(tensor: Tensor, box: Box) -> Tensor:
    """The view of [..., h, w] inside a box."""
    top, left, height, width = box
    return tensor[..., top : top + height, left : left + width]
