"""Restores pictures of any size with a SwinIR alone; large ones in tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from components.images import pad_to_multiple, working_size
from components.models import Model
from components.priors.files import DTYPES, Precision
from components.samplers.tiles import gaussian_weights, tile_boxes
from components.systems.swinir.network import SwinIR
from components.systems.swinir.objective import check_same_size
from components.systems.swinir.options import Options, option_texts, parse_options, restore_defaults
from components.systems.swinir.weights import network_of
from components.tensors import check_pictures
from components.types import Cancellation, Cancelled, Image, OnStep, Request, Restored, Restorer, SampleError, StepEvent


class SwinIRRestorer(Restorer):
    """See types.Restorer. The network is deterministic: seed and prompts have no effect.

    Args:
        network: its output must have its input's size.
        defaults: options that replace the built-in defaults.

    Raises:
        ValueError: another network, or a default that is unknown or out of range.
    """

    def __init__(self, network: SwinIR, defaults: Mapping[str, Any] | None = None) -> None:
        check_same_size(network.config)
        self.network = network.eval().requires_grad_(False)
        self.defaults = parse_options(defaults or {}, Options())

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        """Restore in request order, one picture at a time.

        Args:
            requests: any sizes; `size` enlarges or shrinks by bicubic interpolation first.
            on_step: called after each picture.
            cancelled: called before each tile.

        Raises:
            SampleError: a picture that is not uint8 RGB ("bad_image"), or an impossible size ("bad_size").
            ValueError: unknown or wrong options; the message names the nearest option.
            Cancellation: `cancelled()` became true.
        """
        restored = []
        for number, request in enumerate(requests, start=1):
            options = parse_options(request.options, self.defaults)
            image = self._restore_request(request, options, cancelled)
            restored.append(Restored(key=request.key, image=image, info={"system": "swinir", **option_texts(options)}))
            if on_step is not None:
                on_step(StepEvent(step=number, of=len(requests)))
        return restored

    def _restore_request(self, request: Request, options: Options, cancelled: Cancelled | None) -> Image:
        image = request.image
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise SampleError("bad_image", f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}", request.key)
        size = request.size or (image.shape[0], image.shape[1])
        if min(size) < 1:
            raise SampleError("bad_size", f"size must be positive, got {size[0]} x {size[1]}", request.key)
        enlarged = _resize(image, working_size(size, options.min_side_px))
        restored = restore_image(self.network, enlarged, options.tile_px, options.tile_overlap, cancelled, request.key)
        return _resize(restored, size)


@torch.inference_mode()
def restore_image(
    network: SwinIR,
    image: Image,
    tile_px: int = 1024,
    overlap: float = 0.25,
    cancelled: Cancelled | None = None,
    key: str = "",
) -> Image:
    """Restore one picture, uint8 [H, W, 3] -> the same size.

    The picture is padded with its mirror image to the network's multiple. Sides above tile_px are split
    into overlapping tiles with Gaussian weights. Memory, except for the 8-bit pictures, is that of a tile and a row of
    tiles.

    Args:
        network: on any device; tiles are moved there one by one.
        tile_px: rounded down to a multiple of network.config.multiple_px.
        overlap: least overlap of neighbours, as a share of a tile, 0 to 0.9.
        cancelled: called before each tile.
        key: the picture's name, for errors.

    Raises:
        SampleError: "not_finite", see tensors.check_pictures.
        Cancellation: `cancelled()` became true.
    """
    multiple = network.config.multiple_px
    height, width = image.shape[:2]
    padded = pad_to_multiple(image, multiple)
    rows, columns = padded.shape[:2]
    side = max(multiple, tile_px // multiple * multiple)
    boxes = tile_boxes(rows, columns, (side, side), overlap, multiple)
    weights = gaussian_weights(*boxes[0][2:]).to(torch.float32)[..., None].numpy()
    result = np.empty_like(padded)
    total = np.zeros((rows, columns, 1), dtype=np.float32)
    for top, left, h, w in boxes:
        total[top : top + h, left : left + w] += weights
    strip, strip_top = np.zeros((0, columns, 3), dtype=np.float32), 0
    for top, left, h, w in boxes:
        if cancelled is not None and cancelled():
            raise Cancellation("cancelled between two tiles")
        if top > strip_top:  # boxes are in reading order: the rows above are complete
            _write_rows(result, strip[: top - strip_top], strip_top)
            strip, strip_top = strip[top - strip_top :], top
        missing_rows = top + h - strip_top - len(strip)
        if missing_rows > 0:
            strip = np.concatenate([strip, np.zeros((missing_rows, columns, 3), np.float32)])
        restored = _restore_tile(network, padded[top : top + h, left : left + w], key)
        strip[:h, left : left + w] += restored * (weights / total[top : top + h, left : left + w])
    _write_rows(result, strip, strip_top)
    return np.ascontiguousarray(result[:height, :width])


def _restore_tile(network: SwinIR, image: Image, key: str) -> np.ndarray:
    """Restore one tile, uint8 [h, w, 3] -> float32 [h, w, 3] in [0, 1], not clipped."""
    weight = network.conv_last.weight
    pixels: Tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(weight.device)
    restored = network(pixels.to(torch.float32).div(255).to(weight.dtype))
    check_pictures(restored, [key])
    return restored[0].permute(1, 2, 0).to(torch.float32).cpu().numpy()


def _write_rows(result: Image, rows: np.ndarray, top: int) -> None:
    """Round complete float rows into the 8-bit picture."""
    result[top : top + len(rows)] = np.rint(np.clip(rows, 0, 1) * 255).astype(np.uint8)


def _resize(image: Image, size: tuple[int, int]) -> Image:
    if image.shape[:2] == size:
        return image
    return np.array(Pillow.fromarray(image).resize((size[1], size[0]), Pillow.Resampling.BICUBIC))


def build_restorer(
    model: Model, device: str = "cpu", precision: Precision = "fp32", batch_size: int = 1, **defaults: Any
) -> SwinIRRestorer:
    """The restorer of a model folder.

    Args:
        model: a folder with a SwinIR.
        device: where the network goes.
        precision: of its weights.
        batch_size: unused: pictures differ in size and are restored one by one.
        defaults: options that replace the built-in ones and the recipe's min_side_px, its training resolution.

    Raises:
        ModelError: the folder is damaged.
    """
    options = {**restore_defaults(model.info["recipe"]), **defaults}
    return SwinIRRestorer(network_of(model).to(device, DTYPES[precision]), options)
