"""InstantIR's sampling loop (instantir.md section 5), as a Denoiser that any sampler can drive.

Each call is one step: reference, aggregate, predict, guide. The object holds the state between steps, so one object
serves one run over its time steps. The tiles of a run share the state of the whole picture.

AdaRes (Alg. 1) is spread over the loop's parts. Line 5, the reference, and line 7, the factor, are here. Line 8 belongs
to the sampler. As printed, z' = (b'/b) z - (a/b - a') x0, it lacks a factor b' (beta_{t-1}) on a/b and does not invert
the forward process. The sampler uses the DDIM step a' x0 + b' (z - a x0) / b = (b'/b) z - (b' a/b - a') x0 instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from components.samplers.guidance import guide
from components.samplers.schedules import Schedule
from components.systems.instantir.aggregator import Residuals
from components.systems.instantir.network import Conditions, LoopNetworks
from components.systems.instantir.options import LoopSettings
from components.systems.instantir.references import noised_reference
from components.types import Box, Condition

SKIP_AT_MOST = 0.1
"""Released rules: at this residual scale and below, Previewer and Aggregator do not run (instantir.md section 5)."""


class AdaptiveFactor:
    """Eq. 7's factor of B pictures, from sums over all latents of a step: those of the picture, or of all its tiles.

    All tiles of a picture share one factor. With one factor for each tile, neighbours would follow the input unequally,
    and the result would depend on the tiling. Pixels that several tiles share count once for each tile.

    Args:
        start: ones [B].
        endless: a repeated preview makes the factor infinite, as released; otherwise the factor does not change.
    """

    def __init__(self, start: Tensor, endless: bool) -> None:
        self.value, self.endless = start, endless
        self.step = 0
        self._distance, self._change = torch.zeros_like(start), torch.zeros_like(start)
        self._has_sums = False

    def at(self, step: int) -> Tensor:
        """The factor [B] of this step; the first call in a step ends the sums of the step before."""
        if step != self.step:
            self.value, self.step = self.following, step
            self._distance, self._change = torch.zeros_like(self.value), torch.zeros_like(self.value)
            self._has_sums = False
        return self.value

    def add(self, preview: Tensor, before: Tensor, clean: Tensor) -> None:
        """Add the latents of a picture or of one tile: this step's preview, the one before, and the clean estimate."""
        self._distance = self._distance + (preview - clean).square().flatten(1).sum(dim=1)
        self._change = self._change + (preview - before).square().flatten(1).sum(dim=1)
        self._has_sums = True

    @property
    def following(self) -> Tensor:
        """The factor [B] of the next step, from the sums so far."""
        if not self._has_sums:
            return self.value
        if self.endless:
            return self._distance / self._change
        return torch.where(self._change > 0, self._distance / self._change, self.value)


