"""Priors of SD3's shape from a config, so that any size works; sd3_config.NANO_SD3 has that of the nano one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from components.priors.autoencoder import SpaceToDepthAutoencoder
from components.priors.nano import clip_config, word_tokenizer
from components.priors.sd3 import SD3Prior, check_sd3_shape
from components.samplers.schedules import FlowSchedule


def build_sd3_prior(config: Mapping[str, Any], tokenizer_json: str) -> SD3Prior:
    """Builds an untrained prior.

    Args:
        config: sizes, as in NANO_SD3; "transformer" holds the arguments of SD3Transformer2DModel. Without
            "text_encoder_3" there is no T5.
        tokenizer_json: text of a tokenizer file; all text encoders use it.

    Raises:
        ValueError: the parts do not fit together.
        KeyError, TypeError: a size is missing, or has another name.
    """
    tokenizer = word_tokenizer(tokenizer_json, int(config["text_length"]))
    clip = clip_config(config["text_encoder"], tokenizer)
    sizes = config.get("text_encoder_3")
    t5 = None
    if sizes:
        # a T5 has no token of its own for the start of a prompt
        t5 = T5EncoderModel(
            T5Config(**sizes, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_token_id, dropout_rate=0.0)
        )
    transformer = {k: tuple(v) if isinstance(v, list) else v for k, v in config["transformer"].items()}
    network = SD3Transformer2DModel(**transformer)
    autoencoder = SpaceToDepthAutoencoder(**config["autoencoder"])
    width = int(sizes["d_model"]) if sizes else 0
    faults = check_sd3_shape(
        dict(network.config), autoencoder.latent_channels, [int(config["text_encoder"]["hidden_size"])] * 2, width
    )
    if faults:
        raise ValueError(faults)
    return SD3Prior(
        name="untrained",
        digest="",
        network=network,
        autoencoder=autoencoder,
        text_encoders=(CLIPTextModelWithProjection(clip), CLIPTextModelWithProjection(clip), t5),
        tokenizers=(tokenizer, tokenizer, tokenizer if t5 is not None else None),
        schedule=FlowSchedule(**config["schedule"]),
        t5_tokens=int(config["t5_tokens"]),
    )
