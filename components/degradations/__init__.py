"""Degradations by preset name. They draw plans; engine.py (CPU) or batched/ (torch, whole batches) executes plans.

degradation = build_degradation("realesrgan", sharpen=False, first={"gaussian": (1, 20)})
plan = degradation.draw(seed, key, position)
lq = degradation.apply(hq, plan)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from components.degradations.bsrgan import BSRGAN
from components.degradations.mixed import Mixed
from components.degradations.real_esrgan import SECOND, RealESRGAN, Stage
from components.degradations.simple import FirstOrder, FixedDegradation, NoDegradation, SaltPepper, Strokes
from components.naming import did_you_mean
from components.types import Degradation

PRESETS: dict[
    str, RealESRGAN | BSRGAN | FirstOrder | FixedDegradation | SaltPepper | Strokes | Mixed | NoDegradation
] = {
    # The x4plus options. LQ is always made from the sharpened picture; the losses there use sharpened targets too.
    "realesrgan": RealESRGAN(sharpen=True, sharpen_target=True),
    # Zhang et al. 2021.
    "bsrgan": BSRGAN(),
    # SUPIR 4.1: Real-ESRGAN's model, LQ resized to 512. The paper does not state sharpening and interpolation; ours:
    # off and bicubic.
    "supir": RealESRGAN(),
    # InstantIR's class: sharpened input and target, no rounding of the small picture, 1 % undegraded (per batch there).
    "instantir": RealESRGAN(sharpen=True, sharpen_target=True, round_small=False, clean_prob=0.01),
    # InstaRevive, general restoration: no sharpening, whole pixels in the second resize. LQ is clipped and rounded
    # once, after enlarging.
    "instarevive-bsr": RealESRGAN(whole_small=True, round_small=False, clip_small=False, round_back=True),
    # InstaRevive, faces.
    "instarevive-bfr": FirstOrder(),
    # The adapter paper says only "modified" Real-ESRGAN. Ours: its numbers, LQ 1, 2, 4 or 8 times smaller.
    "dra": RealESRGAN(factors=(1, 2, 4, 8)),
    # SUPIR, Table 1.
    "x4": FixedDegradation(factor=4),
    "x8": FixedDegradation(factor=8),
    "blur2-x4": FixedDegradation(sigma=2.0, factor=4),
    "x4-noise40": FixedDegradation(factor=4, noise=40.0),
    "blur2-x4-noise20-jpeg50": FixedDegradation(sigma=2.0, factor=4, noise=20.0, quality=50),
    # Ours, for a restorer of all of these: Real-ESRGAN without sharpening, the five tests, mild faults and none.
    "mixed": Mixed(),
    # InstaRevive A.8: single faults.
    "salt-pepper": SaltPepper(),
    "strokes": Strokes(),
    # Ours, for 128 px crops of photographs whose short side is 256. The same number of pixels covers four times as
    # much of the scene, so every strength is about halved, and so is the shrinking. Chosen by eye. Plain JPEG.
    "realesrgan-nano": RealESRGAN(
        factors=(2,),
        jpeg_form="edge",
        kernel_sizes=(3, 9),
        first=Stage(
            sigma=(0.1, 1.5), resize=(0.5, 1.5), gaussian=(1.0, 12.0), poisson=(0.05, 0.8), quality=(55.0, 95.0)
        ),
        second=dataclasses.replace(
            SECOND, sigma=(0.1, 0.8), resize=(0.6, 1.2), gaussian=(1.0, 10.0), poisson=(0.05, 0.7), quality=(55.0, 95.0)
        ),
    ),
    "none": NoDegradation(),
}
"""Degradations by name; `build_degradation` varies them."""


def build_degradation(preset: str, **options: Any) -> Degradation:
    """A preset with some of its numbers changed.

    Args:
        preset: a key of PRESETS.
        options: fields of the preset's class by name; a nested dataclass is a mapping (first={"sigma": (0.2, 2)}).

    Raises:
        ValueError: the preset or option is unknown (the message names the nearest), or a number is out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown degradation {preset!r}. {did_you_mean(preset, PRESETS)}")
    return _replace_fields(PRESETS[preset], options, f"degradation {preset!r}")


def _replace_fields(base: Any, options: Mapping[str, Any], where: str) -> Any:
    """Returns a copy of a dataclass with new field values, recursively; lists (from YAML) become tuples."""
    fields = [field.name for field in dataclasses.fields(base)]
    changes: dict[str, Any] = {}
    for name, value in options.items():
        if name not in fields:
            raise ValueError(f"{where} has no option {name!r}. {did_you_mean(name, fields)}")
        changes[name] = _check_type(getattr(base, name), value, f"{name} of {where}")
    return dataclasses.replace(base, **changes)


def _check_type(current: Any, value: Any, where: str) -> Any:
    """Checks that `value` has the type of `current`, and returns it; a list becomes a tuple.

    Raises:
        ValueError: the type differs, or a number is not finite.
    """
    if dataclasses.is_dataclass(current):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping of options, got {value!r}")
        return _replace_fields(current, value, where)
    if isinstance(current, tuple):
        if not isinstance(value, list | tuple) or not all(_is_number(each) for each in value):
            raise ValueError(f"{where} must be a list of numbers, got {value!r}")
        if len(value) != len(current) and not where.startswith("factors "):
            raise ValueError(f"{where} must hold {len(current)} numbers, got {value!r}")
        return tuple(value)
    if isinstance(current, bool | str):
        is_valid = isinstance(value, type(current))
    else:
        is_valid = _is_number(value) and (isinstance(value, int) or not isinstance(current, int))
    if not is_valid:
        kind = {bool: "true or false", str: "a name", int: "a whole number"}.get(type(current), "a finite number")
        raise ValueError(f"{where} must be {kind}, got {value!r}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
