"""Options of a restoration request. Torch-free: they are checked before a job starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from components.options import checked_options

MODELS_OWN = -1
"""As `context_px`: the number in the model's config."""

RESULT_PX = 1024
"""Side of the result of a tile if `tile_px` is 0, for networks that enlarge at least twofold; ours."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a restoration. Pixels are those of the network's input, before it enlarges.

    Attributes:
        tile_px: side of a tile with its context; larger pictures are restored in tiles. Rounded down to the network's
            multiple, and raised to what the context needs. 0: 512, or less if the tile's result were above RESULT_PX.
        context_px: least width of the border of a tile whose result is thrown away; neighbours overlap by more than
            twice as much. -1: as measured at the import of the model.
    """

    tile_px: int = 0
    context_px: int = MODELS_OWN

    def __post_init__(self) -> None:
        if not 0 <= self.tile_px <= 1 << 16:
            raise ValueError(f"option tile_px must be between 0 and {1 << 16}, got {self.tile_px}")
        if not MODELS_OWN <= self.context_px <= 4096:
            raise ValueError(f"option context_px must be between -1 and 4096, got {self.context_px}")

    def tile_of(self, factor: int) -> int:
        """The side of a tile of a network that enlarges by `factor`, px."""
        return self.tile_px or min(512, RESULT_PX // factor)


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The options in their own types; see components.options.checked_options."""
    return checked_options(options, defaults, Options())
