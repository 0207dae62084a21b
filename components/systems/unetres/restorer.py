"""Restores pictures of any size with the regression and the generator; large ones in tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from components.models import Model
from components.options import restore_defaults
from components.picture_restorer import PictureRestorer, resize_bicubic
from components.priors.files import DTYPES, Precision
from components.samplers.picture_tiles import restore_in_tiles
from components.systems.unetres.build import GENERATOR, REGRESSION, network_of
from components.systems.unetres.network import UNetRes
from components.systems.unetres.options import Options
from components.types import Cancelled, Image


class UNetResRestorer(PictureRestorer[Options]):
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
        super().__init__("unetres", defaults or {}, Options())

    def restore_image(
        self, image: Image, size: tuple[int, int], options: Options, cancelled: Cancelled | None, key: str
    ) -> Image:
        """See PictureRestorer."""
        return restore_in_tiles(
            functools.partial(self._network, options.strength),
            resize_bicubic(image, size),
            self.multiple_px,
            options.tile_px,
            options.tile_overlap,
            self.regression.head.weight,
            cancelled,
            key,
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
