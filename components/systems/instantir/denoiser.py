"""InstantIR's sampling loop (instantir.md section 5), as a Denoiser that any sampler can drive.

Each call is one step: preview, aggregate, predict, guide. What lasts from step to step (the step's number, the last
preview, the last residuals, the adaptive factor) is held here, so one object serves one run over its time steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from components.samplers.guidance import guide
from components.samplers.schedules import Schedule
from components.systems.instantir.aggregator import Residuals
from components.systems.instantir.network import Conditions, LoopNetworks
from components.systems.instantir.options import LoopSettings
from components.types import Box, Condition

SKIP_AT_MOST = 0.1
"""At this applied scale and below, Previewer and Aggregator are left out (instantir.md section 5)."""


class InstantIRDenoiser:
    """A types.Denoiser for B pictures.

    Args:
        network: with previewer and aggregator; an InstantIR, or a fast.FastRun, which does the same for less.
        lq: LQ latents [B, C, h, w].
        positive, negative: conditions of B rows each; `negative` may be None without guidance.
        steps: number of calls to come.
        settings: how the loop is steered.

    Attributes:
        condition: the spatial condition, the LQ latents, in the form that tiles are cut from.
        preview: the last preview [H, C, h, w] with H = 2B rows (negative, positive), or B without guidance; stale where
            it was not renewed; None before the first.
        eps: the last guided noise prediction [B, C, h, w].
        applied: the scale applied to the residuals in the last step [H].
        factor: the adaptive factor for the next step [B]; 1 unless settings.adaptive.

    Raises:
        ValueError: guidance without `negative`, or a list of scales of another length than `steps`.
    """

    def __init__(
        self,
        network: LoopNetworks,
        lq: Tensor,
        positive: Conditions,
        negative: Conditions | None,
        steps: int,
        settings: LoopSettings,
    ) -> None:
        if settings.guided and negative is None:
            raise ValueError("guidance needs negative conditions")
        if isinstance(settings.aggregator_scale, Sequence) and len(settings.aggregator_scale) != steps:
            raise ValueError(f"{len(settings.aggregator_scale)} aggregator scales for {steps} steps")
        self.network, self.settings, self.steps, self.batch = network, settings, steps, len(lq)
        self.positive, self.negative = positive, negative
        self.condition = Condition(tensors={"lq": lq})
        self.halves = 2 if settings.guided else 1
        self.given = negative.joined(positive) if settings.guided and negative is not None else positive
        self.lq = lq.repeat(self.halves, 1, 1, 1)
        self.step = 0
        self.preview: Tensor | None = None
        self.eps = torch.zeros_like(lq)
        self.factor = torch.ones(self.batch, device=lq.device, dtype=lq.dtype)
        self.applied = torch.ones(self.halves * self.batch, device=lq.device, dtype=lq.dtype)
        self._features: Residuals | None = None
        self._aggregated = 0
        self._previewed: int | None = None
        self._residuals: Residuals | None = None

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """VE latents [B, C, h, w] and sigma [B] -> clean latents; advances by one step."""
        if self.step >= self.steps:
            raise ValueError(f"this denoiser was made for {self.steps} steps")
        schedule = self.network.prior.schedule
        noisy = Schedule.preserving(latents, sigma).repeat(self.halves, 1, 1, 1)
        timesteps = schedule.timestep_of(sigma).repeat(self.halves)
        before = self._positive_preview()
        residuals = self._control(noisy, timesteps)
        eps = self.network.denoise_eps(noisy, timesteps, self.given, residuals)
        if self.settings.guided:
            without, with_ = eps.chunk(2)
            eps = guide(without, with_, self.settings.cfg_scale, self.settings.guidance_rescale)
        clean = latents - sigma.view(-1, 1, 1, 1) * eps
        if self.settings.adaptive:
            self.factor = _adaptive_factor(self._positive_preview(), before, clean)
        self.eps, self.step = eps, self.step + 1
        return clean

    def tile(self, box: Box) -> InstantIRDenoiser:
        """A fresh run over one tile of the latent grid, with steps and adaptive factor of its own."""
        lq = self.condition.crop(box).tensors["lq"]
        return InstantIRDenoiser(self.network, lq, self.positive, self.negative, self.steps, self.settings)

    def _control(self, noisy: Tensor, timesteps: Tensor) -> Residuals | None:
        """This step's residuals, already scaled."""
        settings, network = self.settings, self.network
        scale = settings.scale_at(self.step, self.steps)
        self.applied = self.factor.clamp(0.0, scale).repeat(self.halves)
        # without the adaptive factor the host knows the scale: asking the device would stop its queue in every step
        if settings.adaptive:
            runs = bool((self.applied > SKIP_AT_MOST).any())
        else:
            runs = min(1.0, scale) > SKIP_AT_MOST
        if runs:
            if not settings.previews_at(self.step, self.steps):
                self.preview, self._previewed = self.lq, None
            elif self._previewed is None or self.step >= self._previewed + settings.preview_every:
                self.preview, self._previewed = network.preview(noisy, timesteps, self.given), self.step
            assert self.preview is not None
            if self._features is None or self.step >= self._aggregated + settings.aggregator_every:
                self._features = network.residuals(self.lq, timesteps, self.preview, self.given)
                self._aggregated = self.step
            self._residuals = self._features
        # as released: a step that skips the Aggregator scales the residuals of the step before once more
        if self._residuals is not None and (settings.adaptive or scale != 1.0):
            self._residuals = self._residuals.scaled(self.applied)
        return self._residuals

    def _positive_preview(self) -> Tensor:
        if self.preview is None:
            return torch.zeros_like(self.lq[-self.batch :])
        return self.preview[-self.batch :]


def _adaptive_factor(preview: Tensor, before: Tensor, clean: Tensor) -> Tensor:
    """Eq. 7 per sample [B]: distance of preview and denoised, over that of this preview and the one before.

    +inf where the preview was not renewed; the clamp makes that the full scale, as released.
    """
    distance = (preview - clean).square().flatten(1).sum(dim=1)
    change = (preview - before).square().flatten(1).sum(dim=1)
    return distance / change
