"""The degradations that studies compare: four levels of quality, and every single fault at three strengths.

The four levels are those of InstantIR's Fig. 4. The faults are FixedDegradations (components.degradations.simple) with
one step switched on. A picture gets the same noise field at every strength, so that strengths are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.degradations import build_degradation
from components.images import to_float, to_uint8
from components.types import Image
from pipelines.core.errors import UsageError

HQ, MIXED = "HQ", "mixed"
QUALITY = (HQ, "x4", "x8", MIXED)
"""Fig. 4's levels, by falling quality (section 3.3)."""
STRENGTHS: Mapping[str, tuple[float, ...]] = {
    "blur": (1, 2, 4),
    "noise": (10, 20, 40),
    "jpeg": (60, 30, 10),
    "downsampling": (2, 4, 8),
}
"""Our strengths, weak to strong: sigma in pixels, standard deviation in 8-bit levels, JPEG quality, factor of the
side."""
UNITS = {"blur": "sigma, px", "noise": "8-bit levels", "jpeg": "quality", "downsampling": "factor"}


@dataclass(frozen=True, kw_only=True)
class Level:
    """A named degradation; single faults also have `kind` and `strength`."""

    name: str
    preset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""
    strength: float = 0.0

    def document(self) -> dict[str, Any]:
        """The fields that determine the pixels."""
        return {"name": self.name, "preset": self.preset, "options": dict(self.options)}


def quality_levels(mixed: str) -> list[Level]:
    """HQ, x4, x8 and the mixed degradation.

    Args:
        mixed: preset of the mixed degradation.

    Raises:
        UsageError: the preset is unknown; the error suggests the nearest name.
    """
    try:
        build_degradation(mixed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    presets = {HQ: "none", "x4": "x4", "x8": "x8", MIXED: mixed}
    return [Level(name=name, preset=preset) for name, preset in presets.items()]


def fault_levels() -> list[Level]:
    """Every single fault at each of its strengths; x4 and x8 equal those of quality_levels."""
    options_of = {
        "blur": lambda s: {"factor": 1, "sigma": s},
        "noise": lambda s: {"factor": 1, "noise": s},
        "jpeg": lambda s: {"factor": 1, "quality": s},
        "downsampling": lambda s: {"factor": s},
    }
    levels = []
    for kind, strengths in STRENGTHS.items():
        for strength in strengths:
            options = options_of[kind](strength)
            name = f"x{strength:g}" if kind == "downsampling" else f"{kind} {strength:g}"
            if name in QUALITY:
                level = Level(name=name, preset=name, kind=kind, strength=strength)
            else:
                level = Level(name=name, preset="x4", options=options, kind=kind, strength=strength)
            levels.append(level)
    return levels


def all_levels(mixed: str, faults: bool = True) -> list[Level]:
    """The levels of quality and the faults, each level once; the faults of a kind stand together, weak to strong."""
    single = fault_levels() if faults else []
    doubles = {level.name for level in single}
    return [*(level for level in quality_levels(mixed) if level.name not in doubles), *single]


def degrade(level: Level, picture: Image, seed: int, key: str) -> Image:
    """The uint8 picture at this level, at the same size. The plan depends on seed and key only."""
    degradation = build_degradation(level.preset, **level.options)
    return to_uint8(degradation.apply(to_float(picture), degradation.draw(seed, key, 0)))


def levels_of_kind(levels: Sequence[Level], kind: str) -> list[Level]:
    """The levels of one fault, weak to strong."""
    return [level for level in levels if level.kind == kind]
