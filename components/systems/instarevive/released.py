"""InstaRevive's released file, and the sizes that a file does not determine. Torch-free: checked early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from components.options import UnknownOption, typed_options
from components.priors.families import family_of
from components.systems.weights_io import find_released
from components.types import Prediction

PUBLISHED = (
    "InstaRevive_v1.ckpt, as EternalEvan/InstaRevive links it; its coarse restorers: restoray weights import swinir"
)
LICENCE = "MIT (code of EternalEvan/InstaRevive) on CreativeML OpenRAIL++-M (weights of PixArt-alpha)"

RELEASED = {"generator": "InstaRevive_v1.ckpt", "align": "InstaRevive_v1_align.ckpt"}
"""File by part. The second is ours: the released generator takes no noise and has no aligning convolution."""

RELEASE_DEFAULTS: Mapping[str, Any] = {"text": "photo", "min_side_px": 512, "color": "none"}
"""Options of imported weights without a recipe of their own: the prompt and the smallest side of the official command
line (reference, section 4)."""

FILE_NAMES: Mapping[str, tuple[str, ...]] = {
    part: (name, f"{Path(name).stem}.safetensors") for part, name in RELEASED.items()
}
"""File names to look for in a folder, by part."""

SIDECAR = "restoray.json"
"""Written next to exported files: what they do not hold (family, heads, time step, prior, licence)."""

_KINDS: Mapping[str, Any] = {
    "family": str,
    "prediction": Prediction,
    "mask_as_bias": bool,
    "timestep": int,
    "input": Literal["lq", "noise"],
    "kernel": int,
}
_NUMBERS = (
    "addition_time_embed_dim",
    "attention_head_dim",
    "caption_channels",
    "caption_projection_dim",
    "cross_attention_dim",
    "in_channels",
    "interpolation_scale",
    "joint_attention_dim",
    "layers_per_block",
    "norm_num_groups",
    "num_attention_heads",
    "num_layers",
    "out_channels",
    "patch_size",
    "pooled_projection_dim",
    "pos_embed_max_size",
    "projection_class_embeddings_input_dim",
    "sample_size",
    "transformer_layers_per_block",
)
_LISTS = ("attention_head_dim", "block_out_channels", "transformer_layers_per_block")
_TEXTS = ("down_block_types", "up_block_types")


def check_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes in their types: names of _KINDS, coarse=MODEL, and network.NAME=NUMBER with diffusers' names.

    Raises:
        ValueError: an unknown name or family (with the nearest one), a wrong type, or a size below 1.
    """
    network, coarse = sizes.get("network", {}), sizes.get("coarse", "")
    network_names = dict.fromkeys([*_NUMBERS, *_LISTS, *_TEXTS])
    choices = (*_KINDS, "coarse", *(f"network.{name}" for name in network_names))
    try:
        checked = typed_options({k: v for k, v in sizes.items() if k not in ("network", "coarse")}, _KINDS)
    except UnknownOption as error:
        raise UnknownOption(error.name, choices) from None
    if "family" in checked:
        family_of(checked["family"])
    if not isinstance(coarse, str):
        raise ValueError(f"coarse must name a model folder, got {coarse!r:.80}")
    if coarse:
        checked["coarse"] = coarse
    if not isinstance(network, Mapping):
        raise UnknownOption("network", choices)
    for name, value in network.items():
        if name not in network_names:
            raise UnknownOption(f"network.{name}", choices)
        _check_size(str(name), value)
    return checked | ({"network": dict(network)} if network else {})


def _check_size(name: str, value: Any) -> None:
    many = isinstance(value, Sequence) and not isinstance(value, str)
    if name in _TEXTS:
        if not many or not all(isinstance(v, str) for v in value):
            raise ValueError(f"network.{name} must be a list of block names, got {value!r:.80}")
        return
    values = value if many and name in _LISTS else [value] if name in _NUMBERS else []
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values):
        kind = "a list of positive whole numbers" if name not in _NUMBERS else "a positive whole number"
        raise ValueError(f"network.{name} must be {kind}, got {value!r:.80}")


def find_files(place: Path) -> list[Path]:
    """The weights files in a folder, the generator first; see find_released. ValueError if the generator is missing."""
    paths = find_released(place, FILE_NAMES, "InstaRevive")
    if place.is_dir() and paths[0].name not in FILE_NAMES["generator"]:
        raise ValueError(f"{place} holds no generator of InstaRevive; looked for {', '.join(FILE_NAMES['generator'])}")
    return paths
