"""SUPIR's control encoder: a copy of the UNet's compression path, with an input for the LQ latents.

The noisy latents run through the copy. The LQ latents enter once, by a zero convolution after the first layer. The
features go to the connectors as they are: unlike ControlNet's they pass no zero convolution (supir.md, section 1.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from components.priors.encoder_copy import COPIED, NO_ADAPTER, embed_step, unet_skeleton
from components.priors.parameters import base_state, copy_strictly
from components.priors.unet_walk import Blocks, Inputs, walk_down, walk_middle
from components.systems.supir.connectors import zero


class ControlEncoder(nn.Module):
    """The encoder (see the module's docstring). `ControlEncoder.from_unet` makes one.

    Args:
        config: the UNet's configuration.
        transformer_depth: see AdaptorConfig; empty for the UNet's own.
        device: "cpu", or "meta" for shapes without memory. The copied part is uninitialised until weights are loaded.
        dtype: of the weights; None is float32.

    Raises:
        ValueError: another number of depths than of levels.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        transformer_depth: tuple[int, ...] = (),
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        levels = len(config["block_out_channels"])
        if transformer_depth and len(transformer_depth) != levels:
            raise ValueError(f"transformer_depth needs {levels} numbers, got {list(transformer_depth)}")
        changes: dict[str, Any] = {}
        if transformer_depth:
            changes["transformer_layers_per_block"] = tuple(transformer_depth)
        self.config = {**config, **NO_ADAPTER, **changes}
        skeleton = unet_skeleton(config, **changes)
        for name in COPIED:
            setattr(self, name, getattr(skeleton, name))
        conv: Any = skeleton.conv_in
        with torch.device("meta"):
            self.hint_conv = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
        self.to(dtype).to_empty(device=device)
        if device != "meta":
            zero(self.hint_conv)

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, transformer_depth: tuple[int, ...] = ()) -> ControlEncoder:
        """A new encoder with the UNet's weights; of a shortened transformer the first blocks. LQ has no effect yet."""
        like = next(unet.parameters())
        control = cls(dict(unet.config), transformer_depth, "meta" if like.is_meta else "cpu", like.dtype)
        control.to(device=like.device)
        own = {name: value for name, value in control.state_dict().items() if not name.startswith("hint_conv.")}
        source = base_state(unet)
        copy_strictly(own, {name: source[name] for name in own if name in source}, "control encoder's copy")
        return control

    def embedding(self, timesteps: Tensor, pooled: Tensor, time_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See embed_step."""
        return embed_step(self, timesteps, pooled, time_ids, dtype)


def walk_control(
    control: Any, lq: Tensor, latents: Tensor, inputs: Inputs, blocks: Blocks | None = None
) -> list[Tensor]:
    """Features of the control encoder: one for each skip connection, the finest first, then the middle block's.

    Args:
        control: a ControlEncoder.
        lq: scaled latents of the LQ picture [B, C, h, w].
        latents: noisy latents in VP form, the same shape.
        inputs: of its blocks, in the order of the walk.
        blocks: block functions, plain or compiled.
    """
    blocks, shifts, rest = blocks or Blocks(), iter(inputs.shifts), zip(inputs.contexts, inputs.fused, strict=True)
    x, features = walk_down(control, control.conv_in(latents) + control.hint_conv(lq), shifts, rest, blocks)
    return [*features, walk_middle(control.mid_block, x, shifts, rest, blocks)]
