"""The prior in the shape of Stable Diffusion 3: an MM-DiT, an autoencoder and up to three text encoders.

One class serves SD3 medium and SD3.5 medium (folders, single files, hub ids) and our model folders of that shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from components.priors.autoencoder import autoencoder_factor, decode_latents, encode_pixels
from components.priors.conditions import Conditions, join
from components.priors.files import DTYPES, Precision
from components.priors.parameters import device_of
from components.priors.sd3_config import CLIP_TOKENS, T5_TOKENS
from components.samplers.flow import Velocity, flow_sigmas, guided_velocity, sample_flow
from components.samplers.schedules import FlowSchedule
from components.types import Cancelled, OnStep, Prediction

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(kw_only=True)
class SD3Prior:
    """A prior in SD3's shape. It is frozen unless a training stage trains it.

    An absent text encoder gives zeros of its width: T5 as in diffusers' StableDiffusion3Pipeline, and the CLIPs in the
    same way. SD3 was trained with each encoder's text dropped at random (arXiv 2403.03206, section 5.3).

    Attributes:
        name, digest: identify the prior; a model trained on it records both.
        network: the MM-DiT.
        autoencoder: AutoencoderKL with shift and scale, or SpaceToDepthAutoencoder.
        text_encoders: two CLIPTextModelWithProjection and a T5EncoderModel, each None if absent.
        tokenizers: of the encoders, None likewise.
        schedule: the times of its training, with their shift.
        t5_tokens: tokens of a prompt for T5; zeros stand for them without T5.
    """

    name: str
    digest: str
    network: SD3Transformer2DModel
    autoencoder: nn.Module
    text_encoders: Sequence[nn.Module | None]
    tokenizers: Sequence[Any]
    schedule: FlowSchedule
    t5_tokens: int = T5_TOKENS

    @property
    def prediction(self) -> Prediction:
        """The network predicts velocities."""
        return "flow_prediction"

    @property
    def source(self) -> dict[str, str]:
        """The record that identifies the prior in a model trained on it."""
        return {"id": self.name, "digest": self.digest}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All networks by part name; absent text encoders are left out."""
        texts = dict(zip(TEXT_PARTS, self.text_encoders, strict=True))
        return {
            "transformer": self.network,
            "autoencoder": self.autoencoder,
            **{part: encoder for part, encoder in texts.items() if encoder is not None},
        }

    @property
    def absent(self) -> tuple[str, ...]:
        """Parts of text encoders that the prior lacks; zeros replace their text."""
        return tuple(part for part in TEXT_PARTS if part not in self.modules)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def latent_channels(self) -> int:
        return int(self.network.config["in_channels"])

    @property
    def factor(self) -> int:
        """The side of a latent pixel in pixels."""
        return autoencoder_factor(self.autoencoder)

    @property
    def multiple_px(self) -> int:
        """Picture sides must be multiples of this, so that patches cover the latents."""
        return self.factor * int(self.network.config["patch_size"])

    @property
    def largest_side(self) -> int | None:
        """The longest side of latents for which the MM-DiT has positions."""
        return int(self.network.config["pos_embed_max_size"]) * int(self.network.config["patch_size"])

    def to(self, device: str | torch.device) -> SD3Prior:
        for module in self.modules.values():
            nn.Module.to(module, device=device)
        return self

    def in_precision(self, precision: Precision) -> SD3Prior:
        """Casts the networks; the autoencoder stays in fp32, as SDXL's does, and an 8-bit T5 stays as it is.

        Latents and pictures stay in fp32 in every precision.
        """
        for part, module in self.modules.items():
            if part in TEXT_PARTS and not getattr(module, "is_quantized", False):
                cast_text_encoder(module, DTYPES[precision])
        nn.Module.to(self.network, dtype=DTYPES[precision])
        return self

    def freeze(self) -> SD3Prior:
        """Sets evaluation mode and disables gradients."""
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        return self

    def halve_text_encoder(self) -> SD3Prior:
        """Casts the text encoders to bfloat16, for training: in float32 T5-XXL alone takes 19 GB."""
        for encoder in self.text_encoders:
            if encoder is not None and not getattr(encoder, "is_quantized", False):
                nn.Module.to(encoder, dtype=torch.bfloat16)  # transformers' `to` warns here
        return self

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/factor, W/factor]; see encode_pixels."""
        return encode_pixels(self.autoencoder, images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, H, W], not clipped."""
        return decode_latents(self.autoencoder, latents)

    def embed_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> (tokens [B, L, D], pooled [B, P]), in the dtype of the first text encoder.

        The tokens are the penultimate layers of both CLIPs side by side, padded with zeros to T5's width D, and then
        T5's last layer; L = L_clip + t5_tokens. Pooled are the projected CLIP vectors side by side.
        """
        rows, width = len(prompts), int(self.network.config["joint_attention_dim"])
        states, pooled = self._clips(prompts)
        clip_tokens = F.pad(states, (0, width - states.shape[-1]))
        t5 = self.text_encoders[2]
        if t5 is None:
            t5_tokens = clip_tokens.new_zeros(rows, self.t5_tokens, width)
        else:
            ids = _token_ids(self.tokenizers[2], prompts, self.t5_tokens).to(device_of(t5))
            t5_tokens = t5(ids)[0].to(clip_tokens)
        return torch.cat([clip_tokens, t5_tokens], dim=1), pooled

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Prompts -> conditions of the network, see embed_prompts."""
        text, pooled = self.embed_prompts(prompts)
        return Conditions(text=text, pooled=pooled)

    def velocity(self, conditions: Conditions) -> Velocity:
        """The network as a velocity under conditions of as many rows as the latents; the result has their dtype."""
        dtype = next(self.network.parameters()).dtype
        arguments = joint_inputs(self.network, conditions, dtype)

        def run(latents: Tensor, sigma: Tensor) -> Tensor:
            times = sigma * self.schedule.num_train_timesteps
            output = self.network(latents.to(dtype), timestep=times, return_dict=False, **arguments)
            return output[0].to(latents.dtype)  # type: ignore[no-any-return]

        return run

    def _clips(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Penultimate states [B, L_clip, widths of both] and pooled vectors [B, P]; zeros for an absent CLIP."""
        whole = int(self.network.config["pooled_projection_dim"])
        rows, reference = len(prompts), self.network.proj_out.bias  # weights may be stored in 8 bits
        clips, tokenizers = self.text_encoders[:2], self.tokenizers[:2]
        length = next((int(tokenizer.model_max_length) for tokenizer in tokenizers if tokenizer), CLIP_TOKENS)
        missing_width = whole - sum(_projection_width(clip) for clip in clips if clip is not None)
        states, pooled = [], []
        for clip, tokenizer in zip(clips, tokenizers, strict=True):
            if clip is None:
                # the first absent CLIP takes the whole width that the others leave; a second one finds none left
                states.append(reference.new_zeros(rows, length, missing_width))
                pooled.append(reference.new_zeros(rows, missing_width))
                missing_width = 0
                continue
            output = clip(_token_ids(tokenizer, prompts, length).to(device_of(clip)), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
            reference = output.text_embeds
        return torch.cat([s.to(reference) for s in states], -1), torch.cat([p.to(reference) for p in pooled], -1)


def cast_text_encoder(encoder: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts a text encoder in place, and returns it.

    In float16 some of T5's layers stay in float32, as when transformers loads a folder: their outputs exceed float16's
    range in T5-XXL.
    """
    whole = (getattr(encoder, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    for name, parameter in encoder.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if set(whole) & set(name.split(".")) else dtype)
    return encoder


def joint_inputs(network: nn.Module, conditions: Conditions, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of an SD3Transformer2DModel besides latents and time.

    Raises:
        ValueError: the conditions have no pooled text.
    """
    if conditions.pooled is None:
        raise ValueError("a network of SD3's shape needs pooled text with the conditions")
    return {
        "encoder_hidden_states": conditions.text.to(dtype),
        "pooled_projections": conditions.pooled.to(dtype),
    }


def generate_latents(
    prior: SD3Prior,
    noise: Tensor,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    steps: int = 28,
    cfg_scale: float = 7.0,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
) -> Tensor:
    """Clean latents [B, C, h, w] from prompts, by Euler steps from standard normal noise [B, C, h, w].

    Args:
        prompts: one for each row.
        negative_prompts: one for each row; None for empty ones. Unused with cfg_scale 1.
        steps, cfg_scale: defaults of diffusers' StableDiffusion3Pipeline.
        on_step, cancelled: see sample_flow.
    """
    positive = prior.conditions(prompts)
    if cfg_scale == 1:
        velocity = prior.velocity(positive)
    else:
        negative = prior.conditions(negative_prompts or [""] * len(prompts))
        velocity = guided_velocity(prior.velocity(join([negative, positive])), cfg_scale)
    return sample_flow(velocity, noise, flow_sigmas(prior.schedule, steps), on_step, cancelled)


def check_sd3_shape(network: Mapping[str, Any], latent_channels: int, projections: Sequence[int], t5_width: int) -> str:
    """The faults of parts that do not fit together, as text; "" if they fit.

    Args:
        network: arguments of the MM-DiT.
        latent_channels: of the autoencoder.
        projections: widths of the pooled vectors of the CLIPs that are there; none of them, or all, or one.
        t5_width: of T5; 0 without.
    """
    faults = []
    pooled, joint = int(network["pooled_projection_dim"]), int(network["joint_attention_dim"])
    if network["in_channels"] != latent_channels:
        faults.append(
            f"the transformer takes {network['in_channels']} channels, the autoencoder makes {latent_channels}"
        )
    total = sum(projections)
    if total > pooled or (len(projections) == 2 and total != pooled):
        faults.append(f"the transformer takes {pooled} pooled text numbers, its CLIPs make {total}")
    if t5_width and t5_width != joint:
        faults.append(f"the transformer takes text of width {joint}, T5 makes {t5_width}")
    return "; ".join(faults)


def _projection_width(clip: nn.Module) -> int:
    return int(clip.config.projection_dim)  # type: ignore[union-attr, arg-type]


def _token_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """Token ids int64 [B, length], cut off or padded."""
    tokens = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return tokens.input_ids  # type: ignore[no-any-return]
