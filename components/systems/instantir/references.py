"""The reference, the Aggregator's second input next to the LQ latents (InstantIR's Table 2a)."""

from __future__ import annotations

from torch import Tensor

from components.samplers.schedules import Schedule

REFERENCE_NOISE = "reference"
"""Stream name of the reference's noise in training; a restoration uses "reference 0", "reference 1", ... by step."""


def noised_reference(schedule: Schedule, preview: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """A preview with fresh noise of the current time step: the input of a `reference_noise` Aggregator (section 4.4).

    "The noisy preview latent follows the same distribution as current diffusion latent": the variance-preserving form
    sqrt(a) preview + sqrt(1 - a) noise. The noise is independent of the noise in the latents. Training and restoring
    both call this function.

    Args:
        schedule: the prior's schedule.
        preview: clean latents [B, C, h, w].
        noise: standard normal, the same shape.
        timesteps: int64 [B], or [1] for all rows.

    Returns:
        VP latents, the same shape.
    """
    return schedule.add_noise(preview, noise, timesteps.expand(len(preview)))
