"""Blur kernels: the six bell families and the circular low-pass of Real-ESRGAN, as pure functions.

Torch-free. Kernels are float64 [size, size] with odd size and sum 1. x runs along columns, y along rows. sigma_x is the
spread along u = cos(theta) x + sin(theta) y, sigma_y along v = -sin(theta) x + cos(theta) y; a positive theta turns
clockwise on screen. q = (u / sigma_x)^2 + (v / sigma_y)^2. Real-ESRGAN (Wang et al. 2021), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import j1

from components.degradations.plans import FAMILIES


def gaussian(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0) -> np.ndarray:
    """exp(-q / 2), float64 [size, size]."""
    return _normalise(np.exp(-0.5 * _squared_radius(size, sigma_x, sigma_y, theta)))


def generalized(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> np.ndarray:
    """exp(-q^beta / 2), float64 [size, size]: peaked below beta 1, flat-topped above."""
    return _normalise(np.exp(-0.5 * _squared_radius(size, sigma_x, sigma_y, theta) ** beta))


def plateau(size: int, sigma_x: float, sigma_y: float, theta: float, beta: float) -> np.ndarray:
    """1 / (1 + q^beta), float64 [size, size]: long tails."""
    return _normalise(1 / (1 + _squared_radius(size, sigma_x, sigma_y, theta) ** beta))


def sinc(size: int, cutoff: float) -> np.ndarray:
    """Circular low-pass c J1(c r) / (2 pi r), float64 [size, size]. It rings like an over-sharpened picture.

    Args:
        size: odd side in pixels.
        cutoff: c in radians a pixel, in (0, pi]; pi keeps all frequencies inside the circle.
    """
    x, y = _offsets(size)
    radius = np.hypot(x, y)
    middle = size // 2
    radius[middle, middle] = 1.0  # avoids 0 / 0; the limit at the centre is set below
    kernel = cutoff * j1(cutoff * radius) / (2 * np.pi * radius)
    kernel[middle, middle] = cutoff**2 / (4 * np.pi)
    return _normalise(kernel)


def build(spec: Mapping[str, Any]) -> np.ndarray:
    """Builds the kernel that a plan describes.

    Args:
        spec: {"kind": "sinc", size, cutoff}, {"kind": family, size, sigma_x, sigma_y, theta, beta}, or
            {"kind": "given", weights} for a measured kernel.

    Raises:
        ValueError: the kind is unknown, or the size is even.
    """
    kind = spec["kind"]
    if kind == "given":
        return np.asarray(spec["weights"], np.float64)
    size = int(spec["size"])
    if kind == "sinc":
        return sinc(size, spec["cutoff"])
    if kind not in FAMILIES:
        raise ValueError(f"unknown kernel kind {kind!r}. Choose from {', '.join(FAMILIES)} and sinc")
    shape = (size, spec["sigma_x"], spec["sigma_y"], spec["theta"])
    if kind.startswith("generalized"):
        return generalized(*shape, spec["beta"])
    if kind.startswith("plateau"):
        return plateau(*shape, spec["beta"])
    return gaussian(*shape)


def line(size: int, sigma: float) -> np.ndarray:
    """The Gaussian line whose outer product with itself is `gaussian(size, sigma, sigma)`, float32 [size]."""
    weights = np.exp(-0.5 * ((np.arange(size) - size // 2) / sigma) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def pad(kernel: np.ndarray, size: int) -> np.ndarray:
    """Pads [k, k] with zeros to [size, size] around the centre, as the original does before batching."""
    margin = (size - kernel.shape[0]) // 2
    return np.pad(kernel, margin)


def trim(kernel: np.ndarray, tolerance: float) -> np.ndarray:
    """Cuts outer rings from [k, k] while their absolute values sum to at most `tolerance`."""
    margin, total = 0, np.abs(kernel).sum()
    while kernel.shape[0] - 2 * margin > 3:
        inner = kernel[margin + 1 : -margin - 1, margin + 1 : -margin - 1]
        if total - np.abs(inner).sum() > tolerance:
            break
        margin += 1
    return kernel[margin : kernel.shape[0] - margin, margin : kernel.shape[1] - margin]


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


def _normalise(kernel: np.ndarray) -> np.ndarray:
    return kernel / kernel.sum()
