"""DDIM (deterministic) and DDPM (stochastic), as functions over a Denoiser in variance-exploding form.

DDIM (Song et al. 2020, Eq. 12 with eta = 0) scales the difference of the current latents and the clean estimate:
z' = x0 + (s'/s)(z - x0). DDPM (Ho et al. 2020, Eqs. 6-7, variance of the posterior, "fixed small") scales it by
(s'/s)^2 and adds new noise of variance s'^2 (1 - (s'/s)^2).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from components.samplers.restoration_pull import RestorationPull
from components.types import Cancellation, Cancelled, Denoiser, OnStep, StepEvent


def sample_ddim(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Tensor,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
    restoration: RestorationPull | None = None,
) -> Tensor:
    """Deterministic DDIM.

    Args:
        denoise: called once per step with the latents and sigma [B].
        latents: [B, C, h, w] at noise level sigmas[0], variance-exploding.
        sigmas: float [n + 1], falling; the last may be 0, or equal the one before (a schedule's first level).
        on_step: called after each step; the preview is the clean estimate.
        cancelled: called before each step.
        restoration: pull towards LQ latents. Its reading "latent" acts on variance-preserving latents, as printed.

    Returns:
        Latents at sigmas[-1].

    Raises:
        Cancellation: `cancelled()` returned true.
        ValueError: there are fewer than two levels, or they do not fall strictly.
    """
    return _sample(denoise, latents, sigmas, None, on_step, cancelled, restoration)


def sample_ddpm(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Tensor,
    step_noise: Callable[[int], Tensor],
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
    restoration: RestorationPull | None = None,
) -> Tensor:
    """Ancestral sampling with the posterior's variance; `step_noise(i)` returns step i's standard normal [B, C, h, w].

    The other arguments are those of sample_ddim.
    """
    return _sample(denoise, latents, sigmas, step_noise, on_step, cancelled, restoration)


def _sample(
    denoise: Denoiser,
    latents: Tensor,
    sigmas: Tensor,
    step_noise: Callable[[int], Tensor] | None,
    on_step: OnStep | None,
    cancelled: Cancelled | None,
    restoration: RestorationPull | None,
) -> Tensor:
    differences = sigmas.diff()
    falls = bool((differences[:-1] < 0).all()) and bool((differences[-1:] <= 0).all())
    if sigmas.ndim != 1 or len(sigmas) < 2 or not falls or float(sigmas[-1]) < 0:
        raise ValueError(f"sigmas must fall strictly and hold at least two levels, got {sigmas.tolist()}")
    steps = len(sigmas) - 1
    for step in range(steps):
        if cancelled is not None and cancelled():
            raise Cancellation(f"cancelled before step {step + 1} of {steps}")
        sigma, following = sigmas[step].to(latents.device), sigmas[step + 1].to(latents.device)
        denoised = denoise(latents, sigma.expand(len(latents)))
        if restoration is not None:
            denoised = restoration.clean(step, steps, denoised)
        ratio = following / sigma
        if step_noise is None:
            latents = denoised + ratio * (latents - denoised)
        else:
            refill = following * (1 - ratio.square()).sqrt()
            latents = denoised + ratio.square() * (latents - denoised) + refill * step_noise(step).to(latents)
        if restoration is not None:
            scale = (1 + following.square()).sqrt()  # of these latents over variance-preserving ones
            latents = restoration.after_step(step, steps, latents, following, scale=scale)
        if on_step is not None:
            on_step(StepEvent(step=step + 1, of=steps, preview=denoised))
    return latents
