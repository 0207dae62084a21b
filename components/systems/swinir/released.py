"""DiffBIR's published SwinIR files, and the sizes that a file does not determine. Torch-free: checked early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.options import UnknownOption, typed_options
from components.systems.swinir.config import SwinIRConfig
from components.systems.weights_io import find_released

PUBLISHED = "lxq007/DiffBIR on the Hugging Face hub (general_swinir_v1.ckpt, face_swinir_v1.ckpt)"
LICENCE = "apache-2.0 (XPixelGroup/DiffBIR)"

PART = "swinir"
RELEASED = {PART: "general_swinir_v1.ckpt"}
"""Released file by part; a second one, for faces, has the same layout."""

FILE_NAMES = tuple(f"{kind}_swinir_v1.{suffix}" for kind in ("general", "face") for suffix in ("ckpt", "safetensors"))
"""File names to look for in a folder."""

SIDECAR = "restoray.json"
"""Written next to an exported file: recipe, licence and origin."""

_NUMBERS: Mapping[str, type] = {
    "img_size": int,
    "embed_dim": int,
    "window_size": int,
    "mlp_ratio": float,
    "sf": int,
    "img_range": float,
    "unshuffle_scale": int,
    "features": int,
}
_LISTS = ("depths", "num_heads")


def check_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as SwinIRConfig's fields, in their types.

    Raises:
        ValueError: an unknown name (with the nearest one), a wrong type, or invalid sizes.
    """
    lists = {name: value for name, value in sizes.items() if name in _LISTS}
    try:
        checked: dict[str, Any] = typed_options({k: v for k, v in sizes.items() if k not in lists}, _NUMBERS)
    except UnknownOption as error:
        raise UnknownOption(error.name, (*_NUMBERS, *_LISTS)) from None
    for name, value in lists.items():
        if not isinstance(value, Sequence) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise ValueError(f"{name} must be a list of whole numbers, got {value!r:.80}")
        checked[name] = list(value)
    if len(lists) != 1:  # one list alone is checked later, with the other one from the file
        SwinIRConfig(**checked)
    return checked


def find_files(place: Path) -> list[Path]:
    """The weights file in a folder; see find_released."""
    return find_released(place, {"network": FILE_NAMES}, "SwinIR")
