"""InstantIR's Degradation Content Perceptor (DCP): picture tokens -> extra keys and values in every cross-attention.

It has two parts (instantir.md section 2). A Resampler condenses the picture encoder's tokens to a few queries. One
processor for each cross-attention of the UNet attends to these queries; the UNet's whole embedding (time, pooled text,
sizes) modulates its keys and values. The Resampler is in `unet.encoder_hid_proj` and the processors are in
`attn2.processor`, so that the UNet's call includes them and LoRA can target them.

Shapes: B batch, N picture tokens, Q queries, W attention width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from components.priors.parameters import base_parameters, base_state, copy_strictly
from components.priors.unet_walk import split_heads
from components.randomness import seeded_init


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """Size of the Resampler; the defaults are those of the released model.

    Attributes:
        dim: inner width.
        depth: layers.
        dim_head, heads: width and number of the attention heads.
        num_queries: Q, number of output tokens.
        embedding_dim: width of the picture encoder's tokens.
        output_dim: width of the UNet's text tokens.
        ff_mult: widening factor of the feed-forward layers.
    """

    dim: int = 1280
    depth: int = 4
    dim_head: int = 64
    heads: int = 20
    num_queries: int = 64
    embedding_dim: int = 1024
    output_dim: int = 2048
    ff_mult: int = 4


class PerceiverAttention(nn.Module):
    """Queries attend to the picture's tokens and to themselves, with pre-norm on both and without biases."""

    def __init__(self, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads, self.dim_head = heads, dim_head
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        """tokens [B, N, dim], queries [B, Q, dim] -> [B, Q, dim]."""
        tokens, queries = self.norm1(tokens), self.norm2(queries)
        query = self._split(self.to_q(queries))
        key, value = (self._split(part) for part in self.to_kv(torch.cat([tokens, queries], dim=1)).chunk(2, dim=-1))
        # both factors get the root of the scale, so that half-precision products stay in range; softmax in float32
        scale = self.dim_head**-0.25
        weights = ((query * scale) @ (key * scale).transpose(-2, -1)).float().softmax(dim=-1).to(value.dtype)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)


class Resampler(nn.Module):
    """Picture tokens [B, N, embedding_dim] -> [B, num_queries, output_dim]. It has no time step input."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        dim, hidden = config.dim, config.dim * config.ff_mult
        self.latents = nn.Parameter(torch.randn(1, config.num_queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(config.embedding_dim, dim)
        self.proj_out = nn.Linear(dim, config.output_dim)
        self.norm_out = nn.LayerNorm(config.output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, config.dim_head, config.heads),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, hidden, bias=False),
                        nn.GELU(),
                        nn.Linear(hidden, dim, bias=False),
                    ),
                ]
            )
            for _ in range(config.depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        queries = self.latents.expand(len(tokens), -1, -1)
        tokens = self.proj_in(tokens)
        for layer in self.layers:
            queries = queries + layer[0](tokens, queries)  # type: ignore[index, operator]
            queries = queries + layer[1](queries)  # type: ignore[index, operator]
        return self.norm_out(self.proj_out(queries))


class AdaLayerNorm(nn.Module):
    """LayerNorm without weights, then x (1 + scale) + shift. One layer maps SiLU(embedding) to (shift, scale)."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding_width, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, Q, W], embedding [B, E] -> [B, Q, W]."""
        shift, scale = self.linear(F.silu(embedding)).unsqueeze(1).chunk(2, dim=-1)
        return layer_norm(x) * (1 + scale) + shift


class PerceptorAttnProcessor(nn.Module):
    """Attention to the text, plus `scale` times attention to the picture's tokens (InstantIR Eqs. 3-4, as released).

    Both share the queries and the output projection. `encoder_hidden_states` is (text, [picture tokens]), as diffusers'
    UNet passes it, or their concatenation along the tokens, where the last `num_tokens` are the picture's.

    Args:
        width: W, the attention's inner width.
        cross_attention_dim: width of text and picture tokens.
        embedding_width: E, width of the UNet's embedding.
        num_tokens: Q, used for the concatenated form only.
        scale: Eq. 3's w.
        time_modulation: whether Eq. 4's modulation is on. Without it shift and scale are learnt constants, the linear
            layers' biases. Their weights then do not change (zero in a new perceptor), so that the files' layout and
            meaning stay the same.
    """

    def __init__(
        self,
        width: int,
        cross_attention_dim: int,
        embedding_width: int,
        num_tokens: int,
        scale: float = 1.0,
        time_modulation: bool = True,
    ) -> None:
        super().__init__()
        self.num_tokens, self.scale, self.time_modulation = num_tokens, scale, time_modulation
        self.to_k_ip = nn.Linear(cross_attention_dim, width, bias=False)
        self.to_v_ip = nn.Linear(cross_attention_dim, width, bias=False)
        self.ln_k_ip = AdaLayerNorm(width, embedding_width)
        self.ln_v_ip = AdaLayerNorm(width, embedding_width)

    def keys_and_values(self, tokens: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """Modulated keys and values [B, Q, W] of picture tokens [B, Q, cross_attention_dim]."""
        if not self.time_modulation:
            temb = torch.zeros_like(temb)
        return self.ln_k_ip(self.to_k_ip(tokens), temb), self.ln_v_ip(self.to_v_ip(tokens), temb)

    # __call__, not forward, since diffusers selects the arguments by the signature of __call__
    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, list[Tensor]] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """[B, L, D] -> [B, L, D]. Raises ValueError without `temb`, or with a mask (SDXL has no masks)."""
        if encoder_hidden_states is None or temb is None:
            raise ValueError("the perceptor needs encoder_hidden_states and temb (pass it in cross_attention_kwargs)")
        if attention_mask is not None:
            raise ValueError("the perceptor's cross-attention takes no attention mask")
        if isinstance(encoder_hidden_states, tuple):
            text, (tokens,) = encoder_hidden_states
        else:
            text = encoder_hidden_states[:, : -self.num_tokens]
            tokens = encoder_hidden_states[:, -self.num_tokens :]
        tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens  # [B, pictures, Q, D]: tokens of all pictures
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        output = _attend(query, attn.to_k(text), attn.to_v(text))
        if self.scale != 0:
            key, value = self.keys_and_values(tokens, temb)
            output = output + self.scale * _attend(query, key, value)
        for layer in attn.to_out:  # type: ignore[union-attr]
            output = layer(output)
        if attn.residual_connection:
            output = output + hidden_states
        return output / attn.rescale_output_factor


