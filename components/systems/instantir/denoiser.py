"""InstantIR's sampling loop (instantir.md section 5), as a Denoiser that any sampler can drive.

Each call is one step: reference, aggregate, predict, guide. What lasts from step to step is held here, so one object
serves one run over its time steps; tiles of one run share what belongs to the whole picture.

AdaRes (Alg. 1) is spread over the loop's parts. Line 5, the reference, and line 7, the factor, are here. Line 8 is the
sampler's: as printed, z' = (b'/b) z - (a/b - a') x0, it lacks a factor b' (beta_{t-1}) on a/b and does not invert the
forward process; the DDIM step a' x0 + b' (z - a x0) / b = (b'/b) z - (b' a/b - a') x0 is used instead.
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
"""Released rules: at this applied scale and below, Previewer and Aggregator are left out (instantir.md section 5)."""


class AdaptiveFactor:
    """Eq. 7's factor of B pictures, from sums over everything that a step looked at: the picture, or all its tiles.

    One factor steers all tiles of a picture: factors of their own would let neighbours keep to the input unequally, and
    make a picture's look depend on how it was cut. Pixels that several tiles share count once for each.

    Args:
        start: ones [B].
        endless: an unrenewed preview makes the factor infinite, as released; else the factor stays.
    """

    def __init__(self, start: Tensor, endless: bool) -> None:
        self.value, self.endless = start, endless
        self.step = 0
        self._distance, self._change = torch.zeros_like(start), torch.zeros_like(start)
        self._seen = False

    def at(self, step: int) -> Tensor:
        """The factor [B] that this step uses; closes the sums of the step before."""
        if step != self.step:
            self.value, self.step = self.following, step
            self._distance, self._change = torch.zeros_like(self.value), torch.zeros_like(self.value)
            self._seen = False
        return self.value

    def add(self, preview: Tensor, before: Tensor, clean: Tensor) -> None:
        """A step's preview, the preview of the step before and the clean estimate, of a picture or of one tile."""
        self._distance = self._distance + (preview - clean).square().flatten(1).sum(dim=1)
        self._change = self._change + (preview - before).square().flatten(1).sum(dim=1)
        self._seen = True

    @property
    def following(self) -> Tensor:
        """The factor [B] for the step after this one, by what was added so far."""
        if not self._seen:
            return self.value
        if self.endless:
            return self._distance / self._change
        return torch.where(self._change > 0, self._distance / self._change, self.value)


