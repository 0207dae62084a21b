"""How much of its surroundings a network needs for a pixel, measured: the context of its tiles."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from components.synthetic import dead_leaves
from components.systems.regressor.config import EXACT_LEVELS
from components.systems.regressor.network import Regressor

CONTEXTS = (16, 32, 64)
"""Contexts that are tried, px; ours. A network that needs more looks at the whole picture, or nearly so."""


@torch.no_grad()
def measure_reach(regressor: Regressor) -> tuple[int, float]:
    """The context of a tile, and how far a tile with it differs from the whole picture.

    A tile is cut out of a picture of dead leaves and noise that goes on for as much again on every side.

    Returns:
        (px of the network's input, largest difference in 8-bit levels): the first of CONTEXTS, rounded up to multiples,
        with which the difference is at most EXACT_LEVELS; else the one with the smallest difference.
    """
    multiple = regressor.config.multiple_px
    contexts = list(dict.fromkeys(-(-context // multiple) * multiple for context in CONTEXTS))
    best = (0, np.inf)
    for context in contexts if len(contexts) > 1 else (contexts[0], 2 * contexts[0]):
        levels = _difference(regressor, context)
        if levels < best[1]:
            best = (context, levels)
        if levels <= EXACT_LEVELS:
            break
    return best[0], round(float(best[1]), 2)


def _difference(regressor: Regressor, context: int) -> float:
    """Largest difference of the core of a tile with that context, a multiple, from the same pixels of a larger picture,
    in 8-bit levels."""
    config = regressor.config
    multiple, factor, border = config.multiple_px, config.factor, context
    core = max(multiple, -(-16 // multiple) * multiple, config.minimum_px - 2 * border)
    tile = core + 2 * border
    whole = _test_picture(tile + 2 * border, next(regressor.parameters()))
    large = regressor(whole)
    small = regressor(whole[..., border : border + tile, border : border + tile])
    inside = slice(border * factor, (border + core) * factor)
    middle = slice(2 * border * factor, (2 * border + core) * factor)
    difference = small[..., inside, inside].float() - large[..., middle, middle].float()
    return float(difference.abs().max()) * 255


def _test_picture(side: int, like: Tensor) -> Tensor:
    """Dead leaves with noise of 5 levels, [1, 3, side, side] in [0, 1]."""
    pixels = dead_leaves(max(side, 16), 0, 0)[:side, :side].astype(np.float32)
    noise = np.random.Generator(np.random.Philox(key=0)).normal(0, 5, pixels.shape).astype(np.float32)
    picture = torch.from_numpy(np.clip(pixels + noise, 0, 255) / 255).permute(2, 0, 1)[None]
    return picture.to(like)
