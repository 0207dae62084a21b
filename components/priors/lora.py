"""LoRA adapters (Hu et al. 2022) in a frozen network through peft: add, name, switch, merge, and peft's own files.

A layer's update is (alpha / rank) up @ down. `up` starts at zero, so a new LoRA leaves the network's results as they
are, bit for bit. A network may hold several LoRAs by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from components.priors.parameters import copy_strictly
from components.randomness import seeded_init

PEFT_PREFIX = "base_model.model."
"""Start of each key in peft's adapter_model.safetensors."""


class LoraWeights(nn.Module):
    """A LoRA's weights, for an optimizer or a checkpoint. This is a view: the modules belong to the network.

    Args:
        layers: see lora_layers.
        name: of the LoRA.
    """

    def __init__(self, layers: Mapping[str, LoraLayer], name: str) -> None:
        super().__init__()
        # a ModuleDict's keys must not contain dots
        self.down = nn.ModuleDict({_escape(n): layer.lora_A[name] for n, layer in layers.items()})
        self.up = nn.ModuleDict({_escape(n): layer.lora_B[name] for n, layer in layers.items()})


def add_lora(
    network: Any, name: str, *, rank: int, alpha: float, targets: Sequence[str], seed: int = 0
) -> dict[str, LoraLayer]:
    """Add a new LoRA to one of diffusers' networks (in place), switched on. Its update starts at zero.

    Args:
        network: with `add_adapter`, on the meta device too.
        name: of the LoRA; it also names its random start.
        rank: inner width.
        alpha: the update's scale is alpha / rank.
        targets: name suffixes of the layers that have the LoRA.
        seed: fixes the random start.

    Returns:
        The layers by their name in the network.

    Raises:
        ValueError: no layer matches the targets.
    """
    trainable = {key: parameter.requires_grad for key, parameter in network.named_parameters()}
    with seeded_init(seed, name):
        network.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,  # type: ignore[arg-type]
                lora_dropout=0.0,
                target_modules=list(targets),
                init_lora_weights=True,
            ),
            adapter_name=name,
        )
    # peft freezes the layers that it wraps; restore their flags
    for key, parameter in network.named_parameters():
        if ".lora_" not in key:
            parameter.requires_grad_(trainable[key.replace(".base_layer.", ".")])
    return lora_layers(network, name)


def lora_layers(network: nn.Module, name: str) -> dict[str, LoraLayer]:
    """Layers with that LoRA by their name in the network; empty without it."""
    return {
        key: module
        for key, module in network.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A
    }


def switch_lora(layers: Iterable[LoraLayer], enabled: bool) -> None:
    """Turn a LoRA on or off and preserve requires_grad.

    peft's switch also changes requires_grad, and a leaf without it drops the gradients of an existing graph.
    """
    for layer in layers:
        flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]  # type: ignore[attr-defined]
        layer.enable_adapters(enabled)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def lora_weight(weights: nn.ModuleDict, name: str) -> Tensor:
    """The weight of `lora_A` (down) or `lora_B` (up) of a layer."""
    return weights[name].weight  # type: ignore[return-value]


@torch.no_grad()
def each_lora_delta(layers: Mapping[str, LoraLayer], name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (layer's name, the LoRA's update of its weight: (alpha / rank) up @ down), layer by layer.

    Updates are float32, whatever the weights' dtype. For a convolution `down` is k x k with the layer's stride and
    padding and `up` is 1 x 1.
    """
    for key, layer in layers.items():
        yield key, _factors(layer, name).delta()


@dataclass(frozen=True)
class LoraFactors:
    """The LoRA of one layer: `down` and `up` as in peft, and the scale alpha / rank."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The update of the layer's weight, float32."""
        delta = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (delta * self.scale).view(len(self.up), *self.down.shape[1:])

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with the update, float32."""
        return weight.float() + self.delta().to(weight.device)


def take_lora(network: Any, name: str) -> dict[str, LoraFactors]:
    """Take a LoRA out of its network, which then has its plain layers and weights again: the LoRA by layer."""
    layers = lora_layers(network, name)
    for key, layer in layers.items():
        owner, _, attribute = key.rpartition(".")
        setattr(network.get_submodule(owner), attribute, layer.get_base_layer())
    configs = getattr(network, "peft_config", {})
    configs.pop(name, None)
    if layers and not configs:  # diffusers and peft then take it for a network that never had one
        del network.peft_config
        network._hf_peft_config_loaded = False
    return {key: _factors(layer, name) for key, layer in layers.items()}


@torch.no_grad()
def merge_lora(network: nn.Module, name: str) -> None:
    """Add a LoRA's updates to the weights of its layers, in float32, and put plain layers in their places."""
    for key, factors in take_lora(network, name).items():
        weight: Tensor = network.get_submodule(key).weight  # type: ignore[assignment]
        weight.copy_(factors.merged(weight))


def peft_state(layers: Mapping[str, LoraLayer], name: str) -> dict[str, Tensor]:
    """A LoRA's weights by the keys of peft's files; the tensors share memory with the modules."""
    return {key: parameter.detach() for key, parameter in _peft_parameters(layers, name).items()}


def load_peft_state(layers: Mapping[str, LoraLayer], name: str, state: Mapping[str, Tensor]) -> None:
    """Copy a LoRA's weights by the keys of peft's files.

    Raises:
        ValueError: lists every missing and unexpected key and every wrong shape.
    """
    copy_strictly(_peft_parameters(layers, name), state, "LoRA")


def peft_config(*, rank: int, alpha: float, targets: Sequence[str], base: str = "") -> dict[str, Any]:
    """The content of peft's adapter_config.json for such a LoRA; `base` names the network's origin."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=sorted(targets),
        base_model_name_or_path=base or None,
        inference_mode=True,
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _factors(layer: LoraLayer, name: str) -> LoraFactors:
    down, up = (lora_weight(each, name).detach() for each in (layer.lora_A, layer.lora_B))
    return LoraFactors(down, up, float(layer.scaling[name]))


def _peft_parameters(layers: Mapping[str, LoraLayer], name: str) -> dict[str, Tensor]:
    parameters: dict[str, Tensor] = {}
    for key, layer in layers.items():
        parameters[f"{PEFT_PREFIX}{key}.lora_A.weight"] = lora_weight(layer.lora_A, name)
        parameters[f"{PEFT_PREFIX}{key}.lora_B.weight"] = lora_weight(layer.lora_B, name)
    return parameters


def _escape(name: str) -> str:
    return name.replace(".", "/")
