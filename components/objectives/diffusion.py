"""The diffusion loss and the dropout of conditions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from components.randomness import Noise
from components.samplers.schedules import Schedule
from components.types import Loss


@dataclass(frozen=True)
class DroppedConditions:
    """The samples that lose a condition, bool [B] each."""

    image: Tensor
    text: Tensor


def epsilon_loss(prediction: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of predicted noise per sample (InstantIR Eq. 1): [B, ...] -> float32 [B]."""
    return (prediction.float() - noise.float()).square().flatten(1).mean(dim=1)


def drop_conditions(uniform: Tensor, image: float, text: float, both: float) -> DroppedConditions:
    """Drops conditions: one uniform number per sample selects "image only", "text only", "both" or "neither".

    Args:
        uniform: [B] in [0, 1).
        image, text, both: probabilities of "image only", "text only" and "both"; stage 2 has 0 / 0.85 / 0.15.

    Raises:
        ValueError: a probability is negative, or the sum is above 1.
    """
    check_dropout(image, text, both)
    none_above = image + text + both
    drop_both = (uniform >= image + text) & (uniform < none_above)
    # 0.85 + 0.15 is slightly below 1 in floats, but must drop a condition in every sample
    if none_above > 1 - 1e-6:
        drop_both = uniform >= image + text
    return DroppedConditions(
        image=(uniform < image) | drop_both,
        text=((uniform >= image) & (uniform < image + text)) | drop_both,
    )


def check_dropout(image: float, text: float, both: float) -> None:
    """Raises ValueError if a probability is negative or the three sum to more than 1."""
    if min(image, text, both) < 0 or image + text + both > 1 + 1e-6:
        raise ValueError(f"dropout must be at least 0 and sum to at most 1, got {image}, {text} and {both}")


def replace_rows(rows: Tensor, replacement: Tensor, where: Tensor) -> Tensor:
    """rows [B, ...], but from `replacement` (same shape, or one row) where the mask `where`, bool [B], is true."""
    return torch.where(where.view(-1, *[1] * (rows.ndim - 1)), replacement, rows)


def clean_weights(schedule: Schedule, maximum: float) -> Tensor:
    """Weight of each time step's loss, float32 [T] with mean 1: min(1 / alphas_cumprod, maximum).

    The squared error of the clean latents is that of the noise times (1 - a) / a, so a large maximum makes the loss
    count clean latents. A maximum of 1 is the plain loss (InstantIR Eq. 1).

    Raises:
        ValueError: the maximum is below 1.
    """
    if maximum < 1:
        raise ValueError(f"the largest weight must be at least 1, got {maximum}")
    weights = (1 / schedule.alphas_cumprod).clamp_max(maximum)
    return weights / weights.mean()


def importance_weights(steps: int, strength: float) -> Tensor:
    """Weight of each time step's loss, float32 [steps] with mean 1: 1 - strength cos(pi t / steps).

    Noisy steps weigh more, clean steps less. InstantIR's released trainers have it as an option with a strength of 0.5,
    off by default (instantir.md section 7).

    Raises:
        ValueError: the strength is outside [0, 1).
    """
    if not 0 <= strength < 1:
        raise ValueError(f"timestep_importance must be in [0, 1), got {strength}")
    weights = 1 - strength * torch.cos(math.pi * torch.arange(steps, dtype=torch.float64) / steps)
    return (weights / weights.mean()).to(torch.float32)


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Noise with random channel means: noise + strength * offset, for noise [B, C, h, w] and offset [B, C, 1, 1].

    Plain noise shows a picture's mean colour even at SDXL's noisiest step: sqrt(alpha) is 0.07 there, and a mean over a
    thousand latents is precise. A network then does not learn to take the colour from the prompt or from LQ. SDXL was
    trained with a strength of 0.05; priors whose latents have more variable means need more.
    """
    return noise + strength * offset if strength else noise


class WeightedEpsilon:
    """The loss of the noise prediction with optional weights and offset noise; with the defaults it is InstantIR Eq. 1.

    Args:
        schedule: the prior's.
        max_clean_weight: see clean_weights; 1 is the plain loss.
        noise_offset: see offset_noise; 0 is plain noise.
        timestep_importance: strength of importance_weights, which multiply clean_weights; 0 is off.
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
        """Noisy latents and target noise, both of the shape of `clean` [B, C, h, w], and timesteps [B].

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
