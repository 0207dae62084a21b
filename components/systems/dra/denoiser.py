"""DRA's networks as a denoiser of all samplers: levels snapped to time steps, guidance, LQ features computed once.

    x = z / sqrt(1 + q^2),  D = z - q eps(x, t)        with q the nearest level of the schedule's table, t its time step

The first rows of a guided call are the negative ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from components.priors.conditions import SizedConditions
from components.samplers.edm import nearest_index
from components.samplers.guidance import guide
from components.types import Box

PredictEps = Callable[[Tensor, Tensor, Sequence[Tensor], SizedConditions], Tensor]
"""(VP latents, time steps, LQ features, conditions) -> noise; see Dra.predict_eps."""


@dataclass(frozen=True, kw_only=True)
class DraDenoiser:
    """See the module's docstring; a Denoiser and a LevelDenoiser that can be cut into tiles.

    Attributes:
        predict: the networks.
        features_of: LQ latents -> features, see UnetAdapters.features; called once for the whole and for each tile.
        table: levels of the schedule by time step, float32 [T], rising.
        lq: scaled latents of the LQ pictures [B, C, h, w].
        conditions: of B rows, or with guidance of 2 B rows, the negative ones first; the same object in all steps and
            tiles, so that a fast path computes its keys once.
        cfg_scale: weight of guidance; None without negative rows.
    """

    predict: PredictEps
    features_of: Callable[[Tensor], Sequence[Tensor]]
    table: Tensor
    lq: Tensor
    conditions: SizedConditions
    cfg_scale: float | None = None

    @cached_property
    def features(self) -> Sequence[Tensor]:
        """The LQ features, for all steps and both halves of guidance."""
        return self.features_of(self.lq)

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

    def tile(self, box: Box) -> DraDenoiser:
        """The denoiser of a part of the latents."""
        top, left, height, width = box
        return replace(self, lq=self.lq[..., top : top + height, left : left + width].contiguous())
