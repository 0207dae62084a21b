"""Regular patterns that a network draws: peaks of the spectrum at the frequencies of its grids.

A network that works on a grid of 4, 8 or 16 px can draw lines or dots of that period, too faint for PSNR and plain to
the eye. Pictures have no reason to have more power at these frequencies than beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from components.types import Image

PERIODS = (4, 8, 16)
"""Grids of a UNetRes, in px: its pixel unshuffle and its two smaller levels."""
NEAR, FAR = 2, 6
"""A peak is compared with the power that is NEAR + 1 to FAR bins away on its line and column of the spectrum."""


def grid_peak(images: Sequence[Image], side: int = 256, periods: Sequence[int] = PERIODS) -> float:
    """The largest peak at a frequency of the grids: a mean over pictures of log(power / median power beside it), nats.

    Without a pattern it is 0 to 1.5, the more the fewer pictures; faint lines of one level give more than 2.

    Args:
        images: uint8 [H, W, 3] or [H, W], both sides at least `side`.
        side: of the square in the middle that counts, a multiple of every period.
        periods: of the grids, px.
    """
    return highest_peak(np.mean([log_power(image, side) for image in images], axis=0), periods)


def highest_peak(spectrum: np.ndarray, periods: Sequence[int] = PERIODS) -> float:
    """grid_peak of a mean of log_power."""
    side, best = len(spectrum), -np.inf
    for period in periods:
        step = side // period
        for row in range(0, side, step):
            for column in range(0, side // 2 + 1, step):
                if row or column:
                    best = max(best, _above_neighbours(spectrum, row, column))
    return float(best)


def log_power(image: Image, side: int = 256) -> np.ndarray:
    """Logarithm of the power spectrum of the luma in the middle of a picture, [side, side]."""
    height, width = image.shape[:2]
    top, left = (height - side) // 2, (width - side) // 2
    luma = image[top : top + side, left : left + side].astype(np.float64)
    luma = luma if luma.ndim == 2 else luma @ np.array([0.299, 0.587, 0.114])
    window = np.hanning(side)
    power = np.abs(np.fft.fft2((luma - luma.mean()) * window[:, None] * window)) ** 2
    return np.asarray(np.log(power + 1e-3))  # a flat picture has no power at all


def _above_neighbours(spectrum: np.ndarray, row: int, column: int) -> float:
    side = len(spectrum)
    offsets = [offset for offset in range(-FAR, FAR + 1) if abs(offset) > NEAR]
    beside = [spectrum[(row + offset) % side, column] for offset in offsets]
    beside += [spectrum[row, (column + offset) % side] for offset in offsets]
    return float(spectrum[row, column] - np.median(beside))
