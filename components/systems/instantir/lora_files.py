"""LoRA files of other tools: their layers by the Previewer's names, and the alpha that is not among their tensors.

kohya         lora_unet_<layer with underscores>.lora_down.weight, .alpha; in the head also ss_network_alpha
diffusers     unet.<layer>.lora_A.weight or .lora.down.weight; since 0.34 lora_adapter_metadata in the head
peft          base_model.model.<layer>.lora_A.weight in adapter_model.safetensors, alpha in adapter_config.json
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor

from components.state_dicts import wrapper_prefix
from components.systems.instantir.previewer import split_key
from components.tensor_files import WeightsFileError, safetensors_metadata

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
KOHYA = "lora_unet_"

OTHER_SPELLING = (
    "Keys of a LoRA are read as diffusers, peft or kohya's tools write them: convert the file with diffusers' "
    "load_lora_weights and save_lora_weights"
)
OTHER_KINDS = {
    ("lora_magnitude_vector", "dora_scale"): "It is a DoRA: train a plain LoRA (use_dora=False)",
    ("hada_w1", "lokr_w", "oft_"): "It is a LyCORIS module (LoHa, LoKr, OFT): train a plain LoRA",
    ("lora_te", "text_encoder"): "It also holds the LoRA of text encoders, which InstantIR leaves as they are: save "
    "that of the UNet alone",
}
"""Parts of keys that name what InstantIR cannot take, and the remedy."""


def layer_names(path: Path, keys: Iterable[str], layers: Collection[str]) -> dict[str, str]:
    """The Previewer's name of each layer of a file, by the file's own.

    Args:
        layers: names of all layers.

    Raises:
        WeightsFileError: the file holds several networks.
    """
    by_kohya_name = {f"{KOHYA}{layer.replace('.', '_')}": layer for layer in layers}
    own = {split[0] for key in keys if (split := split_key(key)) is not None}
    names = {name: by_kohya_name.get(name, name) for name in own}
    try:
        prefix = wrapper_prefix(names.values(), layers)
    except ValueError as error:
        raise WeightsFileError(f"{path}: {error}") from error
    return {name: layer.removeprefix(prefix) for name, layer in names.items()}


def alpha_layer(key: str, names: Mapping[str, str]) -> str | None:
    """The layer of a key such as "lora_unet_mid_block.alpha"; None for any other key."""
    if not key.endswith(".alpha"):
        return None
    name = key.removesuffix(".alpha").removesuffix(".lora").removeprefix("unet.").replace(".processor.", ".")
    return names.get(name)


def join_alphas(tensors: MutableMapping[str, tuple[str, Tensor]], alphas: Mapping[str, float]) -> float:
    """One alpha for all layers: the largest. The others are multiplied into their up weights.

    Args:
        tensors: (the file's key, tensor) by the Previewer's key; changed in place.
        alphas: by layer, positive.
    """
    joint = max(alphas.values())
    for name, (key, tensor) in list(tensors.items()):
        layer, letter = split_key(name) or ("", "")
        if letter == "B" and alphas.get(layer, joint) != joint:
            tensors[name] = (key, tensor.float() * (alphas[layer] / joint))
    return joint


def declared_alpha(path: Path) -> float | None:
    """The alpha that a file's head, or the adapter_config.json of a file of peft, declares; None for none.

    Raises:
        WeightsFileError: it declares what one alpha and one rank cannot say.
    """
    metadata = safetensors_metadata(path)
    settings = _json(metadata.get(METADATA, ""))
    config = path.with_name(CONFIG)
    if not settings and path.stem.startswith("adapter_model") and config.is_file():
        try:
            settings = _json(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WeightsFileError(f"{config}: {error}") from error
    if not settings:
        return _number(metadata.get("ss_network_alpha"))
    values = {name.removeprefix("unet."): value for name, value in settings.items()}
    faults = [name for name in ("use_dora", "alpha_pattern", "rank_pattern") if values.get(name)]
    if faults:
        raise WeightsFileError(
            f"{path}: its settings name {', '.join(faults)}: only a LoRA with one rank and one alpha is read"
        )
    alpha, rank = _number(values.get("lora_alpha")), _number(values.get("r"))
    if alpha is not None and rank is not None and values.get("use_rslora"):
        return float(alpha * rank**0.5)  # its scale is alpha / sqrt(rank), ours alpha / rank
    return alpha


def remedies(keys: Iterable[str]) -> str:
    """Sentences on the keys that do not fit."""
    text = " ".join(keys)
    kinds = [remedy for marks, remedy in OTHER_KINDS.items() if any(mark in text for mark in marks)]
    return ". ".join(kinds or [OTHER_SPELLING])


def _json(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number > 0 else None