class InstantIRDenoiser:
    """A types.Denoiser for B pictures.

    Args:
        network: with previewer and aggregator; an InstantIR, or a fast.FastRun, which does the same for less.
        lq: LQ latents [B, C, h, w].
        positive, negative: conditions of B rows each; `negative` may be None without guidance.
        steps: number of calls to come.
        settings: how the loop is steered.
        hq: latents for reference "hq", same shape as lq.
        noise: step -> standard normal [B, C, h, w], for reference_noise.

    Attributes:
        condition: the spatial conditions, the LQ latents and perhaps HQ's, in the form that tiles are cut from.
        preview: the last reference before noise and LQ were mixed in [H, C, h, w] with H = 2B rows (negative,
            positive), or B without guidance; stale where it was not renewed; None before the first, and in tiles, which
            remember what they must.
        eps: the last guided noise prediction [B, C, h, w]; None before the first, and in tiles.
        applied: the scale applied to the residuals in the last step [H].
        renewed: whether the Previewer ran in the last step.

    Raises:
        ValueError: guidance without `negative`, a list of scales of another length than `steps`, or a reference that
            lacks what it is made of.
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
        self.given = negative.joined(positive) if settings.guided and negative is not None else positive
        self.shown = _shown_to_the_previewer(network, self.given, settings.reference)
        self.condition = Condition(tensors={"lq": lq} if hq is None else {"lq": lq, "hq": hq})
        self.adaptive = AdaptiveFactor(
            torch.ones(self.batch, device=lq.device, dtype=lq.dtype),
            endless=settings.released_rules and settings.adaptive == "released",
        )
        self.noise = _remembered(noise) if noise is not None else None
        self.box: Box | None = None
        self._start()

    def _start(self) -> None:
        lq = self.condition.tensors["lq"]
        self.step = 0
        self.preview: Tensor | None = None
        self.eps: Tensor | None = None
        self.applied = torch.ones(self.halves * self.batch, device=lq.device, dtype=lq.dtype)
        self._features: Residuals | None = None
        self._aggregated = 0
        self._previewed: int | None = None
        self._residuals: Residuals | None = None
        self._compared: Tensor | None = None  # the last preview that entered the adaptive factor [B, C, h, w]
        self.renewed = False

    @property
    def factor(self) -> Tensor:
        """The adaptive factor for the next step [B]; 1 unless settings.adaptive."""
        return self.adaptive.following

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """VE latents [B, C, h, w] and sigma [B] -> clean latents; advances by one step."""
        if self.step >= self.steps:
            raise ValueError(f"this denoiser was made for {self.steps} steps")
        schedule = self.network.prior.schedule
        noisy = Schedule.preserving(latents, sigma).repeat(self.halves, 1, 1, 1)
        timesteps = schedule.timestep_of(sigma).repeat(self.halves)
        before = self._compared
        residuals = self._control(noisy, timesteps)
        eps = self.network.denoise_eps(noisy, timesteps, self.given, residuals)
        if self.settings.guided:
            without, with_ = eps.chunk(2)
            eps = guide(without, with_, self.settings.cfg_scale, self.settings.guidance_rescale)
        clean = latents - sigma.view(-1, 1, 1, 1) * eps
        if self.settings.adaptive != "none" and self.preview is not None:
            self._compare(before, clean)
        if self.box is None:
            self.eps = eps
        elif not self.settings.released_rules and self.settings.preview_every == 1:
            self.preview = None  # a tile's memory is one of many; what AdaRes compares is kept apart
        self.step += 1
        return clean

    def tile(self, box: Box) -> InstantIRDenoiser:
        """A fresh run over one tile of the latent grid, which shares conditions, factor and noise with its siblings.

        The tiles of one run must take their steps together: all of step i before any of step i + 1.
        """
        part = object.__new__(InstantIRDenoiser)
        part.__dict__.update(self.__dict__)
        part.condition, part.box = self.condition.crop(box), box
        part._start()
        return part

    def _control(self, noisy: Tensor, timesteps: Tensor) -> Residuals | None:
        """This step's residuals, already scaled."""
        settings, rows = self.settings, self.halves * self.batch
        self.renewed = False
        scale = settings.scale_at(self.step, self.steps)
        factor, scaling = self.adaptive.at(self.step), settings.adaptive == "released"
        if scaling or settings.released_rules:
            capped = factor if scaling else torch.ones_like(factor)
            self.applied = capped.clamp(0.0, scale).repeat(self.halves)
        else:
            self.applied = torch.full((rows,), scale, device=factor.device, dtype=factor.dtype)
        # Without the adaptive factor the host knows the scale: asking the device would stop its queue in every step.
        # With it, as ours, a preview is made even for rows whose residuals weigh nothing: the factor must stay defined.
        wanted = scale > 0
        if settings.released_rules:
            wanted = bool((self.applied > SKIP_AT_MOST).any()) if scaling else min(1.0, scale) > SKIP_AT_MOST
        if wanted:
            residuals = self._aggregate(noisy, timesteps, factor)
            if scaling or scale != 1.0:
                residuals = residuals.scaled(self.applied)
            self._residuals = residuals if settings.released_rules else None
            return residuals
        # as released: a step that skips the Aggregator scales the residuals of the step before once more
        if self._residuals is not None:
            self._residuals = self._residuals.scaled(self.applied)
        return self._residuals

    def _aggregate(self, noisy: Tensor, timesteps: Tensor, factor: Tensor) -> Residuals:
        """The Aggregator's residuals before any scale; those of an earlier step between two calls of it."""
        if self._features is not None and self.step < self._aggregated + self.settings.aggregator_every:
            return self._features
        reference = self._reference(noisy, timesteps, factor)
        features = self.network.residuals(self._both("lq"), timesteps, reference, self.given)
        if self.settings.aggregator_every > 1:
            self._features, self._aggregated = features, self.step
        return features

    def _reference(self, noisy: Tensor, timesteps: Tensor, factor: Tensor) -> Tensor:
        """What the Aggregator sees beside the LQ latents [H, C, h, w]."""
        settings, network = self.settings, self.network
        if settings.reference == "hq":
            self.preview = self._both("hq")
        elif settings.reference == "lq" or not settings.previews_at(self.step, self.steps):
            self.preview, self._previewed = self._both("lq"), None
        elif self._previewed is not None and self.step < self._previewed + settings.preview_every:
            pass  # the last one serves once more
        elif settings.reference == "mean":
            eps = network.denoise_eps(noisy, timesteps, self.given)
            self.preview, self._previewed = network.prior.schedule.x0_from_eps(noisy, eps, timesteps), self.step
        else:
            self.preview, self._previewed = network.preview(noisy, timesteps, self.shown), self.step
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
        """Hand a step's positive preview to the adaptive factor.

        As released, stand-ins and stale previews count as previews; otherwise only what the Previewer made in this
        step does. Before the first there are zeros (Alg. 1, line 2).
        """
        if not (self.renewed or self.settings.released_rules):
            return
        assert self.preview is not None
        self._compared = self.preview[-self.batch :]
        self.adaptive.add(self._compared, torch.zeros_like(clean) if before is None else before, clean)

    def _both(self, name: str) -> Tensor:
        """A spatial condition for all halves [H, C, h, w]."""
        return self.condition.tensors[name].repeat(self.halves, 1, 1, 1)


def _shown_to_the_previewer(network: LoopNetworks, given: Conditions, reference: str) -> Conditions:
    """The Previewer's conditions: each half's own, without its text, or without text and picture."""
    if reference not in ("preview_dcp", "preview_unconditional"):
        return given
    nothing = network.unconditional(given, [""] * len(given.text))
    if reference == "preview_unconditional":
        return nothing
    return Conditions(
        text=nothing.text, pooled=nothing.pooled, time_ids=given.time_ids, image_tokens=given.image_tokens
    )


def _remembered(noise: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The same, but the last step's noise is kept, as all tiles of a step ask for it."""
    last: dict[int, Tensor] = {}

    def at(step: int) -> Tensor:
        if step not in last:
            last.clear()
            last[step] = noise(step)
        return last[step]

    return at
