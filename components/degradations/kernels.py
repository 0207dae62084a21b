"""Blur kernels and filtering: the six bell families and the circular low-pass of Real-ESRGAN, as pure functions.

Torch-free. Kernels are float64 [size, size] with odd size and sum 1. x runs along columns and y along rows; sigma_x is
the spread along u = cos(theta) x + sin(theta) y, sigma_y the one along v = -sin(theta) x + cos(theta) y, so a positive
theta turns clockwise on screen. q = (u / sigma_x)^2 + (v / sigma_y)^2. Real-ESRGAN (Wang et al. 2021), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from scipy.special import j1

from components.types import Image

FAMILIES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
"""Bell families, in the order in which their probabilities are given."""

USM_SIZE_PX, USM_SIGMA = 51, 8.0  # BasicSR's sharpening: radius 50 made odd, sigma 0.3 (25 - 1) + 0.8
USM_WEIGHT, USM_THRESHOLD = 0.5, 10.0  # strength; residual in 8-bit levels from which a pixel is sharpened


def gaussian(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0) -> np.ndarray:
    """exp(-q / 2), float64 [size, size]."""
    return _normalised(np.exp(-0.5 * _squared_radius(size, sigma_x, sigma_y, theta)))


def generalized(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> np.ndarray:
    """exp(-q^beta / 2), float64 [size, size]: peaked below beta 1, flat-topped above."""
    return _normalised(np.exp(-0.5 * _squared_radius(size, sigma_x, sigma_y, theta) ** beta))


def plateau(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> np.ndarray:
    """1 / (1 + q^beta), float64 [size, size]: long tails."""
    return _normalised(1 / (1 + _squared_radius(size, sigma_x, sigma_y, theta) ** beta))


def sinc(size: int, cutoff: float) -> np.ndarray:
    """Circular low-pass c J1(c r) / (2 pi r), float64 [size, size]; it rings, as over-sharpened pictures do.

    Args:
        size: odd side in pixels.
        cutoff: c in radians a pixel, in (0, pi]; pi keeps all frequencies inside the circle.
    """
    x, y = _offsets(size)
    radius = np.hypot(x, y)
    middle = size // 2
    radius[middle, middle] = 1.0  # any number but 0; the limit follows
    kernel = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[middle, middle] = cutoff**2 / (4 * np.pi)
    return _normalised(kernel)


def build(spec: Mapping[str, Any]) -> np.ndarray:
    """The kernel of a plan's numbers: {"kind": "sinc", size, cutoff} or {"kind": family, size, sigma_x, ... beta}.

    Raises:
        ValueError: an unknown kind, or a size that is not odd.
    """
    kind, size = spec["kind"], int(spec["size"])
    if kind == "sinc":
        return sinc(size, spec["cutoff"])
    if kind not in FAMILIES:
        raise ValueError(f"unknown kernel kind {kind!r}; known are {', '.join(FAMILIES)} and sinc")
    shape = (size, spec["sigma_x"], spec["sigma_y"], spec["theta"])
    if kind.startswith("generalized"):
        return generalized(*shape, spec["beta"])
    if kind.startswith("plateau"):
        return plateau(*shape, spec["beta"])
    return gaussian(*shape)


def pad(kernel: np.ndarray, size: int) -> np.ndarray:
    """Zero-pad [k, k] to [size, size] around the centre, as the original does before batching."""
    margin = (size - kernel.shape[0]) // 2
    return np.pad(kernel, margin)


def filter2d(image: Image, kernel: np.ndarray) -> Image:
    """Correlate float32 [H, W, 3] with a kernel [k, k]; the border mirrors without repeating the edge pixel.

    Works for pictures smaller than the kernel too (the mirror repeats), where the original fails.
    """
    return cv2.filter2D(image, cv2.CV_32F, kernel.astype(np.float32), borderType=cv2.BORDER_REFLECT_101)


def blur(image: Image, spec: Mapping[str, Any]) -> Image:
    """Filter float32 [H, W, 3] with a plan's kernel; isotropic Gaussians run as two passes, equal to 1e-6."""
    if spec["kind"] == "iso":
        return _gaussian_blur(image, int(spec["size"]), spec["sigma_x"])
    return filter2d(image, build(spec))


def sharpen(image: Image, weight: float = USM_WEIGHT, threshold: float = USM_THRESHOLD) -> Image:
    """Unsharp masking of float32 [H, W, 3] in 0..1 where the residual exceeds `threshold` 8-bit levels.

    Real-ESRGAN sharpens HQ so before degrading; the hard mask is blurred, and the sharpened picture clipped before the
    two are blended.
    """
    residual = image - _gaussian_blur(image, USM_SIZE_PX, USM_SIGMA)
    mask = (np.abs(residual) * 255 > threshold).astype(np.float32)
    soft = _gaussian_blur(mask, USM_SIZE_PX, USM_SIGMA)
    sharp = (image + weight * residual).clip(0, 1)
    return soft * sharp + (1 - soft) * image


def _gaussian_blur(image: Image, size: int, sigma: float) -> Image:
    """Isotropic Gaussian blur of float32 [H, W, 3] as two one-dimensional passes."""
    offsets = np.arange(size) - size // 2
    line = np.exp(-0.5 * (offsets / sigma) ** 2)
    line = (line / line.sum()).astype(np.float32)
    return cv2.sepFilter2D(image, cv2.CV_32F, line, line, borderType=cv2.BORDER_REFLECT_101)


def _offsets(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y from the centre, float64 [size, size] each."""
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel size must be odd and positive, got {size}")
    line = np.arange(size, dtype=np.float64) - size // 2
    x, y = np.meshgrid(line, line)
    return x, y


def _squared_radius(size: int, sigma_x: float, sigma_y: float, theta: float) -> np.ndarray:
    """Squared Mahalanobis radius q, float64 [size, size]."""
    x, y = _offsets(size)
    u = (np.cos(theta) * x + np.sin(theta) * y) / sigma_x
    v = (np.cos(theta) * y - np.sin(theta) * x) / sigma_y
    return u**2 + v**2


def _normalised(kernel: np.ndarray) -> np.ndarray:
    return kernel / kernel.sum()
