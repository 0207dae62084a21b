"""Networks that spandrel builds from the keys and shapes of their weights.

spandrel gets tensors only: `components.tensor_files` reads the files, and spandrel's own loaders are not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from spandrel import MAIN_REGISTRY, ImageModelDescriptor, MaskedImageModelDescriptor
from torch import Tensor, nn

from components.models import Model, ModelError
from components.naming import list_some
from components.systems.regressor.config import GRAY, RGB, RegressorConfig, config_from
from components.systems.regressor.released import PART

REFUSED: Mapping[str, str] = {
    "GFPGAN": "restores aligned faces of 512 px only, and its face generator comes under non-commercial terms",
    "RestoreFormer": "restores aligned faces of 512 px only",
    "LaMa": "fills masked holes, and a restoration has no mask",
    "AuraSR": "is a GAN that draws noise of its own, so that no seed would give the same picture again",
}
"""spandrel's architectures that are not taken, each with the reason."""

ONE_BY_ONE = frozenset({"IPT", "SeemoRe", "DRUNet", "DnCNN"})
"""Architectures that spandrel runs on one picture at a time."""

WINDOWS = ("window_size", "win_size", "split_size", "stripe_size", "padder_size")
"""Attributes in which networks keep the sides of their attention windows, and to what they pad by themselves."""

GRIDS: Mapping[str, int] = {"SCUNet": 64, "FBCNN": 8, "KBNet": 16, "MixDehazeNet": 16, "RealCUGAN": 4}
"""Sides of the grid of architectures that halve their pictures without a rule for sizes in spandrel: they pad by
themselves. SCUNet's windows of 8 stand on an eighth of the picture's grid."""

LARGEST_WINDOW = 128
LARGEST_NUMBER = 9999
"""Largest number in a key: spandrel counts layers by it, so a forged key could ask for any number of them; ours."""

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as in OpenCV's conversion to gray."""

FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError),
    ValueError,
)
"""What the constructors of architectures raise for weights that do not fit them."""


def supported() -> list[str]:
    """Names of the architectures that are taken."""
    names = [str(entry.architecture.id) for entry in MAIN_REGISTRY.architectures()]
    return sorted((name for name in names if name not in REFUSED), key=str.lower)


class Regressor(nn.Module):
    """RGB pictures [B, 3, H, W] in [0, 1] -> [B, 3, factor H, factor W], about the same range, not clipped.

    Sides of any length: they are padded below and to the right with their mirror image, and the result is cropped. A
    network of gray pictures changes the luma of colours alone.

    Args:
        descriptor: spandrel's, of a network with weights.
        config: facts about it.
    """

    def __init__(self, descriptor: ImageModelDescriptor[Any], config: RegressorConfig) -> None:
        super().__init__()
        self.network: nn.Module = descriptor.model
        self.config = config
        # spandrel's own __call__ switches gradients off and clips
        self._call: Callable[[nn.Module, Tensor], Tensor] = descriptor._call_fn

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = pad_pictures(images, padded_size((height, width), self.config))
        if self.config.colours == RGB:
            result = self._run(padded)
        else:
            base = _enlarged(padded, self.config.factor)
            result = base + self._run(luma_of(padded)) - luma_of(base)
        return result[..., : height * self.config.factor, : width * self.config.factor]

    def _run(self, images: Tensor) -> Tensor:
        # a clone, since some networks write into their input
        rows = images.split(1) if self.config.architecture in ONE_BY_ONE else (images,)
        if images.dtype == torch.float32:
            return torch.cat([self._call(self.network, row.clone()) for row in rows])
        # the attention masks for other sizes than a network's own are float32, and a product needs one type
        with torch.autocast(images.device.type, images.dtype):
            return torch.cat([self._call(self.network, row.clone()).to(images.dtype) for row in rows])


