"""Families of priors, and how a generator with noise starts. Torch-free, so that recipes list fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from components.priors.one_text_config import PIXART, SD21
from components.priors.sdxl_config import SDXL

Family = Literal["pixart", "sd", "sdxl", "nano"]
"""pixart: a DiT, text and mask. sd: a UNet, text. sdxl and nano: a UNet, text, pooled text and size ids."""


AlignStart = Literal["lq", "noised"]
"""Start of a generator with noise: LQ latents alone, or LQ latents noised to its time step."""

PRIORS: Mapping[str, str] = {"pixart": PIXART, "sd": SD21, "sdxl": SDXL, "nano": "nano"}
"""Default prior of each family."""
