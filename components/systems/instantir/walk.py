"""InstantIR's part of the walks (unet_walk.py): the aggregator's own, and its residuals in the UNet's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.priors.unet_walk import Blocks, Inputs, Joins, walk_down, walk_middle, walk_unet
from components.systems.instantir.aggregator import Residuals


def join_block(join: Any, lq: Tensor, preview: Tensor) -> Tensor:
    """The aggregator's spatial feature transform and zero convolution at one level; all shapes are [B, C, h, w]."""
    return join[1](join[0](preview, lq))


@dataclass(frozen=True)
class AggregatorBlocks(Blocks):
    """The block functions of both walks, plain or compiled."""

    join: Callable[[Any, Tensor, Tensor], Tensor] = join_block


class AddResiduals(Joins):
    """Adds the aggregator's residuals to the skip connections and to the middle block."""

    def __init__(self, residuals: Residuals) -> None:
        self._middle, self._skips = residuals.mid, list(residuals.down)

    def middle(self, x: Tensor) -> Tensor:
        return x + self._middle

    def resnet(self, blocks: Blocks, resnet: Any, x: Tensor, shift: Tensor, skip: Tensor) -> Tensor:
        return blocks.resnet(resnet, x, shift, skip, self._skips.pop())


def walk_unet_with_residuals(
    unet: Any, latents: Tensor, inputs: Inputs, residuals: Residuals | None = None, blocks: Blocks | None = None
) -> Tensor:
    """See walk_unet; residuals of the skips and of the middle block, or None.

    Raises:
        ValueError: another number of residuals than of skips.
    """
    if residuals is None:
        return walk_unet(unet, latents, inputs, blocks=blocks)
    skips = 1 + sum(len(block.resnets) + (block.downsamplers is not None) for block in unet.down_blocks)
    if len(residuals.down) != skips:
        raise ValueError(f"{len(residuals.down)} residuals for {skips} skips")
    return walk_unet(unet, latents, inputs, AddResiduals(residuals), blocks)


def walk_aggregator(
    aggregator: Any, lq: Tensor, preview: Tensor, inputs: Inputs, blocks: AggregatorBlocks | None = None
) -> Residuals:
    """Residuals from LQ latents and a preview [B, C, h, w], concatenated along the height as released.

    Raises:
        ValueError: the shapes differ, or a side is not divisible by 2 ** (levels - 1).
    """
    aggregator.check_pair(lq, preview, -2)
    blocks = blocks or AggregatorBlocks()
    shifts, rest = iter(inputs.shifts), zip(inputs.contexts, inputs.fused, strict=True)
    x = torch.cat([aggregator.conv_in(lq), aggregator.ref_conv_in(preview)], dim=-2)
    x, features = walk_down(aggregator, x, shifts, rest, blocks)
    x = walk_middle(aggregator.mid_block, x, shifts, rest, blocks)
    joins, residuals = [*aggregator.controlnet_down_blocks, aggregator.controlnet_mid_block], []
    for join, feature in zip(joins, [*features, x], strict=True):
        half = feature.shape[-2] // 2
        residuals.append(blocks.join(join, feature[..., :half, :], feature[..., -half:, :]))
    return Residuals(tuple(residuals[:-1]), residuals[-1])
