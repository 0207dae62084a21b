"""Restores pictures of any size with a SwinIR alone; large ones in tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.images import working_size
from components.models import Model
from components.picture_restorer import PictureRestorer, resize_bicubic
from components.priors.files import DTYPES, Precision
from components.samplers.picture_tiles import restore_in_tiles
from components.systems.swinir.network import SwinIR
from components.systems.swinir.objective import check_same_size
from components.systems.swinir.options import Options, restore_defaults
from components.systems.swinir.weights import network_of
from components.types import Cancelled, Image


class SwinIRRestorer(PictureRestorer[Options]):
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
        super().__init__("swinir", defaults or {}, Options())

    def restore_image(
        self, image: Image, size: tuple[int, int], options: Options, cancelled: Cancelled | None, key: str
    ) -> Image:
        """See PictureRestorer; a picture below min_side_px is enlarged for the network, and the result resized back."""
        enlarged = resize_bicubic(image, working_size(size, options.min_side_px))
        restored = restore_image(self.network, enlarged, options.tile_px, options.tile_overlap, cancelled, key)
        return resize_bicubic(restored, size)


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
