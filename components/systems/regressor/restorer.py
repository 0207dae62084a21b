"""Restores pictures of any size with a network of the community; large ones in tiles.

One rule joins the network's factor and the size that a request asks for: the network's input is the request's picture,
resized to the result's size divided by the factor. At scale 1 a network of factor 4 thus gets its picture shrunk to a
fourth, which undoes its factor; at scale 4 it gets the picture as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image as Pillow

from components.models import Model, ModelError
from components.options import restore_defaults
from components.picture_restorer import PictureRestorer
from components.priors.files import DTYPES, Precision
from components.systems.regressor.network import Regressor, config_of, network_of
from components.systems.regressor.options import MODELS_OWN, Options
from components.systems.regressor.tiles import restore_with_context
from components.types import Cancelled, Image


class RegressorRestorer(PictureRestorer[Options]):
    """See types.Restorer. The networks are deterministic: seed and prompts have no effect.

    Args:
        network: in evaluation mode.
        defaults: options that replace the built-in defaults.

    Raises:
        ValueError: a default is unknown or out of range.
    """

    def __init__(self, network: Regressor, defaults: Mapping[str, Any] | None = None) -> None:
        self.network = network.eval().requires_grad_(False)
        super().__init__("regressor", defaults or {}, Options())

    def restore_image(
        self, image: Image, size: tuple[int, int], options: Options, cancelled: Cancelled | None, key: str
    ) -> Image:
        """See PictureRestorer."""
        config = self.network.config
        context = config.context_px if options.context_px == MODELS_OWN else options.context_px
        restored = restore_with_context(
            self.network,
            network_input(image, size, config.factor),
            config,
            options.tile_of(config.factor),
            context,
            next(self.network.parameters()),
            cancelled,
            key,
        )
        return np.ascontiguousarray(restored[: size[0], : size[1]])


def network_input(image: Image, size: tuple[int, int], factor: int) -> Image:
    """A picture resized to what a network enlarges to `size`, or to at most factor - 1 px more below and to the right.

    The resize is Pillow's bicubic one. It widens its kernel when it shrinks, so it does not alias. Super-resolution
    trains on such inputs (MATLAB's imresize has the same kernel). Pixels keep their places: where the result's side is
    no multiple of the factor, the picture goes on with its mirror image.

    Args:
        image: uint8 [H, W, 3].
        size: (height, width) of the result.
        factor: of the network.

    Returns:
        uint8 [ceil(height / factor), ceil(width / factor), 3]; the picture itself if that is its size.
    """
    sides = [-(-side // factor) for side in size]
    # the part of the picture, in its own pixels, that the sides stand for
    spans = [side * factor * own / goal for side, own, goal in zip(sides, image.shape, size, strict=False)]
    if list(image.shape[:2]) == sides and all(span == side for span, side in zip(spans, sides, strict=True)):
        return image
    surplus = [max(0, int(np.ceil(span)) - own) for span, own in zip(spans, image.shape, strict=False)]
    for axis, more in enumerate(surplus):
        if more:
            widths = [(0, more) if axis == other else (0, 0) for other in range(3)]
            image = np.pad(image, widths, mode="reflect" if image.shape[axis] > 1 else "edge")
    box = (0, 0, min(spans[1], image.shape[1]), min(spans[0], image.shape[0]))
    resized = Pillow.fromarray(image).resize((sides[1], sides[0]), Pillow.Resampling.BICUBIC, box=box)
    return np.array(resized)


def build_restorer(
    model: Model, device: str = "cpu", precision: Precision = "fp32", batch_size: int = 1, **defaults: Any
) -> RegressorRestorer:
    """The restorer of a model folder.

    Args:
        model: a folder of a regressor.
        device: where the network goes.
        precision: of its weights.
        batch_size: unused: pictures differ in size and are restored one by one.
        defaults: options that replace the built-in ones and the recipe's.

    Raises:
        ModelError: the folder is damaged, or its architecture does not run in this precision.
    """
    check_precision(model, precision)
    options = {**restore_defaults(model.info.get("recipe") or {}), **defaults}
    return RegressorRestorer(network_of(model).to(device, DTYPES[precision]), options)


def check_precision(model: Model, precision: str) -> None:
    """Raises ModelError for a precision in which the model's architecture does not run."""
    config = config_of(model)
    if precision not in config.precisions:
        raise ModelError(
            f"{model.path}: a {config.architecture} does not run in {precision}, but in {', '.join(config.precisions)}"
        )
