"""The nano prior: SDXL's shape at a size that trains on a laptop. It is built from a config, so any size works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

from components.priors.autoencoder import SpaceToDepthAutoencoder
from components.priors.sdxl import Prior
from components.priors.sdxl_config import ImageView
from components.samplers.schedules import Schedule

PAD, BOS, UNKNOWN, EOS = "<pad>", "<bos>", "<unk>", "<eos>"

NANO: Mapping[str, Any] = {
    "autoencoder": {"factor": 4, "latent_channels": 12, "width": 64, "encoder_blocks": 2, "decoder_blocks": 4},
    "unet": {
        "in_channels": 12,
        "out_channels": 12,
        "block_out_channels": [48, 56, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 1, 2],
        "attention_head_dim": [2, 4, 4],
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "text_length": 16,
    "image_encoder": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 8,
        "image_size": 64,
        "drop_path_rate": 0.0,
    },
    "view": {"shortest_edge_px": 64, "crop_px": 64, "fit": "squash"},
    "schedule": {},
}
"""Our numbers: SDXL's block structure with about 1/1000 of its parameters; 65 picture tokens instead of 257."""


def build_tokenizer_json(words: Sequence[str], length: int) -> str:
    """A word-level tokenizer over a fixed vocabulary, as the text of tokenizer.json; other words become <unk>."""
    vocabulary = {w: i for i, w in enumerate([PAD, BOS, UNKNOWN, EOS, *dict.fromkeys(w.lower() for w in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, vocabulary[BOS]), (EOS, vocabulary[EOS])]
    )
    tokenizer.enable_truncation(length)
    return tokenizer.to_str()


def word_tokenizer(tokenizer_json: str, length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of build_tokenizer_json for prompts of `length` tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer_json),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=length,
    )


def clip_config(sizes: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> CLIPTextConfig:
    """A CLIP text encoder's configuration from its sizes and its tokenizer; the projection keeps the width."""
    return CLIPTextConfig(
        **sizes,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=sizes["hidden_size"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_prior(config: Mapping[str, Any], tokenizer_json: str) -> Prior:
    """Builds an untrained prior.

    Args:
        config: sizes, as in NANO; "unet" holds the arguments of UNet2DConditionModel.
        tokenizer_json: text of a tokenizer file; both text encoders use it.
    """
    tokenizer = word_tokenizer(tokenizer_json, int(config["text_length"]))
    text = clip_config(config["text_encoder"], tokenizer)
    unet = {k: tuple(v) if isinstance(v, list) else v for k, v in config["unet"].items()}
    return Prior(
        name="untrained",
        digest="",
        unet=UNet2DConditionModel(**unet),
        autoencoder=SpaceToDepthAutoencoder(**config["autoencoder"]),
        text_encoders=(CLIPTextModel(text), CLIPTextModelWithProjection(text)),
        tokenizers=(tokenizer, tokenizer),
        image_encoder=Dinov2Model(Dinov2Config(**config["image_encoder"])),
        schedule=Schedule(**config["schedule"]),
        view=ImageView(**config["view"]),
    )
