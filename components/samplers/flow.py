"""Euler sampling of flow-matching priors, and the algebra of their straight paths.

    x = (1 - sigma) clean + sigma noise              (Esser et al. 2024, Eq. 13); sigma is the share of noise, 0 to 1
    v = dx / dsigma = noise - clean                  the network's output
    clean = x - sigma v,   noise = x + (1 - sigma) v
    x' = x + (sigma' - sigma) v                      one Euler step, exact for the exact velocity of one clean picture

Every function treats the samples of a batch one by one, so the bits of a picture depend on its company only as far as
the network's do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from components.samplers.edm import check_cancelled, check_falling
from components.samplers.guidance import guide
from components.samplers.restoration_pull import RestorationPull
from components.samplers.schedules import FlowSchedule
from components.types import Cancelled, OnStep, StepEvent

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(latents [B, C, h, w], sigma [B]) -> velocity [B, C, h, w]; a closure over prompts, guidance and control features."""


def shift_times(times: Tensor, shift: float) -> Tensor:
    """Times in [0, 1] moved towards noise, for larger pictures: shift t / (1 + (shift - 1) t), any shape.

    Esser et al. 2024, Eq. 23; a shift of 1 changes nothing.
    """
    return shift * times / (1 + (shift - 1) * times)


def flow_sigmas(schedule: FlowSchedule, steps: int) -> Tensor:
    """Levels of a sampler, float32 [steps + 1], from 1 down to 0.

    As in diffusers' FlowMatchEulerDiscreteScheduler: even times from 1 to the first time of training, which is shifted
    already, are shifted, and 0 follows.

    Raises:
        ValueError: steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    first = shift_times(torch.tensor(1 / schedule.num_train_timesteps, dtype=torch.float64), schedule.shift)
    even = torch.linspace(1.0, float(first), steps, dtype=torch.float64)
    levels = shift_times(even, schedule.shift)
    return torch.cat([levels, levels.new_zeros(1)]).to(torch.float32)


def noisy_latents(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) clean + sigma noise, for clean and noise [B, ...] and sigma [B] in [0, 1]."""
    share = _as_rows(sigma, clean)
    return (1 - share) * clean + share * noise


def path_velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """The velocity of the path from clean latents to noise, both [B, ...]: noise - clean."""
    return noise - clean


def clean_from_velocity(latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean estimate of a velocity: latents - sigma velocity, for [B, ...] and sigma [B]."""
    return latents - _as_rows(sigma, latents) * velocity


def noise_from_velocity(latents: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The noise estimate of a velocity: latents + (1 - sigma) velocity, for [B, ...] and sigma [B]."""
    return latents + (1 - _as_rows(sigma, latents)) * velocity


def velocity_from_clean(latents: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
    """The velocity of a clean estimate: (latents - clean) / sigma, for [B, ...] and sigma [B] above 0."""
    return (latents - clean) / _as_rows(sigma, latents)


def guided_velocity(predict: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance: negative + scale (positive - negative), see guidance.guide.

    Args:
        predict: a velocity over 2 B rows: the first B have the negative conditions, the others the positive ones.
        scale: 1 gives the positive prediction.
    """

    def run(latents: Tensor, sigma: Tensor) -> Tensor:
        negative, positive = predict(torch.cat([latents, latents]), torch.cat([sigma, sigma])).chunk(2)
        return guide(negative, positive, scale)

    return run


def sample_flow(
    velocity: Velocity,
    latents: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
    restoration: RestorationPull | None = None,
) -> Tensor:
    """Latents at sigmas[-1], by Euler steps.

    Args:
        velocity: called once for each step with the latents and sigma [B].
        latents: [B, C, h, w] at the share of noise sigmas[0].
        sigmas: float [n + 1], strictly falling, to 0 or more, see flow_sigmas.
        on_step: called after each step; the preview is the clean estimate, after the pull.
        cancelled: called before each step.
        restoration: a pull towards LQ latents by the step's number; None for none.

    Raises:
        Cancellation: `cancelled()` returned true.
        ValueError: sigmas do not fall.
    """
    check_falling(sigmas)
    steps = len(sigmas) - 1
    for step in range(steps):
        check_cancelled(cancelled, step, steps)
        sigma, following = (sigmas[i].to(latents.device) for i in (step, step + 1))
        rows = sigma.expand(len(latents))
        direction = velocity(latents, rows)
        clean = clean_from_velocity(latents, direction, rows)
        latents = latents + (following - sigma) * direction
        if restoration is not None:
            pulled = restoration.clean(step, steps, clean)
            # the step's noise stays: only its share of the clean estimate moves
            latents = latents + (1 - following) * (pulled - clean)
            latents = restoration.after_step(step, steps, latents, following, signal_share=1 - following)
            clean = pulled
        if on_step is not None:
            on_step(StepEvent(step=step + 1, of=steps, preview=clean))
    return latents


def _as_rows(sigma: Tensor, like: Tensor) -> Tensor:
    """sigma [B] shaped [B, 1, ...] in the dtype of `like`."""
    return sigma.to(like).view(-1, *[1] * (like.ndim - 1))
