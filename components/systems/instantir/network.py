"""InstantIR's networks as one bundle: a prior whose UNet carries the perceptor and the previewer, and the aggregator.

Latents here are variance-preserving, as in the UNet's training. denoiser.py converts the samplers' variance-exploding
latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from components.objectives.consistency import consistency_output
from components.priors.sdxl import Prior
from components.systems.instantir.aggregator import Aggregator, Residuals, aggregator_state, load_aggregator
from components.systems.instantir.perceptor import (
    PerceptorAttnProcessor,
    install_perceptor,
    load_perceptor,
    perceptor_of,
    perceptor_state,
    resampler_config,
)
from components.systems.instantir.previewer import (
    has_previewer,
    install_previewer,
    load_previewer,
    lora_settings_of,
    previewer_enabled,
    previewer_state,
)

PARTS = ("perceptor", "previewer", "aggregator")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditions of a UNet call, that is all inputs besides latents and time; B rows each.

    Attributes:
        text: token embeddings [B, L, D].
        pooled: pooled text [B, P].
        time_ids: size ids, float [B, 6].
        image_tokens: the picture encoder's tokens of the LQ picture [B, N, D'], or of P views of it [B, P, N, D']. The
            Resampler takes each view separately; attention uses the tokens of all views.
    """

    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    image_tokens: Tensor

    def concat(self, other: Conditions) -> Conditions:
        """These rows, then the rows of `other`."""
        return Conditions(
            text=torch.cat([self.text, other.text]),
            pooled=torch.cat([self.pooled, other.pooled]),
            time_ids=torch.cat([self.time_ids, other.time_ids]),
            image_tokens=torch.cat([self.image_tokens, other.image_tokens]),
        )

    def to(self, dtype: torch.dtype) -> Conditions:
        """Embeddings and tokens in another dtype; the size ids stay in float32, since half precision rounds 1023."""
        return Conditions(
            text=self.text.to(dtype),
            pooled=self.pooled.to(dtype),
            time_ids=self.time_ids,
            image_tokens=self.image_tokens.to(dtype),
        )


