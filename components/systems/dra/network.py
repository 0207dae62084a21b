"""DRA's networks on an SDXL-shaped prior as one bundle: the prior with its LoRA, the adapters, and a robust encoder.

Latents here are variance-preserving, as in the UNet's training; denoiser.py converts the samplers' variance-exploding
latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from components.priors.conditions import SizedConditions
from components.priors.encoder_copy import embed_step
from components.priors.lora import LoraWeights, add_lora, load_peft_state, merge_lora, peft_state
from components.priors.parameters import copy_strictly
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl import Prior
from components.priors.unet_walk import check_walkable, text_inputs, walk_unet
from components.randomness import seeded_init
from components.systems.dra.adapters import AdapterBlocks, AdapterJoins, UnetAdapters
from components.systems.dra.config import UNET_TARGETS, AdapterConfig, LoraConfig, adapter_config, lora_config

ADAPTERS, LORA, ENCODER = "adapters", "lora", "encoder"
"""Parts of a model folder: restoration adapters, diffusion adapters by peft's keys, and the robust encoder."""


class Dra:
    """The bundle. All is frozen; a training stage switches on what it trains.

    Args:
        prior: SDXL-shaped; its UNet gets the LoRA in place.
        adapters: form of the restoration adapters.
        lora: size of the diffusion adapters.
        encoder: the robust encoder of the prior's autoencoder; None for the autoencoder's own.
        seed: fixes the random start of adapters and LoRA.

    Raises:
        ValueError: the UNet's blocks differ from SDXL's.

    Attributes:
        adapters: the restoration adapters, in float32 at first.
        lora: layers with the LoRA by their name in the UNet; their LoRA weights are in float32 at first.
        blocks: block functions of the walk, plain, compiled or recomputing.
    """

    def __init__(
        self,
        prior: Prior,
        adapters: AdapterConfig | None = None,
        lora: LoraConfig | None = None,
        encoder: RobustEncoder | None = None,
        seed: int = 0,
    ) -> None:
        self.prior, self.encoder, self.lora_config = prior, encoder, lora or LoraConfig()
        self.blocks = AdapterBlocks()
        check_walkable(prior.unet)
        like = next(prior.unet.parameters())
        if like.is_meta:
            with torch.device("meta"):
                self.adapters = UnetAdapters(prior.unet, adapters)
        else:  # the random start is computed on the CPU, so that it has the same bits on every device
            with seeded_init(seed, ADAPTERS):
                self.adapters = UnetAdapters(prior.unet, adapters)
            self.adapters.to(like.device)
        self.lora: dict[str, LoraLayer] = {}
        if self.lora_config.rank:
            targets = UNET_TARGETS[self.lora_config.targets]
            self.lora = add_lora(
                prior.unet, LORA, rank=self.lora_config.rank, alpha=self.lora_config.scale, targets=targets, seed=seed
            )
            for layer in self.lora.values():
                layer.lora_A[LORA].float()
                layer.lora_B[LORA].float()
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the UNet computes in; the sampler's latents keep their own."""
        return self.prior.unet.conv_in.weight.dtype

    @property
    def trainable(self) -> nn.Module:
        """Restoration and diffusion adapters as one module: both train together (section 3.2)."""
        modules: dict[str, nn.Module] = {ADAPTERS: self.adapters}
        if self.lora:
            modules[LORA] = LoraWeights(self.lora, LORA)
        return nn.ModuleDict(modules)

    def freeze(self) -> Dra:
        """Sets evaluation mode and disables gradients everywhere."""
        self.prior.freeze()
        self.adapters.eval().requires_grad_(False)
        if self.encoder is not None:
            self.encoder.eval().requires_grad_(False)
        return self

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Dra:
        """Moves the networks and casts UNet, texts and adapters to `dtype`; autoencoder and robust encoder stay."""
        self.prior.to(device, dtype)
        self.adapters.to(device=device, dtype=dtype)
        if self.encoder is not None:
            self.encoder.to(device)
        return self

    def merge_lora(self) -> Dra:
        """Adds the LoRA to the UNet's weights for good: no step then computes it. `parts` has none afterwards."""
        merge_lora(self.prior.unet, LORA)
        self.lora = {}
        return self

    def config(self) -> dict[str, Any]:
        """The settings that from_parts needs; model.json holds them."""
        lora = self.lora_config.to_dict()
        return {ADAPTERS: self.adapters.config.to_dict(), LORA: lora, ENCODER: self.encoder is not None}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Weights by part."""
        parts = {ADAPTERS: {key: parameter.detach() for key, parameter in self.adapters.named_parameters()}}
        if self.lora:
            parts[LORA] = peft_state(self.lora, LORA)
        if self.encoder is not None:
            parts[ENCODER] = {key: parameter.detach() for key, parameter in self.encoder.named_parameters()}
        return parts

    @classmethod
    def from_parts(cls, prior: Prior, config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> Dra:
        """The bundle of a model folder.

        Raises:
            ValueError: a part is missing or unknown, or its weights do not fit.
        """
        encoder = RobustEncoder(prior.autoencoder) if config[ENCODER] else None
        network = cls(prior, adapter_config(config[ADAPTERS]), lora_config(config[LORA]), encoder)
        names = set(network.parts())
        if set(parts) != names:
            raise ValueError(f"a model of this config has the parts {sorted(names)}, got {sorted(parts)}")
        copy_strictly(dict(network.adapters.named_parameters()), parts[ADAPTERS], ADAPTERS)
        if network.lora:
            load_peft_state(network.lora, LORA, parts[LORA])
        if encoder is not None:
            copy_strictly(dict(encoder.named_parameters()), parts[ENCODER], ENCODER)
        return network

    def encode_lq(self, images: Tensor) -> Tensor:
        """LQ pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w] by the robust encoder, if there is one."""
        return self.prior.encode(images) if self.encoder is None else self.encoder(images)

    def predict_eps(
        self, latents: Tensor, timesteps: Tensor, features: Sequence[Tensor], conditions: SizedConditions
    ) -> Tensor:
        """The predicted noise, in the latents' dtype.

        Args:
            latents: noisy latents [H B, C, h, w] in VP form, H halves of guidance.
            timesteps: int64 [H B] or [1].
            features: of the LQ latents of B pictures, see UnetAdapters.features.
            conditions: H B rows.
        """
        unet: Any = self.prior.unet
        own = conditions.cast(self.dtype)
        embedding = embed_step(unet, timesteps.expand(len(latents)), own.pooled, own.time_ids, self.dtype)
        joins = AdapterJoins(self.adapters, features, self.adapters.shifts(embedding), self.blocks.adapter)
        inputs = text_inputs(unet, embedding, own.text)
        return walk_unet(unet, latents.to(self.dtype), inputs, joins, self.blocks).to(latents.dtype)
