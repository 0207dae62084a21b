"""The discrete noise schedules of priors: SDXL's kind with the two forms of its noisy latents, and flow matching.

    variance-preserving (VP), the input of the network:         x = sqrt(a) clean + sqrt(1 - a) noise
    variance-exploding (VE), used by samplers (types.Denoiser): z = clean + sigma noise,   z = x / sqrt(a)

with a = alphas_cumprod[t] and sigma = sqrt((1 - a) / a). The network's noise prediction is the same in both forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS: Sequence[Spacing] = get_args(Spacing)


class _Tables:
    """Copies of a schedule's tables on the devices of the time steps."""

    @cached_property
    def _by_device(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    def _on(self, name: str, device: torch.device) -> Tensor:
        """A table on a device, cached: a copy in every step would make the host wait for the device."""
        if (name, device) not in self._by_device:
            with torch.inference_mode(False):  # an inference tensor could not take part in training later
                self._by_device[name, device] = getattr(self, name).to(device)
        return self._by_device[name, device]


@dataclass(frozen=True)
class Schedule(_Tables):
    """Noise levels of `num_train_timesteps` discrete steps.

    Attributes:
        num_train_timesteps: T; time steps are 0 .. T - 1, the noise rises with them.
        beta_start, beta_end: first and last beta.
        beta_schedule: "scaled_linear" (linear in sqrt(beta), SDXL's) or "linear".

    Raises:
        ValueError: unknown beta_schedule, T < 1, or betas outside 0 < beta_start <= beta_end < 1.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"

    def __post_init__(self) -> None:
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f"beta_schedule must be scaled_linear or linear, got {self.beta_schedule!r}")
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {self.num_train_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas must satisfy 0 < start <= end < 1, got {self.beta_start} and {self.beta_end}")

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """The clean signal's share of the variance, float32 [T], falling."""
        steps = self.num_train_timesteps
        if self.beta_schedule == "linear":
            betas = torch.linspace(self.beta_start, self.beta_end, steps, dtype=torch.float32)
        else:
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, steps, dtype=torch.float32).square()
        return torch.cumprod(1.0 - betas, dim=0)

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise levels in VE form, float32 [T], rising."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    def alpha(self, timesteps: Tensor, ndim: int = 1) -> Tensor:
        """alphas_cumprod at int64 timesteps [B], on their device, shaped [B, 1, ...] with `ndim` dimensions."""
        values = self._on("alphas_cumprod", timesteps.device)[timesteps]
        return values.view(-1, *[1] * (ndim - 1))

    def sigma(self, timesteps: Tensor) -> Tensor:
        """VE noise level at int64 timesteps [B] or [] -> float32 of the same shape."""
        return self._on("sigmas", timesteps.device)[timesteps]

    def timestep_of(self, sigma: Tensor) -> Tensor:
        """The nearest discrete time step of each VE noise level: float [B] -> int64 [B]."""
        return (self._on("sigmas", sigma.device)[None] - sigma[:, None]).abs().argmin(dim=1)

    def shares(self, timestep: int) -> tuple[float, float]:
        """(signal, noise) at a time step: noisy latents are signal clean + noise eps, in VP form."""
        alpha = self.alphas_cumprod[timestep]
        return float(alpha.sqrt()), float((1 - alpha).sqrt())

    def network_times(self, timesteps: Tensor) -> Tensor:
        """The network's time argument at int64 timesteps [B]: the time steps themselves."""
        return timesteps

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents in VP form; clean and noise [B, ...], timesteps int64 [B]."""
        alpha = self.alpha(timesteps, clean.ndim).to(clean.dtype)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise

    def x0_from_eps(self, noisy: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents for a noise prediction, from VP latents [B, ...] and int64 timesteps [B]."""
        alpha = self.alpha(timesteps, noisy.ndim).to(noisy.dtype)
        return (noisy - (1 - alpha).sqrt() * eps) / alpha.sqrt()

    def noise_loss_weights(self, timesteps: Tensor) -> Tensor:
        """Weights by which squared errors of the noise are the loss of the prior's training: ones, float32 [B]."""
        return torch.ones(timesteps.shape, device=timesteps.device)

    def eps_from_velocity(self, noisy: Tensor, velocity: Tensor, timesteps: Tensor) -> Tensor:
        """The noise for a predicted velocity (signal eps - noise clean; Salimans and Ho 2022, app. D)."""
        alpha = self.alpha(timesteps, noisy.ndim).to(noisy.dtype)
        return alpha.sqrt() * velocity + (1 - alpha).sqrt() * noisy

    def timesteps(self, n: int, spacing: Spacing = "leading", offset: int = 1) -> Tensor:
        """Time steps of an n-step sampler, int64 [n], falling.

        Args:
            n: number of steps, 1 .. T.
            spacing: "leading" (SDXL's) takes multiples of T // n plus `offset`; "trailing" starts at T - 1; "linspace"
                goes from T - 1 to 0.
            offset: added with "leading" (SDXL: 1).

        Raises:
            ValueError: n is outside 1 .. T, or the spacing is unknown.
        """
        steps = self.num_train_timesteps
        if not 1 <= n <= steps:
            raise ValueError(f"steps must be between 1 and {steps}, got {n}")
        if spacing == "leading":
            # with n = T the offset would exceed the table
            return (torch.arange(n - 1, -1, -1) * (steps // n) + offset).clamp_max(steps - 1)
        if spacing == "trailing":
            return (steps - torch.arange(n, dtype=torch.float64) * (steps / n)).round().long() - 1
        if spacing == "linspace":
            return torch.linspace(0, steps - 1, n, dtype=torch.float64).round().long().flip(0)
        raise ValueError(f"spacing must be {', '.join(SPACINGS)}, got {spacing!r}")

    def sampling_sigmas(self, timesteps: Tensor, final_clean: bool = True) -> Tensor:
        """VE noise levels of a sampler's int64 timesteps [n], and the final level -> float32 [n + 1].

        On a "leading" grid the level after a step is that of the next grid point, T // n below. After the last step it
        is 0 (diffusers' set_alpha_to_one; the golden recordings of the official loops use it), or without `final_clean`
        that of time step 0.
        """
        levels = self.sigma(timesteps)
        last = levels.new_zeros(1) if final_clean else self.sigma(torch.zeros_like(timesteps[:1]))
        return torch.cat([levels, last])

    @staticmethod
    def preserving(latents: Tensor, sigma: Tensor) -> Tensor:
        """VE latents [B, ...] at sigma [B] -> VP latents: divided by sqrt(1 + sigma^2) = 1 / sqrt(a)."""
        return latents / (1 + sigma.square()).sqrt().view(-1, *[1] * (latents.ndim - 1))

    @staticmethod
    def exploding(latents: Tensor, sigma: Tensor) -> Tensor:
        """VP latents [B, ...] at sigma [B] -> VE latents."""
        return latents * (1 + sigma.square()).sqrt().view(-1, *[1] * (latents.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a prior is sampled, besides its noise schedule; the defaults are those of our models and of the golden files.

    Attributes:
        spacing, offset: of the time steps, see Schedule.timesteps (diffusers' timestep_spacing and steps_offset).
        final_clean: DDIM ends at noise level 0; False: at that of time step 0 (diffusers' set_alpha_to_one). DDPM
            always ends at 0.

    Raises:
        ValueError: an unknown spacing, or a negative offset.
    """

    spacing: Spacing = "leading"
    offset: int = 1
    final_clean: bool = True

    def __post_init__(self) -> None:
        if self.spacing not in SPACINGS:
            raise ValueError(f"timestep_spacing must be one of {', '.join(SPACINGS)}, got {self.spacing!r}")
        if self.offset < 0:
            raise ValueError(f"steps_offset must be at least 0, got {self.offset}")

    def timesteps(self, schedule: Schedule, n: int) -> Tensor:
        """Time steps of an n-step sampler, int64 [n], falling; raises ValueError as Schedule.timesteps."""
        return schedule.timesteps(n, self.spacing, self.offset)

    def sigmas(self, schedule: Schedule, timesteps: Tensor, ancestral: bool = False) -> Tensor:
        """VE noise levels of these time steps and the final level, float32 [n + 1]; `ancestral` for DDPM."""
        return schedule.sampling_sigmas(timesteps, self.final_clean or ancestral)


@dataclass(frozen=True)
class FlowSchedule(_Tables):
    """The times of a flow-matching prior, like a Schedule: x = (1 - t) clean + t noise (Esser et al. 2024, Eq. 13).

    Attributes:
        num_train_timesteps: T; step i is the time i / T before the shift, so the last step still has a share of the
            clean latents.
        shift: moves times towards noise: t' = shift t / (1 + (shift - 1) t); 3 for SD3, 1 for none.

    Raises:
        ValueError: T < 1, or the shift is not positive.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_train_timesteps < 1 or self.shift <= 0:
            raise ValueError(f"num_train_timesteps must be at least 1 and shift positive, got {self}")

    @cached_property
    def times(self) -> Tensor:
        """Shares of noise, float32 [T], rising from 0."""
        plain = torch.arange(self.num_train_timesteps, dtype=torch.float64) / self.num_train_timesteps
        return (self.shift * plain / (1 + (self.shift - 1) * plain)).to(torch.float32)

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise over signal, float32 [T], rising: levels in VE form."""
        return self.times / (1 - self.times)

    def shares(self, timestep: int) -> tuple[float, float]:
        """(signal, noise) at a time step: noisy latents are signal clean + noise eps."""
        time = float(self.times[timestep])
        return 1 - time, time

    def network_times(self, timesteps: Tensor) -> Tensor:
        """The network's time argument at int64 timesteps [B]: shifted time times T, float32 (as in diffusers)."""
        return self._on("times", timesteps.device)[timesteps] * self.num_train_timesteps

    def _time(self, timesteps: Tensor, like: Tensor) -> Tensor:
        return self._on("times", timesteps.device)[timesteps].view(-1, *[1] * (like.ndim - 1)).to(like.dtype)

    def sigma(self, timesteps: Tensor) -> Tensor:
        """Noise over signal at int64 timesteps [B] or [] -> float32 of the same shape."""
        return self._on("sigmas", timesteps.device)[timesteps]

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents; clean and noise [B, ...], timesteps int64 [B]."""
        time = self._time(timesteps, clean)
        return (1 - time) * clean + time * noise

    def x0_from_eps(self, noisy: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents for a noise prediction, from noisy latents [B, ...] and int64 timesteps [B]."""
        time = self._time(timesteps, noisy)
        return (noisy - time * eps) / (1 - time)

    def noise_loss_weights(self, timesteps: Tensor) -> Tensor:
        """As in Schedule: 1 / (1 - t)^2, float32 [B], since the noise's error is 1 - t times the velocity's."""
        return (1 - self._on("times", timesteps.device)[timesteps]).square().reciprocal()

    def eps_from_velocity(self, noisy: Tensor, velocity: Tensor, timesteps: Tensor) -> Tensor:
        """The noise for a predicted velocity (noise - clean)."""
        return noisy + (1 - self._time(timesteps, noisy)) * velocity


def schedule_from(numbers: Mapping[str, Any]) -> Schedule | FlowSchedule:
    """A schedule from its fields by name, as in model.json; a field "shift" makes a FlowSchedule.

    Raises:
        TypeError, ValueError: unknown fields, or values out of range.
    """
    return FlowSchedule(**numbers) if "shift" in numbers else Schedule(**numbers)
