"""DRA's networks on an MM-DiT (Stable Diffusion 3): adapters on its picture tokens, velocities instead of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.priors.conditions import Conditions
from components.priors.mmdit_walk import walk_mmdit
from components.priors.sd3 import SD3Prior, joint_inputs
from components.systems.dra.adapters import Call, TokenAdapterBlocks, TokenAdapters
from components.systems.dra.bundle import Bundle
from components.systems.dra.config import PATCH, TOKEN_TARGETS, AdapterConfig
from components.systems.dra.control import TokenControl


class TokenDra(Bundle[SD3Prior, TokenAdapters | TokenControl]):
    """See Bundle. The adapters are after every fourth transformer block; the text stream passes."""

    shape = "tokens"
    own_family = "sd3"
    targets = TOKEN_TARGETS
    blocks = TokenAdapterBlocks()

    @classmethod
    def adapters_of(cls, network: Any, config: AdapterConfig, factor: int) -> TokenAdapters | TokenControl:
        if network.config["patch_size"] != PATCH:
            raise ValueError(f"tokens must be {PATCH} x {PATCH} latent pixels, not {network.config['patch_size']}")
        if config.form == "controlnet":
            return TokenControl(network, config)
        width = int(network.inner_dim)
        return TokenAdapters(len(network.transformer_blocks), width, width, int(network.config["in_channels"]), config)

    @property
    def dtype(self) -> torch.dtype:
        bias: Tensor = self.prior.network.proj_out.bias
        return bias.dtype

    def predict_velocity(
        self, latents: Tensor, times: Tensor, features: Sequence[Tensor], conditions: Conditions
    ) -> Tensor:
        """The predicted velocity noise - clean, in the latents' dtype.

        Args:
            latents: noisy latents [H B, C, h, w], H halves of guidance.
            times: shares of noise in (0, 1], [H B], or [B] for all halves.
            features: of the LQ latents of B pictures, see the adapters' `features`.
            conditions: H B rows.
        """
        network: Any = self.prior.network
        inputs = joint_inputs(network, conditions, self.dtype)
        steps = times.repeat(len(latents) // len(times)) * self.prior.schedule.num_train_timesteps
        text, pooled, noisy = inputs["encoder_hidden_states"], inputs["pooled_projections"], latents.to(self.dtype)
        embedding = network.time_text_embed(steps, pooled)
        call = Call(latents=noisy, times=steps, embedding=embedding, text=text, pooled=pooled)
        joins = self.adapters.joins(features, call, self.blocks)
        return walk_mmdit(network, noisy, embedding, text, joins, self.blocks).to(latents.dtype)
