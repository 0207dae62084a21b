"""Options of a coarse restoration request. Torch-free: they are checked before a job starts."""

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
        min_side_px: a picture with a shorter short side is enlarged to it for the network, and the result is resized
            back; 512 in DiffBIR and InstaRevive; 0 for no limit.
        tile_px: side of a tile; larger pictures are restored in tiles. Rounded down to the network's multiple.
        tile_overlap: least overlap of neighbours, as a share of a tile.
    """

    min_side_px: int = 512
    tile_px: int = 1024
    tile_overlap: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.min_side_px <= 4096:
            raise ValueError(f"option min_side_px must be between 0 and 4096, got {self.min_side_px}")
        if self.tile_px < 1:
            raise ValueError(f"option tile_px must be at least 1, got {self.tile_px}")
        if not 0 <= self.tile_overlap <= 0.9:
            raise ValueError(f"option tile_overlap must be between 0 and 0.9, got {self.tile_overlap}")


def restore_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Default restorer options from a resolved recipe: pictures are at least as large as in training."""
    return {"min_side_px": recipe["resolution"]} if "resolution" in recipe else {}


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The options in their own types; see components.options.checked_options."""
    return checked_options(options, defaults, Options())
