"""Sensor noise: Gaussian and Poisson, in colour or gray, as fields to add.

Torch-free. Levels are in 8-bit units where the name says so; fields are float32 in the picture's own 0..1.
"""

from __future__ import annotations

import numpy as np

from components.types import Image

GRAY_WEIGHTS = np.array([0.2989, 0.587, 0.114], np.float32)  # the original's luma (torchvision's rgb_to_grayscale)


def gaussian_field(height: int, width: int, level: float, gray: bool, draw: np.random.Generator) -> np.ndarray:
    """Gaussian noise of standard deviation `level` (8-bit units): float32 [height, width, 3], or [.., 1] when gray."""
    field = draw.standard_normal((height, width, 1 if gray else 3), dtype=np.float32)
    return field * np.float32(level / 255)


def poisson_field(image: Image, scale: float, gray: bool, draw: np.random.Generator) -> np.ndarray:
    """Shot noise of float32 [H, W, 3] in 0..1: float32 of the same shape, or [H, W, 1] when gray.

    As in the original the photon count follows the content: `vals`, the next power of two of the number of distinct
    8-bit levels of the whole picture (all channels together; luma when gray), so that a flat picture gets very strong
    noise. Variance = scale^2 * rounded picture / vals. The draws are exact, not a normal approximation.
    """
    source = (image @ GRAY_WEIGHTS)[..., None] if gray else image
    levels = np.rint(source * 255).clip(0, 255).astype(np.uint8)
    vals = photon_count(levels)
    rates = levels * (vals / 255)  # float64
    return ((draw.poisson(rates) - rates) * (scale / vals)).astype(np.float32)


def photon_count(levels: np.ndarray) -> int:
    """Next power of two of the number of distinct values in a uint8 array: 1..256."""
    distinct = int(np.count_nonzero(np.bincount(levels.ravel(), minlength=256)))
    return 1 << (distinct - 1).bit_length()
