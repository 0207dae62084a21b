"""Tiles with a context that is thrown away: a picture in tiles equals the whole one if the network looks no further.

    |<- context ->|<-- fade -->|                 |<-- fade -->|<- context ->|
           0          0 .. 1           1             1 .. 0          0            share of a tile in the result

Neighbours fade into each other where both have their context, so a network that looks further leaves no hard seam.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from components.samplers.picture_tiles import blend_tiles
from components.systems.regressor.config import RegressorConfig
from components.systems.regressor.network import padded_size
from components.types import Box, Cancelled, Image

FADE_PX = 16
"""Width of the zone in which neighbours fade into each other, px of the input, rounded up to multiples; ours."""


def restore_with_context(
    network: Callable[[Tensor], Tensor],
    image: Image,
    config: RegressorConfig,
    tile_px: int,
    context_px: int,
    like: Tensor,
    cancelled: Cancelled | None = None,
    key: str = "",
) -> Image:
    """Run the network on one picture, uint8 [H, W, 3] -> [factor H, factor W, 3].

    Args:
        network: pictures [1, 3, h, w] in [0, 1] -> [1, 3, factor h, factor w].
        config: facts about it.
        tile_px, context_px: see options.Options, here without the special values.
        like: a weight of the network: tiles get its device and dtype, one by one.
        cancelled: called before each tile.
        key: the picture's name, for errors.

    Raises:
        SampleError: "not_finite", see tensors.check_pictures.
        Cancellation: `cancelled()` became true.
    """
    height, width = image.shape[:2]
    padded = _pad(image, padded_size((height, width), config))
    rows, columns = padded.shape[:2]
    tile, context, fade = tile_sides(config, tile_px, context_px)
    tops, vertical = _axis(rows, tile, context, fade, config)
    lefts, horizontal = _axis(columns, tile, context, fade, config)

    def shares(box: Box) -> np.ndarray:
        return vertical[box[0]][:, None, None] * horizontal[box[1]][None, :, None]

    boxes = [(top, left, min(tile, rows), min(tile, columns)) for top in tops for left in lefts]
    result = blend_tiles(network, padded, boxes, shares, like, config.factor, cancelled, key)
    return np.ascontiguousarray(result[: height * config.factor, : width * config.factor])


def tile_sides(config: RegressorConfig, tile_px: int, context_px: int) -> tuple[int, int, int]:
    """(side of a tile, its context, its fade), multiples in px: the tile is raised to what the other two need."""
    multiple = config.multiple_px
    context, fade = (-(-side // multiple) * multiple for side in (context_px, FADE_PX))
    least = max(config.minimum_px, 2 * (context + fade) + multiple)
    return max(tile_px // multiple * multiple, least), context, fade


def _axis(
    length: int, tile: int, context: int, fade: int, config: RegressorConfig
) -> tuple[list[int], dict[int, np.ndarray]]:
    """Starts of the tiles along an axis, and the shares of each at the factor's resolution, float32 [factor tile]."""
    if tile >= length:
        return [0], {0: np.ones(length * config.factor, np.float32)}
    step = tile - 2 * context - fade
    starts = [*range(0, length - tile, step), length - tile]
    place = (np.arange(tile * config.factor) + 0.5) / config.factor
    shares, total = {}, np.zeros(length * config.factor)
    for start in starts:
        rise = np.ones_like(place) if start == 0 else np.clip((place - context) / fade, 0, 1)
        fall = np.ones_like(place) if start == length - tile else np.clip((tile - context - place) / fade, 0, 1)
        shares[start] = np.minimum(rise, fall)
        total[start * config.factor :][: len(place)] += shares[start]
    return starts, {
        start: (share / total[start * config.factor :][: len(place)]).astype(np.float32)
        for start, share in shares.items()
    }


def _pad(image: Image, size: tuple[int, int]) -> Image:
    """Pad a picture below and to the right with its mirror image, as network.pad_pictures."""
    for axis, side in enumerate(size):
        length = image.shape[axis]
        if side > length:
            widths = [(0, side - length) if axis == other else (0, 0) for other in range(3)]
            image = np.pad(image, widths, mode="reflect" if length > 1 else "edge")
    return image
