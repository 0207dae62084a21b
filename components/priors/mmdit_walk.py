"""An MM-DiT's forward pass, block by block, so that a system can act on its picture tokens between the blocks.

The same operations in the same order as diffusers' SD3Transformer2DModel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.priors.block_calls import BlockFunctions


def joint_block(block: Any, tokens: Tensor, text: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """One transformer block: (picture tokens, text tokens); the last block of a network leaves the text."""
    after, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=embedding)
    return tokens, text if after is None else after


@dataclass(frozen=True)
class TokenBlocks(BlockFunctions):
    """The block functions of the walk, plain, compiled or recomputing."""

    joint: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = joint_block


class TokenJoins:
    """What a system does between the blocks; this one does nothing."""

    def after_block(self, number: int, tokens: Tensor) -> Tensor:
        """After block `number` (from 0): picture tokens [B, L, C] -> the same shape."""
        return tokens


def walk_mmdit(
    network: Any,
    latents: Tensor,
    embedding: Tensor,
    text: Tensor,
    joins: TokenJoins | None = None,
    blocks: TokenBlocks | None = None,
) -> Tensor:
    """Latents [B, C, h, w] -> velocity, the same shape.

    Args:
        network: SD3-shaped.
        latents: noisy latents with sides that are multiples of the patch.
        embedding: of time and pooled text [B, E], the output of `time_text_embed`.
        text: joint text [B, L, D] before `context_embedder`.
        joins: called after each block; None for none.
        blocks: block functions, or None for the plain ones.
    """
    joins, blocks = joins or TokenJoins(), blocks or TokenBlocks()
    tokens, text = network.pos_embed(latents).contiguous(), network.context_embedder(text)
    for number, block in enumerate(network.transformer_blocks):
        tokens, text = blocks.joint(block, tokens, text, embedding)
        tokens = joins.after_block(number, tokens)
    return unpatch(network, network.proj_out(network.norm_out(tokens, embedding)), latents)


def unpatch(network: Any, patches: Tensor, latents: Tensor) -> Tensor:
    """Patches [B, L, numbers of a patch] -> [B, C, h, w] of the latents' size."""
    patch, channels = int(network.config["patch_size"]), int(network.out_channels)
    height, width = (side // patch for side in latents.shape[-2:])
    patches = patches.reshape(len(latents), height, width, patch, patch, channels)
    picture = torch.einsum("nhwpqc->nchpwq", patches)
    return picture.reshape(len(latents), channels, height * patch, width * patch)
