"""niqe_restoray: a NIQE-type score without a target, with a model of our own.

The normalised brightness of a picture's patches has statistics. Those of sharp photographs are near a Gaussian, which
was fitted on the cleared photographs that train the shipped models. The score is the distance to it (Mittal et al.
2013, "Making a completely blind image quality analyzer", Eqs. 1 to 10). It differs from NIQE: it has other photographs,
and patches of 64 px at every 32 px, so that a picture of 256 px has 49. So its numbers do not belong in NIQE's column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import gamma

from components.types import Image

PATCH_PX, STRIDE_PX = 64, 32
MIN_SIDE_PX = PATCH_PX + STRIDE_PX
WINDOW_PX, WINDOW_SIGMA = 7, 7 / 6
SHARP_SHARE = 0.75
"""The Gaussian is fitted on patches whose mean contrast is at least this share of their picture's highest (Eq. 8)."""

NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""Steps to the neighbour whose product with a pixel is taken: right, below, and the two diagonals."""

FEATURES = 2 * (2 + 4 * len(NEIGHBOURS))
"""Numbers of a patch: two scales of a generalised Gaussian's two and four asymmetric ones' four parameters."""

FILE = Path(__file__).parent / "weights" / "niqe-restoray.safetensors"


def naturalness(image: Image, gaussian: tuple[np.ndarray, np.ndarray] | None = None) -> float:
    """Distance of a picture's patches from those of sharp photographs; lower is better.

    Args:
        image: uint8 [H, W, 3], sides of MIN_SIDE_PX or more.
        gaussian: (mean [FEATURES], covariance [FEATURES, FEATURES]); None takes the shipped one.

    Raises:
        ValueError: a smaller picture.
    """
    mean, covariance = gaussian or shipped_gaussian()
    features, _ = patch_features(image)
    own = np.cov(features, rowvar=False)
    difference = features.mean(axis=0) - mean
    return float(np.sqrt(difference @ np.linalg.pinv((covariance + own) / 2) @ difference))


def fit(images: Iterable[Image]) -> tuple[np.ndarray, np.ndarray]:
    """(mean, covariance) of the sharp patches of pictures, float64."""
    sharp = []
    for image in images:
        features, contrast = patch_features(image)
        sharp.append(features[contrast >= SHARP_SHARE * contrast.max()])
    rows = np.concatenate(sharp)
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


def save(gaussian: tuple[np.ndarray, np.ndarray], path: Path = FILE) -> None:
    """Write a Gaussian as the shipped one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"mean": gaussian[0], "covariance": gaussian[1]}, path)


@lru_cache(maxsize=1)
def shipped_gaussian() -> tuple[np.ndarray, np.ndarray]:
    """The Gaussian that comes with the code."""
    tensors = load_file(FILE)
    return tensors["mean"], tensors["covariance"]


