"""Filtering float32 pictures [H, W, 3] with blur kernels, and unsharp masking.

Torch-free. Borders are mirrored without repeating the edge; a kernel is correlated, not flipped. A picture may be
smaller than the kernel (the mirror then repeats), where the original fails. `blur` picks the fastest method within
TOLERANCE. It trims outer rings of small weight. A kernel that is a sum of few outer products runs as two
one-dimensional passes per product. Other small kernels use the direct sum, large ones the Fourier transform.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from components.degradations import kernels
from components.degradations.resize import resize
from components.degradations.scratch import take
from components.types import Image

TOLERANCE = 2e-4  # largest error of a blur in 0..1: a twentieth of an 8-bit level; noise and JPEG come after it
RANKS = 3  # outer products of a kernel at most; their two passes cost about a third of a large direct sum
DIRECT_PX = 11  # larger kernels use our Fourier transform; OpenCV's own switch to it takes three times as long
FOURIER_FROM = 160 * 160  # pixels; in smaller pictures the direct sum is as fast

USM_SIZE_PX, USM_SIGMA = 51, 8.0  # BasicSR's sharpening: radius 50 made odd, sigma 0.3 (25 - 1) + 0.8
USM_WEIGHT, USM_THRESHOLD = 0.5, 10.0  # strength; pixels with a larger residual (8-bit levels) are sharpened
QUICK = 4  # quick sharpening blurs at 1 / QUICK of the size


def filter2d(image: Image, kernel: np.ndarray, out: np.ndarray | None = None) -> Image:
    """Correlates with a kernel [k, k], directly or by the Fourier transform; the two agree to 5e-6."""
    large = kernel.shape[0] > DIRECT_PX and image.shape[0] * image.shape[1] >= FOURIER_FROM
    if large and min(image.shape[:2]) > kernel.shape[0]:
        return _fourier(image, kernel, out)
    return cv2.filter2D(image, cv2.CV_32F, kernel.astype(np.float32), dst=out, borderType=cv2.BORDER_REFLECT_101)


def blur(image: Image, spec: Mapping[str, Any], exact: bool = False, out: np.ndarray | None = None) -> Image:
    """Filters with a plan's kernel.

    Args:
        image: float32 [H, W, 3].
        spec: see kernels.build.
        exact: use the whole kernel; otherwise the result is within TOLERANCE of that.
        out: float32 [H, W, 3] for the result; must not be `image`.
    """
    if spec["kind"] == "iso":
        line = kernels.line(int(spec["size"]), spec["sigma_x"])
        line = line if exact else _trim_line(line)
        return _two_passes(image, line, line, out)
    kernel = kernels.build(spec)
    if exact:
        return filter2d(image, kernel, out)
    kernel = kernels.trim(kernel, TOLERANCE / 4)
    kernel = kernel / kernel.sum()
    if kernel.shape[0] >= 7:
        terms = _outer_products(kernel)
        if terms:
            blurred = _two_passes(image, *terms[0], out)
            for rows, columns in terms[1:]:
                more = _two_passes(image, rows, columns, take(image.shape, image, blurred))
                cv2.add(blurred, more, dst=blurred)
            return blurred
    return filter2d(image, kernel, out)


def sharpen(
    image: Image,
    weight: float = USM_WEIGHT,
    threshold: float = USM_THRESHOLD,
    quick: bool = False,
    out: np.ndarray | None = None,
) -> Image:
    """Unsharp masking of float32 [H, W, 3] in 0..1 where the residual exceeds `threshold` 8-bit levels.

    Real-ESRGAN sharpens HQ in this way before the degradation. It blurs the hard mask and clips the sharpened picture,
    and then blends: soft * sharp + (1 - soft) * image.

    Args:
        quick: blur at a quarter of the size, in a fifth of the time. The error is up to 8 levels at single pixels on
            the edge of the mask, and a quarter of a level in the mean of 256-pixel crops (tests).
        out: float32 [H, W, 3] for the result; must not be `image`.
    """
    blurred = _quarter_blur if quick else _wide_blur
    residual = blurred(image, np.empty_like(image) if out is None else out)
    np.subtract(image, residual, out=residual)
    mask = np.abs(residual, out=take(image.shape, image, residual))
    mask *= np.float32(255)
    cv2.threshold(mask, threshold, 1, cv2.THRESH_BINARY, dst=mask)
    soft = blurred(mask, take(image.shape, image, residual, mask))
    sharp = cv2.scaleAdd(residual, weight, image, dst=residual)
    np.clip(sharp, 0, 1, out=sharp)
    sharp -= image
    sharp *= soft
    sharp += image
    return sharp


def _wide_blur(image: Image, out: np.ndarray) -> Image:
    line = kernels.line(USM_SIZE_PX, USM_SIGMA)
    return _two_passes(image, line, line, out)


def _quarter_blur(image: Image, out: np.ndarray) -> Image:
    height, width = image.shape[:2]
    small = resize(image, max(1, height // QUICK), max(1, width // QUICK), "area")
    line = kernels.line(USM_SIZE_PX // QUICK | 1, USM_SIGMA / QUICK)
    return resize(_two_passes(small, line, line), height, width, "bilinear", out)


def _two_passes(image: Image, rows: np.ndarray, columns: np.ndarray, out: np.ndarray | None = None) -> Image:
    """Correlates along x with `rows` and along y with `columns`."""
    return cv2.sepFilter2D(image, cv2.CV_32F, rows, columns, dst=out, borderType=cv2.BORDER_REFLECT_101)


def _trim_line(line: np.ndarray) -> np.ndarray:
    """Cuts a symmetric line to its middle; two passes lose twice the weight that one cut loses."""
    margin = int(np.searchsorted(2 * np.cumsum(line[: line.size // 2]), TOLERANCE / 4))
    middle: np.ndarray = line[margin : line.size - margin]
    return middle / middle.sum()


def _outer_products(kernel: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(row, column) lines whose outer products sum to the kernel within TOLERANCE / 2; [] if RANKS are too few."""
    left, values, right = np.linalg.svd(kernel)
    rest = kernel - (left[:, :RANKS] * values[:RANKS]) @ right[:RANKS]
    if np.abs(rest).sum() > TOLERANCE / 2:
        return []
    ranks = RANKS
    while ranks > 1:
        less = rest + values[ranks - 1] * np.outer(left[:, ranks - 1], right[ranks - 1])
        if np.abs(less).sum() > TOLERANCE / 2:
            break
        rest, ranks = less, ranks - 1
    scale = np.sqrt(values[:ranks])
    return [
        ((right[k] * scale[k]).astype(np.float32), (left[:, k] * scale[k]).astype(np.float32)) for k in range(ranks)
    ]


