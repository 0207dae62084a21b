"""Colour transfer: a restored picture takes its colours from the input (StableSR's post-processing).

There are two forms. SUPIR and InstaRevive compute both with the same numbers:

    adain      each channel gets the input's mean and standard deviation
    wavelet    fine bands of the restored picture on the coarsest band of the input

The two code bases call them differently. SUPIR applies them to tensors in [-1, 1] and clips afterwards. InstaRevive
applies them to each tile, without statistics of the whole picture. Here they use the whole picture.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from components.tensors import images_to_tensor, tensor_to_images
from components.types import Image

Transfer = Literal["none", "adain", "wavelet"]
LEVELS = 5
ADAIN_EPS = 1e-5
STRIP_PX = 512
"""Rows of one strip, so that memory does not grow with the picture; ours."""


def adain(content: Tensor, style: Tensor, eps: float = ADAIN_EPS) -> Tensor:
    """Return content with style's mean and standard deviation per channel (Huang and Belongie 2017).

    Args:
        content, style: [B, C, H, W]; sizes may differ.
        eps: added to the unbiased variance.

    Raises:
        ValueError: channels differ, or a picture has a single pixel and so no variance.
    """
    if content.shape[:2] != style.shape[:2]:
        raise ValueError(f"content {tuple(content.shape)} and style {tuple(style.shape)} differ in batch or channels")
    mean, deviation = _statistics(content, eps)
    style_mean, style_deviation = _statistics(style, eps)
    return (content - mean) / deviation * style_deviation + style_mean


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + eps), [B, C, 1, 1]."""
    if x.shape[-1] * x.shape[-2] < 2:
        raise ValueError(f"a picture of {tuple(x.shape[-2:])} pixels has no variance")
    variance, mean = torch.var_mean(x, dim=(-2, -1), keepdim=True)
    return mean, (variance + eps).sqrt()


def wavelet_blur(x: Tensor, radius: int) -> Tensor:
    """Apply one level of the a-trous transform: the 3 x 3 binomial kernel with holes of `radius` px, edges repeated.

    Args:
        x: [B, C, H, W] of any size; edges also repeat where the radius exceeds a side.
    """
    # separable: [1, 2, 1] / 4 along each axis
    for dim in (-2, -1):
        size = x.shape[dim]
        places = torch.arange(-radius, size + radius, device=x.device).clamp(0, size - 1)
        padded = x.index_select(dim, places)
        low, middle, high = (padded.narrow(dim, start, size) for start in (0, radius, 2 * radius))
        x = 0.25 * low + 0.5 * middle + 0.25 * high
    return x


def wavelet_split(x: Tensor, levels: int = LEVELS) -> tuple[Tensor, Tensor]:
    """Split x into (fine, coarse) bands that add up to x; the radius starts at 1 and doubles with each level."""
    coarse = x
    for level in range(levels):
        coarse = wavelet_blur(coarse, 2**level)
    return x - coarse, coarse


def wavelet(content: Tensor, style: Tensor, levels: int = LEVELS) -> Tensor:
    """Return the fine bands of content on the coarse band of style; both [B, C, H, W], not clipped.

    Raises:
        ValueError: shapes differ.
    """
    if content.shape != style.shape:
        raise ValueError(f"content {tuple(content.shape)} and style {tuple(style.shape)} differ")
    return wavelet_split(content, levels)[0] + wavelet_split(style, levels)[1]


def transfer_colors(restored: Image, lq: Image, kind: Transfer, strip_px: int = STRIP_PX) -> Image:
    """Transfer the colours of 8-bit pictures strip by strip, so that memory does not grow with their height.

    The strips are exact: adain uses the statistics of the whole pictures, and a wavelet strip includes the rows that
    its blurs reach. Compared with a transfer of unrounded pictures, a level may differ by one.

    Args:
        restored, lq: uint8 [H, W, 3] of one size.
        kind: "none" returns `restored` unchanged.
        strip_px: rows of a strip.

    Raises:
        ValueError: sizes differ, or the kind is unknown.
    """
    if restored.shape != lq.shape:
        raise ValueError(f"pictures of {restored.shape} and {lq.shape} differ in size")
    if kind == "none":
        return restored
    if kind not in ("adain", "wavelet"):
        raise ValueError(f"colour transfer must be none, adain or wavelet, got {kind!r}")
    height = len(restored)
    halo = 2**LEVELS - 1 if kind == "wavelet" else 0  # sum of the radii
    gain, shift = _adain_line(restored, lq) if kind == "adain" else (None, None)
    result = np.empty_like(restored)
    for top in range(0, height, strip_px):
        bottom = min(top + strip_px, height)
        first, last = max(0, top - halo), min(height, bottom + halo)
        content = images_to_tensor([restored[first:last]])
        if kind == "wavelet":
            strip = wavelet(content, images_to_tensor([lq[first:last]]))
        else:
            assert gain is not None and shift is not None
            strip = content * gain + shift
        result[top:bottom] = tensor_to_images(strip[:, :, top - first : bottom - first])[0]
    return result


def _adain_line(restored: Image, lq: Image) -> tuple[Tensor, Tensor]:
    """Return adain of two whole 8-bit pictures as gain and shift [1, 3, 1, 1], computed from histograms."""
    count = restored.shape[0] * restored.shape[1]
    if count < 2:
        return torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)
    moments = []
    for image in (restored, lq):
        levels = np.arange(256, dtype=np.float64) / 127.5 - 1
        histograms = np.stack([np.bincount(image[..., c].ravel(), minlength=256) for c in range(3)])
        mean = histograms @ levels / count
        variance = (histograms @ levels**2 - count * mean**2) / (count - 1)
        moments.append((mean, np.sqrt(np.maximum(variance, 0) + ADAIN_EPS)))
    (mean, deviation), (lq_mean, lq_deviation) = moments
    gain = lq_deviation / deviation
    line = (torch.from_numpy(v).to(torch.float32).view(1, 3, 1, 1) for v in (gain, lq_mean - gain * mean))
    return next(line), next(line)
