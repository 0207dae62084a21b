"""DRA's networks for the samplers: guidance, LQ features computed once, and a UNet's levels snapped to time steps.

    x = z / sqrt(1 + q^2),  D = z - q eps(x, t)        with q the nearest level of the schedule's table, t its time step

An MM-DiT gives velocities, see samplers.flow. The first rows of a guided call are the negative ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from components.priors.conditions import Conditions, SizedConditions
from components.samplers.edm import nearest_index
from components.samplers.guidance import guide
from components.types import Box

PredictEps = Callable[[Tensor, Tensor, Sequence[Tensor], SizedConditions], Tensor]
"""(VP latents, time steps, LQ features, conditions) -> noise; see Dra.predict_eps."""


PredictVelocity = Callable[[Tensor, Tensor, Sequence[Tensor], Conditions], Tensor]
"""(latents, times, LQ features, conditions) -> velocity; see TokenDra.predict_velocity. All tiles of a step pass the
same object for the times."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What both denoisers have in common; they can be cut into tiles.

    Attributes:
        features_of: LQ -> features, see the adapters' `features`; called once for the whole and for each tile.
        lq: what it takes, such as scaled latents of the LQ pictures [B, C, h, w].
        factor: side of a latent pixel there; 1 for latents.
        cfg_scale: weight of guidance; None without negative rows.
    """

    features_of: Callable[[Tensor], Sequence[Tensor]]
    lq: Tensor
    factor: int = 1
    cfg_scale: float | None = None

    @cached_property
    def features(self) -> Sequence[Tensor]:
        """The LQ features, for all steps and both halves of guidance."""
        return self.features_of(self.lq)

    def tile(self, box: Box) -> Self:
        """The denoiser of a part of the latents."""
        top, left, height, width = (self.factor * side for side in box)
        return replace(self, lq=self.lq[..., top : top + height, left : left + width].contiguous())


@dataclass(frozen=True, kw_only=True)
class FlowDenoiser(Adapted):
    """A samplers.flow.Velocity.

    Attributes:
        predict: the networks.
        conditions: of B rows, or with guidance of 2 B rows, the negative ones first.
    """

    predict: PredictVelocity
    conditions: Conditions

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """The velocity [B, C, h, w] at the shares of noise [B], guided."""
        if self.cfg_scale is None:
            return self.predict(latents, sigma, self.features, self.conditions)
        both = self.predict(torch.cat([latents, latents]), sigma, self.features, self.conditions)
        negative, positive = both.chunk(2)
        return guide(negative, positive, self.cfg_scale)


@dataclass(frozen=True, kw_only=True)
class DraDenoiser(Adapted):
    """A Denoiser and a LevelDenoiser, see the module's docstring.

    Attributes:
        predict: the networks.
        table: levels of the schedule by time step, float32 [T], rising.
        conditions: as in FlowDenoiser; the same object in all steps and tiles, so that a fast path computes its keys
            once.
    """

    predict: PredictEps
    table: Tensor
    conditions: SizedConditions

    def __call__(self, latents: Tensor, sigma: Tensor, level: Tensor | None = None) -> Tensor:
        """Clean latents; see types.Denoiser. The schedule's level before churn is not needed."""
        table = self.table.to(latents.device)
        timesteps = nearest_index(table, sigma)
        snapped = table[timesteps].to(latents.dtype).view(-1, 1, 1, 1)
        scaled = latents / (1 + snapped.square()).sqrt()
        if self.cfg_scale is None:
            return latents - snapped * self.predict(scaled, timesteps, self.features, self.conditions)
        both = self.predict(
            torch.cat([scaled, scaled]), torch.cat([timesteps, timesteps]), self.features, self.conditions
        )
        negative, positive = both.chunk(2)
        return latents - snapped * guide(negative, positive, self.cfg_scale)
