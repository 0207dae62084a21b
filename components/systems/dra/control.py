"""ControlNet twins of the adapters, for the paper's comparison (Table 3): copies of the prior's first blocks.

    a copy of the first blocks gets the noisy latents and hint(LQ); its outputs return through zero layers

On a UNet: a copy of the compression path without its middle block, whose features are added to the skips; the last one
is also added behind the prior's middle block. On an MM-DiT: a copy of the first joint blocks, whose tokens are added
after the prior's blocks, in equal shares of their number. As with the adapters, what depends on LQ alone is computed
once for a picture; the copy itself runs in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.controlnets.controlnet_sd3 import SD3ControlNetModel
from torch import Tensor, nn

from components.priors.encoder_copy import COPIED, embed_step, skip_widths, unet_skeleton
from components.priors.mmdit_walk import TokenJoins
from components.priors.parameters import base_state, copy_strictly
from components.priors.unet_walk import Blocks, Joins, text_inputs, walk_down
from components.systems.dra.adapters import AdapterBlocks, Call, TokenAdapterBlocks
from components.systems.dra.config import AdapterConfig


class UnetControl(nn.Module):
    """The twin on an SDXL-shaped UNet: diffusers' ControlNetModel without its middle block.

    With `config.hint` "latents" LQ latents enter by a zero convolution, and nothing is added behind the middle block.

    Args:
        unet: the prior's; the start of the copy's weights.
        config: `hint` counts here.
        factor: of the prior's autoencoder, a power of 2.

    Attributes:
        factor: side of a latent pixel in what `features` takes, see UnetAdapters.
    """

    def __init__(self, unet: Any, config: AdapterConfig, factor: int) -> None:
        super().__init__()
        self.config = config
        like = next(unet.parameters())
        skeleton: Any = unet_skeleton(dict(unet.config))
        for name in COPIED:
            if name != "mid_block":
                setattr(self, name, getattr(skeleton, name))
        if not like.is_meta:
            self.to_empty(device=like.device)
            source = base_state(unet)
            own = self.state_dict()
            copy_strictly(own, {name: source[name] for name in own if name in source}, "the copy")
        channels, width = int(skeleton.conv_in.in_channels), int(skeleton.conv_in.out_channels)
        widths = skip_widths(self)
        self.middle: nn.Module | None = None
        if config.hint == "latents":
            self.factor = 1
            self.hint: nn.Module = zeros(nn.Conv2d(channels, width, 3, padding=1))
        else:
            self.factor = factor
            self.hint = ControlNetConditioningEmbedding(width, block_out_channels=_hint_widths(factor))
            self.middle = zeros(nn.Conv2d(widths[-1], widths[-1], 1))
        self.out = nn.ModuleList(zeros(nn.Conv2d(width, width, 1)) for width in widths)
        self.float()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the copy computes in."""
        bias: Tensor = self.out[0].bias  # type: ignore[assignment]
        return bias.dtype

    def features(self, lq: Tensor) -> list[Tensor]:
        """What depends on LQ pictures [B, 3, H, W] in [-1, 1] alone, or with hint "latents" on latents [B, C, h, w]."""
        if self.factor > 1:
            lq = (lq + 1) / 2  # the range of diffusers' pipelines
        return [self.hint(lq.to(self.dtype))]

    def joins(self, features: Sequence[Tensor], call: Call, blocks: AdapterBlocks) -> Joins:
        """The additions to one call of the UNet, see UnetAdapters.joins."""
        assert call.time_ids is not None, "of an SDXL-shaped UNet"
        pooled, text = call.pooled.to(self.dtype), call.text.to(self.dtype)
        embedding = embed_step(self, call.times, pooled, call.time_ids, self.dtype)
        inputs = text_inputs(self, embedding, text)
        rest = zip(inputs.contexts, inputs.fused, strict=True)
        x = self.conv_in(call.latents.to(self.dtype))  # type: ignore[operator]
        x = (x.unflatten(0, (-1, len(features[0]))) + features[0]).flatten(0, 1)
        _, skips = walk_down(self, x, iter(inputs.shifts), rest, blocks)
        middle = None if self.middle is None else self.middle(skips[-1])
        return ControlJoins([zero(skip) for zero, skip in zip(self.out, skips, strict=True)], middle)


