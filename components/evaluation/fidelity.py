"""PSNR, SSIM and GMSD, computed here, so that they need no metric library.

The conventions are those of pyiqa, so that scores agree with it: Y is full range, 0.299 R + 0.587 G + 0.114 B; SSIM and
GMSD see values of 0 to 255, rounded to whole numbers.

Functions take (restored, hq), float tensors [1, 3, H, W] in [0, 1], and return a scalar tensor in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in Y (ITU-R BT.601)."""

SQUARED_ERROR_FLOOR = 1e-8
"""Added to the mean squared error: equal pictures score 80 dB."""

WINDOW_PX, WINDOW_SIGMA_PX = 11, 1.5
"""The Gaussian window of SSIM (Wang et al. 2004, sec. III-C)."""

SSIM_K1, SSIM_K2 = 0.01, 0.03
"""The constants of SSIM, as shares of the range (Wang et al. 2004, sec. III-C)."""

GMSD_C = 170.0
"""The constant of GMSD for values of 0 to 255 (Xue et al. 2014, sec. III)."""


def luma(images: Tensor) -> Tensor:
    """Y [B, 1, H, W] of RGB [B, 3, H, W], in the same range."""
    weights = torch.tensor(LUMA, dtype=torch.float64, device=images.device)
    return (images.double() * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)


def psnr(restored: Tensor, hq: Tensor) -> Tensor:
    """PSNR in dB over all channels."""
    error = (restored.double() - hq.double()).square().mean()
    return -10 * torch.log10(error + SQUARED_ERROR_FLOOR)


def psnry(restored: Tensor, hq: Tensor) -> Tensor:
    """PSNR in dB of Y."""
    return psnr(luma(restored), luma(hq))


def ssim(restored: Tensor, hq: Tensor) -> Tensor:
    """Mean SSIM of Y."""
    return _mean_ssim((luma(restored) * 255).round(), (luma(hq) * 255).round())


def ssimc(restored: Tensor, hq: Tensor) -> Tensor:
    """Mean SSIM over the three channels."""
    return _mean_ssim((restored.double() * 255).round(), (hq.double() * 255).round())


def _mean_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM of [1, C, H, W] with values of 0 to 255 (Wang et al. 2004, Eqs. 13 to 17).

    Only whole windows count. The contrast-structure term is cut off at 0, so that no window scores below 0.
    """
    offsets = torch.arange(WINDOW_PX, dtype=x.dtype, device=x.device) - WINDOW_PX // 2
    line = torch.exp(-offsets.square() / (2 * WINDOW_SIGMA_PX**2))
    line = line / line.sum()

    def blur(values: Tensor) -> Tensor:
        planes = values.transpose(0, 1)  # channels as a batch: every channel has the same window
        return F.conv2d(F.conv2d(planes, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    means = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (means * contrast.clamp(min=0)).mean()


def gmsd(restored: Tensor, hq: Tensor) -> Tensor:
    """Deviation of the gradient similarity of Y at half size (Xue et al. 2014, Eqs. 2 to 7).

    Prewitt gradients; beyond the border the picture is 0. The deviation is that of a sample (n - 1).
    """
    x, y = (_gradient(F.avg_pool2d((luma(image) * 255).round(), 2)) for image in (restored, hq))
    similarity = (2 * x * y + GMSD_C) / (x**2 + y**2 + GMSD_C)
    return similarity.std()


def _gradient(plane: Tensor) -> Tensor:
    """Magnitude of the Prewitt gradient of [1, 1, H, W]."""
    box = torch.ones(3, dtype=plane.dtype, device=plane.device) / 3
    slope = torch.tensor([1.0, 0.0, -1.0], dtype=plane.dtype, device=plane.device)
    kernels = torch.stack([torch.outer(box, slope), torch.outer(slope, box)]).unsqueeze(1)
    return F.conv2d(plane, kernels, padding=1).square().sum(1, keepdim=True).sqrt()