class Perceptor(nn.Module):
    """The trainable modules in a UNet, with the names of adapter.pt: image_proj.*, ip_adapter.<i>.*.

    This is a view: the modules belong to the UNet.
    """

    def __init__(self, image_proj: Resampler, ip_adapter: Mapping[str, PerceptorAttnProcessor]) -> None:
        super().__init__()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict(dict(ip_adapter))


def install_perceptor(
    unet: UNet2DConditionModel,
    resampler: ResamplerConfig | Mapping[str, Any],
    seed: int = 0,
    time_modulation: bool = True,
) -> Perceptor:
    """Install a new Resampler and processors in a UNet (in place) and return them.

    As released, key and value weights start as copies of the text's, the modulation at zero, the Resampler at random.

    Args:
        unet: SDXL-shaped UNet without a perceptor.
        resampler: size of the Resampler; output_dim must equal the UNet's cross_attention_dim.
        seed: fixes the random start.
        time_modulation: see PerceptorAttnProcessor.

    Raises:
        ValueError: widths do not fit, or the UNet already has a perceptor.
    """
    config = resampler if isinstance(resampler, ResamplerConfig) else ResamplerConfig(**resampler)
    if unet.encoder_hid_proj is not None:
        raise ValueError("the UNet has an encoder_hid_proj already: a perceptor is installed once")
    text_dim = unet.config["cross_attention_dim"]
    if config.output_dim != text_dim:
        raise ValueError(f"the Resampler's output_dim {config.output_dim} is not the UNet's text width {text_dim}")
    embedding_width = unet.time_embedding.linear_2.out_features
    like = next(unet.parameters())
    with seeded_init(seed, "perceptor"):
        image_proj = Resampler(config)
        for attention in cross_attentions(unet).values():
            processor = PerceptorAttnProcessor(
                attention.inner_dim, text_dim, embedding_width, config.num_queries, time_modulation=time_modulation
            )
            processor.to(device=like.device, dtype=like.dtype)
            processor.to_k_ip.weight.data.copy_(_base(attention.to_k).weight.data)
            processor.to_v_ip.weight.data.copy_(_base(attention.to_v).weight.data)
            attention.set_processor(processor)  # type: ignore[arg-type]
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([image_proj.to(device=like.device, dtype=like.dtype)])
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return perceptor_of(unet)


def perceptor_of(unet: UNet2DConditionModel) -> Perceptor:
    """The perceptor of a UNet. Raises ValueError if it has none."""
    if not isinstance(unet.encoder_hid_proj, MultiIPAdapterImageProjection):
        raise ValueError("the UNet has no perceptor: call install_perceptor first")
    attentions = cross_attentions(unet)
    return Perceptor(
        unet.encoder_hid_proj.image_projection_layers[0],  # type: ignore[arg-type]
        {index: attention.processor for index, attention in attentions.items()},  # type: ignore[misc]
    )


def perceptor_state(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The perceptor's weights by adapter.pt's names, with its two dictionaries flattened; without LoRA weights.

    The tensors share memory with the modules: clone them before the modules change.
    """
    return base_state(perceptor_of(unet))


def load_perceptor(unet: UNet2DConditionModel, state: Mapping[str, Tensor]) -> None:
    """Copy weights, with the names of perceptor_state, into the UNet's perceptor.

    Raises:
        ValueError: lists every missing and unexpected key and every wrong shape.
    """
    copy_strictly(base_parameters(perceptor_of(unet)), state, "perceptor")


def cross_attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """Cross-attention layers by their index among all attention layers, in the order down, up, mid blocks.

    These are the indices in adapter.pt; they follow the order in which the UNet registers its blocks.
    """
    attentions: dict[str, Attention] = {}
    blocks: list[tuple[str, nn.Module | None]] = [
        ("down_blocks", unet.down_blocks),
        ("up_blocks", unet.up_blocks),
        ("mid_block", unet.mid_block),
    ]
    number = 0
    for _, block in blocks:
        for name, module in block.named_modules() if block is not None else ():
            if isinstance(module, Attention):
                if name.rpartition(".")[2] == "attn2":
                    attentions[str(number)] = module
                number += 1
    return attentions


def resampler_config(perceptor: Perceptor) -> dict[str, int]:
    """The Resampler's size, for model.json."""
    return asdict(perceptor.image_proj.config)


def layer_norm(x: Tensor) -> Tensor:
    """AdaLayerNorm's normalisation over the last dimension, before the modulation."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [B, heads, L, d]; key and value [B, S, W] -> [B, L, W]."""
    heads = query.shape[1]
    hidden = F.scaled_dot_product_attention(query, split_heads(key, heads), split_heads(value, heads))
    return hidden.transpose(1, 2).flatten(2)


def _base(layer: nn.Module) -> nn.Linear:
    """The layer itself, or the layer inside peft's wrapper."""
    return getattr(layer, "base_layer", layer)  # type: ignore[return-value, arg-type]
