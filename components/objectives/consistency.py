"""Arithmetic of consistency distillation (Luo et al. 2023, as used by InstantIR Eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from components.samplers.schedules import Schedule


def boundary_scalings(
    timesteps: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out), float32 [B] each; with them a one-step model is the identity at time 0.

    With s = timestep_scaling * t: c_skip = d^2 / (s^2 + d^2) and c_out = s / sqrt(s^2 + d^2), d = sigma_data
    (instantir.md section 3).
    """
    scaled = timesteps.to(torch.float32) * timestep_scaling
    total = scaled.square() + sigma_data**2
    return sigma_data**2 / total, scaled / total.sqrt()


def consistency_output(
    schedule: Schedule,
    noisy: Tensor,
    eps: Tensor,
    timesteps: Tensor,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> Tensor:
    """One-step clean latents: c_out x0 + c_skip x_t.

    Args:
        schedule: the prior's.
        noisy: VP latents [B, C, h, w].
        eps: predicted noise, same shape.
        timesteps: int64 [B].
        timestep_scaling, sigma_data: see boundary_scalings.
    """
    skip, out = boundary_scalings(timesteps, timestep_scaling, sigma_data)
    shape = (-1, *[1] * (noisy.ndim - 1))
    clean = schedule.x0_from_eps(noisy, eps, timesteps)
    return (out.view(shape) * clean + skip.view(shape) * noisy).to(noisy.dtype)


@dataclass(frozen=True)
class SolverGrid:
    """The teacher's coarse time grid: `points` times from T/points - 1 to T - 1 (19, 39, ..., 999 for 50 of 1000).

    Raises:
        ValueError: points is outside 1 .. T.
    """

    schedule: Schedule
    points: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.points <= self.schedule.num_train_timesteps:
            raise ValueError(f"num_ddim_timesteps must be 1 .. {self.schedule.num_train_timesteps}, got {self.points}")

    @property
    def stride(self) -> int:
        """Time steps of one solver step."""
        return self.schedule.num_train_timesteps // self.points

    def interval(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Grid index int64 [B] in 0 .. points - 1 -> (start, end) time steps int64 [B]; end is at least 0."""
        start = (index + 1) * self.stride - 1
        return start, (start - self.stride).clamp_min(0)


def ddim_step(schedule: Schedule, clean: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
    """VP latents at int64 timesteps [B] on the path through a clean and a noise estimate [B, C, h, w]."""
    return schedule.add_noise(clean, eps, timesteps)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c, mean per sample: [B, ...] -> float32 [B]. The released code has c = 0.001."""
    difference = prediction.float() - target.float()
    return ((difference.square() + c**2).sqrt() - c).flatten(1).mean(dim=1)


def squared_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of Eq. 5 per sample, [B]: the mean instead of the sum, so it does not grow with the picture."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