class LoopNetworks(Protocol):
    """The networks' interface to a sampling loop; InstantIR and fast.FastRun implement it."""

    @property
    def prior(self) -> Prior: ...

    def preview(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor: ...

    def residuals(self, lq: Tensor, timesteps: Tensor, preview: Tensor, conditions: Conditions) -> Residuals: ...

    def denoise_eps(
        self, latents: Tensor, timesteps: Tensor, conditions: Conditions, residuals: Residuals | None = None
    ) -> Tensor: ...

    def unconditional(self, conditions: Conditions, negative_prompts: list[str]) -> Conditions: ...


class InstantIR:
    """The bundle of InstantIR's networks. It changes the prior's UNet in place, so a prior belongs to one bundle.

    Args:
        prior: frozen prior whose UNet has no perceptor.
        resampler: ResamplerConfig fields; embedding_dim and output_dim default to the prior's widths.
        lora: LoraSettings fields; None for no previewer (yet).
        aggregator: whether to build an aggregator.
        seed: fixes the random start of all parts.
        time_modulation: whether the perceptor's keys and values depend on the time step (Eq. 4).
        perceptor_scale: Eq. 3's w; 1 as in the released model; 0 leaves the perceptor out.
    """

    def __init__(
        self,
        prior: Prior,
        resampler: Mapping[str, Any],
        lora: Mapping[str, Any] | None = None,
        aggregator: bool = False,
        seed: int = 0,
        time_modulation: bool = True,
        perceptor_scale: float = 1.0,
    ) -> None:
        size = dict(resampler)
        if "embedding_dim" not in size:
            size["embedding_dim"] = prior.image_token_dim
        if "output_dim" not in size:
            size["output_dim"] = prior.unet.config["cross_attention_dim"]
        self.prior: Prior = prior
        self.perceptor = install_perceptor(prior.unet, size, seed, time_modulation)
        self.perceptor_scale = perceptor_scale
        self.aggregator: Aggregator | None = None
        if lora is not None:
            self.add_previewer(lora, seed)
        if aggregator:
            self.add_aggregator(seed)
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the networks compute in; the sampler's latents keep their own."""
        return next(self.unet.parameters()).dtype

    @classmethod
    def from_parts(
        cls, prior: Prior, config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]
    ) -> InstantIR:
        """The bundle of a model folder, from the result of `config()` and weights for exactly the parts that it names.

        Raises:
            ValueError: a part is missing or unknown, or its weights do not fit.
        """
        network = cls(
            prior,
            config["resampler"],
            config.get("lora"),
            bool(config.get("aggregator")),
            # the oldest folders lack these two keys; their models have both at the default
            time_modulation=bool(config.get("time_modulation", True)),
            perceptor_scale=float(config.get("perceptor_scale", 1.0)),
        )
        names = set(network.parts())
        if set(parts) != names:
            raise ValueError(f"an InstantIR of this config has the parts {sorted(names)}, got {sorted(parts)}")
        network.load_parts(parts)
        return network

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.prior.unet

    @property
    def time_modulation(self) -> bool:
        """Whether keys and values depend on the time step; see PerceptorAttnProcessor."""
        return all(p.time_modulation for p in self._processors())

    @property
    def perceptor_scale(self) -> float:
        """Eq. 3's w, the same in every layer."""
        return float(self._processors()[0].scale)

    @perceptor_scale.setter
    def perceptor_scale(self, scale: float) -> None:
        for processor in self._processors():
            processor.scale = scale

    def _processors(self) -> list[PerceptorAttnProcessor]:
        return [cast(PerceptorAttnProcessor, p) for p in self.perceptor.ip_adapter.values()]

    @property
    def has_previewer(self) -> bool:
        return has_previewer(self.unet)

    def add_previewer(self, lora: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        """Install a new LoRA, frozen. Raises ValueError if the UNet already has one."""
        install_previewer(self.unet, lora, seed)
        self.perceptor = perceptor_of(self.unet)  # peft replaced some of the perceptor's layers
        self.freeze()

    def add_aggregator(self, seed: int = 0) -> None:
        """Make a new aggregator from the UNet, frozen. Raises ValueError if there already is one."""
        if self.aggregator is not None:
            raise ValueError("the network has an aggregator already")
        self.aggregator = Aggregator.from_unet(self.unet, seed)
        self.freeze()

    def freeze(self) -> InstantIR:
        """Set evaluation mode and switch all gradients off; a training stage then switches those of its own part on."""
        self.prior.freeze()
        if self.aggregator is not None:
            self.aggregator.eval().requires_grad_(False)
        return self

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> InstantIR:
        """Move all networks to a device and, with `dtype`, to another precision; see Prior.to."""
        self.prior.to(device, dtype)
        if self.aggregator is not None:
            self.aggregator.to(device=device, dtype=dtype)
        return self

    def config(self) -> dict[str, Any]:
        """The settings that from_parts needs for the same shapes; model.json holds them."""
        return {
            "resampler": resampler_config(self.perceptor),
            "lora": lora_settings_of(self.unet).to_dict() if self.has_previewer else None,
            "aggregator": self.aggregator is not None,
            "time_modulation": self.time_modulation,
            "perceptor_scale": self.perceptor_scale,
        }

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Weights by part, under the released files' names."""
        parts = {"perceptor": perceptor_state(self.unet)}
        if self.has_previewer:
            parts["previewer"] = previewer_state(self.unet)
        if self.aggregator is not None:
            parts["aggregator"] = aggregator_state(self.aggregator)
        return parts

    def load_parts(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy weights into the named parts; other parts do not change. Raises ValueError that lists every fault."""
        for name, state in parts.items():
            if name == "perceptor":
                load_perceptor(self.unet, state)
            elif name == "previewer":
                load_previewer(self.unet, state)
            elif name == "aggregator" and self.aggregator is not None:
                load_aggregator(self.aggregator, state)
            else:
                raise ValueError(f"no such part {name!r} in this network; it has {sorted(self.parts())}")

    def denoise_eps(
        self, latents: Tensor, timesteps: Tensor, conditions: Conditions, residuals: Residuals | None = None
    ) -> Tensor:
        """The noise prediction of the prior with the perceptor (LoRA off).

        Args:
            latents: VP latents [B, C, h, w].
            timesteps: int64 [B] or [1].
            conditions: B rows.
            residuals: the aggregator's residuals, or None.
        """
        if not self.has_previewer:
            return predict_noise(self.unet, latents, timesteps, conditions, residuals)
        with previewer_enabled(self.unet, False):
            return predict_noise(self.unet, latents, timesteps, conditions, residuals)

    def preview(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """The Previewer's one-step clean latents [B, C, h, w] (LoRA on); arguments as in denoise_eps."""
        timesteps = timesteps.expand(len(latents))
        with previewer_enabled(self.unet):
            eps = predict_noise(self.unet, latents, timesteps, conditions)
        return consistency_output(self.prior.schedule, latents, eps, timesteps)

    def residuals(self, lq: Tensor, timesteps: Tensor, preview: Tensor, conditions: Conditions) -> Residuals:
        """The aggregator's residuals for LQ latents and a preview [B, C, h, w].

        Raises:
            ValueError: there is no aggregator, or the shapes do not fit.
        """
        if self.aggregator is None:
            raise ValueError("the network has no aggregator")
        # the Aggregator computes in the UNet's dtype, whatever the dtype of the loop's latents
        return self.aggregator(
            lq.to(self.dtype), timesteps, preview.to(self.dtype), conditions.pooled, conditions.time_ids
        )

    def unconditional(self, conditions: Conditions, negative_prompts: list[str]) -> Conditions:
        """The conditions of guidance's negative half: the negative prompts, no picture, the same sizes."""
        text, pooled = self.prior.embed_prompts(negative_prompts)
        blank = self.prior.null_image_tokens(len(text))
        if conditions.image_tokens.ndim == 4:  # one copy for each view: attention over copies equals attention over one
            blank = blank.unsqueeze(1).expand(-1, conditions.image_tokens.shape[1], -1, -1)
        return Conditions(text=text, pooled=pooled, time_ids=conditions.time_ids, image_tokens=blank)


def unet_embedding(unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
    """The UNet's whole embedding [B, E]: time plus pooled text and sizes, before the activation."""
    time = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
    extra = unet.get_aug_embed(
        emb=time, encoder_hidden_states=conditions.text, added_cond_kwargs=_added_cond_kwargs(conditions)
    )
    return time + extra


def predict_noise(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timesteps: Tensor,
    conditions: Conditions,
    residuals: Residuals | None = None,
) -> Tensor:
    """One call of a UNet with a perceptor: VP latents [B, C, h, w] -> noise, the same shape. The LoRA's switch stays.

    All inputs are cast to the UNet's dtype and the result is cast back to the latents' dtype, so that a half-precision
    UNet works in a float32 loop.
    """
    dtype = next(unet.parameters()).dtype
    timesteps, conditions, latents_dtype, latents = (
        timesteps.expand(len(latents)),
        conditions.to(dtype),
        latents.dtype,
        latents.to(dtype),
    )
    residuals = residuals.to(dtype) if residuals else None
    temb = unet_embedding(unet, latents, timesteps, conditions)
    return unet(
        latents,
        timesteps,
        encoder_hidden_states=conditions.text,
        cross_attention_kwargs={"temb": temb},
        added_cond_kwargs=_added_cond_kwargs(conditions),
        down_block_additional_residuals=residuals.down if residuals else None,
        mid_block_additional_residual=residuals.mid if residuals else None,
        return_dict=False,
    )[0].to(latents_dtype)


def _added_cond_kwargs(conditions: Conditions) -> dict[str, Any]:
    tokens = conditions.image_tokens
    return {
        "text_embeds": conditions.pooled,
        "time_ids": conditions.time_ids,
        # diffusers takes a list with one tensor [B, pictures, N, D] for each adapter
        "image_embeds": [tokens if tokens.ndim == 4 else tokens.unsqueeze(1)],
    }
