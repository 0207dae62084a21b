"""A tiny random pipeline of diffusers in SD3's shape, and the same weights as a single file of Stability AI's names."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from components.priors.nano import build_tokenizer_json, word_tokenizer
from components.randomness import seeded_init

WORDS = ["red", "blue", "green", "dark"]
LENGTH, T5_LENGTH = 7, 11
PROMPTS, NEGATIVES = ["red dark blue", "green"], ["dark", "dark red"]
LAYERS = 3
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": LAYERS,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 16,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def clip(width: int, layers: int, act: str) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            vocab_size=8,
            max_position_embeddings=LENGTH,
            projection_dim=width,
            hidden_act=act,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
        )
    )


def pipeline(shift: float = 3.0, **changes: Any) -> StableDiffusion3Pipeline:
    """A pipeline with random weights; `changes` are arguments of the transformer."""
    with seeded_init(0, "sd3"):
        tokenizer = word_tokenizer(build_tokenizer_json(WORDS, LENGTH), LENGTH)
        parts: dict[str, Any] = {
            "transformer": SD3Transformer2DModel(**{**TRANSFORMER, **changes}),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": clip(16, 2, "quick_gelu"),
            "text_encoder_2": clip(24, 3, "gelu"),
            "text_encoder_3": T5EncoderModel(
                T5Config(d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=8, pad_token_id=0)
            ),
        }
    for part in parts.values():
        part.eval()
    pipe = StableDiffusion3Pipeline(
        **parts,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transformer_file(width: int = 32, *, dual: tuple[int, ...] = (), qk_norm: bool = False) -> dict[str, Tensor]:
    """Random tensors of an MM-DiT of TRANSFORMER's sizes under the names of a single file, written down one by one."""
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 256, width), "x_embedder.proj.weight": (width, 16, 2, 2)}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    shapes["x_embedder.proj.bias"] = (width,)
    linear("t_embedder.mlp.0", width, 256)
    linear("t_embedder.mlp.2", width, width)
    linear("y_embedder.mlp.0", width, 40)
    linear("y_embedder.mlp.2", width, width)
    linear("context_embedder", width, 48)
    for layer in range(LAYERS):
        for stream in ("x_block", "context_block"):
            own, last = f"joint_blocks.{layer}.{stream}", stream == "context_block" and layer == LAYERS - 1
            image_dual = stream == "x_block" and layer in dual
            linear(f"{own}.attn.qkv", 3 * width, width)
            if qk_norm:
                shapes[f"{own}.attn.ln_q.weight"] = shapes[f"{own}.attn.ln_k.weight"] = (8,)
            linear(f"{own}.adaLN_modulation.1", (2 if last else 9 if image_dual else 6) * width, width)
            if image_dual:
                linear(f"{own}.attn2.qkv", 3 * width, width)
                linear(f"{own}.attn2.proj", width, width)
                if qk_norm:
                    shapes[f"{own}.attn2.ln_q.weight"] = shapes[f"{own}.attn2.ln_k.weight"] = (8,)
            if not last:
                linear(f"{own}.attn.proj", width, width)
                linear(f"{own}.mlp.fc1", 4 * width, width)
                linear(f"{own}.mlp.fc2", width, 4 * width)
    linear("final_layer.linear", 2 * 2 * 16, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return {name: 0.1 * normal(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}
