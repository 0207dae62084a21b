"""Names, sizes and licences of SDXL and DINOv2, without their files. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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

SDXL_AUTOENCODER: Mapping[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.13025,
}
"""SDXL base's autoencoder, in AutoencoderKL's arguments: 83,653,863 parameters (supir.md, section 1.1)."""

LICENCES: Mapping[str, str] = {
    SDXL: "CreativeML OpenRAIL++-M",
    DINOV2: "apache-2.0",
}
"""Licences from the models' cards on the hub."""


IMAGENET_MEAN = (0.485, 0.456, 0.406)


IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """The preparation of a picture for the picture encoder.

    Attributes:
        shortest_edge_px: with fit "crop" the short side is resized to this (bicubic, antialiased).
        crop_px: side of the encoder's square input.
        fit: "crop" takes the centre square of the resized picture; "squash" resizes the whole picture to the square.
    """

    shortest_edge_px: int = 256
    crop_px: int = 224
    fit: Literal["crop", "squash"] = "crop"