class ControlJoins(Joins):
    """Adds a feature to each skip connection.

    Args:
        additions: in the order in which the skips are made.
        middle: added behind the middle block; None for nothing.
    """

    def __init__(self, additions: Sequence[Tensor], middle: Tensor | None = None) -> None:
        self._additions, self._middle = list(additions), middle

    def middle(self, x: Tensor) -> Tensor:
        return x if self._middle is None else x + self._middle.to(x.dtype)

    def resnet(self, blocks: Blocks, resnet: Any, x: Tensor, shift: Tensor, skip: Tensor) -> Tensor:
        return super().resnet(blocks, resnet, x, shift, skip + self._additions.pop().to(skip.dtype))


def _hint_widths(factor: int) -> tuple[int, ...]:
    """Channels of the encoder of LQ pictures: SDXL's ControlNet for factor 8, with fewer halvings for less."""
    count = factor.bit_length()
    if factor != 1 << (count - 1) or not 2 <= count <= len(_HINT_WIDTHS):
        raise ValueError(f"a ControlNet on pictures needs latents of a factor of 2, 4 or 8, not {factor}: hint=latents")
    return _HINT_WIDTHS[:count]


_HINT_WIDTHS = (16, 32, 96, 256)
"""The default of diffusers' ControlNetModel."""

_SIZES = (
    *("sample_size", "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads"),
    *("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size", "qk_norm"),
)
"""Arguments of SD3Transformer2DModel that a ControlNet has too."""


class TokenControl(nn.Module):
    """The twin on an MM-DiT: diffusers' SD3ControlNetModel on the LQ latents.

    Args:
        network: the prior's; the start of the copy's weights.
        config: `layers` counts here.

    Raises:
        ValueError: the network has no more blocks than the copy.

    Attributes:
        factor: see UnetAdapters.
    """

    factor = 1

    def __init__(self, network: Any, config: AdapterConfig) -> None:
        super().__init__()
        self.config, own = config, dict(network.config)
        if config.layers >= int(own["num_layers"]):
            raise ValueError(f"a ControlNet of {config.layers} layers needs a prior with more, not {own['num_layers']}")
        dual = tuple(number for number in own.get("dual_attention_layers") or () if number < config.layers)
        sizes = {name: own[name] for name in _SIZES if name in own}
        like = next(network.parameters())
        with torch.device(like.device):
            self.net = SD3ControlNetModel(**sizes, num_layers=config.layers, dual_attention_layers=dual)
        if not like.is_meta:
            source, target = base_state(network), self.net.state_dict()
            copied = {name: value for name, value in source.items() if name in target}
            copy_strictly({name: target[name] for name in copied}, copied, "the copy")
        self.blocks = int(own["num_layers"])
        self.float()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the copy computes in."""
        return self.net.controlnet_blocks[0].bias.dtype  # type: ignore[union-attr, return-value]

    def features(self, lq: Tensor) -> list[Tensor]:
        """What depends on LQ latents [B, C, h, w] alone, as tokens."""
        return [self.net.pos_embed_input(lq.to(self.dtype))]

    def joins(self, features: Sequence[Tensor], call: Call, blocks: TokenAdapterBlocks) -> TokenJoins:
        """The additions to one call of the MM-DiT, see TokenAdapters.joins."""
        net: Any = self.net
        embedding = net.time_text_embed(call.times, call.pooled.to(self.dtype))
        text = net.context_embedder(call.text.to(self.dtype))
        tokens = net.pos_embed(call.latents.to(self.dtype))
        tokens = (tokens.unflatten(0, (-1, len(features[0]))) + features[0]).flatten(0, 1)
        additions = []
        for block, zero in zip(net.transformer_blocks, net.controlnet_blocks, strict=True):
            tokens, text = blocks.joint(block, tokens, text, embedding)
            additions.append(zero(tokens))
        return TokenControlJoins(additions, self.blocks)


class TokenControlJoins(TokenJoins):
    """Adds tokens after each block but the last; each of the n additions serves the same share of the blocks.

    Args:
        additions: of the copy's blocks.
        blocks: number of the prior's blocks.
    """

    def __init__(self, additions: Sequence[Tensor], blocks: int) -> None:
        self._additions, self._blocks = list(additions), blocks

    def after_block(self, number: int, tokens: Tensor) -> Tensor:
        if number == self._blocks - 1:
            return tokens
        return tokens + self._additions[number * len(self._additions) // self._blocks].to(tokens.dtype)


def zeros(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with zeros as its weights."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
