"""EDM sampling with restoration guidance: Euler steps that add noise before they remove it.

    Karras et al. 2022, Algorithm 2, without its second-order correction; SUPIR's Algorithm 1 (Yu et al. 2024) adds the
    pull of each clean estimate towards the latents of a first restoration, strong at high noise and weak at low noise:

        D' = D - (D - target) (sigma / sigma_max) ** tau                             (SUPIR, Algorithm 1, lines 5 and 7)

with sigma the level before churn. The released sampler differs from the printed one, and is the default here (supir.md,
sections 4.2 and 7): the step to a level at or below 0.05 has no pull, and a network of discrete time steps sees the
nearest level of its table, while the Euler step keeps the exact one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from components.samplers.restoration_pull import RestorationPull
from components.samplers.schedules import Schedule
from components.types import Cancellation, Cancelled, OnStep, StepEvent

GUIDANCE_MIN = 0.05
"""restore_cfg_s_tmin of the release: a step to this level or below is not guided."""


class LevelDenoiser(Protocol):
    """A denoiser that also sees the schedule's level before churn, which control and guidance schedules depend on."""

    def __call__(self, latents: Tensor, sigma: Tensor, level: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Noise that is added before a step (EDM's stochastic sampler).

    Attributes:
        amount: shared by all steps: a step's level rises by min(amount / steps, sqrt(2) - 1) of itself; 0 for none.
        noise_scale: factor of the added noise.
        low, high: only steps whose level is between them add noise, both included.
    """

    amount: float = 0.0
    noise_scale: float = 1.0
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        if self.amount < 0 or self.noise_scale < 0 or not 0 <= self.low <= self.high:
            raise ValueError(f"churn needs amount >= 0, noise_scale >= 0 and 0 <= low <= high, got {self}")

    def gamma(self, level: float, steps: int) -> float:
        """The share by which a step's level rises."""
        return min(self.amount / steps, math.sqrt(2) - 1) if self.low <= level <= self.high else 0.0


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Restoration guidance: every clean estimate moves towards the same latents.

    Attributes:
        target: clean latents [B, C, h, w] of a first restoration.
        tau: exponent; larger values end the pull earlier. Must be positive.
        sigma_max: level at which the pull is whole.
        low: a step to this level or below is not guided.
    """

    target: Tensor
    tau: float
    sigma_max: float
    low: float = GUIDANCE_MIN

    def __post_init__(self) -> None:
        if self.tau <= 0 or self.sigma_max <= 0:
            raise ValueError(f"a pull needs tau and sigma_max above 0, got {self.tau} and {self.sigma_max}")

    def weight(self, level: Tensor, following: Tensor) -> Tensor:
        """The share of the target in the estimate of a step from `level` to `following`."""
        weight = (level / self.sigma_max) ** self.tau
        return torch.where(following > self.low, weight, torch.zeros_like(weight))


def sample_edm(
    denoise: LevelDenoiser,
    latents: Tensor,
    sigmas: Tensor,
    step_noise: Callable[[int], Tensor] | None = None,
    churn: Churn | None = None,
    pull: Pull | None = None,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
    restoration: RestorationPull | None = None,
) -> Tensor:
    """Latents at sigmas[-1].

    Args:
        denoise: called once for each step with the latents, the level [B] that they have, and the schedule's level [].
        latents: [B, C, h, w] at noise level sigmas[0], variance-exploding.
        sigmas: float [n + 1], strictly falling; the last may be 0.
        step_noise: step (from 0) -> standard normal of the latents' shape; needed with churn.
        churn: None for none.
        pull: None for none.
        on_step: called after each step; the preview is the clean estimate, after the pull.
        cancelled: called before each step.
        restoration: a pull towards LQ latents by the step's number, after `pull`; None for none.

    Raises:
        Cancellation: `cancelled()` returned true.
        ValueError: sigmas do not fall, or churn without step_noise.
    """
    check_falling(sigmas)
    churn = churn or Churn()
    if churn.amount and step_noise is None:
        raise ValueError("churn needs step_noise")
    steps = len(sigmas) - 1
    for step in range(steps):
        check_cancelled(cancelled, step, steps)
        level, following = (sigmas[i].to(latents.device) for i in (step, step + 1))
        gamma = churn.gamma(float(sigmas[step]), steps)
        sigma = level * (1 + gamma)
        if gamma > 0:
            assert step_noise is not None, "checked above"
            added = churn.noise_scale * step_noise(step).to(latents)
            latents = latents + added * (sigma.square() - level.square()).sqrt()
        clean = denoise(latents, sigma.expand(len(latents)), level)
        if pull is not None:
            clean = clean - (clean - pull.target) * pull.weight(level, following)
        if restoration is not None:
            clean = restoration.clean(step, steps, clean)
        latents = latents + (latents - clean) / sigma * (following - sigma)
        if restoration is not None:
            latents = restoration.after_step(step, steps, latents, following)
        if on_step is not None:
            on_step(StepEvent(step=step + 1, of=steps, preview=clean))
    return latents


def check_falling(sigmas: Tensor) -> None:
    """Raises ValueError unless the levels [n + 1] fall strictly, to 0 or more."""
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()) or float(sigmas[-1]) < 0:
        raise ValueError(f"sigmas must fall strictly and hold at least two levels, got {sigmas.tolist()}")


def check_cancelled(cancelled: Cancelled | None, step: int, steps: int) -> None:
    """Raises Cancellation before step `step` (from 0) if `cancelled()` says so."""
    if cancelled is not None and cancelled():
        raise Cancellation(f"cancelled before step {step + 1} of {steps}")


# --- levels of a discrete schedule, in the precision of the release ---------------------------------------------------


def level_table(schedule: Schedule) -> Tensor:
    """All levels of a schedule, float32 [T], rising; the products are formed in float64, unlike Schedule.sigmas."""
    steps = schedule.num_train_timesteps
    if schedule.beta_schedule == "linear":
        betas = torch.linspace(schedule.beta_start, schedule.beta_end, steps, dtype=torch.float64)
    else:
        ends = (schedule.beta_start**0.5, schedule.beta_end**0.5)
        betas = torch.linspace(*ends, steps, dtype=torch.float64).square()
    products = torch.cumprod(1 - betas, dim=0)
    return ((1 - products) / products).sqrt().to(torch.float32)


def level_indices(steps: int, total: int = 1000) -> Tensor:
    """Time steps of a sampler of `steps` steps, int64 [steps], falling: from T - 1, evenly, 0 excluded.

    With steps = T these are all time steps.

    Raises:
        ValueError: steps outside 1 .. total.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"steps must be between 1 and {total}, got {steps}")
    if steps == total:
        return torch.arange(total - 1, -1, -1)
    spaced = torch.arange(steps, dtype=torch.float64) * ((total - 1) / steps)
    return ((total - 1) - spaced).to(torch.int64)


def edm_sigmas(table: Tensor, steps: int) -> Tensor:
    """Levels of a sampler of `steps` steps from a level_table, and 0: float32 [steps + 1], falling."""
    return torch.cat([table[level_indices(steps, len(table))], table.new_zeros(1)])


def karras_sigmas(steps: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Levels from high to low, even in the rho-th root (Karras et al. 2022, Eq. 5), and 0: float32 [steps + 1]."""
    place = torch.linspace(0, 1, steps, dtype=torch.float32)
    roots = [value ** (1 / rho) for value in (low, high)]
    return torch.cat([(roots[1] + place * (roots[0] - roots[1])) ** rho, place.new_zeros(1)])


def nearest_index(table: Tensor, sigma: Tensor) -> Tensor:
    """The time step with the nearest level: float [B] -> int64 [B]."""
    return (table[None] - sigma[:, None]).abs().argmin(dim=1)


def between(level: Tensor, sigma_max: float, start: float, end: float) -> Tensor:
    """A number that depends linearly on a level: `start` at sigma_max, `end` at 0 (SUPIR's CFG and control scales)."""
    return (start - end) * level / sigma_max + end


# --- samplers of distilled and accelerated models ---------------------------------------------------------------------


def sample_dpmpp_2m(
    denoise: LevelDenoiser,
    latents: Tensor,
    sigmas: Tensor,
    step_noise: Callable[[int], Tensor] | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    first_noise: bool = False,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
    restoration: RestorationPull | None = None,
) -> Tensor:
    """DPM-Solver++(2M) with noise (Lu et al. 2022; the SDE form of k-diffusion), the midpoint rule.

    In t = -log sigma, with h the step in t and D the clean estimate:

        z' = (sigma'/sigma) e^(-eta h) z + (1 - e^(-(1 + eta) h)) (D + (D - D_before) h / (2 h_before))
             + sigma' sqrt(1 - e^(-2 eta h)) noise_scale noise

    The first step has no D_before; a step to 0 returns D.

    Args:
        step_noise: step (from 0) -> standard normal of the latents' shape; needed with eta > 0.
        eta: share of the noise, 0 (none) to 1.
        first_noise: False is as released: the first step removes the noise that it should replace, but adds none.
        Others: see sample_edm.

    Raises:
        Cancellation, ValueError: see sample_edm; eta outside 0 .. 1, or above 0 without step_noise.
    """
    check_falling(sigmas)
    if not 0 <= eta <= 1 or (eta and step_noise is None):
        raise ValueError(f"eta must be between 0 and 1, and needs step_noise above 0; got {eta}")
    before: tuple[Tensor, Tensor] | None = None
    steps = len(sigmas) - 1
    for step in range(steps):
        check_cancelled(cancelled, step, steps)
        level, following = (sigmas[i].to(latents.device) for i in (step, step + 1))
        clean = denoise(latents, level.expand(len(latents)), level)
        if restoration is not None:
            clean = restoration.clean(step, steps, clean)
        if float(sigmas[step + 1]) == 0:
            latents = clean
        else:
            h = (level / following).log()
            estimate = clean
            if before is not None:
                estimate = clean + (clean - before[0]) * (h / (2 * before[1]))
            latents = (following / level) * (-eta * h).exp() * latents - torch.expm1(-(1 + eta) * h) * estimate
            if eta and (step or first_noise):
                assert step_noise is not None, "checked above"
                spread = following * (-torch.expm1(-2 * eta * h)).sqrt() * noise_scale
                latents = latents + spread * step_noise(step).to(latents)
            before = (clean, h)
        if restoration is not None:
            latents = restoration.after_step(step, steps, latents, following)
        if on_step is not None:
            on_step(StepEvent(step=step + 1, of=steps, preview=clean))
    return latents


def sample_euler_ancestral(
    denoise: LevelDenoiser,
    latents: Tensor,
    sigmas: Tensor,
    step_noise: Callable[[int], Tensor] | None = None,
    eta: float = 1.0,
    noise_scale: float = 1.0,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
    restoration: RestorationPull | None = None,
) -> Tensor:
    """Euler steps that go below the next level and add noise up to it (k-diffusion's ancestral sampler).

    Arguments as in sample_dpmpp_2m.
    """
    check_falling(sigmas)
    if not 0 <= eta <= 1 or (eta and step_noise is None):
        raise ValueError(f"eta must be between 0 and 1, and needs step_noise above 0; got {eta}")
    steps = len(sigmas) - 1
    for step in range(steps):
        check_cancelled(cancelled, step, steps)
        level, following = (sigmas[i].to(latents.device) for i in (step, step + 1))
        clean = denoise(latents, level.expand(len(latents)), level)
        if restoration is not None:
            clean = restoration.clean(step, steps, clean)
        up = eta * following * (1 - (following / level).square()).clamp_min(0).sqrt()
        down = (following.square() - up.square()).clamp_min(0).sqrt()
        latents = latents + (latents - clean) / level * (down - level)
        if step_noise is not None and float(sigmas[step + 1]) > 0:
            latents = latents + noise_scale * up * step_noise(step).to(latents)
        if restoration is not None:
            latents = restoration.after_step(step, steps, latents, following)
        if on_step is not None:
            on_step(StepEvent(step=step + 1, of=steps, preview=clean))
    return latents


SUBSTEPS: Sequence[int] = (0, 100, 200, 300)
"""Positions among all falling time steps where a model distilled to at most four steps is evaluated (released)."""


def substep_sigmas(table: Tensor, steps: int, places: Sequence[int] = SUBSTEPS) -> Tensor:
    """Levels at the first `steps` of the places, and 0: float32 [steps + 1].

    Raises:
        ValueError: more steps than places.
    """
    if not 1 <= steps <= len(places):
        raise ValueError(f"a sampler of {len(places)} places takes 1 to {len(places)} steps, got {steps}")
    falling = edm_sigmas(table, len(table))
    return torch.cat([falling[list(places[:steps])], table.new_zeros(1)])
