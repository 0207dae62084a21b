"""InstantIR's networks as one bundle: a prior whose UNet carries the perceptor and the previewer, and the aggregator.

Latents here are variance-preserving, as the UNet was trained; samplers' variance-exploding form ends at denoiser.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from components.objectives.consistency import consistency_output
from components.systems.instantir.aggregator import Aggregator, Residuals, aggregator_state, load_aggregator
from components.systems.instantir.perceptor import (
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

if TYPE_CHECKING:
    from components.priors.sdxl import Prior

PARTS = ("perceptor", "previewer", "aggregator")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Everything a UNet call is told besides latents and time; B rows each.

    Attributes:
        text: token embeddings [B, L, D].
        pooled: pooled text [B, P].
        time_ids: size ids, float [B, 6].
        image_tokens: the picture encoder's tokens of the LQ picture [B, N, D'].
    """

    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    image_tokens: Tensor

    def joined(self, other: Conditions) -> Conditions:
        """These rows, then the other's."""
        return Conditions(
            text=torch.cat([self.text, other.text]),
            pooled=torch.cat([self.pooled, other.pooled]),
            time_ids=torch.cat([self.time_ids, other.time_ids]),
            image_tokens=torch.cat([self.image_tokens, other.image_tokens]),
        )


class LoopNetworks(Protocol):
    """What a sampling loop asks of the networks; InstantIR and fast.FastRun both are this."""

    @property
    def prior(self) -> Prior: ...

    def preview(self, latents: Tensor, timesteps: Tensor, given: Conditions) -> Tensor: ...

    def residuals(self, lq: Tensor, timesteps: Tensor, preview: Tensor, given: Conditions) -> Residuals: ...

    def denoise_eps(
        self, latents: Tensor, timesteps: Tensor, given: Conditions, residuals: Residuals | None = None
    ) -> Tensor: ...

    def unconditional(self, given: Conditions, negative_prompts: list[str]) -> Conditions: ...


