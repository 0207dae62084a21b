"""Noise: Gaussian (colour, gray or correlated between channels), shot noise, salt and pepper.

Torch-free. The random generator is counter-based (Philox 4x64-10, as in numpy): the k-th 16-bit word of a noise field
depends only on (seed, k). So the torch back end makes the same field on any device, and a field does not depend on
order, batch or worker. Gaussian noise uses a word as an index into a table of normal quantiles. Shot noise scales and
skews such a quantile, so that it approximates a Poisson count.

Below, "the original" is Real-ESRGAN, and "level" in an operation `op` is the strength of its noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from components.images import to_uint8
from components.types import Image

GRAY_WEIGHTS = np.array([0.2989, 0.587, 0.114], np.float32)  # luma as in the original (torchvision's rgb_to_grayscale)


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
    """(z^2 - 1) / 6 for each z of normal_table, float32 [65536].

    This is the first term of the Cornish-Fisher expansion of a Poisson count; it gives the count its skew.
    """
    return (normal_table() ** 2 - 1) / 6


@lru_cache(maxsize=9)
def shot_tables(photons: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors a / photons and b / photons for each 8-bit pixel value, float32 [256] each.

    A Poisson count of rate r = value * photons / 255 is approximated by r + a z + b (z^2 - 1) / 6. With b = 1 and
    a^2 = r - 1 / 18 the variance is r. If r is below 1/2, b = sqrt(2 r) and a^2 = r - b^2 / 18: the variance stays r,
    the skew term fades out, and value 0 has no noise.
    """
    rates = np.arange(256) * (photons / 255)
    skew = np.sqrt(np.minimum(1, 2 * rates))
    spread = np.sqrt(rates - skew**2 / 18)
    return (spread / photons).astype(np.float32), (skew / photons).astype(np.float32)


def photon_count(pixels: np.ndarray) -> int:
    """The photons of a white pixel, as in the original: the number of distinct values of a uint8 picture.

    The number is rounded up to a power of two: 1..256.
    """
    histogram = cv2.calcHist([pixels.reshape(-1, 1)], [0], None, [256], [0, 256])
    return 1 << (int(np.count_nonzero(histogram)) - 1).bit_length()


def gaussian_field(height: int, width: int, op: Mapping[str, Any], out: np.ndarray | None = None) -> np.ndarray:
    """Gaussian noise for a plan's operation: float32 [height, width, 3], or [height, width, 1] if gray.

    Pixels have the scale 0..1. op["level"] is the standard deviation in 8-bit levels. A 3 x 3 matrix op["mix"], also in
    8-bit levels, correlates the channels; op["level"] then has no effect.
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
    """Shot noise for a picture, float32 [H, W, 3] in 0..1: float32 of the same shape, or [H, W, 1] if gray.

    As in the original, the number of photons depends on the content: see photon_count, which counts the 8-bit values of
    all channels together, or of the luma if gray. So a flat picture gets very strong noise. The variance at a pixel is
    op["level"]^2 * p / photons, where p is the pixel in 0..1, rounded to 8 bit.
    """
    source = cv2.transform(image, GRAY_WEIGHTS[None])[..., None] if op["gray"] else image
    pixels = to_uint8(source)
    indices = words(op["seed"], pixels.size).reshape(pixels.shape)
    spread, skew = (table * np.float32(op["level"]) for table in shot_tables(photon_count(pixels)))
    field = cv2.LUT(indices, normal_table())
    cv2.multiply(field, cv2.LUT(pixels, spread), dst=field)
    skew_field = cv2.LUT(indices, skew_table())
    cv2.multiply(skew_field, cv2.LUT(pixels, skew), dst=skew_field)
    return cv2.add(field, skew_field, dst=field).reshape(source.shape)


def noise_field(image: Image, op: Mapping[str, Any], out: np.ndarray | None = None) -> np.ndarray:
    """The noise that an operation adds to a picture, float32 [H, W, 3]: of the same shape, or [H, W, 1] if gray."""
    if op["kind"] == "gaussian":
        return gaussian_field(image.shape[0], image.shape[1], op, None if op["gray"] else out)
    return shot_field(image, op)


def salt_pepper(image: Image, op: Mapping[str, Any]) -> Image:
    """A copy in which a share op["amount"] of the values is set to 0 or 1, with equal odds.

    If gray, a pixel's three channels change together.
    """
    height, width = image.shape[:2]
    random_words = words(op["seed"], height * width * (1 if op["gray"] else 3)).reshape(height, width, -1)
    limit = round(op["amount"] * (1 << 16))
    hit = random_words < limit
    return np.where(hit, (random_words & 1).astype(np.float32), image)
