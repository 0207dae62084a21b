"""Restores pictures of any size with a SwinIR alone; large ones in tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow

from components.images import working_size
from components.models import Model
from components.priors.files import DTYPES, Precision
from components.samplers.picture_tiles import restore_in_tiles
from components.systems.swinir.network import SwinIR
from components.systems.swinir.objective import check_same_size
from components.systems.swinir.options import Options, option_texts, parse_options, restore_defaults
from components.systems.swinir.weights import network_of
from components.types import Cancelled, Image, OnStep, Request, Restored, Restorer, SampleError, StepEvent


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


def restore_image(
    network: SwinIR,
    image: Image,
    tile_px: int = 1024,
    overlap: float = 0.25,
    cancelled: Cancelled | None = None,
    key: str = "",
) -> Image:
    """Restore one picture, uint8 [H, W, 3] -> the same size; see restore_in_tiles."""
    like = network.conv_last.weight
    return restore_in_tiles(network, image, network.config.multiple_px, tile_px, overlap, like, cancelled, key)


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
