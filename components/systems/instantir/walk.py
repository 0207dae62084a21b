"""The forward passes of UNet and aggregator, written out over diffusers' own modules.

diffusers' forward computes again in each call what holds for a whole run (text keys, picture keys, embeddings), and
hands tensors from block to block by keyword dictionaries. Here everything that does not depend on the latents comes in
as arguments, so that who calls decides what is kept (fast.py), and each block is a function of tensors that compiles by
itself. Values equal diffusers' to rounding; the recorded goldens hold for both.

Shapes: B batch, L tokens of the latents, S tokens attended to, C channels, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from components.systems.instantir.aggregator import Residuals
from components.systems.instantir.perceptor import split_heads


class Context(NamedTuple):
    """What a cross-attention attends to.

    Attributes:
        text_key, text_value: the text's, heads apart [B, heads, S, d].
        key, value: the picture's [B, Q, W], normalised but not modulated.
        key_modulation, value_modulation: shift, then scale, of the picture's at this time step [B, 2 W].
    """

    text_key: Tensor
    text_value: Tensor
    key: Tensor
    value: Tensor
    key_modulation: Tensor
    value_modulation: Tensor


class Inputs(NamedTuple):
    """What the blocks of a network are given besides latents, in the order of the walk.

    Attributes:
        shifts: the embedding's part for each resnet [B, C].
        contexts: for each transformer block; None without cross-attention.
        fused: for each transformer block the query, key and value weights of its self-attention in one [3 C, C]; None
            for three separate products.
    """

    shifts: Sequence[Tensor]
    contexts: Sequence[Context | None]
    fused: Sequence[Tensor | None]


def resnet_block(
    block: Any, x: Tensor, shift: Tensor, skip: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """One ResnetBlock2D, its time projection already done: x [B, C, h, w], shift [B, C'] -> [B, C', h, w].

    On the way up it is given a `skip` to join to x, perhaps with a residual that is `added` to it.
    """
    if skip is not None:
        x = torch.cat([x, skip if added is None else skip + added], dim=1)
    hidden = block.conv1(F.silu(block.norm1(x))) + shift[:, :, None, None]
    hidden = block.conv2(F.silu(block.norm2(hidden)))
    return hidden + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def transformer_block(block: Any, x: Tensor, context: Context | None, fused: Tensor | None) -> Tensor:
    """One BasicTransformerBlock with the perceptor in its cross-attention: [B, L, C] -> [B, L, C]."""
    attention, normed = block.attn1, block.norm1(x)
    if fused is None:
        query, key, value = attention.to_q(normed), attention.to_k(normed), attention.to_v(normed)
    else:
        query, key, value = F.linear(normed, fused).chunk(3, dim=-1)
    heads = attention.heads
    attended = F.scaled_dot_product_attention(
        split_heads(query, heads), split_heads(key, heads), split_heads(value, heads)
    )
    x = x + attention.to_out[0](attended.transpose(1, 2).flatten(2))
    if context is not None:
        attention = block.attn2
        query = split_heads(attention.to_q(block.norm2(x)), attention.heads)
        attended = F.scaled_dot_product_attention(query, context.text_key, context.text_value)
        scale = attention.processor.scale
        if scale != 0:
            key = modulated(context.key, context.key_modulation, attention.heads)
            value = modulated(context.value, context.value_modulation, attention.heads)
            attended = attended + scale * F.scaled_dot_product_attention(query, key, value)
        x = x + attention.to_out[0](attended.transpose(1, 2).flatten(2))
    hidden, gate = block.ff.net[0].proj(block.norm3(x)).chunk(2, dim=-1)
    return x + block.ff.net[2](hidden * F.gelu(gate))


def modulated(normed: Tensor, modulation: Tensor, heads: int) -> Tensor:
    """AdaLayerNorm after its normalisation: normed [B, Q, W], modulation [B, 2 W] -> [B, heads, Q, d]."""
    shift, scale = modulation.unsqueeze(1).chunk(2, dim=-1)
    return split_heads(normed * (1 + scale) + shift, heads)


def enter_block(model: Any, x: Tensor) -> Tensor:
    """The start of a Transformer2DModel: [B, C, h, w] -> tokens [B, h w, C]."""
    hidden = model.norm(x)
    if not model.use_linear_projection:
        hidden = model.proj_in(hidden)
    hidden = hidden.flatten(2).transpose(1, 2)
    return model.proj_in(hidden) if model.use_linear_projection else hidden


def leave_block(model: Any, hidden: Tensor, x: Tensor) -> Tensor:
    """The end of a Transformer2DModel that was given x: tokens [B, h w, C] and x [B, C, h, w] -> as x."""
    if model.use_linear_projection:
        hidden = model.proj_out(hidden)
    hidden = hidden.transpose(1, 2).unflatten(2, x.shape[-2:])
    if not model.use_linear_projection:
        hidden = model.proj_out(hidden)
    return x + hidden


def join_block(join: Any, lq: Tensor, preview: Tensor) -> Tensor:
    """The aggregator's spatial feature transform and zero convolution at one level: [B, C, h, w] twice -> the same."""
    return join[1](join[0](preview, lq))


