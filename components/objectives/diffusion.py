"""The diffusion loss and the dropout of conditions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from components.samplers.schedules import Schedule
from components.types import Loss

if TYPE_CHECKING:
    from components.randomness import Noise


@dataclass(frozen=True)
class DroppedConditions:
    """Which samples of a batch lose which condition, bool [B] each."""

    image: Tensor
    text: Tensor


def epsilon_loss(prediction: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of predicted noise per sample (InstantIR Eq. 1): [B, ...] -> float32 [B]."""
    return (prediction.float() - noise.float()).square().flatten(1).mean(dim=1)


def drop_conditions(uniform: Tensor, image: float, text: float, both: float) -> DroppedConditions:
    """Split one uniform draw a sample into "image only", "text only", "both" and "neither".

    Args:
        uniform: [B] in [0, 1).
        image, text, both: probabilities; text-only and both may fill the whole range (stage 2: 0 / 0.85 / 0.15).

    Raises:
        ValueError: a negative probability, or a sum above 1.
    """
    check_dropout(image, text, both)
    none_above = image + text + both
    drop_both = (uniform >= image + text) & (uniform < none_above)
    # 0.85 + 0.15 is a hair below 1 in floats: whoever asked for everything gets everything
    if none_above > 1 - 1e-6:
        drop_both = uniform >= image + text
    return DroppedConditions(
        image=(uniform < image) | drop_both,
        text=((uniform >= image) & (uniform < image + text)) | drop_both,
    )


def check_dropout(image: float, text: float, both: float) -> None:
    """Raise ValueError where the three probabilities cannot be one distribution."""
    if min(image, text, both) < 0 or image + text + both > 1 + 1e-6:
        raise ValueError(f"dropout must be at least 0 and sum to at most 1, got {image}, {text} and {both}")


def replace_rows(rows: Tensor, replacement: Tensor, where: Tensor) -> Tensor:
    """rows [B, ...] with those marked by bool [B] taken from `replacement` (same shape, or one row)."""
    return torch.where(where.view(-1, *[1] * (rows.ndim - 1)), replacement, rows)


def clean_weights(schedule: Schedule, maximum: float) -> Tensor:
    """Weight of each time step's loss, float32 [T] with mean 1: min(1 / alphas_cumprod, maximum).

    The error of the clean latents is the error of the noise times (1 - a) / a, so that large weights stand
    for "clean latents count". A maximum of 1 is the plain loss (InstantIR Eq. 1).

    Raises:
        ValueError: maximum below 1.
    """
    if maximum < 1:
        raise ValueError(f"the largest weight must be at least 1, got {maximum}")
    weights = (1 / schedule.alphas_cumprod).clamp_max(maximum)
    return weights / weights.mean()


def importance_weights(steps: int, strength: float) -> Tensor:
    """Weight of each time step's loss, float32 [steps] with mean 1: 1 - strength cos(pi t / steps).

    More for noisy steps, less for clean ones. InstantIR's released trainers have it as an option, off, with a strength
    of 0.5 (instantir.md section 7).

    Raises:
        ValueError: strength outside [0, 1).
    """
    if not 0 <= strength < 1:
        raise ValueError(f"timestep_importance must be in [0, 1), got {strength}")
    weights = 1 - strength * torch.cos(math.pi * torch.arange(steps, dtype=torch.float64) / steps)
    return (weights / weights.mean()).to(torch.float32)


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Noise whose channel means vary: noise + strength * offset, for noise [B, C, h, w] and offset [B, C, 1, 1].

    Even at SDXL's noisiest step a picture's mean colour shows through plain noise (sqrt(alpha) is 0.07 there, and the
    mean over a thousand latents is sharp): no network then learns to take it from the prompt or from an LQ picture.
    SDXL was trained with a strength of 0.05; priors whose latents vary more in their means need more.
    """
    return noise + strength * offset if strength else noise


class WeightedEpsilon:
    """The noise prediction's loss with the two changes that a short training needs; without them it is Eq. 1.

    Args:
        schedule: the prior's.
        max_clean_weight: see clean_weights; 1 is the plain loss.
        noise_offset: see offset_noise; 0 is plain noise.
        timestep_importance: see importance_weights, which multiply the others; 0 is none.
    """

    def __init__(
        self,
        schedule: Schedule,
        max_clean_weight: float = 1.0,
        noise_offset: float = 0.0,
        timestep_importance: float = 0.0,
    ) -> None:
        self.schedule, self.noise_offset = schedule, noise_offset
        self.weights = clean_weights(schedule, max_clean_weight)
        importance = importance_weights(schedule.num_train_timesteps, timestep_importance)
        if timestep_importance:
            self.weights = self.weights * importance
            self.weights = self.weights / self.weights.mean()

    def noisy(self, clean: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents and target noise, both like `clean` [B, C, h, w], and timesteps [B].

        Draws "timestep", "noise" and "noise_offset".
        """
        timesteps = noise.integers("timestep", 0, self.schedule.num_train_timesteps)
        offsets = noise.normal("noise_offset", (clean.shape[1], 1, 1))
        target = offset_noise(noise.normal("noise", tuple(clean.shape[1:])), offsets, self.noise_offset)
        return self.schedule.add_noise(clean, target, timesteps), target, timesteps

    def __call__(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Loss:
        """The weighted loss as value and metric "loss", and the unweighted one as metric "plain_loss"."""
        plain = epsilon_loss(prediction, target)
        value = (plain * self.weights.to(plain.device)[timesteps]).mean()
        return Loss(value=value, metrics={"loss": value.detach(), "plain_loss": plain.detach().mean()})
