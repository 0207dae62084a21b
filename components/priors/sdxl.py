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
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from components.models import SHIPPED, Model, ModelError, load_model, load_strictly
from components.priors.autoencoder import autoencoder_factor, decode_latents, encode_pixels
from components.priors.files import first_line
from components.priors.hub import DTYPES, Precision, load_sdxl
from components.priors.sdxl_config import DINOV2
from components.samplers.schedules import Schedule

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
        image_encoder_name: folder or hub id of the image encoder, where it does not come with the prior.
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
    image_encoder_name: str = ""

    @property
    def source(self) -> dict[str, str]:
        """What finds the prior again; a model trained on it records this."""
        found = {"id": self.name, "digest": self.digest}
        return found | ({"image_encoder": self.image_encoder_name} if self.image_encoder_name else {})

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
        return autoencoder_factor(self.autoencoder)

    @property
    def multiple_px(self) -> int:
        """Picture sides must be multiples of this, so that the UNet halves evenly."""
        return self.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Prior:
        """Onto a device and, with `dtype`, into another precision; the autoencoder keeps its own, as SDXL's needs
        float32."""
        for name, module in self.modules.items():
            # torch's own: diffusers' warns of casting even where it keeps no module in float32
            nn.Module.to(module, device=device, dtype=None if name == "autoencoder" else dtype)
        return self

    def in_precision(self, precision: Precision) -> Prior:
        """Cast the networks; the autoencoder stays in fp32 unless it says that half precision does it no harm.

        Latents and pictures stay in fp32 whatever the networks compute in: `encode` and `decode` answer in the type
        that they are given.
        """
        for name, module in self.modules.items():
            if name != "autoencoder" or not self._upcasts:
                module.to(DTYPES[precision])
        return self

    @property
    def _upcasts(self) -> bool:
        config = getattr(self.autoencoder, "config", {})
        return bool(config.get("force_upcast", True))

    def freeze(self) -> Prior:
        """Evaluation mode, no gradients."""
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        return self

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/factor, W/factor].

        The mode of the encoder's distribution, or with standard normal `noise` of the latents' shape a sample of it.
        """
        return encode_pixels(self.autoencoder, images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, H, W], not clipped."""
        return decode_latents(self.autoencoder, latents)

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
        seen = self.view_images(images).to(next(self.image_encoder.parameters()).dtype)
        return self.image_encoder(pixel_values=seen).last_hidden_state

    def null_image_tokens(self, batch: int) -> Tensor:
        """Tokens of "no picture": an all-zero normalised input (the mean colour) through the encoder."""
        crop = self.view.crop_px
        blank = torch.zeros(1, 3, crop, crop, device=self.device, dtype=next(self.image_encoder.parameters()).dtype)
        return self.image_encoder(pixel_values=blank).last_hidden_state.expand(batch, -1, -1)

    def time_ids(self, sizes: Tensor) -> Tensor:
        """Size ids int64 [B, 6] (original h, w, crop top, left, target h, w) as the UNet wants them, float [B, 6]."""
        return sizes.to(self.device, torch.float32)


def load_prior(
    name: str | Path, device: str = "cpu", image_encoder: str = DINOV2, precision: Precision = "fp32"
) -> Prior:
    """Load a prior, frozen.

    Args:
        name: a shipped name ("nano"), a model folder, or a diffusers folder or hub id of an SDXL pipeline; each also as
            a name below RESTORAY_HOME/weights.
        device: where it goes.
        image_encoder: Dinov2 folder or hub id, used with a diffusers prior only; "" for none.
        precision: of the networks' weights; see Prior.in_precision.

    Raises:
        ModelError: nothing usable under that name; says what was tried.
    """
    try:
        model = load_model(name)
    except ModelError as error:
        if "nor a shipped model" not in str(error):
            raise
        return load_diffusers_prior(str(name), image_encoder, precision, str(error)).to(device).freeze()
    if model.info["system"] != "prior":
        raise ModelError(f"{model.path}: holds a {model.info['system']} model, not a prior")
    return prior_from_model(model).in_precision(precision).to(device).freeze()


def prior_from_model(model: Model) -> Prior:
    """A prior from its model folder.

    Raises:
        ModelError: its config builds none, or its weights do not fit.
    """
    from components.priors.nano import build_prior  # the builder needs Prior: imported here to break the circle

    tokenizer = model.file("tokenizer.json").read_text(encoding="utf-8")
    try:
        prior = build_prior(model.info["config"], tokenizer)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{model.path}: its config builds no prior ({first_line(error)})") from error
    for part, module in prior.modules.items():
        load_strictly(module, model.part(part), f"{model.path}: part {part}")
    # what finds it again: a shipped name, or where the folder is
    prior.name = model.path.name if model.path.parent == SHIPPED else str(model.path.resolve())
    prior.digest = model.digest
    return prior


def load_diffusers_prior(
    name: str, image_encoder: str = DINOV2, precision: Precision = "fp32", before: str = ""
) -> Prior:
    """An SDXL pipeline in diffusers' layout (folder or hub id), and a Dinov2 model in transformers' layout.

    Raises:
        ModelError: says what was tried; `before` is what was tried earlier.
    """
    try:
        return Prior(**load_sdxl(name, image_encoder, precision))
    except ModelError as error:
        raise ModelError(f"no SDXL pipeline: {error}{f' ({before})' if before else ''}") from error
