"""Names and shapes of InstantIR's released files for a prior of any size, computed from configurations alone.

All modules are built on the meta device, without memory or weights. At SDXL's size the result is the published layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from components.systems.instantir.aggregator import Aggregator, aggregator_state
from components.systems.instantir.perceptor import ResamplerConfig, install_perceptor, perceptor_state
from components.systems.instantir.previewer import LoraSettings, released_names

Shape = tuple[int, ...]


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet of that configuration on the meta device."""
    bare = {**config, "encoder_hid_dim_type": None, "encoder_hid_dim": None}
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(bare)  # type: ignore[arg-type, return-value]


def layout(
    unet_config: Mapping[str, Any], resampler: Mapping[str, Any] | None = None, lora: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Shape]]:
    """Shapes of the parts perceptor, previewer and aggregator, by the released files' keys.

    Args:
        unet_config: configuration of the prior's UNet.
        resampler: ResamplerConfig fields; output_dim defaults to the UNet's text width.
        lora: LoraSettings fields.

    Raises:
        ValueError: the Resampler does not fit the UNet.
    """
    size = ResamplerConfig(**{"output_dim": unet_config["cross_attention_dim"], **(resampler or {})})
    settings = LoraSettings(**{k: v for k, v in (lora or {}).items() if v is not None})
    aggregator = Aggregator(unet_config, "meta")
    with torch.device("meta"):
        unet = meta_unet(unet_config)
        install_perceptor(unet, size)
    return {
        "perceptor": {name: tuple(value.shape) for name, value in perceptor_state(unet).items()},
        "previewer": dict(_lora_shapes(unet, settings)),
        "aggregator": {name: tuple(value.shape) for name, value in aggregator_state(aggregator).items()},
    }


def _lora_shapes(unet: UNet2DConditionModel, settings: LoraSettings) -> Iterator[tuple[str, Shape]]:
    """(key, shape) of the LoRA that peft would install: down k x k with the layer's geometry, up 1 x 1."""
    for name, module in unet.named_modules():
        if not any(name == target or name.endswith(f".{target}") for target in settings.targets):
            continue
        down_name, up_name = released_names(name)
        if isinstance(module, nn.Linear):
            yield down_name, (settings.rank, module.in_features)
            yield up_name, (module.out_features, settings.rank)
        elif isinstance(module, nn.Conv2d):
            yield down_name, (settings.rank, module.in_channels // module.groups, *module.kernel_size)
            yield up_name, (module.out_channels, settings.rank, 1, 1)


def parameter_count(shapes: Mapping[str, Shape]) -> int:
    """Number of values in tensors of these shapes."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())
