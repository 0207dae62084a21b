"""How a generator with noise starts. Torch-free, so that recipes list fast."""

from __future__ import annotations

from typing import Literal

AlignStart = Literal["lq", "noised"]
"""Start of a generator with noise: LQ latents alone, or LQ latents noised to its time step."""