def _fourier(image: Image, kernel: np.ndarray, out: np.ndarray | None) -> Image:
    """Correlation by OpenCV's real transform, plane by plane on a mirrored border."""
    height, width = image.shape[:2]
    reach = kernel.shape[0] // 2
    rows, columns = (cv2.getOptimalDFTSize(side + 2 * reach) for side in (height, width))
    padded = cv2.copyMakeBorder(image, reach, reach, reach, reach, cv2.BORDER_REFLECT_101)
    plane_kernel = np.zeros((rows, columns), np.float32)
    plane_kernel[: kernel.shape[0], : kernel.shape[1]] = kernel
    response = cv2.dft(plane_kernel)
    result = np.empty_like(image) if out is None else out
    plane = np.zeros((rows, columns), np.float32)
    for channel in range(image.shape[2]):
        plane[: padded.shape[0], : padded.shape[1]] = padded[..., channel]
        spectrum: np.ndarray = cv2.dft(plane)  # the argument nonzeroRows would make it four times slower
        cv2.mulSpectrums(spectrum, response, 0, spectrum, conjB=True)
        inverse = cv2.dft(spectrum, dst=spectrum, flags=cv2.DFT_INVERSE | cv2.DFT_SCALE)
        result[..., channel] = inverse[:height, :width]
    return result
