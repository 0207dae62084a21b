"""SUPIR's networks as a denoiser of the EDM samplers: snapped levels, guidance and control scales by level.

    x = z / sqrt(1 + q^2),  D = z - q eps(x, t)        with q the nearest level of the schedule's table, t its time step

The first rows of a guided call are the negative ones, as released. Guidance and control scales are linear in a level:
guidance in the level that the latents have, the control scale in the schedule's level before churn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from components.priors.conditions import SizedConditions
from components.samplers.edm import between, nearest_index
from components.samplers.guidance import guide
from components.types import Box

PredictEps = Callable[[Tensor, Tensor, Tensor, SizedConditions, float | Tensor], Tensor]
"""(VP latents, time steps, LQ latents, conditions, control scale) -> noise; see Supir.predict_eps."""


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A number linear in a level.

    Attributes:
        start: at sigma_max.
        end: at 0.
    """

    start: float
    end: float

    def at(self, level: Tensor, sigma_max: float) -> float | Tensor:
        """The number at levels; a constant stays a plain number."""
        return self.end if self.start == self.end else between(level, sigma_max, self.start, self.end)


@dataclass(frozen=True, kw_only=True)
class SupirDenoiser:
    """See the module's docstring; a LevelDenoiser that can be cut into tiles.

    Attributes:
        predict: the networks.
        table: levels of the schedule by time step, float32 [T], rising; see edm.level_table.
        lq: scaled latents of the LQ pictures [B, C, h, w].
        conditions: of B rows, or with guidance of 2 B rows, the negative ones first; the same object in all steps and
            tiles, so that a fast path computes its keys once.
        guided: whether there are negative rows.
        cfg_scale, control_scale: by level.
        sigma_max: the level where a ramp starts.
        tiles: conditions of their own for parts of the latents, by box.
    """

    predict: PredictEps
    table: Tensor
    lq: Tensor
    conditions: SizedConditions
    guided: bool
    cfg_scale: Ramp
    control_scale: Ramp
    sigma_max: float
    tiles: Mapping[Box, SizedConditions] = field(default_factory=dict)

    def __call__(self, latents: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        """Clean latents; see LevelDenoiser."""
        table = self.table.to(latents.device)
        timesteps = nearest_index(table, sigma)
        snapped = table[timesteps].to(latents.dtype).view(-1, 1, 1, 1)
        scaled = latents / (1 + snapped.square()).sqrt()
        control = self.control_scale.at(level, self.sigma_max)
        if not self.guided:
            return latents - snapped * self.predict(scaled, timesteps, self.lq, self.conditions, control)
        both = self.predict(
            torch.cat([scaled, scaled]),
            torch.cat([timesteps, timesteps]),
            torch.cat([self.lq, self.lq]),
            self.conditions,
            control,
        )
        negative, positive = (latents - snapped * eps for eps in both.chunk(2))
        scale = self.cfg_scale.at(sigma, self.sigma_max)
        return guide(negative, positive, scale.view(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale)

    def tile(self, box: Box) -> SupirDenoiser:
        """The denoiser of a part of the latents."""
        top, left, height, width = box
        part = self.lq[..., top : top + height, left : left + width].contiguous()
        return replace(self, lq=part, conditions=self.tiles.get(box, self.conditions), tiles={})
