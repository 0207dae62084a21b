"""What a request may ask of InstaRevive. Torch-free: judged before a job starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from components.options import on_top, typed_options

FIXED_PROMPTS: Mapping[str, str] = {
    "photo": "real-world image, realistic, high quality, photograph, film, professional, 4k, highly detailed",
    "face": "portrait photo of human face, photograph, film, professional, 4k, highly detailed",
}
"""What the released inference tells the network of every picture (reference, section 4)."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "released": {
        "text": "photo",
        "color": "wavelet",
        "window": "equal",
        "tiles": "never",
        "tile_px": 512,
        "tile_overlap": 0.125,
        "min_side_px": 512,
        "padding": "zero",
        "rounding": "truncate",
    },
}
"""What each preset settles; explicit options win over it, and it wins over a recipe's defaults.

released: the official command line at commit 50ed1d9; its --tiled is tiles=auto here. Coarse restorer and encoder then
see the whole picture in floating point, colours are transferred in each tile by itself and with tiles only, and the
result comes back to its size by Lanczos.
"""


def restore_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Restorer options that a resolved recipe settles: what lies in its `restore_options`."""
    return dict(recipe.get("restore_options") or {})


def check_options(given: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The given options in their own types; see components.options.OptionCheck.

    Args:
        defaults: what the model's recipe settles, see restore_defaults.

    Raises:
        ValueError: an unknown name (with the near one), a wrong type, or a value outside its range.
    """
    values = typed_options(given, get_type_hints(Options))
    on_top(values, parse_options(defaults, Options()), PRESETS)  # checks the ranges
    return values


def parse_options(given: Mapping[str, Any], defaults: Options) -> Options:
    """Options by name on top of their preset's, on top of defaults; raises as check_options."""
    return on_top(typed_options(given, get_type_hints(Options)), defaults, PRESETS)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A request's options, with InstaRevive's defaults.

    Attributes:
        preset: "default", or "released", which sets others, see PRESETS.
        text: what the network is told: "given" the request's prompt, "photo" or "face" a released fixed one.
        coarse: use the model's coarse restorer before the generator, where it has one.
        color: colour transfer from what the generator saw, see components.color. None by default: a model may be meant
            to change colours (low light, cartoons).
        window: how overlapping tiles of the generator are weighed: "gaussian", on tiles spread evenly, or "equal", on
            tiles from the top left with the last ones flush to the border (released).
        tiles: "auto" lets the generator see what is larger than a tile in tiles, "never" all at once.
        tile_px: side of a tile; 0 takes the size that the network was made for, else 128 latents.
        tile_overlap: share of a tile that neighbours share at least.
        min_side_px: a shorter short side is enlarged to it for the networks; 0 for no limit.
        padding: what fills the picture up to the multiples that the networks take: its "mirror" image, or "zero".
        rounding: to 8 bit: "nearest", or "truncate" (released).
        inpaint: which pixels are missing; all others keep their latents from the input: "none" (all are restored),
            "white" those that are white in all channels, "reference" where the picture given with the request is white.

    Raises:
        ValueError: a value outside its range.
    """

    preset: Literal["default", "released"] = "default"
    text: Literal["given", "photo", "face"] = "given"
    coarse: bool = True
    color: Literal["none", "adain", "wavelet"] = "none"
    window: Literal["gaussian", "equal"] = "gaussian"
    tiles: Literal["auto", "never"] = "auto"
    tile_px: int = 0
    tile_overlap: float = 0.25
    min_side_px: int = 0
    padding: Literal["mirror", "zero"] = "mirror"
    rounding: Literal["nearest", "truncate"] = "nearest"
    inpaint: Literal["none", "white", "reference"] = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.min_side_px <= 4096:
            raise ValueError(f"min_side_px must be between 0 and 4096, got {self.min_side_px}")
        if self.tile_px != 0 and not 16 <= self.tile_px <= 8192:
            raise ValueError(f"tile_px must be 0 or between 16 and 8192, got {self.tile_px}")
        if not 0 <= self.tile_overlap <= 0.9:
            raise ValueError(f"tile_overlap must be between 0 and 0.9, got {self.tile_overlap}")

    @property
    def released(self) -> bool:
        return self.preset == "released"
