"""Noise: Gaussian (colour, gray or correlated between channels), shot noise, salt and pepper.

Torch-free. Counter-based: the k-th 16-bit word of a field depends on (seed, k) only, by Philox 4x64-10 as in numpy. So
the torch back end makes the same field on any device, and a field does not depend on order, batch or worker. A word
picks a quantile of the normal distribution; shot noise is such a value, skewed and scaled to the rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from components.images import to_uint8
from components.types import Image

GRAY_WEIGHTS = np.array([0.2989, 0.587, 0.114], np.float32)  # the original's luma (torchvision's rgb_to_grayscale)


def words(seed: int, count: int) -> np.ndarray:
    """The first `count` random 16-bit words of a seed, uint16 [count]."""
    return np.random.Philox(key=seed).random_raw(-(-count // 4)).astype("<u8", copy=False).view("<u2")[:count]


@lru_cache(maxsize=1)
def normal_table() -> np.ndarray:
    """Quantiles of the standard normal distribution at (k + 1/2) / 65536, scaled to variance 1: float32 [65536]."""
    from scipy.special import ndtri

    table = ndtri((np.arange(1 << 16) + 0.5) / (1 << 16))
    return (table / table.std()).astype(np.float32)


@lru_cache(maxsize=1)
def skew_table() -> np.ndarray:
    """(z^2 - 1) / 6 of the same quantiles, float32 [65536]: Cornish and Fisher's first term, the skew of a count."""
    return (normal_table() ** 2 - 1) / 6


@lru_cache(maxsize=9)
def shot_tables(photons: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of z and of its skew term at each 8-bit level, float32 [256] each.

    A count of rate r = level * photons / 255 is r + a z + b (z^2 - 1) / 6. With b = 1 and a^2 = r - 1 / 18 the variance
    is r. Where r is below 1/2, b = sqrt(2 r): the skew fades out, and level 0 has no noise.
    """
    rates = np.arange(256) * (photons / 255)
    skew = np.sqrt(np.minimum(1, 2 * rates))
    spread = np.sqrt((rates - skew**2 / 18).clip(0))
    return (spread / photons).astype(np.float32), (skew / photons).astype(np.float32)


def photon_count(levels: np.ndarray) -> int:
    """The number of distinct values in a uint8 array, rounded up to a power of two: 1..256."""
    histogram = cv2.calcHist([levels.reshape(-1, 1)], [0], None, [256], [0, 256])
    return 1 << (int(np.count_nonzero(histogram)) - 1).bit_length()


def gaussian_field(height: int, width: int, op: Mapping[str, Any], out: np.ndarray | None = None) -> np.ndarray:
    """Gaussian noise of a plan's operation: float32 [height, width, 3] on the scale 0..1, or [.., 1] when gray.

    `level` is the standard deviation in 8-bit levels. A 3 x 3 matrix `mix` (in 8-bit levels too) correlates the
    channels and replaces `level`, which is then for information only.
    """
    channels = 1 if op["gray"] else 3
    indices = words(op["seed"], height * width * channels).reshape(height, width, channels)
    table = normal_table()
    mix = op.get("mix")
    field = cv2.LUT(indices, table if mix is not None else table * np.float32(op["level"] / 255), dst=out)
    if field.ndim == 2:
        field = field[..., None]
    if mix is not None:
        field = cv2.transform(field, np.asarray(mix, np.float32) / np.float32(255))
    return field


def shot_field(image: Image, op: Mapping[str, Any]) -> np.ndarray:
    """Shot noise for float32 [H, W, 3] in 0..1: float32 of the same shape, or [H, W, 1] when gray.

    As in the original, the photon count depends on the content: the number of distinct 8-bit levels of the whole
    picture (all channels together; luma when gray), rounded up to a power of two. So a flat picture gets very strong
    noise. Variance = level^2 * rounded picture / photons.
    """
    source = cv2.transform(image, GRAY_WEIGHTS[None])[..., None] if op["gray"] else image
    levels = to_uint8(source)
    indices = words(op["seed"], levels.size).reshape(levels.shape)
    spread, skew = (table * np.float32(op["level"]) for table in shot_tables(photon_count(levels)))
    field = cv2.LUT(indices, normal_table())
    cv2.multiply(field, cv2.LUT(levels, spread), dst=field)
    bend = cv2.LUT(indices, skew_table())
    cv2.multiply(bend, cv2.LUT(levels, skew), dst=bend)
    return cv2.add(field, bend, dst=field).reshape(source.shape)


def noise_field(image: Image, op: Mapping[str, Any], out: np.ndarray | None = None) -> np.ndarray:
    """The field that a noise operation adds to float32 [H, W, 3]: the same shape, or [H, W, 1] when gray."""
    if op["kind"] == "gaussian":
        return gaussian_field(image.shape[0], image.shape[1], op, None if op["gray"] else out)
    return shot_field(image, op)


def salt_pepper(image: Image, op: Mapping[str, Any]) -> Image:
    """A copy with a share `amount` of the pixels (all channels together when gray) set to 0 or 1 with equal odds."""
    height, width = image.shape[:2]
    numbers = words(op["seed"], height * width * (1 if op["gray"] else 3)).reshape(height, width, -1)
    limit = round(op["amount"] * (1 << 16))
    hit = numbers < limit
    return np.where(hit, (numbers & 1).astype(np.float32), image)
