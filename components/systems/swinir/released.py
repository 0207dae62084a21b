"""DiffBIR's published SwinIR files by name, and what a file does not tell of its size. Torch-free: judged early."""

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
"""Released file by part; for faces there is a second one of the same layout."""

KNOWN_NAMES = tuple(f"{kind}_swinir_v1.{suffix}" for kind in ("general", "face") for suffix in ("ckpt", "safetensors"))
"""What a folder is searched for."""

SIDECAR = "restoray.json"
"""Written beside an exported file: recipe, licence and where it came from."""

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


def check_sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as SwinIRConfig's fields, in their types.

    Raises:
        ValueError: an unknown name (with the near one), a wrong type, or sizes that make no network.
    """
    lists = {name: value for name, value in given.items() if name in _LISTS}
    try:
        checked: dict[str, Any] = typed_options({k: v for k, v in given.items() if k not in lists}, _NUMBERS)
    except UnknownOption as error:
        raise UnknownOption(error.name, (*_NUMBERS, *_LISTS)) from None
    for name, value in lists.items():
        if not isinstance(value, Sequence) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise ValueError(f"{name} must be a list of whole numbers, got {value!r:.80}")
        checked[name] = list(value)
    if len(lists) != 1:  # one list alone is judged with what the file says of the other
        SwinIRConfig(**checked)
    return checked


def find_files(place: Path) -> list[Path]:
    """The weights file in a folder; see find_released."""
    return find_released(place, {"network": KNOWN_NAMES}, "SwinIR")
