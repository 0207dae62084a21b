"""Options of a restoration request. Torch-free: they are checked before a job starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from components.options import checked_options


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a restoration.

    Attributes:
        strength: share of the generator's detail, from 0 (the regression alone) to 1; a model without a generator
            ignores it. Of 0.3, 0.5, 0.75 and 1 the default is the largest with which the shipped model is no worse
            than its input, in dB, at any of the six poor inputs (docs/benchmarks.md).
        tile_px: side of a tile; larger pictures are restored in tiles. Rounded down to the network's multiple.
        tile_overlap: least overlap of neighbours, as a share of a tile.
    """

    strength: float = 0.5
    tile_px: int = 768
    tile_overlap: float = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"option strength must be between 0 and 1, got {self.strength}")
        if self.tile_px < 1:
            raise ValueError(f"option tile_px must be at least 1, got {self.tile_px}")
        if not 0 <= self.tile_overlap <= 0.9:
            raise ValueError(f"option tile_overlap must be between 0 and 0.9, got {self.tile_overlap}")


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The options in their own types; see components.options.checked_options."""
    return checked_options(options, defaults, Options())
