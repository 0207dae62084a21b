"""Windows, colours and rounding as in the released command line (reference, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from components.color import Transfer, adain, wavelet
from components.tensors import check_pictures
from components.types import Box, Image


def windows(height: int, width: int, side: int, stride: int) -> list[Box]:
    """Boxes from the top left, `stride` apart, the last ones flush with the border; in reading order.

    Args:
        height, width: of the grid.
        side: of a window; one window covers a shorter side of the grid.
        stride: 1 to side.

    Raises:
        ValueError: a stride that would leave gaps.
    """
    if not 1 <= stride <= side:
        raise ValueError(f"stride must be between 1 and the window's side {side}, got {stride}")
    sides = (min(side, height), min(side, width))
    places = [
        [*range(0, length - extent, stride), length - extent]
        for length, extent in zip((height, width), sides, strict=True)
    ]
    return [(top, left, *sides) for top in places[0] for left in places[1]]


def decode_windows(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    source: Tensor,
    boxes: Sequence[Box],
    factor: int,
    color: Transfer,
) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] (not clipped): each window is decoded and coloured by itself, then averaged.

    Args:
        decode: scaled latents -> pictures in [-1, 1].
        latents: [B, C, H / factor, W / factor].
        source: pictures with the target colours, [B, 3, H, W] in [0, 1].
        boxes: in latent pixels; they cover the latents.
        color: "none", "adain" or "wavelet".
    """
    total, count = torch.zeros_like(source), torch.zeros_like(source[:1, :1])
    for top, left, height, width in boxes:
        picture = decode(latents[..., top : top + height, left : left + width].contiguous()) / 2 + 0.5
        rows, columns = (slice(a * factor, (a + n) * factor) for a, n in ((top, height), (left, width)))
        if color != "none":
            picture = (adain if color == "adain" else wavelet)(picture, source[..., rows, columns])
        total[..., rows, columns] += picture
        count[..., rows, columns] += 1
    return total / count


def nearest_pool(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask [B, 1, H, W] resized to (height, width) by nearest pixels."""
    return F.interpolate(mask, size)


def to_levels(pictures: Tensor, rounding: Literal["nearest", "truncate"], keys: Sequence[str] = ()) -> list[Image]:
    """float [B, 3, H, W] in [0, 1] (values outside are clipped) -> uint8 [H, W, 3] each.

    Raises:
        SampleError: "not_finite", see tensors.check_pictures; `keys` are the pictures' names for it.
    """
    check_pictures(pictures, keys)
    levels = pictures.to(torch.float32).clamp(0, 1) * 255
    levels = levels.round() if rounding == "nearest" else levels
    return list(levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
