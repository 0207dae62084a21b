"""The forward passes of an SDXL-shaped UNet and of copies of its compression path, written over diffusers' own modules.

diffusers' forward computes values that are constant in a run (text keys, picture keys, embeddings) in each call, and
passes tensors between blocks in keyword dictionaries. Here all values that do not depend on the latents are arguments,
so that the caller can cache them, and each block is a function of tensors that compiles separately. What a system adds
to the UNet between its layers or blocks is a Joins. Results equal diffusers' up to rounding, as the golden tests check.

Shapes: B batch, L tokens of the latents, S tokens of the context, C channels, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from components.priors.block_calls import BlockFunctions


class Context(NamedTuple):
    """The keys and values of a cross-attention.

    Attributes:
        text_key, text_value: keys and values of the text, split into heads [B, heads, S, d].
        key, value: keys and values of a picture [B, Q, W], normalised but not modulated; None for the text alone.
        key_modulation, value_modulation: modulation of `key` and `value` at this time step [B, 2 W]: shift, then scale.
    """

    text_key: Tensor
    text_value: Tensor
    key: Tensor | None = None
    value: Tensor | None = None
    key_modulation: Tensor | None = None
    value_modulation: Tensor | None = None


class Inputs(NamedTuple):
    """The inputs of a network's blocks besides latents, in the order of the walk.

    Attributes:
        shifts: the embedding's shift for each resnet [B, C].
        contexts: the context for each transformer block; None without cross-attention.
        fused: for each transformer block the fused query, key and value weights of its self-attention [3 C, C]; None
            for three separate products.
    """

    shifts: Sequence[Tensor]
    contexts: Sequence[Context | None]
    fused: Sequence[Tensor | None]


def resnet_block(
    block: Any, x: Tensor, shift: Tensor, skip: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """One ResnetBlock2D after its time projection: x [B, C, h, w], shift [B, C'] -> [B, C', h, w].

    On the expansion path, `skip` (plus `residual`, if any) is concatenated to x.
    """
    if skip is not None:
        x = torch.cat([x, skip if residual is None else skip + residual], dim=1)
    hidden = block.conv1(F.silu(block.norm1(x))) + shift[:, :, None, None]
    hidden = block.conv2(F.silu(block.norm2(hidden)))
    return hidden + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def transformer_block(block: Any, x: Tensor, context: Context | None, fused: Tensor | None) -> Tensor:
    """One BasicTransformerBlock: [B, L, C] -> the same shape; the attention processor has the picture's `scale`."""
    attention, x_norm = block.attn1, block.norm1(x)
    if fused is None:
        query, key, value = attention.to_q(x_norm), attention.to_k(x_norm), attention.to_v(x_norm)
    else:
        query, key, value = F.linear(x_norm, fused).chunk(3, dim=-1)
    heads = attention.heads
    output = F.scaled_dot_product_attention(
        split_heads(query, heads), split_heads(key, heads), split_heads(value, heads)
    )
    x = x + attention.to_out[0](output.transpose(1, 2).flatten(2))
    if context is not None:
        attention = block.attn2
        query = split_heads(attention.to_q(block.norm2(x)), attention.heads)
        output = F.scaled_dot_product_attention(query, context.text_key, context.text_value)
        if context.key is not None and attention.processor.scale != 0:
            key = modulate(context.key, context.key_modulation, attention.heads)
            value = modulate(context.value, context.value_modulation, attention.heads)
            output = output + attention.processor.scale * F.scaled_dot_product_attention(query, key, value)
        x = x + attention.to_out[0](output.transpose(1, 2).flatten(2))
    hidden, gate = block.ff.net[0].proj(block.norm3(x)).chunk(2, dim=-1)
    return x + block.ff.net[2](hidden * F.gelu(gate))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, heads d] -> [B, heads, L, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def modulate(x: Any, modulation: Any, heads: int) -> Tensor:
    """AdaLayerNorm after its normalisation: x [B, Q, W], modulation [B, 2 W] -> [B, heads, Q, d]."""
    shift, scale = modulation.unsqueeze(1).chunk(2, dim=-1)
    return split_heads(x * (1 + scale) + shift, heads)


def enter_block(model: Any, x: Tensor) -> Tensor:
    """The start of a Transformer2DModel: [B, C, h, w] -> tokens [B, h w, C]."""
    hidden = model.norm(x)
    if not model.use_linear_projection:
        hidden = model.proj_in(hidden)
    hidden = hidden.flatten(2).transpose(1, 2)
    return model.proj_in(hidden) if model.use_linear_projection else hidden


def leave_block(model: Any, hidden: Tensor, x: Tensor) -> Tensor:
    """The end of a Transformer2DModel with input x: tokens [B, h w, C] and x [B, C, h, w] -> x's shape."""
    if model.use_linear_projection:
        hidden = model.proj_out(hidden)
    hidden = hidden.transpose(1, 2).unflatten(2, x.shape[-2:])
    if not model.use_linear_projection:
        hidden = model.proj_out(hidden)
    return x + hidden


@dataclass(frozen=True)
class Blocks(BlockFunctions):
    """The block functions of the walks, plain or compiled."""

    resnet: Callable[..., Tensor] = resnet_block
    enter: Callable[[Any, Tensor], Tensor] = enter_block
    transformer: Callable[[Any, Tensor, Context | None, Tensor | None], Tensor] = transformer_block
    leave: Callable[[Any, Tensor, Tensor], Tensor] = leave_block


class Joins:
    """What a system does between the UNet's layers and blocks; this one does nothing.

    Attributes:
        changes_skip: whether the output of `after_down` also replaces the block's last skip feature.
    """

    changes_skip: bool = False

    def after_down(self, number: int, x: Tensor) -> Tensor:
        """After block `number` of the compression path with its downsampler: [B, C, h, w] -> the same shape."""
        return x

    def after_up(self, number: int, x: Tensor) -> Tensor:
        """After block `number` of the expansion path with its upsampler: [B, C, h, w] -> the same shape."""
        return x

    def middle(self, x: Tensor) -> Tensor:
        """After the middle block: [B, C, h, w] -> the same shape."""
        return x

    def resnet(self, blocks: Blocks, resnet: Any, x: Tensor, shift: Tensor, skip: Tensor) -> Tensor:
        """A resnet that takes the skip connection's tensor; arguments as in resnet_block."""
        return blocks.resnet(resnet, x, shift, skip)

    def enlarge(self, x: Tensor) -> Tensor:
        """Before an upsampler: [B, C, h, w] -> the same shape."""
        return x


def walk_unet(
    unet: Any, latents: Tensor, inputs: Inputs, joins: Joins | None = None, blocks: Blocks | None = None
) -> Tensor:
    """VP latents [B, C, h, w] -> predicted noise, the same shape.

    Args:
        unet: SDXL-shaped UNet.
        latents: latents with any sides; upsampling takes the skip's size, so odd sides work.
        inputs: inputs in the order of resnets_of and transformers_of.
        joins: called in the order of the walk; None for none.
        blocks: compiled block functions, or None for the plain ones.
    """
    blocks, joins = blocks or Blocks(), joins or Joins()
    shifts, rest = iter(inputs.shifts), zip(inputs.contexts, inputs.fused, strict=True)
    x, skips = walk_down(unet, unet.conv_in(latents), shifts, rest, blocks, joins)
    x = joins.middle(walk_middle(unet.mid_block, x, shifts, rest, blocks))
    for number, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            x = joins.resnet(blocks, resnet, x, next(shifts), skips.pop())
            x = _spatial(attention, x, rest, blocks)
        if block.upsamplers is not None:
            x = joins.enlarge(x)
            x = block.upsamplers[0].conv(F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
        x = joins.after_up(number, x)
    return unet.conv_out(F.silu(unet.conv_norm_out(x)))  # type: ignore[no-any-return]


def text_inputs(network: Any, embedding: Tensor, text: Tensor) -> Inputs:
    """The inputs of all blocks of a UNet or of a copy, without caches.

    Args:
        embedding: the whole embedding [B, E], before the activation.
        text: token embeddings [B, S, D].
    """
    activated, contexts = F.silu(embedding), list[Context | None]()
    for block in transformers_of(network):
        attention: Any = block.attn2
        if attention is None:
            contexts.append(None)
        else:
            heads = attention.heads
            contexts.append(Context(split_heads(attention.to_k(text), heads), split_heads(attention.to_v(text), heads)))
    shifts = [resnet.time_emb_proj(activated) for resnet in resnets_of(network)]  # type: ignore[misc]
    return Inputs(shifts, contexts, [None] * len(contexts))


def resnets_of(network: Any) -> list[ResnetBlock2D]:
    """The resnets of a UNet or of a copy in the order of the walk: down, middle, up."""
    return [module for module in _modules(network) if isinstance(module, ResnetBlock2D)]


def transformers_of(network: Any) -> list[BasicTransformerBlock]:
    """The transformer blocks of a UNet or of a copy in the order of the walk: down, middle, up."""
    return [module for module in _modules(network) if isinstance(module, BasicTransformerBlock)]


def check_walkable(network: nn.Module) -> None:
    """Raises ValueError that names the first block that differs from SDXL's: the walk would compute it wrongly."""
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
            raise ValueError(f"{name}: {wrong}; only SDXL-shaped networks work here")


def walk_down(
    network: Any,
    x: Tensor,
    shifts: Iterator[Tensor],
    rest: Iterator[Any],
    blocks: Blocks,
    joins: Joins | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The compression path of a UNet or of a copy after its input convolution: (output, all skips).

    Args:
        network: with down_blocks.
        x: output of the input convolution [B, C, h, w].
        shifts: of the resnets, in order; `rest`: (context, fused) of each transformer block.
        blocks: block functions.
        joins: see Joins.after_down; None for none.
    """
    skips, joins = [x], joins or Joins()
    for number, block in enumerate(network.down_blocks):
        attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
        for resnet, attention in zip(block.resnets, attentions, strict=True):
            x = _spatial(attention, blocks.resnet(resnet, x, next(shifts)), rest, blocks)
            skips.append(x)
        if block.downsamplers is not None:
            x = block.downsamplers[0](x)
            skips.append(x)
        x = joins.after_down(number, x)
        if joins.changes_skip:
            skips[-1] = x
    return x, skips


def walk_middle(mid: Any, x: Tensor, shifts: Iterator[Tensor], rest: Iterator[Any], blocks: Blocks) -> Tensor:
    """The middle block; arguments as in walk_down."""
    x = blocks.resnet(mid.resnets[0], x, next(shifts))
    for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
        x = blocks.resnet(resnet, _spatial(attention, x, rest, blocks), next(shifts))
    return x


def _spatial(model: Any, x: Tensor, rest: Iterator[Any], blocks: Blocks) -> Tensor:
    """One Transformer2DModel: [B, C, h, w] -> the same shape. For None it returns x."""
    if model is None:
        return x
    hidden = blocks.enter(model, x)
    for block in model.transformer_blocks:
        context, fused = next(rest)
        hidden = blocks.transformer(block, hidden, context, fused)
    return blocks.leave(model, hidden, x)


def _modules(network: Any) -> Iterator[nn.Module]:
    """Modules in the order of the walk. In a block, resnets keep their order, and so do transformers."""
    for part in (network.down_blocks, getattr(network, "mid_block", None), getattr(network, "up_blocks", None)):
        if part is not None:
            yield from part.modules()
