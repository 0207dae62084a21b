"""Preprocessing of pictures: the sizes of the released command line, and the perceptor's view.

Like the official tools, this module resizes 8-bit pictures with Pillow, so the bits are equal on every device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from components.images import MAX_STRETCH
from components.priors.sdxl_config import IMAGENET_MEAN, IMAGENET_STD, ImageView
from components.types import Image

Fit = Literal["whole", "crop", "pad", "crops"]


@dataclass(frozen=True, kw_only=True)
class ResizeRule:
    """The released command line's sizes (instantir.md section 5).

    Attributes:
        min_side: first, a shorter short side is enlarged to this.
        max_side: second, a longer long side is reduced to this.
        multiple: last, both sides are rounded down to multiples of this. The picture is resized to them, not cropped.
    """

    min_side: int = 768
    max_side: int = 1024
    multiple: int = 64


def released_sizes(
    input_wh: tuple[int, int],
    width: int | None = None,
    height: int | None = None,
    rule: ResizeRule = ResizeRule(),
) -> tuple[tuple[int, int], tuple[int, int]]:
    """((width, height) at which the networks run, (width, height) of the result), by the released rules.

    Args:
        input_wh: (width, height) of the picture.
        width, height: size of the result; one alone keeps the aspect, neither keeps the picture's size.

    Raises:
        ValueError: a size below one pixel.
    """
    if min(input_wh) < 1 or any(side is not None and side < 1 for side in (width, height)):
        raise ValueError(f"sizes must be positive, got {input_wh} to {(width, height)}")
    if width is not None:
        output = (width, height if height is not None else round(input_wh[1] * width / input_wh[0]))
    elif height is not None:
        output = (round(input_wh[0] * height / input_wh[1]), height)
    else:
        output = input_wh
    sides: tuple[float, float] = output
    if min(sides) < rule.min_side:
        sides = _scale_sides(sides, rule.min_side / min(sides))
    if max(sides) > rule.max_side:
        sides = _scale_sides(sides, rule.max_side / max(sides))
    runtime = tuple(max(rule.multiple, int(side) // rule.multiple * rule.multiple) for side in sides)
    return (runtime[0], runtime[1]), output


def _scale_sides(sides: tuple[float, float], ratio: float) -> tuple[int, int]:
    return round(sides[0] * ratio), round(sides[1] * ratio)


def resize(image: Image, size: tuple[int, int], how: Pillow.Resampling) -> Image:
    """Resize uint8 [H, W, 3] to (height, width) with Pillow; a picture of that size is returned as it is."""
    if image.shape[:2] == size:
        return image
    return np.array(Pillow.fromarray(image).resize((size[1], size[0]), how))


def view_pixels(image: Image, view: ImageView, fit: Fit) -> Tensor:
    """The input of the perceptor's picture encoder for one picture.

    Args:
        image: uint8 [H, W, 3].
        view: the encoder's sizes.
        fit: "crop" is the released form: the short side becomes view.shortest_edge_px, and the centre square of
            view.crop_px is cropped; pixels outside are lost. "whole" resizes the picture to the square. "pad" fits it
            into the square on the mean colour. "crops" takes the released crop at evenly spaced positions along the
            long side, so that the crops cover the picture. A strip of more than MAX_STRETCH to 1 is first squeezed.

    Returns:
        Normalised float32 [N, 3, crop, crop]: N is 1, or with "crops" the number of positions.

    Raises:
        ValueError: `fit` is unknown.
    """
    side = view.crop_px
    height, width = image.shape[:2]
    if fit == "whole":
        return normalise(resize(image, (side, side), Pillow.Resampling.BICUBIC))[None]
    if fit == "pad":
        ratio = side / max(height, width)
        size = (max(1, round(height * ratio)), max(1, round(width * ratio)))
        top, left = (side - size[0]) // 2, (side - size[1]) // 2
        canvas = torch.zeros(3, side, side)  # 0 is the mean colour, as in "no picture"
        pixels = normalise(resize(image, size, Pillow.Resampling.BICUBIC))
        canvas[:, top : top + size[0], left : left + size[1]] = pixels
        return canvas[None]
    if fit not in ("crop", "crops"):
        raise ValueError(f"view must be whole, crop, pad or crops, got {fit!r}")
    if max(height, width) > MAX_STRETCH * min(height, width):  # else 1 x 3000 pixels would become 3000 views
        size = (min(height, MAX_STRETCH * width), min(width, MAX_STRETCH * height))
        image = resize(image, size, Pillow.Resampling.BICUBIC)
        height, width = size
    edge = view.shortest_edge_px
    # as in the BiT-style processor: the long side is truncated to an integer
    size = (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)
    picture = resize(image, (max(side, size[0]), max(side, size[1])), Pillow.Resampling.BICUBIC)
    places = [_middle(picture.shape[:2], side)] if fit == "crop" else _places(picture.shape[:2], side)
    return torch.stack([normalise(picture[t : t + side, left : left + side]) for t, left in places])


def _middle(size: tuple[int, ...], side: int) -> tuple[int, int]:
    return (size[0] - side) // 2, (size[1] - side) // 2


def _places(size: tuple[int, ...], side: int) -> list[tuple[int, int]]:
    """(top, left) corners of evenly spaced squares that cover the picture."""
    axes = []
    for length in size[:2]:
        count = -(-length // side)
        axes.append([i * (length - side) // max(1, count - 1) for i in range(count)])
    return [(top, left) for top in axes[0] for left in axes[1]]


def normalise(image: Image) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W], normalised by ImageNet's mean and standard deviation."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(torch.float32).div(255)
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / deviation
