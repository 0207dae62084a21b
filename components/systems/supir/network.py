"""SUPIR's networks as one bundle: a prior, the control encoder with its connectors, and the robust encoder.

Latents here are variance-preserving, as in the UNet's training; denoiser.py converts the samplers' variance-exploding
latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from components.priors.conditions import SizedConditions
from components.priors.encoder_copy import embed_step
from components.priors.parameters import copy_strictly
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl import Prior
from components.priors.unet_walk import Blocks, check_walkable, text_inputs, walk_unet
from components.randomness import seeded_init
from components.systems.supir.config import AdaptorConfig, adaptor_config
from components.systems.supir.connectors import ConnectorJoins, Scale, build_connectors, places_of
from components.systems.supir.control import ControlEncoder, walk_control

ENCODER, ADAPTOR = "encoder", "adaptor"
"""Parts of a model folder: the robust encoder, and the control encoder with its connectors."""


class Adaptor(nn.Module):
    """The control encoder and its connectors.

    Args:
        unet: of the prior; the start of the control encoder's weights.
        config: sizes.
        seed: fixes the random start of the connectors.
    """

    def __init__(self, unet: Any, config: AdaptorConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.control = ControlEncoder.from_unet(unet, tuple(config.transformer_depth))
        like = next(unet.parameters())
        if like.is_meta:
            with torch.device("meta"):
                self.connectors = build_connectors(unet, config)
        else:  # the random start is computed on the CPU, so that it has the same bits on every device
            with seeded_init(seed, "connectors"):
                self.connectors = build_connectors(unet, config)
        self.connectors.to(device=like.device, dtype=like.dtype)
        self.places = places_of(unet, config.cross_attention)


class Supir:
    """The bundle. Prior and adaptor are frozen; a training stage switches on what it trains.

    Args:
        prior: SDXL-shaped.
        encoder: the robust encoder of the prior's autoencoder.
        adaptor: of the prior's UNet; None before its stage.

    Raises:
        ValueError: the UNet's blocks differ from SDXL's.

    Attributes:
        blocks: block functions of both walks, plain, compiled or recomputing.
    """

    def __init__(self, prior: Prior, encoder: RobustEncoder, adaptor: Adaptor | None) -> None:
        self.prior, self.encoder, self.adaptor = prior, encoder, adaptor
        self.blocks = Blocks()
        check_walkable(prior.unet)
        self.freeze()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that UNet and adaptor compute in; the sampler's latents keep their own."""
        return next(self.prior.unet.parameters()).dtype

    def freeze(self) -> Supir:
        """Sets evaluation mode and disables gradients everywhere."""
        self.prior.freeze()
        for module in (self.encoder, self.adaptor):
            if module is not None:
                module.eval().requires_grad_(False)
        return self

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Supir:
        """Moves the networks and casts UNet, texts and adaptor to `dtype`; autoencoder and robust encoder stay."""
        self.prior.to(device, dtype)
        self.encoder.to(device)
        if self.adaptor is not None:
            self.adaptor.to(device=device, dtype=dtype)
        return self

    def config(self) -> dict[str, Any]:
        """The settings that from_parts needs; model.json holds them."""
        return {ADAPTOR: None if self.adaptor is None else self.adaptor.config.to_dict()}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Weights by part."""
        modules: dict[str, nn.Module | None] = {ENCODER: self.encoder, ADAPTOR: self.adaptor}
        return {
            name: {key: parameter.detach() for key, parameter in module.named_parameters()}
            for name, module in modules.items()
            if module is not None
        }

    @classmethod
    def from_parts(cls, prior: Prior, config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> Supir:
        """The bundle of a model folder.

        Raises:
            ValueError: a part is missing or unknown, or its weights do not fit.
        """
        encoder, adaptor = RobustEncoder(prior.autoencoder), None
        if config.get(ADAPTOR) is not None:
            adaptor = Adaptor(prior.unet, adaptor_config(config[ADAPTOR]))
        network = cls(prior, encoder, adaptor)
        names = set(network.parts())
        if set(parts) != names:
            raise ValueError(f"a SUPIR of this config has the parts {sorted(names)}, got {sorted(parts)}")
        modules = {ENCODER: encoder, ADAPTOR: adaptor}
        for name, state in parts.items():
            module = modules[name]
            assert module is not None, "checked above"
            copy_strictly(dict(module.named_parameters()), state, name)
        return network

    def predict_eps(
        self, latents: Tensor, timesteps: Tensor, lq: Tensor, conditions: SizedConditions, scale: Scale = 1.0
    ) -> Tensor:
        """The predicted noise.

        Args:
            latents: noisy latents [B, C, h, w] in VP form.
            timesteps: int64 [B] or [1].
            lq: scaled latents of the LQ picture by the robust encoder, the same shape.
            conditions: B rows.
            scale: control scale; 0 is the prior alone.

        Raises:
            ValueError: there is no adaptor.
        """
        if self.adaptor is None:
            raise ValueError("the network has no adaptor")
        features = control_features(self.adaptor, latents, timesteps, lq, conditions, self.blocks)
        return predict_eps(self.prior.unet, self.adaptor, latents, timesteps, features, conditions, scale, self.blocks)


def control_features(
    adaptor: Adaptor,
    latents: Tensor,
    timesteps: Tensor,
    lq: Tensor,
    conditions: SizedConditions,
    blocks: Blocks | None = None,
) -> list[Tensor]:
    """The control encoder's features in its dtype; arguments as in Supir.predict_eps."""
    control = adaptor.control
    dtype = control.hint_conv.weight.dtype
    own = conditions.cast(dtype)
    embedding = control.embedding(timesteps.expand(len(latents)), own.pooled, own.time_ids, dtype)
    return walk_control(control, lq.to(dtype), latents.to(dtype), text_inputs(control, embedding, own.text), blocks)


def predict_eps(
    unet: Any,
    adaptor: Adaptor,
    latents: Tensor,
    timesteps: Tensor,
    features: list[Tensor],
    conditions: SizedConditions,
    scale: Scale,
    blocks: Blocks | None = None,
) -> Tensor:
    """The UNet's predicted noise with control features, in the latents' dtype; see Supir.predict_eps."""
    dtype = next(unet.parameters()).dtype
    own = conditions.cast(dtype)
    embedding = embed_step(unet, timesteps.expand(len(latents)), own.pooled, own.time_ids, dtype)
    joins = ConnectorJoins(adaptor.connectors, adaptor.places, features, scale)
    return walk_unet(unet, latents.to(dtype), text_inputs(unet, embedding, own.text), joins, blocks).to(latents.dtype)
