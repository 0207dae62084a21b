"""Restoration sampling: after a step the latents move towards the LQ latents, strongly at first and later not at all.

    z_t = z'_t + w g(t, T) (c_lq - z'_t)                        (Diffusion Restoration Adapter, arXiv 2502.20679, Eq. 1)
    g(t, T; a) = (t/T - a) / (1 - a)  if t/T > a, else 0        (Eq. 2)

z'_t is what the sampler returns and t the number of steps that remain then, so 0 <= t < T and g < 1. t/T is the share
of steps, not a noise level: the pull is the same in every sampler. Guidance acts before, inside the denoiser.

Eq. 1 also shrinks the noise in z'_t, so the latents have too little noise for their level. Two other readings keep it:

    latent     Eq. 1 as printed
    x0         the same pull on each clean estimate, before the sampler uses it
    renoised   towards c_lq with the run's fixed start noise at the level after the step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

PullMode = Literal["latent", "x0", "renoised"]


def steps_left(step: int, steps: int) -> int:
    """t: the steps that remain after step `step` (from 0) of `steps`."""
    return steps - 1 - step


def pull_share(left: int, steps: int, threshold: float) -> float:
    """g(t, T; a) of Eq. 2, in [0, 1), for t = `left` of T = `steps` and a = `threshold` in [0, 1)."""
    share = left / steps
    return (share - threshold) / (1 - threshold) if share > threshold else 0.0


def pull_towards(latents: Tensor, target: Tensor, weight: float) -> Tensor:
    """latents + weight (target - latents) [B, ...]: Eq. 1 with weight = w g."""
    return latents + weight * (target - latents)


@dataclass(frozen=True, kw_only=True)
class RestorationPull:
    """The pull of one run; a sampler calls `clean` and `after_step` in every step.

    Attributes:
        target: c_lq, scaled latents of the LQ pictures [B, C, h, w].
        weight: w, in [0, 1]; 0 for no pull.
        threshold: a, in [0, 1): steps with at most this share of steps left have no pull.
        mode: the reading, see the module's docstring.
        noise: standard normal start noise of the run, the shape of `target`; needed for "renoised".

    Raises:
        ValueError: an unknown mode, a number out of range, or "renoised" without noise.
    """

    target: Tensor
    weight: float = 0.05
    threshold: float = 0.8
    mode: PullMode = "latent"
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        check_pull(self.weight, self.threshold, self.mode)
        if self.mode == "renoised" and self.noise is None:
            raise ValueError("a renoised pull needs the start noise")

    def strength(self, step: int, steps: int) -> float:
        """w g after step `step` (from 0) of `steps`."""
        return self.weight * pull_share(steps_left(step, steps), steps, self.threshold)

    def clean(self, step: int, steps: int, clean: Tensor) -> Tensor:
        """The clean estimate that the sampler uses in this step; only "x0" changes it."""
        strength = self.strength(step, steps)
        return pull_towards(clean, self.target, strength) if self.mode == "x0" and strength else clean

    def after_step(
        self,
        step: int,
        steps: int,
        latents: Tensor,
        noise_share: float | Tensor,
        signal_share: float | Tensor = 1.0,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The latents after a step; "x0" leaves them.

        Args:
            latents: the sampler's, signal_share clean + noise_share noise.
            noise_share, signal_share: at the level after the step: (sigma, 1) in variance-exploding form, (t, 1 - t) in
                a flow.
            scale: factor of these latents over those that Eq. 1 is meant for: a sampler that keeps variance-preserving
                latents in variance-exploding form gives 1 / signal.
        """
        strength = self.strength(step, steps)
        if self.mode == "x0" or not strength:
            return latents
        if self.mode == "latent":
            return pull_towards(latents, scale * self.target, strength)
        assert self.noise is not None, "checked at the start"
        return pull_towards(latents, signal_share * self.target + noise_share * self.noise, strength)


def check_pull(weight: float, threshold: float, mode: str) -> None:
    """Raises ValueError for an unknown mode, a weight outside [0, 1] or a threshold outside [0, 1)."""
    if mode not in get_args(PullMode):
        raise ValueError(f"the pull's mode must be one of {', '.join(get_args(PullMode))}, got {mode!r}")
    if not 0 <= weight <= 1:
        raise ValueError(f"the pull's weight must be between 0 and 1, got {weight}")
    if not 0 <= threshold < 1:
        raise ValueError(f"the pull's threshold must be at least 0 and below 1, got {threshold}")
