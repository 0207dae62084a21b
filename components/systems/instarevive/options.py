"""Options of an InstaRevive request. Torch-free: they are checked before a job starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from components.options import apply_preset, typed_options

FIXED_PROMPTS: Mapping[str, str] = {
    "photo": "real-world image, realistic, high quality, photograph, film, professional, 4k, highly detailed",
    "face": "portrait photo of human face, photograph, film, professional, 4k, highly detailed",
}
"""Prompts that the released inference uses for every picture (reference, section 4)."""

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
"""Options of each preset. Explicit options override them, and they override a recipe's defaults.

released: the official command line at commit 50ed1d9; its --tiled is tiles=auto here. Coarse restorer and encoder then
process the whole picture in floating point. Colours are transferred within each tile, and only if there are tiles. The
result is resized by Lanczos.
"""


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The options in their own types; see components.options.OptionCheck.

    Args:
        defaults: from the model's recipe, see restore_defaults.

    Raises:
        ValueError: an unknown name (with the nearest one), a wrong type, or a value outside its range.
    """
    values = typed_options(options, get_type_hints(Options))
    apply_preset(values, parse_options(defaults, Options()), PRESETS)  # checks the ranges
    return values


def parse_options(options: Mapping[str, Any], defaults: Options) -> Options:
    """Options by name over their preset's over defaults; raises like check_options."""
    return apply_preset(typed_options(options, get_type_hints(Options)), defaults, PRESETS)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A request's options, with InstaRevive's defaults.

    Attributes:
        preset: "default", or "released", which sets others, see PRESETS.
        text: the prompt: "given" for the request's own, "photo" or "face" for a fixed one of the release.
        coarse: use the model's coarse restorer before the generator, if it has one.
        color: colour transfer from the generator's input, see components.color. The recipes of tasks that change
            colours (low light, cartoons, night, inpainting) turn it off.
        window: weights of the generator's overlapping tiles: "gaussian", with evenly spread tiles, or "equal", with
            tiles from the top left and the last ones flush with the border (released).
        tiles: "auto": a picture larger than a tile goes through the generator in tiles; "never": always as a whole.
        tile_px: side of a tile; 0 for the network's native size, else 128 latents.
        tile_overlap: least overlap of neighbours, as a share of a tile.
        min_side_px: a picture with a shorter short side is enlarged to it for the networks; 0 for no limit.
        padding: fills the picture up to the multiples that the networks need: its "mirror" image, or "zero".
        rounding: to 8 bits: "nearest", or "truncate" (released).
        inpaint: which pixels are missing; all others keep their latents from the input. "none": all are restored;
            "white": pixels that are white in all channels; "reference": where the request's reference is white.

    Raises:
        ValueError: a value outside its range.
    """

    preset: Literal["default", "released"] = "default"
    text: Literal["given", "photo", "face"] = "given"
    coarse: bool = True
    color: Literal["none", "adain", "wavelet"] = "wavelet"
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
