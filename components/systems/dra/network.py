"""DRA's networks on an SDXL-shaped prior.

Latents here are variance-preserving, as in the UNet's training; denoiser.py converts the samplers' variance-exploding
latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.priors.conditions import SizedConditions
from components.priors.encoder_copy import embed_step
from components.priors.sdxl import Prior
from components.priors.unet_walk import check_walkable, text_inputs, walk_unet
from components.systems.dra.adapters import AdapterBlocks, Call, UnetAdapters
from components.systems.dra.bundle import ADAPTERS, ENCODER, LORA, Bundle
from components.systems.dra.config import UNET_TARGETS, AdapterConfig
from components.systems.dra.control import UnetControl

__all__ = ["ADAPTERS", "ENCODER", "LORA", "Dra"]


class Dra(Bundle[Prior, UnetAdapters | UnetControl]):
    """See Bundle. The adapters are after the UNet's blocks."""

    shape = "maps"
    own_family = "sdxl"
    targets = UNET_TARGETS
    blocks = AdapterBlocks()

    @classmethod
    def adapters_of(cls, network: Any, config: AdapterConfig, factor: int) -> UnetAdapters | UnetControl:
        check_walkable(network)
        return UnetAdapters(network, config) if config.form == "adapters" else UnetControl(network, config, factor)

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.unet.conv_in.weight.dtype

    def predict_eps(
        self, latents: Tensor, timesteps: Tensor, features: Sequence[Tensor], conditions: SizedConditions
    ) -> Tensor:
        """The predicted noise, in the latents' dtype.

        Args:
            latents: noisy latents [H B, C, h, w] in VP form, H halves of guidance.
            timesteps: int64 [H B] or [1].
            features: of the LQ latents of B pictures, see the adapters' `features`.
            conditions: H B rows.
        """
        unet: Any = self.prior.unet
        own = conditions.cast(self.dtype)
        times, noisy = timesteps.expand(len(latents)), latents.to(self.dtype)
        embedding = embed_step(unet, times, own.pooled, own.time_ids, self.dtype)
        call = Call(
            latents=noisy, times=times, embedding=embedding, text=own.text, pooled=own.pooled, time_ids=own.time_ids
        )
        joins = self.adapters.joins(features, call, self.blocks)
        return walk_unet(unet, noisy, text_inputs(unet, embedding, own.text), joins, self.blocks).to(latents.dtype)
