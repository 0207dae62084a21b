"""What the families with a UNet2DConditionModel share. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from components.priors.conditions import NetworkInputs


def unet_builder(family: str, embed_type: str | None) -> Callable[[Mapping[str, Any]], nn.Module]:
    """PriorFamily.build for UNets whose addition_embed_type is `embed_type`."""

    def build(arguments: Mapping[str, Any]) -> nn.Module:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        network: nn.Module = UNet2DConditionModel(**arguments)
        own = arguments.get("addition_embed_type")
        if own != embed_type:
            raise ValueError(f"a {family} network has addition_embed_type {embed_type!r}, this one has {own!r}")
        return network

    return build


def attention_inputs() -> NetworkInputs:
    """PriorFamily.inputs for networks with cross-attention."""
    from components.priors.conditions import cross_attention_inputs

    return cross_attention_inputs