class InstantIR:
    """The bundle. It changes the prior's UNet in place, so a prior belongs to one bundle.

    Args:
        prior: frozen; its UNet is without perceptor.
        resampler: ResamplerConfig fields; embedding_dim and output_dim default to the prior's widths.
        lora: LoraSettings fields; None for no previewer (yet).
        aggregator: whether there is one.
        seed: fixes the random start of all parts.
    """

    def __init__(
        self,
        prior: Prior,
        resampler: Mapping[str, Any],
        lora: Mapping[str, Any] | None = None,
        aggregator: bool = False,
        seed: int = 0,
    ) -> None:
        size = dict(resampler)
        if "embedding_dim" not in size:
            size["embedding_dim"] = prior.image_token_dim
        if "output_dim" not in size:
            size["output_dim"] = prior.unet.config["cross_attention_dim"]
        self.prior: Prior = prior
        self.perceptor = install_perceptor(prior.unet, size, seed)
        self.aggregator: Aggregator | None = None
        if lora is not None:
            self.add_previewer(lora, seed)
        if aggregator:
            self.add_aggregator(seed)
        self.freeze()

    @classmethod
    def from_parts(
        cls, prior: Prior, config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]
    ) -> InstantIR:
        """The bundle of a model folder: `config` as by `config()`, and weights for exactly the parts that it names.

        Raises:
            ValueError: parts are missing, unknown or do not fit.
        """
        lora = config.get("lora")
        network = cls(prior, config["resampler"], lora, bool(config.get("aggregator")))
        expected = set(network.parts())
        if set(parts) != expected:
            raise ValueError(f"an InstantIR of this config has the parts {sorted(expected)}, got {sorted(parts)}")
        network.load_parts(parts)
        return network

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.prior.unet

    @property
    def has_previewer(self) -> bool:
        return has_previewer(self.unet)

    def add_previewer(self, lora: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        """Install a new LoRA, frozen. Raises ValueError where there is one."""
        install_previewer(self.unet, lora, seed)
        self.perceptor = perceptor_of(self.unet)  # peft replaced some of its layers
        self.freeze()

    def add_aggregator(self, seed: int = 0) -> None:
        """Make a new aggregator from the UNet, frozen. Raises ValueError where there is one."""
        if self.aggregator is not None:
            raise ValueError("the network has an aggregator already")
        self.aggregator = Aggregator.from_unet(self.unet, seed)
        self.freeze()

    def freeze(self) -> InstantIR:
        """Evaluation mode and no gradients anywhere; a training stage then frees its own part."""
        self.prior.freeze()
        if self.aggregator is not None:
            self.aggregator.eval().requires_grad_(False)
        return self

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> InstantIR:
        """Onto a device and, with `dtype`, into another precision; see Prior.to."""
        self.prior.to(device, dtype)
        if self.aggregator is not None:
            self.aggregator.to(device=device, dtype=dtype)
        return self

    def config(self) -> dict[str, Any]:
        """What from_parts needs to build the same shapes; goes to model.json."""
        return {
            "resampler": resampler_config(self.perceptor),
            "lora": lora_settings_of(self.unet).to_dict() if self.has_previewer else None,
            "aggregator": self.aggregator is not None,
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
        """Copy weights into the parts named; the others stay. Raises ValueError that lists every fault."""
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
        self, latents: Tensor, timesteps: Tensor, given: Conditions, residuals: Residuals | None = None
    ) -> Tensor:
        """The prior's noise prediction with the perceptor (LoRA off).

        Args:
            latents: VP [B, C, h, w].
            timesteps: int64 [B] or [1].
            given: conditions of B rows.
            residuals: the aggregator's, or None for none.
        """
        if not self.has_previewer:
            return predict_noise(self.unet, latents, timesteps, given, residuals)
        with previewer_enabled(self.unet, False):
            return predict_noise(self.unet, latents, timesteps, given, residuals)

    def preview(self, latents: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
        """One-step clean latents [B, C, h, w] by the Previewer (LoRA on), arguments as denoise_eps."""
        timesteps = timesteps.expand(len(latents))
        with previewer_enabled(self.unet):
            eps = predict_noise(self.unet, latents, timesteps, given)
        return consistency_output(self.prior.schedule, latents, eps, timesteps)

    def residuals(self, lq: Tensor, timesteps: Tensor, preview: Tensor, given: Conditions) -> Residuals:
        """The aggregator's residuals for LQ latents and a preview [B, C, h, w].

        Raises:
            ValueError: there is no aggregator, or the shapes do not fit.
        """
        if self.aggregator is None:
            raise ValueError("the network has no aggregator")
        return self.aggregator(lq, timesteps, preview, given.pooled, given.time_ids)

    def unconditional(self, given: Conditions, negative_prompts: list[str]) -> Conditions:
        """The negative half of guidance: other text, no picture, same sizes."""
        text, pooled = self.prior.embed_prompts(negative_prompts)
        nothing = self.prior.null_image_tokens(len(text))
        return Conditions(text=text, pooled=pooled, time_ids=given.time_ids, image_tokens=nothing)


def unet_embedding(unet: UNet2DConditionModel, latents: Tensor, timesteps: Tensor, given: Conditions) -> Tensor:
    """The UNet's whole embedding [B, E]: time plus pooled text and sizes, without activation."""
    embedded = unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))
    added = unet.get_aug_embed(emb=embedded, encoder_hidden_states=given.text, added_cond_kwargs=_added(given))
    return embedded + added


def predict_noise(
    unet: UNet2DConditionModel,
    latents: Tensor,
    timesteps: Tensor,
    given: Conditions,
    residuals: Residuals | None = None,
) -> Tensor:
    """One call of a UNet with a perceptor, with the LoRA as it stands: VP latents [B, C, h, w] -> noise, same shape."""
    timesteps = timesteps.expand(len(latents))
    temb = unet_embedding(unet, latents, timesteps, given)
    return unet(
        latents,
        timesteps,
        encoder_hidden_states=given.text,
        cross_attention_kwargs={"temb": temb},
        added_cond_kwargs=_added(given),
        down_block_additional_residuals=residuals.down if residuals else None,
        mid_block_additional_residual=residuals.mid if residuals else None,
        return_dict=False,
    )[0]


def _added(given: Conditions) -> dict[str, Any]:
    return {
        "text_embeds": given.pooled,
        "time_ids": given.time_ids,
        "image_embeds": [given.image_tokens.unsqueeze(1)],  # diffusers: a list of adapters, [B, pictures, N, D]
    }