def patch_features(image: Image) -> tuple[np.ndarray, np.ndarray]:
    """Features [patches, FEATURES] and mean contrast [patches] of a picture; errors as in `naturalness`."""
    if min(image.shape[:2]) < MIN_SIDE_PX:
        raise ValueError(f"needs sides of {MIN_SIDE_PX} px, the picture has {min(image.shape[:2])}")
    even = image[: image.shape[0] // 2 * 2, : image.shape[1] // 2 * 2]  # so that both scales have the same patches
    brightness: np.ndarray = even.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    columns: list[np.ndarray] = []
    contrast = np.zeros(0)
    for scale in (1, 2):
        if scale == 2:
            size = (brightness.shape[1] // 2, brightness.shape[0] // 2)
            brightness = np.asarray(cv2.resize(brightness, size, interpolation=cv2.INTER_AREA))
        normalised, deviation = normalise(brightness)
        patch = (PATCH_PX // scale, STRIDE_PX // scale)
        if scale == 1:
            contrast = means_of_patches(deviation, *patch).ravel()
        moments = [np.abs(normalised), normalised**2]
        columns += generalised_gaussian(*(means_of_patches(m, *patch).ravel() for m in moments))
        for down, right in NEIGHBOURS:
            product = normalised * np.roll(normalised, (-down, -right), axis=(0, 1))
            left = product < 0
            sides = [left.astype(np.float32), product**2 * left, product**2 * ~left, np.abs(product), product**2]
            columns += asymmetric_gaussian(*(means_of_patches(m, *patch).ravel() for m in sides))
    return np.stack(columns, axis=1).astype(np.float64), contrast


def normalise(brightness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((I - mean) / (deviation + 1), deviation) with Gaussian windows (Eqs. 1 to 3)."""

    def blur(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, (WINDOW_PX, WINDOW_PX), WINDOW_SIGMA, borderType=cv2.BORDER_REPLICATE)

    mean = blur(brightness)
    deviation = np.sqrt(np.abs(blur(brightness**2) - mean**2))
    return (brightness - mean) / (deviation + 1), deviation


def means_of_patches(values: np.ndarray, patch: int, stride: int) -> np.ndarray:
    """Mean of each patch [rows, columns] of a map of values of at least 0."""
    sums = cv2.integral(values.astype(np.float64))
    tops = np.arange(0, values.shape[0] - patch + 1, stride)
    lefts = np.arange(0, values.shape[1] - patch + 1, stride)
    low, high = tops[:, None], tops[:, None] + patch
    total = sums[high, lefts + patch] - sums[low, lefts + patch] - sums[high, lefts] + sums[low, lefts]
    return np.maximum(total, 0) / patch**2  # a sum of zeros may be a little negative in floats


def generalised_gaussian(absolute: np.ndarray, square: np.ndarray) -> list[np.ndarray]:
    """Shape and variance of a generalised Gaussian from E|x| and E x^2 (Eq. 4; moment matching)."""
    shapes, ratios = _shape_table()
    ratio = absolute**2 / np.maximum(square, 1e-12)
    return [shapes[_nearest(ratios, ratio)], square]


def asymmetric_gaussian(
    left_share: np.ndarray, left: np.ndarray, right: np.ndarray, absolute: np.ndarray, square: np.ndarray
) -> list[np.ndarray]:
    """Shape, mean, left and right deviation of an asymmetric generalised Gaussian (Eqs. 5 to 7).

    Args:
        left_share: share of negative values; left, right: E x^2 over all values, of the negative and of the others.
        absolute, square: E|x| and E x^2.
    """
    shapes, ratios = _shape_table()
    left_deviation = np.sqrt(left / np.maximum(left_share, 1e-6))
    right_deviation = np.sqrt(right / np.maximum(1 - left_share, 1e-6))
    gain = left_deviation / np.maximum(right_deviation, 1e-6)
    ratio = absolute**2 / np.maximum(square, 1e-12)
    ratio = ratio * (gain**3 + 1) * (gain + 1) / (gain**2 + 1) ** 2
    shape = shapes[_nearest(ratios, ratio)]
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    mean = (right_deviation - left_deviation) * scale * gamma(2 / shape) / gamma(1 / shape)
    return [shape, mean, left_deviation, right_deviation]


@lru_cache(maxsize=1)
def _shape_table() -> tuple[np.ndarray, np.ndarray]:
    """Shapes, and the ratio (E|x|)^2 / E x^2 of each, rising."""
    shapes = np.arange(0.2, 10.0, 0.001)
    return shapes, gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes))


def _nearest(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the nearest entry of a rising table."""
    right = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    return np.where(np.abs(values - table[right - 1]) <= np.abs(values - table[right]), right - 1, right)


def feature_names() -> Sequence[str]:
    """Names of the features, for reports and tests."""
    one = ["shape", "variance"]
    for down, right in NEIGHBOURS:
        one += [f"{name} {down},{right}" for name in ("shape", "mean", "left", "right")]
    return [f"{name} /{scale}" for scale in (1, 2) for name in one]
