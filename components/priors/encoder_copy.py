"""Copies of an SDXL-shaped UNet's compression path, which condition the UNet on a picture (as ControlNet does).

A copy is a module with the UNet's own names: conv_in, time_proj, time_embedding, add_time_proj, add_embedding,
down_blocks and mid_block. So unet_walk.py walks it, and weights are copied by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

COPIED = ("conv_in", "time_proj", "time_embedding", "add_time_proj", "add_embedding", "down_blocks", "mid_block")
"""Modules of a copy."""


NO_ADAPTER: Mapping[str, Any] = {"encoder_hid_dim_type": None, "encoder_hid_dim": None}
"""Entries of a UNet's configuration without its picture adapter, which a new UNet would refuse."""


def unet_skeleton(config: Mapping[str, Any], **changes: Any) -> UNet2DConditionModel:
    """A UNet of this configuration on the meta device, whose modules a copy takes: the rest must not take memory.

    Args:
        config: of the prior's UNet; its picture adapter is left out.
        changes: replace entries.
    """
    bare = {**config, **NO_ADAPTER, **changes}
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(bare)  # type: ignore[arg-type, no-any-return]


def embed_step(network: Any, timesteps: Tensor, pooled: Tensor, time_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole embedding [B, E] of a UNet or of a copy, from timesteps [B], pooled text [B, P] and size ids [B, 6]."""
    sizes = network.add_time_proj(time_ids.flatten()).view(len(pooled), -1)
    extra = torch.cat([pooled, sizes.to(pooled.dtype)], dim=-1).to(dtype)
    return network.time_embedding(network.time_proj(timesteps).to(dtype)) + network.add_embedding(extra)  # type: ignore[no-any-return]


def skip_widths(network: Any) -> list[int]:
    """Channels of each skip feature: the input convolution's, then each block's layers and downsampler."""
    widths = [network.conv_in.out_channels]
    for block in network.down_blocks:
        widths += [resnet.out_channels for resnet in block.resnets]
        if block.downsamplers is not None:
            widths.append(widths[-1])
    return widths
