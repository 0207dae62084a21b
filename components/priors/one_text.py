"""Priors with a single text encoder: PixArt-alpha (a DiT, T5 and its mask) and Stable Diffusion 2.1 (a UNet, OpenCLIP).

Both work on the latents of an AutoencoderKL. The text encoder may be absent (T5-XXL has 4.8 billion parameters): such a
prior knows the prompts only whose embeddings it was given.
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
from components.priors.files import first_line, read_json
from components.priors.hub import Precision, find_folder, load_part
from components.priors.one_text_config import PIXART_TOKENS
from components.priors.scheduler_config import read_schedule
from components.samplers.schedules import FlowSchedule, Schedule
from components.types import Prediction

_NETWORK = {"pixart": "transformer", "sd": "unet"}
_WEIGHTS = "diffusion_pytorch_model"


@dataclass(kw_only=True)
class OneTextPrior:
    """A prior whose network sees one sequence of text tokens. Frozen unless a training stage says otherwise.

    Attributes:
        name, digest: where it came from; a model trained on it records both.
        network: PixArtTransformer2DModel or UNet2DConditionModel.
        autoencoder: AutoencoderKL.
        text_encoder, tokenizer: None where prompts come from `known` only.
        schedule: it was trained with.
        prediction: what the network predicts, "epsilon", "v_prediction", or with a flow's schedule "flow_prediction".
        masked: whether padding is masked (T5) or is text like any other (CLIP).
        known: embeddings of prompts: (text [1, L, D], mask [1, L] or None).
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
    known: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @property
    def source(self) -> dict[str, str]:
        """What finds the prior again; a model trained on it records this."""
        return {"id": self.name, "digest": self.digest}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All networks by part name."""
        found = {"network": self.network, "autoencoder": self.autoencoder}
        return found | ({"text_encoder": self.text_encoder} if self.text_encoder is not None else {})

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def latent_channels(self) -> int:
        return int(self.network.config["in_channels"])  # type: ignore[index, arg-type]

    @property
    def factor(self) -> int:
        """Pixels of a latent pixel's side."""
        return autoencoder_factor(self.autoencoder)

    def to(self, device: str | torch.device) -> OneTextPrior:
        for module in self.modules.values():
            module.to(device)
        return self

    def freeze(self) -> OneTextPrior:
        """Evaluation mode, no gradients."""
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        return self

    def halve_text_encoder(self) -> OneTextPrior:
        """The text encoder in bfloat16, for training beside it: in float32 T5-XXL alone takes 19 GB."""
        if self.text_encoder is not None:
            nn.Module.to(self.text_encoder, dtype=torch.bfloat16)  # torch's own: transformers' warns of parts kept
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
            ValueError: no text encoder, and a prompt that is not among the known ones.
        """
        if all(prompt in self.known for prompt in prompts):
            found = [self.known[prompt] for prompt in prompts]
            masks = [mask for _, mask in found if mask is not None]
            text = torch.cat([text for text, _ in found]).to(self.device)
            return text, torch.cat(masks).to(self.device) if masks else None
        if self.text_encoder is None:
            known = ", ".join(repr(prompt) for prompt in self.known) or "none"
            raise ValueError(f"{self.name} has no text encoder and knows only these prompts: {known}")
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).to(self.device)
        mask = tokens.attention_mask if self.masked else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0], mask


def load_one_text_prior(
    name: str,
    family: Literal["pixart", "sd"],
    precision: Precision = "fp32",
    *,
    with_text: bool = True,
    with_network: bool = True,
) -> OneTextPrior:
    """A diffusers folder or hub id of a PixArt-alpha or Stable Diffusion 2.1 pipeline, frozen, on the CPU.

    The autoencoder goes into bf16 with the rest, but stays in fp32 with fp16, in which its gradients overflow.

    Args:
        with_text: load the text encoder too.
        with_network: load the network's weights; False leaves it on the meta device, for who brings others.

    Raises:
        ModelError: names what was looked for and not found, or does not fit.
    """
    part = _NETWORK[family]
    parts = (
        {"vae": _WEIGHTS}
        | ({part: _WEIGHTS} if with_network else {})
        | ({"text_encoder": "model"} if with_text else {})
    )
    needed = tuple(f"{p}/config.json" for p in dict.fromkeys([*parts, part]))
    folder, found_id = find_folder(name, needed, ("*/*.json", "*/*.txt", "*/*.model"), parts, precision)
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
        name=found_id,
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
