"""The spread of one picture's results over seeds, and the agreement of each result with the input.

InstaRevive's A.6 accepts several results as long as they align with the input. Block means measure both: a degradation
keeps the picture at a coarse scale, and seeds may only change the detail below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from components.types import Image

BLOCK_PX = 8
"""Side of a block: the strongest downsampling of the paper's levels (x8) keeps block means."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Standard deviation over seeds in 8-bit levels, root mean square over pixels; total^2 = coarse^2 + fine^2.

    Attributes:
        coarse: deviation of the block means.
        fine: deviation of the rest, within the blocks.
    """

    total: float
    coarse: float
    fine: float


def block_means(picture: np.ndarray, block_px: int = BLOCK_PX) -> np.ndarray:
    """Means over square blocks of [H, W, 3], float64 [H // b, W // b, 3]; pixels beyond the last block do not count.

    Raises:
        ValueError: a side is shorter than a block.
    """
    height, width = (side // block_px for side in picture.shape[:2])
    if not height or not width:
        raise ValueError(f"a picture of {picture.shape[1]} x {picture.shape[0]} has no block of {block_px} px")
    whole = np.asarray(picture, dtype=np.float64)[: height * block_px, : width * block_px]
    return np.asarray(whole.reshape(height, block_px, width, block_px, -1).mean(axis=(1, 3)))


def spread(pictures: Sequence[Image], block_px: int = BLOCK_PX) -> Spread:
    """The spread of two or more results of one picture, uint8 [H, W, 3] each; variances are unbiased.

    Raises:
        ValueError: fewer than two pictures, different sizes, or a side shorter than a block.
    """
    if len(pictures) < 2 or len({picture.shape for picture in pictures}) > 1:
        raise ValueError("a spread needs at least two pictures of one size")
    means = np.stack([block_means(picture, block_px) for picture in pictures])
    height, width = (side * block_px for side in means.shape[1:3])
    pixels = np.stack([np.asarray(picture, dtype=np.float64)[:height, :width] for picture in pictures])
    total, coarse = float(pixels.var(axis=0, ddof=1).mean()), float(means.var(axis=0, ddof=1).mean())
    # Block means are an orthogonal projection, so variances add up; rounding may give a difference just below zero.
    return Spread(total=total**0.5, coarse=coarse**0.5, fine=max(total - coarse, 0.0) ** 0.5)


def coarse_error(picture: Image, other: Image, block_px: int = BLOCK_PX) -> float:
    """Root mean square difference of two pictures' block means in 8-bit levels; 0 for equal block means."""
    difference = block_means(picture, block_px) - block_means(other, block_px)
    return float(np.sqrt(np.square(difference).mean()))
