"""What is known of SDXL and DINOv2 without their files: names, sizes and licences. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
DINOV2 = "facebook/dinov2-large"  # InstantIR's choice (reference/instantir.md section 2)
DINOV2_TOKEN_DIM = 1024

SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""SDXL base's UNet (arXiv 2307.01952, table 1), in UNet2DConditionModel's arguments: 2,567,463,684 parameters."""

LICENCES: Mapping[str, str] = {
    SDXL: "CreativeML OpenRAIL++-M",
    DINOV2: "apache-2.0",
}
"""As the hub's cards of these models say."""
