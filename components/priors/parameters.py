"""Parameters of a network by name: without peft's wrappers, and copied only if all of them fit; and their device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from components.models import key_faults


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names without peft's wrappers; LoRA weights are left out."""
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in module.named_parameters()
        if ".lora_" not in name
    }


def device_of(module: nn.Module) -> torch.device:
    """Where a network's weights are: parts of a prior may wait on the CPU."""
    return next(module.parameters()).device


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """base_parameters, detached; the tensors share the parameters' memory."""
    return {name: parameter.detach() for name, parameter in base_parameters(module).items()}


@torch.no_grad()
def copy_strictly(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors by name; copies nothing unless every tensor fits.

    Raises:
        ValueError: lists every missing and unexpected key and every wrong shape.
    """
    keys_by_fault = {
        "missing": [name for name in parameters if name not in state],
        "unexpected": [name for name in state if name not in parameters],
        "of the wrong shape": [
            f"{name} has shape {tuple(state[name].shape)} instead of {tuple(parameter.shape)}"
            for name, parameter in parameters.items()
            if name in state and state[name].shape != parameter.shape
        ],
    }
    if faults := key_faults(keys_by_fault):
        raise ValueError(f"the {what}'s weights do not fit: {faults}")
    for name, parameter in parameters.items():
        parameter.copy_(state[name])
