"""Names of SD3's tensors: single files of Stability AI on one side, diffusers' and transformers' modules on the other.

A single file holds the MM-DiT (model.diffusion_model), the autoencoder (first_stage_model), and perhaps the text
encoders (text_encoders.clip_l, clip_g and t5xxl). Two kinds of tensors change besides their names: a file joins the
queries, keys and values of an attention, and the modulations of the last norms hold shift before scale, not after it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from components.priors.sdxl_keys import translate_key

TRANSFORMER, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
TEXTS: Mapping[str, str] = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
"""Prefix of each text encoder's tensors, whose names below it are those of transformers."""

EMBEDDINGS: Mapping[str, str] = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
BLOCK: Mapping[str, str] = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
JOINED: Mapping[str, tuple[str, str, str]] = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def whole_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors with the MM-DiT below TRANSFORMER, also if the file holds it alone, under shorter names."""
    for prefix in ("diffusion_model.", ""):
        if f"{prefix}x_embedder.proj.weight" in tensors:
            return {f"{TRANSFORMER}{key.removeprefix(prefix)}": value for key, value in tensors.items()}
    return dict(tensors)


def transformer_sizes(state: Mapping[str, Tensor], head: int = 64) -> dict[str, Any]:
    """The arguments of SD3Transformer2DModel that follow from a file's MM-DiT, keys without TRANSFORMER.

    Args:
        state: tensors by key.
        head: width of an attention head, 64 in all published sizes. Normalised queries show it, and then it is unused.

    Raises:
        KeyError: a tensor that has the sizes is missing.
        ValueError: the heads do not fill the width.
    """
    patch, linear = state["x_embedder.proj.weight"], state["final_layer.linear.weight"]
    width, in_channels, side = (int(n) for n in patch.shape[:3])
    norm = state.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = head if norm is None else int(norm.shape[0])
    if width % head:
        raise ValueError(f"the width {width} is no multiple of {head}, the width of a head")
    return {
        "patch_size": side,
        "in_channels": in_channels,
        "out_channels": int(linear.shape[0]) // side**2,
        "num_layers": _layers(state),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": int(state["context_embedder.weight"].shape[1]),
        "caption_projection_dim": int(state["context_embedder.weight"].shape[0]),
        "pooled_projection_dim": int(state["y_embedder.mlp.0.weight"].shape[1]),
        "pos_embed_max_size": math.isqrt(int(state["pos_embed"].shape[1])),
        "dual_attention_layers": tuple(
            layer for layer in range(_layers(state)) if f"joint_blocks.{layer}.x_block.attn2.qkv.weight" in state
        ),
        "qk_norm": None if norm is None else "rms_norm",
    }


def transformer_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's MM-DiT, keys without TRANSFORMER, under diffusers' names; keys that are none of its keep their names."""
    layers = _layers(state)
    table = dict(EMBEDDINGS)
    joined: dict[str, tuple[str, ...]] = {}
    for layer in range(layers):
        old, new = f"joint_blocks.{layer}", f"transformer_blocks.{layer}"
        table |= {f"{old}.{a}": f"{new}.{b}" for a, b in BLOCK.items()}
        joined |= {f"{old}.{a}": tuple(f"{new}.{b}" for b in names) for a, names in JOINED.items()}
    swapped = {"final_layer.adaLN_modulation.1", f"joint_blocks.{layers - 1}.context_block.adaLN_modulation.1"}
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if key == "pos_embed":
            result["pos_embed.pos_embed"] = value
        elif module in joined:
            result |= {f"{name}.{kind}": part for name, part in zip(joined[module], value.chunk(3), strict=True)}
        else:
            shift_scale = torch.cat(value.chunk(2)[::-1]) if module in swapped else value
            result[translate_key(key, table) or key] = shift_scale
    return result


def text_to_transformers(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """A file's text encoder, keys without its prefix, as transformers names it.

    CLIP-L's projection is the identity, which files leave out. T5's input embedding is its shared one. Position ids and
    CLIP's temperature are no weights of a text encoder.
    """
    result = {k: v for k, v in state.items() if not k.endswith("position_ids") and k != "logit_scale"}
    if part == "text_encoder" and "text_projection.weight" not in result:
        width = int(result["text_model.final_layer_norm.weight"].shape[0])
        result["text_projection.weight"] = torch.eye(width)
    if part == "text_encoder_3" and "shared.weight" in result:
        result["encoder.embed_tokens.weight"] = result["shared.weight"]
    return result


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _layers(state: Mapping[str, Tensor]) -> int:
    numbers = {int(key.split(".")[1]) for key in state if key.startswith("joint_blocks.")}
    return max(numbers, default=-1) + 1