@dataclass(frozen=True)
class Blocks:
    """The functions that the walks are made of, plain or compiled."""

    resnet: Callable[..., Tensor] = resnet_block
    enter: Callable[[Any, Tensor], Tensor] = enter_block
    transformer: Callable[[Any, Tensor, Context | None, Tensor | None], Tensor] = transformer_block
    leave: Callable[[Any, Tensor, Tensor], Tensor] = leave_block
    join: Callable[[Any, Tensor, Tensor], Tensor] = join_block

    def wrapped(self, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> Blocks:
        """All through `wrap` (a compiler)."""
        return replace(self, **{f.name: wrap(getattr(self, f.name)) for f in fields(self)})


def walk_unet(
    unet: Any, latents: Tensor, inputs: Inputs, residuals: Residuals | None = None, blocks: Blocks | None = None
) -> Tensor:
    """VP latents [B, C, h, w] -> predicted noise, same shape.

    Args:
        unet: SDXL-shaped, with a perceptor.
        latents: any sides; skips are met by size, so odd ones pass.
        inputs: for unet_resnets and unet_transformers, in their order.
        residuals: added to the skips and to the middle block.
        blocks: compiled functions, or None for the plain ones.
    """
    blocks, shifts, rest = blocks or Blocks(), iter(inputs.shifts), zip(inputs.contexts, inputs.fused, strict=True)
    x, skips = _walk_down(unet, unet.conv_in(latents), shifts, rest, blocks)
    x = _walk_mid(unet.mid_block, x, shifts, rest, blocks)
    added: list[Tensor | None] = [None] * len(skips)
    if residuals is not None:
        if len(residuals.down) != len(skips):
            raise ValueError(f"{len(residuals.down)} residuals for {len(skips)} skips")
        added, x = list(residuals.down), x + residuals.mid
    for block in unet.up_blocks:
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            x = blocks.resnet(resnet, x, next(shifts), skips.pop(), added.pop())
            x = _spatial(attention, x, rest, blocks)
        if block.upsamplers is not None:
            x = block.upsamplers[0].conv(F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
    return unet.conv_out(F.silu(unet.conv_norm_out(x)))


def walk_aggregator(
    aggregator: Any, lq: Tensor, preview: Tensor, inputs: Inputs, blocks: Blocks | None = None
) -> Residuals:
    """Residuals of LQ latents and a preview [B, C, h, w], joined along the height as released.

    Raises:
        ValueError: shapes differ, or sides do not halve evenly.
    """
    aggregator.check_pair(lq, preview, -2)
    blocks, shifts, rest = blocks or Blocks(), iter(inputs.shifts), zip(inputs.contexts, inputs.fused, strict=True)
    x = torch.cat([aggregator.conv_in(lq), aggregator.ref_conv_in(preview)], dim=-2)
    x, features = _walk_down(aggregator, x, shifts, rest, blocks)
    x = _walk_mid(aggregator.mid_block, x, shifts, rest, blocks)
    joins, joined = [*aggregator.controlnet_down_blocks, aggregator.controlnet_mid_block], []
    for join, feature in zip(joins, [*features, x], strict=True):
        half = feature.shape[-2] // 2
        joined.append(blocks.join(join, feature[..., :half, :], feature[..., -half:, :]))
    return Residuals(tuple(joined[:-1]), joined[-1])


def resnets_of(network: Any) -> list[ResnetBlock2D]:
    """The resnets of a UNet or aggregator in the order of the walk: down, middle, up."""
    return [module for module in _walked(network) if isinstance(module, ResnetBlock2D)]


def transformers_of(network: Any) -> list[BasicTransformerBlock]:
    """The transformer blocks of a UNet or aggregator in the order of the walk: down, middle, up."""
    return [module for module in _walked(network) if isinstance(module, BasicTransformerBlock)]


def check_walkable(network: nn.Module) -> None:
    """Raises ValueError, naming the first block not built as SDXL's: the walk would compute it wrongly."""
    for name, module in network.named_modules():
        wrong = ""
        if isinstance(module, ResnetBlock2D):
            plain = module.time_embedding_norm == "default" and not module.skip_time_act
            if not plain or module.upsample is not None or module.downsample is not None:
                wrong = "a resnet with another use of the embedding, or that resamples"
            elif module.output_scale_factor != 1 or module.dropout.p:
                wrong = "a resnet with an output scale or dropout"
        elif isinstance(module, BasicTransformerBlock):
            if module.norm_type != "layer_norm" or module.only_cross_attention or module.pos_embed is not None:
                wrong = "a transformer block with another normalisation or position embedding"
            elif not isinstance(module.ff.net[0], GEGLU) or len(module.ff.net) != 3:
                wrong = "another feed-forward than GEGLU"
        if wrong:
            raise ValueError(f"{name}: {wrong}; only SDXL-shaped networks are walked")


def _walk_down(
    network: Any, x: Tensor, shifts: Iterator[Tensor], rest: Iterator[Any], blocks: Blocks
) -> tuple[Tensor, list[Tensor]]:
    """The compression path of a UNet or aggregator after its input convolution: its end, and all skips."""
    skips = [x]
    for block in network.down_blocks:
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            x = _spatial(attention, blocks.resnet(resnet, x, next(shifts)), rest, blocks)
            skips.append(x)
        if block.downsamplers is not None:
            x = block.downsamplers[0](x)
            skips.append(x)
    return x, skips


def _walk_mid(mid: Any, x: Tensor, shifts: Iterator[Tensor], rest: Iterator[Any], blocks: Blocks) -> Tensor:
    x = blocks.resnet(mid.resnets[0], x, next(shifts))
    for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
        x = blocks.resnet(resnet, _spatial(attention, x, rest, blocks), next(shifts))
    return x


def _spatial(model: Any, x: Tensor, rest: Iterator[Any], blocks: Blocks) -> Tensor:
    """One Transformer2DModel (None passes through): [B, C, h, w] -> the same."""
    if model is None:
        return x
    hidden = blocks.enter(model, x)
    for block in model.transformer_blocks:
        context, fused = next(rest)
        hidden = blocks.transformer(block, hidden, context, fused)
    return blocks.leave(model, hidden, x)


def _walked(network: Any) -> Iterator[nn.Module]:
    """Modules in the order of the walk. Inside a block, resnets and transformers each come in their own order."""
    for part in (network.down_blocks, network.mid_block, getattr(network, "up_blocks", None)):
        if part is not None:
            yield from part.modules()
