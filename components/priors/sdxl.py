"""The prior: an SDXL-shaped text-to-image model and the picture encoder that looks at the LQ input.

One class serves SDXL itself (a diffusers folder or hub id) and the nano prior that ships with the project (a model
folder): a UNet2DConditionModel, two CLIP text encoders with their tokenizers, an autoencoder and a Dinov2Model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from components.models import SHIPPED, Model, ModelError, load_model, load_strictly
from components.priors.autoencoder import SpaceToDepthAutoencoder
from components.samplers.schedules import Schedule

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINOV2 = "facebook/dinov2-large"  # InstantIR's choice (reference/instantir.md section 2)


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """How a picture is shown to the picture encoder.

    Attributes:
        shortest_edge_px: the short side is resized to this (bicubic, antialiased) ...
        crop_px: ... and the centre square of this side is taken.
        fit: "crop" as said; "squash" resizes the whole picture to crop_px square, so that nothing is cut off.
    """

    shortest_edge_px: int = 256
    crop_px: int = 224
    fit: Literal["crop", "squash"] = "crop"


@dataclass(kw_only=True)
class Prior:
    """An SDXL-shaped prior. Everything is frozen unless a training stage says otherwise.

    Attributes:
        name, digest: where it came from; a model trained on it records both.
        unet: diffusers' UNet2DConditionModel with addition_embed_type "text_time".
        autoencoder: AutoencoderKL or SpaceToDepthAutoencoder.
        text_encoders, tokenizers: two each; the second encoder's pooled output is the pooled text.
        image_encoder: Dinov2Model; its last hidden state (class token first) is what the perceptor sees.
        schedule: the noise schedule it was trained with.
        view: how pictures are prepared for the image encoder.
    """

    name: str
    digest: str
    unet: UNet2DConditionModel
    autoencoder: nn.Module
    text_encoders: Sequence[nn.Module]
    tokenizers: Sequence[Any]
    image_encoder: nn.Module
    schedule: Schedule
    view: ImageView = field(default_factory=ImageView)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All networks by part name."""
        return {
            "unet": self.unet,
            "autoencoder": self.autoencoder,
            "text_encoder": self.text_encoders[0],
            "text_encoder_2": self.text_encoders[1],
            "image_encoder": self.image_encoder,
        }

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def latent_channels(self) -> int:
        return int(self.unet.config["in_channels"])

    @property
    def image_token_dim(self) -> int:
        return int(self.image_encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]

    @property
    def factor(self) -> int:
        """Pixels of a latent pixel's side."""
        if isinstance(self.autoencoder, SpaceToDepthAutoencoder):
            return self.autoencoder.factor
        return 2 ** (len(self.autoencoder.config["block_out_channels"]) - 1)  # type: ignore[index, arg-type]

    @property
    def multiple_px(self) -> int:
        """Picture sides must be multiples of this, so that the UNet halves evenly."""
        return self.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    def to(self, device: str | torch.device) -> Prior:
        for module in self.modules.values():
            module.to(device)
        return self

    def freeze(self) -> Prior:
        """Evaluation mode, no gradients."""
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        return self

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/factor, W/factor] (the mode, no sampling)."""
        if isinstance(self.autoencoder, SpaceToDepthAutoencoder):
            return self.autoencoder.encode(images)
        with torch.autocast(images.device.type, enabled=False):
            seen = images.to(next(self.autoencoder.parameters()).dtype)
            latents = self.autoencoder.encode(seen).latent_dist.mode()  # type: ignore[operator]
        return latents.to(images.dtype) * self.autoencoder.config["scaling_factor"]  # type: ignore[index]

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, H, W], not clipped."""
        if isinstance(self.autoencoder, SpaceToDepthAutoencoder):
            return self.autoencoder.decode(latents)
        with torch.autocast(latents.device.type, enabled=False):
            scaled = latents / self.autoencoder.config["scaling_factor"]  # type: ignore[index]
            images = self.autoencoder.decode(scaled.to(next(self.autoencoder.parameters()).dtype)).sample  # type: ignore
        return images.to(latents.dtype)

    def embed_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (token embeddings [B, L, D], pooled [B, P]): both penultimate layers joined (SDXL)."""
        hidden: list[Tensor] = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids.to(self.device)
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            if hasattr(output, "text_embeds"):
                pooled = output.text_embeds
        return torch.cat(hidden, dim=-1), pooled

    def view_images(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> normalised pixel values [B, 3, crop, crop] for the image encoder."""
        crop = self.view.crop_px
        if self.view.fit == "squash":
            seen = F.interpolate(images, (crop, crop), mode="bicubic", antialias=True, align_corners=False)
        else:
            height, width = images.shape[-2:]
            scale = self.view.shortest_edge_px / min(height, width)
            size = (max(crop, round(height * scale)), max(crop, round(width * scale)))
            seen = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
            top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
            seen = seen[..., top : top + crop, left : left + crop]
        mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
        return ((seen.clamp(-1, 1) + 1) / 2 - mean) / std

    def embed_images(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> tokens [B, N, D], class token first, after the final norm."""
        return self.image_encoder(pixel_values=self.view_images(images)).last_hidden_state

    def null_image_tokens(self, batch: int) -> Tensor:
        """Tokens of "no picture": an all-zero normalised input (the mean colour) through the encoder."""
        crop = self.view.crop_px
        blank = torch.zeros(1, 3, crop, crop, device=self.device)
        return self.image_encoder(pixel_values=blank).last_hidden_state.expand(batch, -1, -1)

    def time_ids(self, sizes: Tensor) -> Tensor:
        """Size ids int64 [B, 6] (original h, w, crop top, left, target h, w) as the UNet wants them, float [B, 6]."""
        return sizes.to(self.device, torch.float32)


def load_prior(name: str | Path, device: str = "cpu", image_encoder: str = DINOV2) -> Prior:
    """Load a prior, frozen.

    Args:
        name: a shipped name ("nano"), a model folder, or a diffusers folder or hub id of an SDXL pipeline.
        device: where it goes.
        image_encoder: Dinov2 folder or hub id, used with a diffusers prior only.

    Raises:
        ModelError: nothing usable under that name.
    """
    try:
        model = load_model(name)
    except ModelError as error:
        if "nor a shipped model" not in str(error):
            raise
        return load_diffusers_prior(str(name), image_encoder).to(device).freeze()
    if model.info["system"] != "prior":
        raise ModelError(f"{model.path}: holds a {model.info['system']} model, not a prior")
    return prior_from_model(model).to(device).freeze()


def prior_from_model(model: Model) -> Prior:
    """A prior from its model folder."""
    from components.priors.nano import build_prior  # the builder needs Prior: imported here to break the circle

    prior = build_prior(model.info["config"], model.file("tokenizer.json").read_text(encoding="utf-8"))
    for part, module in prior.modules.items():
        load_strictly(module, model.part(part), f"{model.path}: part {part}")
    # what finds it again: a shipped name, or where the folder is
    prior.name = model.path.name if model.path.parent == SHIPPED else str(model.path.resolve())
    prior.digest = model.digest
    return prior


def load_diffusers_prior(name: str, image_encoder: str = DINOV2) -> Prior:
    """An SDXL pipeline in diffusers' layout (folder or hub id), and a Dinov2 model in transformers' layout."""
    from transformers import AutoModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    try:
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", use_safetensors=True)
        autoencoder = AutoencoderKL.from_pretrained(name, subfolder="vae", use_safetensors=True)
        encoders = (
            CLIPTextModel.from_pretrained(name, subfolder="text_encoder", use_safetensors=True),
            CLIPTextModelWithProjection.from_pretrained(name, subfolder="text_encoder_2", use_safetensors=True),
        )
        tokenizers = tuple(CLIPTokenizer.from_pretrained(name, subfolder=s) for s in ("tokenizer", "tokenizer_2"))
        dino = AutoModel.from_pretrained(image_encoder, use_safetensors=True)
    except OSError as error:
        raise ModelError(f"{name}: no shipped prior, no model folder, and no SDXL pipeline either ({error})") from error
    return Prior(
        name=name,
        digest="",
        unet=unet,
        autoencoder=autoencoder,
        text_encoders=encoders,
        tokenizers=tokenizers,
        image_encoder=dino,
        schedule=Schedule(),
    )
