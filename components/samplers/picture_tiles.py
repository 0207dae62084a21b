"""Run a network from pictures to pictures on a picture of any size, in overlapping tiles, with the memory of a tile.

The network needs no state between tiles. `tiles.py` is the same for denoisers, whose tiles belong to one sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from components.images import pad_to_multiple
from components.samplers.tiles import gaussian_weights, tile_boxes
from components.tensors import check_pictures
from components.types import Box, Cancellation, Cancelled, Image

PictureNetwork = Callable[[Tensor], Tensor]
"""Pictures [1, 3, h, w] in [0, 1] -> the same size, about the same range, not clipped."""


@torch.inference_mode()
def restore_in_tiles(
    network: PictureNetwork,
    image: Image,
    multiple: int,
    tile_px: int,
    overlap: float,
    like: Tensor,
    cancelled: Cancelled | None = None,
    key: str = "",
) -> Image:
    """Restore one picture, uint8 [H, W, 3] -> the same size.

    The picture is padded with its mirror image to `multiple`. Sides above tile_px are split into overlapping tiles with
    Gaussian weights. Memory, except for the 8-bit pictures, is that of a tile and a row of tiles.

    Args:
        network: see PictureNetwork.
        multiple: the network's sides are multiples of it.
        tile_px: largest side of a tile; rounded down to a multiple.
        overlap: least overlap of neighbours, as a share of a tile, 0 to 0.9.
        like: a weight of the network: tiles get its device and dtype, one by one.
        cancelled: called before each tile.
        key: the picture's name, for errors.

    Raises:
        SampleError: "not_finite", see tensors.check_pictures.
        Cancellation: `cancelled()` became true.
    """
    height, width = image.shape[:2]
    padded = pad_to_multiple(image, multiple)
    rows, columns = padded.shape[:2]
    side = max(multiple, tile_px // multiple * multiple)
    boxes = tile_boxes(rows, columns, (side, side), overlap, multiple)
    weights = gaussian_weights(*boxes[0][2:]).to(torch.float32)[..., None].numpy()
    total = np.zeros((rows, columns, 1), dtype=np.float32)
    for top, left, h, w in boxes:
        total[top : top + h, left : left + w] += weights

    def shares(box: Box) -> np.ndarray:
        top, left, h, w = box
        return weights / total[top : top + h, left : left + w]

    result = blend_tiles(network, padded, boxes, shares, like, 1, cancelled, key)
    return np.ascontiguousarray(result[:height, :width])


@torch.inference_mode()
def blend_tiles(
    network: PictureNetwork,
    image: Image,
    boxes: Sequence[Box],
    shares: Callable[[Box], np.ndarray],
    like: Tensor,
    factor: int = 1,
    cancelled: Cancelled | None = None,
    key: str = "",
) -> Image:
    """Restore a picture tile by tile, uint8 [H, W, 3] -> [factor H, factor W, 3].

    Args:
        network: see PictureNetwork; here its result has `factor` times the sides of its input.
        boxes: tiles that cover the picture, in reading order; those of one row have one top.
        shares: of each tile in the result, float32 [factor h, factor w, 1]. At every pixel the shares sum to 1.
        like, cancelled, key: see restore_in_tiles, with its errors.
    """
    rows, columns = image.shape[0] * factor, image.shape[1] * factor
    result = np.empty((rows, columns, 3), dtype=np.uint8)
    strip, strip_top = np.zeros((0, columns, 3), dtype=np.float32), 0
    for box in boxes:
        if cancelled is not None and cancelled():
            raise Cancellation("cancelled between two tiles")
        top, left, h, w = (side * factor for side in box)
        if top > strip_top:  # boxes are in reading order: the rows above are complete
            _write_rows(result, strip[: top - strip_top], strip_top)
            strip, strip_top = strip[top - strip_top :], top
        missing_rows = top + h - strip_top - len(strip)
        if missing_rows > 0:
            strip = np.concatenate([strip, np.zeros((missing_rows, columns, 3), np.float32)])
        restored = _restore_tile(network, image[box[0] : box[0] + box[2], box[1] : box[1] + box[3]], like, key)
        strip[:h, left : left + w] += restored * shares(box)
    _write_rows(result, strip, strip_top)
    return result


def _restore_tile(network: PictureNetwork, image: Image, like: Tensor, key: str) -> np.ndarray:
    """Restore one tile, uint8 [h, w, 3] -> float32 of the network's sides, in [0, 1], not clipped."""
    pixels: Tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(like.device)
    restored = network(pixels.to(torch.float32).div(255).to(like.dtype))
    check_pictures(restored, [key])
    return restored[0].permute(1, 2, 0).to(torch.float32).cpu().numpy()


def _write_rows(result: Image, rows: np.ndarray, top: int) -> None:
    """Round complete float rows into the 8-bit picture."""
    result[top : top + len(rows)] = np.rint(np.clip(rows, 0, 1) * 255).astype(np.uint8)
