"""Resizing as the degradations need it: without antialiasing, to a size or by a factor.

The original passes a factor for its first resize. Its bilinear and bicubic modes then sample with a step that does not
fit the floored size, and LQ shifts by up to 6.6 px against HQ. `resample` with the factor's step reproduces that.
`resize` uses OpenCV to reach a size: the result is aligned, and ten times faster. The modes:

    area        OpenCV's: it weights fractions of pixels
    pool        the original's area mode: whole pixels, so it keeps more noise; the distribution test detects it
    bilinear, bicubic
    antialias   a bicubic (a = -0.5) whose kernel is stretched when shrinking, the usual x4 of super-resolution tests
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from scipy.sparse import csr_matrix

from components.degradations.plans import RESIZE_MODES as MODES
from components.types import Image

OPENCV = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def resize(image: Image, height: int, width: int, mode: str, out: np.ndarray | None = None) -> Image:
    """Resizes float32 [H, W, 3] to [height, width, 3]. Bicubic may overshoot 0..1; the result is not clipped.

    Args:
        mode: one of MODES.
        out: buffer that OpenCV's modes may write to; the result may be another array.

    Raises:
        ValueError: the mode is unknown.
    """
    if image.shape[:2] == (height, width):
        return image
    if mode in OPENCV:
        return cv2.resize(image, (width, height), dst=out, interpolation=OPENCV[mode])
    return resample(image, height, width, mode, image.shape[0] / height, image.shape[1] / width)


def resample(image: Image, height: int, width: int, mode: str, step_y: float, step_x: float) -> Image:
    """Resizes float32 [H, W, 3] to [height, width, 3]; the steps are source pixels per output pixel."""
    rows = _sparse(image.shape[0], height, mode, step_y)
    columns = _sparse(image.shape[1], width, mode, step_x)
    tall = (rows @ image.reshape(image.shape[0], -1)).reshape(height, image.shape[1], 3)
    transposed = (columns @ cv2.transpose(tall).reshape(image.shape[1], -1)).reshape(width, height, 3)
    return cv2.transpose(transposed)


def _sparse(size_in: int, size_out: int, mode: str, step: float) -> csr_matrix:
    """sampling_matrix as a sparse float32 matrix."""
    if mode != "pool":
        return csr_matrix(sampling_matrix(size_in, size_out, mode, step), dtype=np.float32)
    row = np.arange(size_out)
    first, last = row * size_in // size_out, -(-(row + 1) * size_in // size_out)
    length = last - first
    starts = np.concatenate([[0], np.cumsum(length)])
    places = np.arange(starts[-1]) - np.repeat(starts[:-1] - first, length)
    weights = np.repeat(1 / length, length).astype(np.float32)
    return csr_matrix((weights, places, starts), shape=(size_out, size_in))


def sampling_matrix(size_in: int, size_out: int, mode: str, step: float) -> np.ndarray:
    """Weights, float64 [size_out, size_in]; each row sums to 1. Pixel centres are at half-integers, edges repeat.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"unknown resize mode {mode!r}. Choose from {', '.join(MODES)}")
    matrix = np.zeros((size_out, size_in))
    rows = np.arange(size_out)
    if mode == "pool":
        pool_matrix: np.ndarray = _sparse(size_in, size_out, mode, step).toarray().astype(np.float64)
        return pool_matrix
    if mode == "area" and step >= 1:
        edges = np.arange(size_in)
        for row in rows:
            overlap = np.minimum(edges + 1, (row + 1) * step) - np.maximum(edges, row * step)
            matrix[row] = overlap.clip(0) / step
        return matrix / matrix.sum(1, keepdims=True)
    if mode == "area":  # enlarging: OpenCV mixes two neighbours where an output pixel covers both
        first = np.floor(rows * step).astype(int)
        share = (rows + 1) - (first + 1) / step
        share = np.where(share > 0, share - np.floor(share), 0)
        np.add.at(matrix, (rows, first.clip(0, size_in - 1)), 1 - share)
        np.add.at(matrix, (rows, (first + 1).clip(0, size_in - 1)), share)
        return matrix
    centre = (rows + 0.5) * step - 0.5
    if mode == "bilinear":
        centre = centre.clip(0)  # as torch does; bicubic keeps its negative centres
    stretch = max(1.0, step) if mode == "antialias" else 1.0
    reach = {"bilinear": 1, "bicubic": 2, "antialias": math.ceil(2 * stretch)}[mode]
    first = np.floor(centre).astype(int) - reach + 1
    for tap in range(2 * reach):
        where = first + tap
        distance = np.abs(where - centre) / stretch
        weight = (
            (1 - distance).clip(0) if mode == "bilinear" else cubic(distance, -0.5 if mode == "antialias" else -0.75)
        )
        np.add.at(matrix, (rows, where.clip(0, size_in - 1)), weight)
    return matrix / matrix.sum(1, keepdims=True) if mode == "antialias" else matrix


def cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel at distances >= 0."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
