"""Names of InstantIR's released files, and the sizes that a file does not hold. Torch-free, for early checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.options import UnknownOption, typed_options
from components.systems.weights_io import find_released

PUBLISHED = "InstantX/InstantIR on the Hugging Face hub, folder models/"
LICENCE = "apache-2.0, if these are the published files (card of InstantX/InstantIR)"

RELEASED = {"perceptor": "adapter.pt", "previewer": "previewer_lora_weights.bin", "aggregator": "aggregator.pt"}
"""Released file name by part."""

FILE_NAMES: Mapping[str, tuple[str, ...]] = {
    "perceptor": ("adapter.pt", "adapter_ckpt.pt", "adapter.safetensors"),
    "previewer": (
        "previewer_lora_weights.bin",
        "pytorch_lora_weights.bin",
        "previewer_lora_weights.safetensors",
        "pytorch_lora_weights.safetensors",
        "adapter_model.safetensors",
        "adapter_model.bin",
    ),
    "aggregator": ("aggregator.pt", "aggregator_ckpt.pt", "aggregator.safetensors"),
}
"""File names to search a folder for: the published ones, those of the training scripts and of peft, and variants."""

RELEASE_DEFAULTS: Mapping[str, Any] = {"view": "crop", "resize": "released", "color": "none"}
"""Options of imported weights without a recipe of their own: the view, the working size and the colours of the official
command line (instantir.md section 5; its colour transfer is never called: deviation 14). The weights were trained on
DINOv2's centre crop."""

SIDECAR = "restoray.json"
"""File next to exported weights, with facts that they do not hold (attention heads, alpha, licence, prior)."""

SPELLINGS = ("released", "peft", "diffusers")
"""Spellings of LoRA keys. released: .lora.down/.lora.up for attention projections, else .lora_A/.lora_B. peft: always
.lora_A/.lora_B. diffusers: always .lora.down/.lora.up."""

_SIZES: Mapping[str, Mapping[str, type]] = {
    "resampler": {
        "dim": int,
        "depth": int,
        "dim_head": int,
        "heads": int,
        "num_queries": int,
        "embedding_dim": int,
        "output_dim": int,
        "ff_mult": int,
    },
    "lora": {"rank": int, "alpha": float},
}


def check_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes {"resampler": {...}, "lora": {...}}, converted to their types.

    Raises:
        ValueError: an unknown name (the error suggests the nearest one), a wrong type, or a size below 1.
    """
    result: dict[str, Any] = {}
    choices = [f"{group}.{name}" for group, names in _SIZES.items() for name in names]
    for group, values in sizes.items():
        if group not in _SIZES or not isinstance(values, Mapping):
            raise UnknownOption(str(group), choices)
        try:
            result[group] = typed_options(values, _SIZES[group])
        except UnknownOption as error:
            raise UnknownOption(f"{group}.{error.name}", choices) from None
        for name, value in result[group].items():
            if value <= 0 or (name != "alpha" and value < 1):
                raise ValueError(f"{group}.{name} must be positive, got {value}")
    return result


def find_files(place: Path) -> list[Path]:
    """The weights files in a folder, or in its subfolder models/; see find_released."""
    return find_released(place, FILE_NAMES, "InstantIR", (".", "models"))
