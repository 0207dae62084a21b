"""The prior: an SDXL-shaped text-to-image model and the picture encoder of the LQ input.

One class serves SDXL itself (a diffusers folder or hub id) and the nano prior that ships with the project (a model
folder): a UNet2DConditionModel, two CLIP text encoders with their tokenizers, an autoencoder and a Dinov2Model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from components.priors.autoencoder import autoencoder_factor, decode_latents, encode_pixels
from components.priors.conditions import Conditions, SizedConditions
from components.priors.files import DTYPES, Precision
from components.priors.parameters import device_of
from components.priors.sdxl_config import IMAGENET_MEAN, IMAGENET_STD, ImageView
from components.samplers.schedules import Sampling, Schedule
from components.types import Prediction


@dataclass(kw_only=True)
class Prior:
    """An SDXL-shaped prior. It is frozen unless a training stage trains it.

    Attributes:
        name, digest: identify the prior; a model trained on it records both.
        unet: diffusers' UNet2DConditionModel with addition_embed_type "text_time".
        autoencoder: AutoencoderKL or SpaceToDepthAutoencoder.
        text_encoders, tokenizers: two each; the second encoder's pooled output is the pooled text.
        image_encoder: Dinov2Model; its last hidden state (class token first) is the input of the perceptor.
        schedule: the noise schedule of its training.
        view: preparation of pictures for the image encoder.
        sampling: how it is sampled.
        image_encoder_name: folder or hub id of the image encoder if it is not part of the prior.
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
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def source(self) -> dict[str, str]:
        """The record that identifies the prior in a model trained on it."""
        record = {"id": self.name, "digest": self.digest}
        return record | ({"image_encoder": self.image_encoder_name} if self.image_encoder_name else {})

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
    def network(self) -> UNet2DConditionModel:
        """The denoiser: the UNet."""
        return self.unet

    @network.setter
    def network(self, network: UNet2DConditionModel) -> None:
        self.unet = network

    @property
    def prediction(self) -> Prediction:
        """The denoiser predicts noise."""
        return "epsilon"

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
        """The side of a latent pixel in pixels."""
        return autoencoder_factor(self.autoencoder)

    @property
    def multiple_px(self) -> int:
        """Picture sides must be multiples of this, so that the UNet halves evenly."""
        return self.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    @property
    def largest_side(self) -> int | None:
        """The UNet takes latents of any side."""
        return None

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Prior:
        """Moves the networks to a device and casts all but the autoencoder to `dtype`: SDXL's autoencoder needs
        float32."""
        for name, module in self.modules.items():
            # not diffusers' `to`: it warns about casting even if no module stays in float32
            nn.Module.to(module, device=device, dtype=None if name == "autoencoder" else dtype)
        return self

    def in_precision(self, precision: Precision) -> Prior:
        """Casts the networks; the autoencoder stays in fp32 unless its config has `force_upcast` false.

        Latents and pictures stay in fp32 in every precision: `encode` and `decode` return the dtype of their input.
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
        """Sets evaluation mode and disables gradients."""
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        return self

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/factor, W/factor].

        The latents are the mode of the encoder's distribution. With standard normal `noise` of their shape they are a
        sample of it.
        """
        return encode_pixels(self.autoencoder, images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, H, W], not clipped."""
        return decode_latents(self.autoencoder, latents)

    def embed_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (token embeddings [B, L, D], pooled [B, P]): both penultimate layers, joined (SDXL)."""
        hidden: list[Tensor] = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids.to(device_of(encoder))
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            if hasattr(output, "text_embeds"):
                pooled = output.text_embeds
        return torch.cat(hidden, dim=-1), pooled

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Prompts -> conditions of a denoiser without size ids, see embed_prompts."""
        text, pooled = self.embed_prompts(prompts)
        return Conditions(text=text, pooled=pooled)

    def halve_text_encoder(self) -> Prior:
        """Casts the text encoders to bfloat16, for training."""
        for encoder in self.text_encoders:
            nn.Module.to(encoder, dtype=torch.bfloat16)  # transformers' `to` warns here
        return self

    def prompt_chunks(self, prompt: str) -> int:
        """Pieces of the text encoders' length that hold a whole prompt, at least 1; see embed_long_prompts."""
        lengths = []
        for tokenizer in self.tokenizers:
            room = tokenizer.model_max_length - 2  # a start and an end token stand around each piece
            lengths.append(-(-len(_token_ids(tokenizer, prompt)) // room))
        return max(1, *lengths)

    def embed_long_prompts(self, prompts: Sequence[str], chunks: int) -> tuple[Tensor, Tensor]:
        """Prompts of any length -> (token embeddings [B, chunks L, D], pooled [B, P] of the first piece).

        A prompt is cut into pieces of the text encoders' length, which are encoded one by one and joined; empty pieces
        follow a short one. With one chunk this is embed_prompts, which cuts a longer prompt off.

        Args:
            chunks: see prompt_chunks; prompts of one call to the UNet need the same number.
        """
        if chunks == 1:
            return self.embed_prompts(prompts)
        hidden: list[Tensor] = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            rows = [row for prompt in prompts for row in _pieces(tokenizer, prompt, chunks)]
            output = encoder(torch.tensor(rows, device=device_of(encoder)), output_hidden_states=True)
            states = output.hidden_states[-2]
            hidden.append(states.unflatten(0, (len(prompts), chunks)).flatten(1, 2))
            if hasattr(output, "text_embeds"):
                pooled = output.text_embeds[::chunks]
        return torch.cat(hidden, dim=-1), pooled

    def view_images(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> normalised pixel values [B, 3, crop, crop] for the image encoder."""
        crop = self.view.crop_px
        if self.view.fit == "squash":
            resized = F.interpolate(images, (crop, crop), mode="bicubic", antialias=True, align_corners=False)
        else:
            height, width = images.shape[-2:]
            scale = self.view.shortest_edge_px / min(height, width)
            size = (max(crop, round(height * scale)), max(crop, round(width * scale)))
            resized = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
            top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
            resized = resized[..., top : top + crop, left : left + crop]
        mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
        return ((resized.clamp(-1, 1) + 1) / 2 - mean) / std

    def embed_images(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> tokens [B, N, D], class token first, after the final norm."""
        pixels = self.view_images(images).to(next(self.image_encoder.parameters()).dtype)
        return self.image_encoder(pixel_values=pixels).last_hidden_state

    def null_image_tokens(self, batch: int) -> Tensor:
        """The encoder's tokens for "no picture": an all-zero normalised input (the mean colour)."""
        crop = self.view.crop_px
        blank = torch.zeros(1, 3, crop, crop, device=self.device, dtype=next(self.image_encoder.parameters()).dtype)
        return self.image_encoder(pixel_values=blank).last_hidden_state.expand(batch, -1, -1)

    def time_ids(self, sizes: Tensor) -> Tensor:
        """Size ids int64 [B, 6] (original h, w, crop top, left, target h, w) for the UNet, float [B, 6]."""
        return sizes.to(self.device, torch.float32)

    def sized_conditions(
        self, prompts: Sequence[str], size: tuple[int, int], device: torch.device, chunks: int = 1
    ) -> SizedConditions:
        """Conditions of prompts for whole pictures (or tiles) of one size, on a device.

        Args:
            prompts: one for each picture.
            size: (height, width) in pixels: original and target size of the size ids, with the crop at (0, 0).
            device: of the results.
            chunks: see embed_long_prompts.
        """
        text, pooled = self.embed_long_prompts(prompts, chunks)
        sizes = torch.tensor([[*size, 0, 0, *size]]).expand(len(prompts), -1)
        return SizedConditions(text=text.to(device), pooled=pooled.to(device), time_ids=sizes.to(device, torch.float32))


def _token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """All tokens of a prompt, without start and end."""
    return list(tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def _pieces(tokenizer: Any, prompt: str, chunks: int) -> list[list[int]]:
    """A prompt's tokens in rows of the model's length: start, up to length - 2 tokens, end, padding."""
    length, ids = tokenizer.model_max_length, _token_ids(tokenizer, prompt)
    room, rows = length - 2, []
    for number in range(chunks):
        row = [tokenizer.bos_token_id, *ids[number * room : (number + 1) * room], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (length - len(row)))
    return rows