class SameSize(nn.Module):
    """Pictures [B, 3, H, W] in [0, 1] -> the same size: the network's factor is undone by shrinking its input first."""

    def __init__(self, regressor: Regressor) -> None:
        super().__init__()
        self.regressor = regressor

    def forward(self, images: Tensor) -> Tensor:
        factor = self.regressor.config.factor
        if factor == 1:
            return self.regressor(images)  # type: ignore[no-any-return]
        height, width = images.shape[-2:]
        sides = (-(-height // factor) * factor, -(-width // factor) * factor)
        padded = pad_pictures(images, sides)
        # antialiased as Pillow's, with which the restorer shrinks; computed in float32, as some devices lack it in half
        size = (sides[0] // factor, sides[1] // factor)
        small = F.interpolate(padded.float(), size, mode="bicubic", antialias=True).clamp(0, 1).to(images.dtype)
        return self.regressor(small)[..., :height, :width]  # type: ignore[no-any-return]


def luma_of(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W]."""
    weights = images.new_tensor(LUMA).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _enlarged(images: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return images
    return F.interpolate(images.float(), scale_factor=factor, mode="bicubic").to(images.dtype)


def padded_size(size: tuple[int, int], config: RegressorConfig) -> tuple[int, int]:
    """The least (height, width) that a network takes for a picture of that size."""
    height, width = (-(-max(side, config.minimum_px) // config.multiple_px) * config.multiple_px for side in size)
    return (max(height, width),) * 2 if config.square else (height, width)


def pad_pictures(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] -> [B, C, *size], with the mirror image below and to the right, as images.pad_to_multiple."""
    for axis, side in ((-2, size[0]), (-1, size[1])):
        length = images.shape[axis]
        if side > length:
            places = np.pad(np.arange(length), (0, side - length), mode="reflect" if length > 1 else "edge")
            images = images.index_select(axis, torch.from_numpy(places).to(images.device))
    return images


def open_regressor(tensors: Mapping[str, Tensor], what: str, config: RegressorConfig | None = None) -> Regressor:
    """The network of weights under their published keys, in evaluation mode, frozen.

    Args:
        tensors: by key; they are copied.
        config: of an earlier detection; None reads the facts from the architecture and leaves those about tiles at 0.
        what: the tensors' origin, for messages.

    Raises:
        ModelError: no supported architecture, one that is refused, or keys and shapes that do not fit it.
    """
    _check_numbers(tensors, what)
    descriptor = _detect(dict(tensors), what)
    name = str(descriptor.architecture.id)
    if config is not None and config.architecture != name:
        raise ModelError(f"{what}: holds the weights of {name}, and model.json names {config.architecture}")
    assert isinstance(descriptor, ImageModelDescriptor)
    regressor = Regressor(descriptor, config or _facts_of(descriptor, what))
    return regressor.eval().requires_grad_(False)


def network_of(model: Model) -> Regressor:
    """The network of a model folder, in evaluation mode, frozen.

    Raises:
        ModelError: a model of another system, or a damaged folder.
    """
    if model.info["system"] != "regressor":
        raise ModelError(f"{model.path}: holds a {model.info['system']} model, not a regressor")
    return open_regressor(model.part(PART), str(model.path), config_of(model))


def config_of(model: Model) -> RegressorConfig:
    """The facts in a model folder; ModelError if they are not a regressor's."""
    try:
        return config_from(model.info["config"])
    except (TypeError, ValueError) as error:
        raise ModelError(f"{model.path}: {error}") from error


def _detect(state: dict[str, Any], what: str) -> ImageModelDescriptor[Any] | MaskedImageModelDescriptor[Any]:
    for entry in MAIN_REGISTRY.architectures("detection"):
        name = str(entry.architecture.id)
        try:
            if not entry.detect(state):
                continue
            if name in REFUSED:
                raise ModelError(f"{what}: {name} {REFUSED[name]}; it is not supported")
            return entry.architecture.load(state)
        except ModelError:
            raise
        except FAULTS as error:
            reason = " ".join(str(error).split())
            kind = "" if isinstance(error, RuntimeError | ValueError | AssertionError) else f"{type(error).__name__} "
            raise ModelError(f"{what}: looks like a {name}, but its weights do not fit one: {kind}{reason}") from error
    raise ModelError(
        f"{what}: no supported architecture has such keys ({list_some(sorted(state), 3)}). Supported: "
        f"{', '.join(supported())}"
    )


def _check_numbers(tensors: Mapping[str, Tensor], what: str) -> None:
    for key in tensors:
        if any(part.isdecimal() and int(part[:8]) > LARGEST_NUMBER for part in key.split(".")):
            raise ModelError(f"{what}: {key:.200}: no network has so many layers")


def _facts_of(descriptor: ImageModelDescriptor[Any], what: str) -> RegressorConfig:
    """Facts from spandrel's descriptor and from the attention windows of the modules."""
    name, channels = str(descriptor.architecture.id), (descriptor.input_channels, descriptor.output_channels)
    if channels not in ((RGB, RGB), (GRAY, GRAY)):
        raise ModelError(
            f"{what}: this {name} turns {channels[0]} channels into {channels[1]}; colour (3 to 3) and gray (1 to 1) "
            "are supported"
        )
    needs = descriptor.size_requirements
    multiple = math.lcm(needs.multiple_of, GRIDS.get(name, 1), *_windows(descriptor.model))
    halves = {"bf16": descriptor.supports_bfloat16, "fp16": descriptor.supports_half}
    return RegressorConfig(
        architecture=name,
        tags=tuple(str(tag) for tag in descriptor.tags),
        factor=descriptor.scale,
        colours=channels[0],
        multiple_px=multiple,
        minimum_px=max(1, -(-needs.minimum // multiple)) * multiple,
        square=needs.square,
        precisions=("fp32", *(kind for kind, works in halves.items() if works)),
    )


def _windows(network: nn.Module) -> set[int]:
    """Sides of the attention windows in a network, in pixels of the grid that they stand on."""
    sides: set[int] = set()
    for module in network.modules():
        for name in WINDOWS:
            value = getattr(module, name, None)
            values = value if isinstance(value, list | tuple) else [value]
            sides |= {side for side in values if isinstance(side, int) and 1 <= side <= LARGEST_WINDOW}
    return sides
