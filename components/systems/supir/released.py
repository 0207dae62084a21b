"""SUPIR's released files: their names, their licence, and the sizes that may be given. Torch-free: checked early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.options import UnknownOption, typed_options
from components.systems.supir.config import Connector, adaptor_config
from components.systems.weights_io import find_released

PUBLISHED = "SUPIR-v0Q.ckpt (strong degradations) or SUPIR-v0F.ckpt (light ones), as Fanghua-Yu/SUPIR links them"
LICENCE = "SUPIR Software Licence (non-commercial; weights and architecture claimed by SupPixel)"
PERMITTED_USE = "non-commercial only, as the licence says; commercial use needs a written agreement with SupPixel"
"""What the authors' licence claims (supir.md, section 0; docs/licences.md). It is reported, not judged."""

PUBLISHED_PARAMETERS = 1_332_339_912
"""Of a released file: control encoder, connectors and robust encoder (supir.md, section 1.1)."""

RELEASED = {"network": "SUPIR-v0Q.ckpt"}
"""The released file, which holds both parts of a model folder; SUPIR-v0F.ckpt has the same layout."""

FILE_NAMES = tuple(
    f"SUPIR-{version}{precision}.{suffix}"
    for version in ("v0Q", "v0F")
    for precision in ("", "_fp16")
    for suffix in ("ckpt", "safetensors")
)
"""File names to look for in a folder: the released ones, and those of the copies in half precision."""

RELEASE_DEFAULTS: Mapping[str, Any] = {
    "resize": "released",
    "sizes": "released",
    "encoding": "sample",
    "joined_words": False,
    "long_texts": "cut",
}
"""Options of imported weights without a recipe of their own: the built-in ones are the official command line's, and
these are its sizes and texts. Its tiles are not among them: their weights are half a row off."""

SIDECAR = "restoray.json"
"""Written next to an exported file: recipe, prior, licence and origin."""

CONTROL = "model.control_model."
CONNECTORS = "model.diffusion_model.project_modules."
ENCODER = "first_stage_model.denoise_encoder."
"""Beginnings of the released keys (supir.md, section 1.4)."""

OF_THE_PRIOR = (
    "model.diffusion_model.",
    *(f"first_stage_model.{part}." for part in ("encoder", "decoder", "quant_conv", "post_quant_conv")),
    "conditioner.",
    "denoiser.",
)
"""Beginnings of SDXL's own keys, which a file may hold too; CONNECTORS are none of them."""

_KINDS: Mapping[str, Any] = {"connector": Connector, "cross_attention": bool}
_DEPTH = "transformer_depth"


def check_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as AdaptorConfig's fields, in their types.

    Raises:
        ValueError: an unknown name (with the nearest one), a wrong type, or a depth below 1.
    """
    try:
        checked = typed_options({name: value for name, value in sizes.items() if name != _DEPTH}, _KINDS)
    except UnknownOption as error:
        raise UnknownOption(error.name, (*_KINDS, _DEPTH)) from None
    if _DEPTH in sizes:
        depths = sizes[_DEPTH]
        is_list = isinstance(depths, Sequence) and not isinstance(depths, str)
        if not is_list or not all(isinstance(depth, int) and not isinstance(depth, bool) for depth in depths):
            raise ValueError(f"{_DEPTH} must be a list of whole numbers, got {depths!r:.80}")
        checked[_DEPTH] = list(depths)
    adaptor_config(checked)
    return checked


def find_files(place: Path) -> list[Path]:
    """The weights file in a folder; see find_released. A folder with two of them is refused: each is a model."""
    return find_released(place, {"network": FILE_NAMES}, "SUPIR")
