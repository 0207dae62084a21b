"""InstantIR's released files by name, and the sizes that a file does not tell. Torch-free: judged early."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.options import UnknownOption, typed_options
from components.systems.weights_io import find_released

PUBLISHED = "InstantX/InstantIR on the Hugging Face hub, folder models/"
LICENCE = "apache-2.0, if these are the published files (card of InstantX/InstantIR)"

RELEASED = {"perceptor": "adapter.pt", "previewer": "previewer_lora_weights.bin", "aggregator": "aggregator.pt"}
"""Released file by part."""

KNOWN_NAMES: Mapping[str, tuple[str, ...]] = {
    "perceptor": ("adapter.pt", "adapter_ckpt.pt", "adapter.safetensors"),
    "previewer": (
        "previewer_lora_weights.bin",
        "pytorch_lora_weights.bin",
        "previewer_lora_weights.safetensors",
        "pytorch_lora_weights.safetensors",
    ),
    "aggregator": ("aggregator.pt", "aggregator_ckpt.pt", "aggregator.safetensors"),
}
"""What a folder is searched for: published names, those of the training scripts, and twins as safetensors."""

SIDECAR = "restoray.json"
"""Written beside exported files: what they do not tell themselves (attention heads, alpha, licence, prior)."""

SPELLINGS = ("released", "peft", "diffusers")
"""released: .lora.down/.lora.up for attention projections, .lora_A/.lora_B elsewhere; the others one of the two."""

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


def check_sizes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes {"resampler": {...}, "lora": {...}} in their types.

    Raises:
        ValueError: an unknown name (with the near one), a wrong type, or a size below 1.
    """
    checked: dict[str, Any] = {}
    known = [f"{group}.{name}" for group, names in _SIZES.items() for name in names]
    for group, values in given.items():
        if group not in _SIZES or not isinstance(values, Mapping):
            raise UnknownOption(str(group), known)
        try:
            checked[group] = typed_options(values, _SIZES[group])
        except UnknownOption as error:
            raise UnknownOption(f"{group}.{error.name}", known) from None
        for name, value in checked[group].items():
            if value <= 0 or (name != "alpha" and value < 1):
                raise ValueError(f"{group}.{name} must be positive, got {value}")
    return checked


def find_files(place: Path) -> list[Path]:
    """The weights files in a folder, or in models/ below it; see find_released."""
    return find_released(place, KNOWN_NAMES, "InstantIR", (".", "models"))
