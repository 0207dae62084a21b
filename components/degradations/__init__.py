"""Degradations by preset name.

degradation = build_degradation("realesrgan", sharpen=True, first={"gaussian": (1, 20)})
lq = degradation.apply(hq, degradation.draw(seed, key, position))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.degradations.real_esrgan import SECOND, RealESRGAN, Stage, check_picture
from components.naming import did_you_mean
from components.types import Degradation, Image, Plan


@dataclass(frozen=True, kw_only=True)
class Undegraded:
    """Returns the picture as it is: for pairs that come degraded, and for tests of the rest of the chain."""

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """The empty decision."""
        return {"kind": "none", "version": 1}

    def apply(self, hq: Image, plan: Plan) -> Image:
        """A copy of float32 [H, W, 3]; SampleError as in RealESRGAN.apply."""
        check_picture(hq)
        return hq.copy()

    def target(self, hq: Image) -> Image:
        """The picture itself."""
        return hq


PRESETS: dict[str, RealESRGAN | Undegraded] = {
    # x4plus options. Sharpening is off: BasicSR sharpens, InstaRevive does not, SUPIR's and DRA's papers do not say.
    "realesrgan": RealESRGAN(),
    # InstantIR's class: sharpened input and target, no rounding of the small picture, 1 % undegraded (there by batch).
    "instantir": RealESRGAN(sharpen=True, sharpen_target=True, round_small=False, clean_prob=0.01),
    # Ours, for 128 px crops of photographs whose short side is 256: about half of every strength, since the same
    # number of pixels covers four times as much of the scene, and half the shrinking. Chosen by looking.
    "realesrgan-nano": RealESRGAN(
        factor=2,
        kernel_sizes=(3, 9),
        first=Stage(
            sigma=(0.1, 1.5), resize=(0.5, 1.5), gaussian=(1.0, 12.0), poisson=(0.05, 0.8), quality=(55.0, 95.0)
        ),
        second=dataclasses.replace(
            SECOND, sigma=(0.1, 0.8), resize=(0.6, 1.2), gaussian=(1.0, 10.0), poisson=(0.05, 0.7), quality=(55.0, 95.0)
        ),
    ),
    "none": Undegraded(),
}
"""Degradations by name; `build_degradation` varies them."""


def build_degradation(preset: str, **options: Any) -> Degradation:
    """A preset with some of its numbers changed.

    Args:
        preset: a name in PRESETS.
        options: fields of RealESRGAN by name; those of its stages as nested mappings (first={"sigma": (0.2, 2)}).

    Raises:
        ValueError: an unknown preset or option, with the nearest known one, or a number outside its range.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown degradation {preset!r}. {did_you_mean(preset, PRESETS)}")
    return _replaced(PRESETS[preset], options, f"degradation {preset!r}")


def _replaced(base: Any, options: Mapping[str, Any], where: str) -> Any:
    """A dataclass with fields replaced, recursively; lists (from YAML) become tuples."""
    fields = [field.name for field in dataclasses.fields(base)]
    changes: dict[str, Any] = {}
    for name, value in options.items():
        if name not in fields:
            raise ValueError(f"{where} has no option {name!r}. {did_you_mean(name, fields)}")
        if isinstance(value, Mapping):
            value = _replaced(getattr(base, name), value, f"{name} of {where}")
        changes[name] = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(base, **changes)
