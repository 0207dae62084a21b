"""The fast path of MM-DiTs: the same results with less compute, as fast_unet.py does for UNets.

Of an MM-DiT's call, the text enters as `context_embedder(text)` and `text_embedder(pooled)`, which depend on a run's
conditions alone. The modulations (each block's shifts, scales and gates, and the last norm's) depend on the time and on
pooled text: they are the same for all tiles of a step. In SD3 medium their layers hold a third of the weights. The text
itself changes from block to block and with the time, so no block has keys to keep.

Shapes: B rows, L picture tokens, S text tokens, C width, E embedding width, M numbers of all modulations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.priors.block_calls import BlockFunctions
from components.priors.fast_unet import concat_weights
from components.priors.mmdit_walk import TokenJoins, unpatch

Fused = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Weight and bias of query, key and value in one, of the picture's stream and of the text's; None calls the layers."""


def modulated_block(
    block: Any,
    tokens: Tensor,
    text: Tensor,
    shifts: Tensor,
    text_shifts: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    text_weight: Tensor | None = None,
    text_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """diffusers' JointTransformerBlock with the modulations computed before: (picture tokens, text tokens).

    Args:
        block: the module.
        tokens: [B, L, C].
        text: [B, S, C]; the last block of a network returns it as it is.
        shifts: output of the layer in the picture's norm, [B, 6 C], or [B, 9 C] with a second attention.
        text_shifts: of the text's norm, [B, 6 C], or [B, 2 C] in the last block.
        weight, bias, text_weight, text_bias: see Fused.
    """
    own, last = _rows(shifts, 9 if block.use_dual_attention else 6), block.context_pre_only
    shift, scale, gate, shift_ff, scale_ff, gate_ff = own[:6]
    of_text = _rows(text_shifts, 2 if last else 6)
    text_shift, text_scale = (of_text[1], of_text[0]) if last else (of_text[0], of_text[1])
    normed = block.norm1.norm(tokens)
    text_normed = block.norm1_context.norm(text) * (1 + text_scale) + text_shift
    picture = _project(block.attn, normed * (1 + scale) + shift, weight, bias)
    added = _project_text(block.attn, text_normed, text_weight, text_bias)
    joined = [torch.cat([picture[part], added[part]], dim=2) for part in range(3)]
    answer = _merge_heads(F.scaled_dot_product_attention(joined[0], joined[1], joined[2]))
    length = tokens.shape[1]
    tokens = tokens + gate * block.attn.to_out[0](answer[:, :length])
    if block.use_dual_attention:
        three = _project(block.attn2, normed * (1 + own[7]) + own[6], None, None)
        tokens = tokens + own[8] * block.attn2.to_out[0](
            _merge_heads(F.scaled_dot_product_attention(three[0], three[1], three[2]))
        )
    tokens = tokens + gate_ff * block.ff(block.norm2(tokens) * (1 + scale_ff) + shift_ff)
    if last:
        return tokens, text
    text_gate, text_shift_ff, text_scale_ff, text_gate_ff = of_text[2:]
    text = text + text_gate * block.attn.to_add_out(answer[:, length:])
    normed = block.norm2_context(text) * (1 + text_scale_ff) + text_shift_ff
    return tokens, text + text_gate_ff * block.ff_context(normed)


def _rows(numbers: Tensor, count: int) -> list[Tensor]:
    """Numbers [B, count C] as `count` tensors [B, 1, C]."""
    return [part[:, None] for part in numbers.chunk(count, dim=1)]


@dataclass(frozen=True)
class ModulatedBlocks(BlockFunctions):
    """The block functions of the walk, plain or compiled."""

    modulated: Callable[..., tuple[Tensor, Tensor]] = modulated_block


@dataclass(frozen=True)
class FastMMDiT:
    """An MM-DiT with the values that are derived from its weights.

    Attributes:
        network: the module.
        project: the embedding of time and pooled text [B, E] -> all modulations [B, M].
        sizes: numbers of each of them: the picture's and the text's by block, and the last norm's.
        fused: by block.
    """

    network: Any
    project: Callable[[Tensor], Tensor]
    sizes: Sequence[int]
    fused: Sequence[Fused]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        bias: Tensor = self.network.proj_out.bias
        return bias.dtype

    def embed_text(self, text: Tensor) -> Tensor:
        """Joint text [B, S, D] -> text tokens [B, S, C] of the first block."""
        return self.network.context_embedder(text.to(self.dtype))  # type: ignore[no-any-return]

    def embed_pooled(self, pooled: Tensor) -> Tensor:
        """Pooled text [B, P] -> its term of the embedding [B, E]."""
        return self.network.time_text_embed.text_embedder(pooled.to(self.dtype))  # type: ignore[no-any-return]

    def embed_times(self, times: Tensor) -> Tensor:
        """Time steps [B] as the network takes them -> their term of the embedding [B, E]."""
        embed = self.network.time_text_embed
        return embed.timestep_embedder(embed.time_proj(times).to(self.dtype))  # type: ignore[no-any-return]

    def walk(
        self, latents: Tensor, text: Tensor, modulations: Tensor, joins: TokenJoins, blocks: ModulatedBlocks
    ) -> Tensor:
        """Latents [B, C, h, w] -> velocity, the same shape.

        Args:
            latents: noisy latents with sides that are multiples of the patch.
            text: see embed_text.
            modulations: see `project`.
            joins: called after each block.
            blocks: block functions.
        """
        network, parts = self.network, modulations.split(list(self.sizes), dim=1)
        tokens = network.pos_embed(latents).contiguous()
        for number, (block, fused) in enumerate(zip(network.transformer_blocks, self.fused, strict=True)):
            tokens, text = blocks.modulated(block, tokens, text, parts[2 * number], parts[2 * number + 1], *fused)
            tokens = joins.after_block(number, tokens)
        scale, shift = (part[:, None] for part in parts[-1].chunk(2, dim=1))
        return unpatch(network, network.proj_out(network.norm_out.norm(tokens) * (1 + scale) + shift), latents)


def derive_mmdit(network: Any, join: bool, replace: bool = False) -> FastMMDiT:
    """An MM-DiT with what is derived from its weights.

    Args:
        network: SD3-shaped.
        join: fuse weights; a network in training is never fused, since its weights change.
        replace: the network's layers become views of the fused matrices, which then take no extra memory.
    """
    layers = modulation_layers(network)
    sizes = [layer.out_features for layer in layers]
    if not join or any(parameter.requires_grad for parameter in network.parameters()):
        nothing: Fused = (None, None, None, None)
        return FastMMDiT(network, lambda e: _by_layer(layers, e), sizes, [nothing] * len(network.transformer_blocks))
    weight, bias = concat_weights(layers, replace), torch.cat([layer.bias.detach() for layer in layers])
    fused = [_fuse_attention(block.attn, replace) for block in network.transformer_blocks]
    return FastMMDiT(network, lambda e: F.linear(F.silu(e), weight, bias), sizes, fused)


def modulation_layers(network: Any) -> list[Any]:
    """The layers that take the embedding: of the picture's norm and of the text's by block, then of the last norm."""
    pairs = ((block.norm1.linear, block.norm1_context.linear) for block in network.transformer_blocks)
    return [*(layer for pair in pairs for layer in pair), network.norm_out.linear]


def _by_layer(layers: Sequence[nn.Linear], embedding: Tensor) -> Tensor:
    active = F.silu(embedding)
    return torch.cat([layer(active) for layer in layers], dim=1)


@torch.no_grad()
def _fuse_attention(attention: Any, replace: bool) -> Fused:
    streams = (
        [attention.to_q, attention.to_k, attention.to_v],
        [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj],
    )
    parts: list[Tensor | None] = []
    for layers in streams:
        if any(layer is None or layer.bias is None for layer in layers):
            parts += [None, None]
        else:
            parts += [concat_weights(layers, replace), torch.cat([layer.bias.detach() for layer in layers])]
    return (parts[0], parts[1], parts[2], parts[3])


def _project(attention: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """Queries, keys and values [B, heads, L, d] of the picture's stream, the first two normed if the network does."""
    layers = (attention.to_q, attention.to_k, attention.to_v)
    return _heads(attention, layers, (attention.norm_q, attention.norm_k), x, weight, bias)


def _project_text(attention: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    layers = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
    return _heads(attention, layers, (attention.norm_added_q, attention.norm_added_k), x, weight, bias)


def _heads(
    attention: Any,
    layers: Sequence[Any],
    norms: Sequence[Any],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> list[Tensor]:
    flat = [layer(x) for layer in layers] if weight is None else F.linear(x, weight, bias).chunk(3, dim=-1)
    three = [part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in flat]
    for number, norm in enumerate(norms):
        if norm is not None:
            three[number] = norm(three[number])
    return three


def _merge_heads(x: Tensor) -> Tensor:
    """[B, heads, L, d] -> [B, L, heads d]."""
    return x.transpose(1, 2).flatten(2)
