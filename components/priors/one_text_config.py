"""Names, sizes and licences of PixArt-alpha and Stable Diffusion 2.1, without their files. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PIXART = "PixArt-alpha/PixArt-XL-2-512x512"
SD21 = "stabilityai/stable-diffusion-2-1-base"

PIXART_DIT: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 64,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
}
"""PixArt-XL/2 at 512 (arXiv 2310.00426) in PixArtTransformer2DModel's arguments: 610,856,096 parameters."""

SD21_UNET: Mapping[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
"""Stable Diffusion 2.1's UNet in UNet2DConditionModel's arguments: 865,910,724 parameters."""

SD_VAE: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 256,
    "scaling_factor": 0.18215,
    "force_upcast": False,
}
"""stabilityai/sd-vae-ft-ema, the autoencoder of both, in AutoencoderKL's arguments: 83,653,863 parameters."""

PIXART_SCHEDULE: Mapping[str, Any] = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}

PIXART_TOKENS = 300
"""Tokens of a prompt in InstaRevive's code (reference, section 5.7); PixArt-alpha itself was trained with 120."""

LICENCES: Mapping[str, str] = {PIXART: "CreativeML OpenRAIL++-M", SD21: "CreativeML OpenRAIL++-M"}
"""Licences from the models' cards on the hub."""
