"""What the Aggregator is shown beside the LQ latents: the kinds of reference of InstantIR's Table 2a."""

from __future__ import annotations

from torch import Tensor

from components.samplers.schedules import Schedule

REFERENCE_NOISE = "reference"
"""Name of the fresh noise in training; a restoration draws "reference 0", "reference 1", ... one for each step."""


def noised_reference(schedule: Schedule, preview: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """A preview with fresh noise of the current time step: what a `reference_noise` Aggregator takes (section 4.4).

    "The noisy preview latent follows the same distribution as current diffusion latent": the variance-preserving form
    sqrt(a) preview + sqrt(1 - a) noise, with noise that has nothing to do with the latents' own. Training and restoring
    both call this.

    Args:
        schedule: the prior's.
        preview: clean latents [B, C, h, w].
        noise: standard normal, same shape.
        timesteps: int64 [B], or [1] for all rows.

    Returns:
        VP latents, same shape.
    """
    return schedule.add_noise(preview, noise, timesteps.expand(len(preview)))
