"""Priors with a single text encoder: PixArt-alpha (a DiT, T5 and its mask) and Stable Diffusion 2.1 (a UNet, OpenCLIP).

Both work on the latents of an AutoencoderKL. The text encoder may be absent (T5-XXL has 4.8 billion parameters). Such a
prior accepts only the prompts in `prompt_embeddings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from components.models import ModelError
from components.priors.autoencoder import autoencoder_factor, decode_latents, encode_pixels
from components.priors.conditions import Conditions
from components.priors.files import Precision, first_line, read_json
from components.priors.hub import find_folder, load_part
from components.priors.one_text_config import PIXART_TOKENS
from components.priors.scheduler_config import read_schedule
from components.samplers.schedules import FlowSchedule, Schedule
from components.types import Prediction

_NETWORK = {"pixart": "transformer", "sd": "unet"}
_WEIGHTS = "diffusion_pytorch_model"


@dataclass(kw_only=True)
class OneTextPrior:
    """A prior whose network takes one sequence of text tokens. It is frozen unless a training stage trains it.

    Attributes:
        name, digest: identify the prior; a model trained on it records both.
        network: PixArtTransformer2DModel or UNet2DConditionModel.
        autoencoder: AutoencoderKL.
        text_encoder, tokenizer: None if prompts come from `prompt_embeddings` only.
        schedule: the noise schedule of its training.
        prediction: output of the network: "epsilon", "v_prediction", or with a FlowSchedule "flow_prediction".
        masked: whether padding is masked (T5) or counts as text (CLIP).
        prompt_embeddings: (text [1, L, D], mask [1, L] or None) by prompt.
    """

    name: str
    digest: str
    network: nn.Module
    autoencoder: nn.Module
    text_encoder: nn.Module | None
    tokenizer: Any
    schedule: Schedule | FlowSchedule
    prediction: Prediction = "epsilon"
    masked: bool = True
    prompt_embeddings: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @property
    def source(self) -> dict[str, str]:
        """The record that identifies the prior in a model trained on it."""
        return {"id": self.name, "digest": self.digest}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All networks by part name."""
        networks = {"network": self.network, "autoencoder": self.autoencoder}
        return networks | ({"text_encoder": self.text_encoder} if self.text_encoder is not None else {})

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def latent_channels(self) -> int:
        return int(self.network.config["in_channels"])  # type: ignore[index, arg-type]

    @property
    def factor(self) -> int:
        """The side of a latent pixel in pixels."""
        return autoencoder_factor(self.autoencoder)

    def to(self, device: str | torch.device) -> OneTextPrior:
        for module in self.modules.values():
            module.to(device)
        return self

    def freeze(self) -> OneTextPrior:
        """Sets evaluation mode and disables gradients."""
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        return self

    def halve_text_encoder(self) -> OneTextPrior:
        """Casts the text encoder to bfloat16 for training: in float32 T5-XXL alone takes 19 GB."""
        if self.text_encoder is not None:
            nn.Module.to(self.text_encoder, dtype=torch.bfloat16)  # transformers' `to` warns here
        return self

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/factor, W/factor]; see encode_pixels."""
        return encode_pixels(self.autoencoder, images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, H, W], not clipped."""
        return decode_latents(self.autoencoder, latents)

    def embed_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Prompts -> (text [B, L, D], mask [B, L] of 1 and 0, or None where padding is text).

        Raises:
            ValueError: there is no text encoder, and a prompt is not in `prompt_embeddings`.
        """
        if all(prompt in self.prompt_embeddings for prompt in prompts):
            embeddings = [self.prompt_embeddings[prompt] for prompt in prompts]
            masks = [mask for _, mask in embeddings if mask is not None]
            text = torch.cat([text for text, _ in embeddings]).to(self.device)
            return text, torch.cat(masks).to(self.device) if masks else None
        if self.text_encoder is None:
            usable = ", ".join(repr(prompt) for prompt in self.prompt_embeddings) or "none"
            raise ValueError(f"{self.name} has no text encoder; usable prompts are: {usable}")
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens.attention_mask if self.masked else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0], mask

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Prompts -> conditions of a denoiser, see embed_prompts."""
        text, mask = self.embed_prompts(prompts)
        return Conditions(text=text, mask=mask)


def load_one_text_prior(
    name: str,
    family: Literal["pixart", "sd"],
    precision: Precision = "fp32",
    *,
    with_text: bool = True,
    with_network: bool = True,
) -> OneTextPrior:
    """Loads a diffusers folder or hub id of a PixArt-alpha or Stable Diffusion 2.1 pipeline, frozen, on the CPU.

    With bf16 the autoencoder is in bf16 too. With fp16 it stays in fp32, since its gradients overflow in fp16.

    Args:
        with_text: load the text encoder too.
        with_network: load the network's weights; False leaves it on the meta device, for a caller with other weights.

    Raises:
        ModelError: files are missing or do not fit; the message names them.
    """
    part = _NETWORK[family]
    parts = (
        {"vae": _WEIGHTS}
        | ({part: _WEIGHTS} if with_network else {})
        | ({"text_encoder": "model"} if with_text else {})
    )
    required = tuple(f"{p}/config.json" for p in dict.fromkeys([*parts, part]))
    folder, prior_id = find_folder(name, required, ("*/*.json", "*/*.txt", "*/*.model"), parts, precision)
    cls = PixArtTransformer2DModel if family == "pixart" else UNet2DConditionModel
    if with_network:
        network = load_part(cls, folder / part, _WEIGHTS, precision)
    else:
        with torch.device("meta"):
            network = cls.from_config(read_json(folder / part / "config.json"))  # type: ignore[assignment]
    autoencoder = load_part(AutoencoderKL, folder / "vae", _WEIGHTS, "fp32" if precision == "fp16" else precision)
    encoder, tokenizer = _load_text(folder, family, precision) if with_text else (None, None)
    schedule, prediction = read_schedule(folder)
    return OneTextPrior(
        name=prior_id,
        digest="",
        network=network,
        autoencoder=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        schedule=schedule,
        prediction=prediction,
        masked=family == "pixart",
    ).freeze()


def _load_text(folder: Path, family: str, precision: Precision) -> tuple[nn.Module, Any]:
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    cls = T5EncoderModel if family == "pixart" else CLIPTextModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ModelError(f"{folder / 'tokenizer'}: no tokenizer ({first_line(error)})") from error
    if family == "pixart":
        tokenizer.model_max_length = PIXART_TOKENS
    return load_part(cls, folder / "text_encoder", "model", precision), tokenizer
