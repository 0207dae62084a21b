"""Where the Aggregator's reference comes from besides the Previewer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from components.samplers.schedules import Schedule

REFERENCE_NOISE = "reference"
"""Name of the fresh noise in training."""


def noised_reference(schedule: Schedule, preview: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """A preview with fresh noise of its time step, as the current latents have it (InstantIR Table 2a, last row).

    Only an Aggregator that was trained on such references (`reference_noise`) can use them.

    Args:
        schedule: the prior's.
        preview: clean latents [B, C, h, w].
        noise: standard normal, same shape; not the noise of the current latents.
        timesteps: int64 [B].

    Returns:
        VP latents [B, C, h, w].
    """
    return schedule.add_noise(preview, noise, timesteps)
