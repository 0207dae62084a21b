"""The files of an exported DRA model, and the sizes that may be given. The authors published no weights. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.priors.families import family_of
from components.systems.dra.config import adapter_config, lora_config, shape_of
from components.systems.weights_io import find_released

PUBLISHED = "none: the authors published no weights; files are those that an export wrote"

ADAPTER_FILE, ENCODER_FILE = "adapters", "encoder"
LORA_FILE = "adapter_model"
"""peft's own name; beside it is peft's adapter_config.json."""

LORA_CONFIG = "adapter_config.json"
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
"""The LoRA once more, as diffusers' pipelines read it: load_lora_weights(FOLDER). An import leaves it aside."""

SUFFIXES: Mapping[str, str] = {"pt": ".pt", "safetensors": ".safetensors"}
LORA_SUFFIXES: Mapping[str, str] = {"pt": ".bin", "safetensors": ".safetensors"}
"""Endings of files by form; peft's pickle is .bin."""

RELEASED = {
    "adapters": f"{ADAPTER_FILE}.safetensors",
    "lora": f"{LORA_FILE}.safetensors",
    "encoder": f"{ENCODER_FILE}.safetensors",
}
"""File by part of a model folder; the last two may be missing, as the model's config says."""

SIDECAR = "restoray.json"
"""Written next to the exported files: recipe, prior, sizes, licence and origin."""


def check_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as a model's config: {"adapters": AdapterConfig's fields, "lora": LoraConfig's fields, "encoder": flag,
    "family": of the prior}.

    Raises:
        ValueError: an unknown name, with the nearest one, a wrong type, or a value out of range.
    """
    names = ("adapters", "lora", "encoder", "family")
    if unknown := [name for name in sizes if name not in names]:
        raise ValueError(f"unknown size {unknown[0]!r:.80}; choose from {', '.join(names)}")
    for name, check in (("adapters", adapter_config), ("lora", lora_config)):
        values = sizes.get(name, {})
        if not isinstance(values, Mapping):
            raise ValueError(f"{name} must be a mapping of sizes, got {values!r:.80}")
        check(values)
    if "family" in sizes:
        shape_of(family_of(str(sizes["family"])))
    if not isinstance(sizes.get("encoder", False), bool):
        raise ValueError(f"encoder must be true or false, got {sizes['encoder']!r:.80}")
    return dict(sizes)


def find_files(place: Path) -> list[Path]:
    """The weights files in a folder, see find_released."""
    names = {
        "adapters": [f"{ADAPTER_FILE}{ending}" for ending in SUFFIXES.values()],
        "lora": [f"{LORA_FILE}{ending}" for ending in LORA_SUFFIXES.values()],
        "encoder": [f"{ENCODER_FILE}{ending}" for ending in SUFFIXES.values()],
    }
    return find_released(place, names, "DRA")