class InstantIRDenoiser:
    """A types.Denoiser for B pictures.

    Args:
        network: networks with previewer and aggregator: an InstantIR, or a fast.FastRun, which is faster.
        lq: LQ latents [B, C, h, w].
        positive, negative: conditions of B rows each; `negative` may be None without guidance.
        steps: number of sampler steps.
        settings: settings of the loop.
        hq: latents for reference "hq", the same shape as lq.
        noise: step -> standard normal [B, C, h, w], for reference_noise.

    Attributes:
        condition: the spatial conditions: LQ latents and, for reference "hq", HQ latents. Tiles crop them.
        preview: the last reference [H, C, h, w], before noise and LQ latents are mixed in. H = 2B rows (negative,
            positive), or B without guidance. It is an older preview in steps that reuse one. None before the first
            step; tiles may drop it after each step.
        eps: the last guided noise prediction [B, C, h, w]; None before the first step, and in tiles.
        residual_scale: the scale of the residuals in the last step [H].
        renewed: whether the Previewer ran in the last step.

    Raises:
        ValueError: guidance without `negative`, a list of scales whose length is not `steps`, or a reference without
            its HQ latents or noise.
    """

    def __init__(
        self,
        network: LoopNetworks,
        lq: Tensor,
        positive: Conditions,
        negative: Conditions | None,
        steps: int,
        settings: LoopSettings,
        *,
        hq: Tensor | None = None,
        noise: Callable[[int], Tensor] | None = None,
    ) -> None:
        if settings.guided and negative is None:
            raise ValueError("guidance needs negative conditions")
        if isinstance(settings.aggregator_scale, Sequence) and len(settings.aggregator_scale) != steps:
            raise ValueError(f"{len(settings.aggregator_scale)} aggregator scales for {steps} steps")
        if settings.reference == "hq" and (hq is None or hq.shape != lq.shape):
            raise ValueError(f"reference hq needs HQ latents of shape {tuple(lq.shape)}")
        if settings.reference_noise and noise is None:
            raise ValueError("reference_noise needs noise")
        self.network, self.settings, self.steps, self.batch = network, settings, steps, len(lq)
        self.positive, self.negative = positive, negative
        self.halves = 2 if settings.guided else 1
        self.conditions = negative.concat(positive) if settings.guided and negative is not None else positive
        self.previewer_conditions = _previewer_conditions(network, self.conditions, settings.reference)
        self.condition = Condition(tensors={"lq": lq} if hq is None else {"lq": lq, "hq": hq})
        self.adaptive = AdaptiveFactor(
            torch.ones(self.batch, device=lq.device, dtype=lq.dtype),
            endless=settings.released_rules and settings.adaptive == "released",
        )
        self.noise = _cache_last(noise) if noise is not None else None
        self.box: Box | None = None
        self._start()

    def _start(self) -> None:
        lq = self.condition.tensors["lq"]
        self.step = 0
        self.preview: Tensor | None = None
        self.eps: Tensor | None = None
        self.residual_scale = torch.ones(self.halves * self.batch, device=lq.device, dtype=lq.dtype)
        self._features: Residuals | None = None
        self._features_step = 0
        self._preview_step: int | None = None
        self._residuals: Residuals | None = None
        self._last_preview: Tensor | None = None  # the last preview in the adaptive factor [B, C, h, w]
        self.renewed = False

    @property
    def factor(self) -> Tensor:
        """The adaptive factor of the next step [B]; 1 unless settings.adaptive is set."""
        return self.adaptive.following

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """VE latents [B, C, h, w] and sigma [B] -> clean latents; advances by one step."""
        if self.step >= self.steps:
            raise ValueError(f"this denoiser was made for {self.steps} steps")
        schedule = self.network.prior.schedule
        noisy = Schedule.preserving(latents, sigma).repeat(self.halves, 1, 1, 1)
        timesteps = schedule.timestep_of(sigma).repeat(self.halves)
        before = self._last_preview
        residuals = self._control(noisy, timesteps)
        eps = self.network.denoise_eps(noisy, timesteps, self.conditions, residuals)
        if self.settings.guided:
            without, with_ = eps.chunk(2)
            eps = guide(without, with_, self.settings.cfg_scale, self.settings.guidance_rescale)
        clean = latents - sigma.view(-1, 1, 1, 1) * eps
        if self.settings.adaptive != "none" and self.preview is not None:
            self._compare(before, clean)
        if self.box is None:
            self.eps = eps
        elif not self.settings.released_rules and self.settings.preview_every == 1:
            self.preview = None  # a run has many tiles, so drop each one's preview; AdaRes keeps its own
        self.step += 1
        return clean

    def tile(self, box: Box) -> InstantIRDenoiser:
        """A new run over one tile of the latent grid; it shares conditions, factor and noise with the other tiles.

        The tiles of one run must take their steps together: all tiles finish step i before any tile starts step i + 1.
        """
        part = object.__new__(InstantIRDenoiser)
        part.__dict__.update(self.__dict__)
        part.condition, part.box = self.condition.crop(box), box
        part._start()
        return part

    def _control(self, noisy: Tensor, timesteps: Tensor) -> Residuals | None:
        """This step's residuals, after scaling."""
        settings, rows = self.settings, self.halves * self.batch
        self.renewed = False
        scale = settings.scale_at(self.step, self.steps)
        factor, scales_residuals = self.adaptive.at(self.step), settings.adaptive == "released"
        if scales_residuals or settings.released_rules:
            scale_before_cap = factor if scales_residuals else torch.ones_like(factor)
            self.residual_scale = scale_before_cap.clamp(0.0, scale).repeat(self.halves)
        else:
            self.residual_scale = torch.full((rows,), scale, device=factor.device, dtype=factor.dtype)
        # Without the adaptive factor the host knows the scale. Reading it from the device would wait for the device's
        # queue in every step. With the factor and our rules, the Previewer also runs for rows whose residuals have
        # scale 0, since the factor must stay defined.
        runs_aggregator = scale > 0
        if settings.released_rules:
            runs_aggregator = (
                bool((self.residual_scale > SKIP_AT_MOST).any()) if scales_residuals else min(1.0, scale) > SKIP_AT_MOST
            )
        if runs_aggregator:
            residuals = self._aggregate(noisy, timesteps, factor)
            if scales_residuals or scale != 1.0:
                residuals = residuals.scale_by(self.residual_scale)
            self._residuals = residuals if settings.released_rules else None
            return residuals
        # as released: a step without the Aggregator scales the residuals of the step before once more
        if self._residuals is not None:
            self._residuals = self._residuals.scale_by(self.residual_scale)
        return self._residuals

    def _aggregate(self, noisy: Tensor, timesteps: Tensor, factor: Tensor) -> Residuals:
        """The Aggregator's residuals before scaling; between two calls of the Aggregator, those of the last call."""
        if self._features is not None and self.step < self._features_step + self.settings.aggregator_every:
            return self._features
        reference = self._reference(noisy, timesteps, factor)
        features = self.network.residuals(self._both("lq"), timesteps, reference, self.conditions)
        if self.settings.aggregator_every > 1:
            self._features, self._features_step = features, self.step
        return features

    def _reference(self, noisy: Tensor, timesteps: Tensor, factor: Tensor) -> Tensor:
        """The reference [H, C, h, w], the Aggregator's second input next to the LQ latents."""
        settings, network = self.settings, self.network
        if settings.reference == "hq":
            self.preview = self._both("hq")
        elif settings.reference == "lq" or not settings.previews_at(self.step, self.steps):
            self.preview, self._preview_step = self._both("lq"), None
        elif self._preview_step is not None and self.step < self._preview_step + settings.preview_every:
            pass  # the last preview is used again
        elif settings.reference == "mean":
            eps = network.denoise_eps(noisy, timesteps, self.conditions)
            self.preview, self._preview_step = network.prior.schedule.x0_from_eps(noisy, eps, timesteps), self.step
        else:
            self.preview, self._preview_step = network.preview(noisy, timesteps, self.previewer_conditions), self.step
            self.renewed = True
        assert self.preview is not None
        reference = self.preview
        if settings.adaptive == "paper":
            delta = (factor.clamp(0.0, 1.0) if settings.adaptive_clamp else factor).repeat(self.halves)
            reference = reference + delta.view(-1, 1, 1, 1) * (self._both("lq") - reference)
        if self.noise is not None and settings.reference_noise:
            noise = Condition(tensors={"noise": self.noise(self.step)})
            fresh = (noise.crop(self.box) if self.box is not None else noise).tensors["noise"]
            reference = noised_reference(
                network.prior.schedule, reference, fresh.repeat(self.halves, 1, 1, 1), timesteps
            )
        return reference

    def _compare(self, before: Tensor | None, clean: Tensor) -> None:
        """Add a step's positive preview to the adaptive factor.

        By the released rules every reference counts, also LQ latents and repeated previews. Otherwise only a preview
        counts that the Previewer made in this step. The preview before the first one is zero (Alg. 1, line 2).
        """
        if not (self.renewed or self.settings.released_rules):
            return
        assert self.preview is not None
        self._last_preview = self.preview[-self.batch :]
        self.adaptive.add(self._last_preview, torch.zeros_like(clean) if before is None else before, clean)

    def _both(self, name: str) -> Tensor:
        """A spatial condition, repeated for all halves [H, C, h, w]."""
        return self.condition.tensors[name].repeat(self.halves, 1, 1, 1)


def _previewer_conditions(network: LoopNetworks, conditions: Conditions, reference: str) -> Conditions:
    """The Previewer's conditions: those of the UNet, the same without text, or without text and picture."""
    if reference not in ("preview_dcp", "preview_unconditional"):
        return conditions
    unconditional = network.unconditional(conditions, [""] * len(conditions.text))
    if reference == "preview_unconditional":
        return unconditional
    return Conditions(
        text=unconditional.text,
        pooled=unconditional.pooled,
        time_ids=conditions.time_ids,
        image_tokens=conditions.image_tokens,
    )


def _cache_last(noise: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The same function with a cache of the last step's noise, which all tiles of that step use."""
    last: dict[int, Tensor] = {}

    def at(step: int) -> Tensor:
        if step not in last:
            last.clear()
            last[step] = noise(step)
        return last[step]

    return at
