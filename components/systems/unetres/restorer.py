"""Restores pictures of any size with the regression and the generator; large ones in tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as Pillow
from torch import Tensor

from components.models import Model
from components.priors.files import DTYPES, Precision
from components.samplers.picture_tiles import restore_in_tiles
from components.systems.unetres.build import GENERATOR, REGRESSION, network_of
from components.systems.unetres.network import UNetRes
from components.systems.unetres.options import Options, option_texts, parse_options, restore_defaults
from components.types import Cancelled, Image, OnStep, Request, Restored, Restorer, SampleError, StepEvent


class UNetResRestorer(Restorer):
    """See types.Restorer. The networks are deterministic: seed and prompts have no effect.

    Args:
        regression: restores by itself.
        generator: adds detail to the regression's result; None for none.
        defaults: options that replace the built-in defaults.

    Raises:
        ValueError: a default is unknown or out of range.
    """

    def __init__(
        self, regression: UNetRes, generator: UNetRes | None = None, defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.regression = regression.eval().requires_grad_(False)
        self.generator = None if generator is None else generator.eval().requires_grad_(False)
        networks = [network for network in (self.regression, self.generator) if network is not None]
        self.multiple_px = math.lcm(*(network.config.multiple_px for network in networks))
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
            restored.append(Restored(key=request.key, image=image, info={"system": "unetres", **option_texts(options)}))
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
        if image.shape[:2] != size:
            image = np.array(Pillow.fromarray(image).resize((size[1], size[0]), Pillow.Resampling.BICUBIC))
        return restore_in_tiles(
            functools.partial(self._network, options.strength),
            image,
            self.multiple_px,
            options.tile_px,
            options.tile_overlap,
            self.regression.head.weight,
            cancelled,
            request.key,
        )

    def _network(self, strength: float, images: Tensor) -> Tensor:
        """Pictures in [0, 1]: the regression's, and `strength` times what the generator changes."""
        lq = images * 2 - 1
        result = self.regression(lq)
        if self.generator is not None and strength:
            detail = self.generator.change(result, lq)
            result = result + strength * detail.to(result.dtype)
        return result / 2 + 0.5  # type: ignore[no-any-return]


def build_restorer(
    model: Model, device: str = "cpu", precision: Precision = "fp32", batch_size: int = 1, **defaults: Any
) -> UNetResRestorer:
    """The restorer of a model folder.

    Args:
        model: a folder of a trained UNetRes.
        device: where the networks go.
        precision: of their weights.
        batch_size: unused: pictures differ in size and are restored one by one.
        defaults: options that replace the built-in ones and the recipe's.

    Raises:
        ModelError: the folder is damaged.
    """
    options = {**restore_defaults(model.info.get("recipe") or {}), **defaults}
    regression = network_of(model, REGRESSION).to(device, DTYPES[precision])
    generator = None
    if GENERATOR in model.info["parts"]:
        generator = network_of(model, GENERATOR).to(device, DTYPES[precision])
    return UNetResRestorer(regression, generator, options)
