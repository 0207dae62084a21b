"""Names, sizes and licences of Stable Diffusion 3, and the sizes of its shape at nano size. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SD3_MEDIUM = "stabilityai/stable-diffusion-3-medium-diffusers"
SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"

SD3_TRANSFORMER: Mapping[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
"""SD3 medium (arXiv 2403.03206, d = 24) in SD3Transformer2DModel's arguments: 2,028,328,000 parameters."""

SD35_TRANSFORMER: Mapping[str, Any] = {
    **SD3_TRANSFORMER,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
"""SD3.5 medium (MMDiT-X): a second self-attention in the first 13 blocks, normalised queries and keys."""

SD3_AUTOENCODER: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""The autoencoder of both, in AutoencoderKL's arguments: scaled latents are (x - 0.0609) 1.5305."""

CLIP_L: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
}
"""The first text encoder in CLIPTextConfig's arguments. With this eos_token_id CLIP pools at the largest token id."""

CLIP_G: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "eos_token_id": 2,
}
"""The second text encoder, in the same arguments."""

T5_XXL: Mapping[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
"""The third text encoder, t5-v1_1-xxl, in T5Config's arguments."""

SD3_SCHEDULE: Mapping[str, Any] = {"num_train_timesteps": 1000, "shift": 3.0}

CLIP_TOKENS = 77
T5_TOKENS = 256
"""Tokens of a prompt for the CLIPs and for T5; 256 is the default of diffusers' pipeline, 512 its largest number."""

LICENCES: Mapping[str, str] = {
    SD3_MEDIUM: "Stability AI Community License",
    SD35_MEDIUM: "Stability AI Community License",
}
"""Licences from the models' cards on the hub; docs/licences.md has what they permit."""

NANO_SD3: Mapping[str, Any] = {
    "family": "sd3",
    "autoencoder": {"factor": 4, "latent_channels": 12, "width": 64, "encoder_blocks": 2, "decoder_blocks": 4},
    "transformer": {
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "num_layers": 6,
        "attention_head_dim": 32,
        "num_attention_heads": 3,
        "joint_attention_dim": 64,
        "caption_projection_dim": 96,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 48,
        "qk_norm": "rms_norm",
    },
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "text_encoder_3": {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    "text_length": 16,
    "t5_tokens": 16,
    "schedule": {"shift": 1.0},
}
"""Our numbers: SD3's block structure with about 1/1000 of its parameters, on the latents of the nano prior."""
