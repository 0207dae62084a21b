"""Sizes and resizing of the official tools (supir.md, section 4.5).

The command line enlarges a picture by its factor, then until its short side is MIN_SIDE, and rounds its sides to
MULTIPLE. The result comes back at the size before that minimum. The demo page rounds to PAGE_MULTIPLE with other
filters, and its result keeps the working size.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from torch import Tensor

from components.images import MAX_STRETCH
from components.types import Image

MIN_SIDE, MULTIPLE, PAGE_MULTIPLE = 1024, 64, 32


def released_sizes(
    size: tuple[int, int], min_side: int = MIN_SIDE, multiple: int = MULTIPLE
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(working size, size of the result), both (height, width), for a result of about `size`.

    Args:
        size: (height, width) of the input times its factor, rounded.
    """
    height, width = size
    factor = _enlargement(size, min_side)
    work = tuple(max(multiple, round(side * factor / multiple) * multiple) for side in (height, width))
    return (work[0], work[1]), (height, width)


def fixed_sizes(size: tuple[int, int], side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The same with a short side of exactly `side`, which may also shrink the picture."""
    factor = side / min(size)
    result = (round(size[0] * factor), round(size[1] * factor))
    return released_sizes(result, min_side=0)[0], result


def page_resize(image: Image, factor: float, min_side: int = MIN_SIDE, multiple: int = PAGE_MULTIPLE) -> Image:
    """A picture at the demo page's working size: Lanczos where the factor enlarges, else area.

    Args:
        image: uint8 [H, W, 3].
        factor: of the result's sides to the input's.
    """
    size = (image.shape[0] * factor, image.shape[1] * factor)
    larger = _enlargement(size, min_side)
    height, width = (max(multiple, round(side * larger / multiple) * multiple) for side in size)
    how = cv2.INTER_LANCZOS4 if factor > 1 else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), dtype=np.uint8)


def page_fix(image: Image, side: int) -> Image:
    """A picture whose short side becomes `side`, with sides of multiples of 64, as the demo page makes it."""
    (height, width), _ = fixed_sizes((image.shape[0], image.shape[1]), side)
    how = cv2.INTER_LANCZOS4 if side > min(image.shape[:2]) else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), dtype=np.uint8)


def _enlargement(size: tuple[float, float], min_side: int) -> float:
    """The factor to a short side of `min_side`; in a strip the long side limits it, as in images.working_size."""
    return max(1.0, min(min_side / min(size), MAX_STRETCH * min_side / max(size)))


def resize_result(image: Tensor, size: tuple[int, int]) -> Image:
    """A result [3, H, W] in [-1, 1] at (height, width), uint8: bicubic without antialias, and cut off, not rounded."""
    resized = F.interpolate(image[None].float(), size=size, mode="bicubic")[0]
    levels = (resized.permute(1, 2, 0) * 127.5 + 127.5).cpu().numpy().clip(0, 255)
    return levels.astype(np.uint8)


def resize(image: Image, size: tuple[int, int]) -> Image:
    """Resize uint8 [H, W, 3] to (height, width), bicubic; a picture of that size is returned as it is."""
    if image.shape[:2] == size:
        return image
    return np.array(Pillow.fromarray(image).resize((size[1], size[0]), Pillow.Resampling.BICUBIC))


def to_tensor(image: Image) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 127.5 - 1
