"""Gradient checkpointing of InstantIR's networks: the backward pass computes activations again.

diffusers' blocks have a switch for it and call a checkpoint function for each residual block and transformer block.
They do not handle the Previewer: its LoRA is on for one call only. This module restores the LoRA's state when the
backward pass repeats that call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from components.systems.instantir.network import InstantIR
from components.systems.instantir.previewer import has_previewer, lora_layers


def checkpoint_gradients(network: InstantIR, enabled: bool = True) -> None:
    """Switch checkpointing on or off in the UNet and in the Aggregator, but not in parts that are added later.

    It costs one more forward pass of the networks that train. Gradients equal those without checkpointing up to
    rounding. Calls without gradients do not change.
    """
    layers = list(lora_layers(network.unet).values()) if has_previewer(network.unet) else []

    def repeat(module: nn.Module, *args: Any) -> Any:
        off = [layer.disable_adapters for layer in layers[:1]]

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), _lora_state(layers, off)

        # the networks are in evaluation mode, so a repeated call needs no random state
        return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    _set_checkpointing(network.unet, enabled, repeat)
    if network.aggregator is not None:
        _set_checkpointing(network.aggregator, enabled, repeat)


@contextlib.contextmanager
def _lora_state(layers: Sequence[LoraLayer], off: Sequence[bool]) -> Iterator[None]:
    """Inside the context the LoRA is off or on as in `off` (empty without a LoRA); afterwards as before.

    It sets peft's private flag: a backward pass enters about a hundred times, and peft's own switch visits all
    parameters.
    """
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = off[0]
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def _set_checkpointing(root: nn.Module, enabled: bool, function: Callable[..., Any]) -> None:
    """Does what diffusers' enable_gradient_checkpointing does, also for modules that are not a ModelMixin."""
    for module in root.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = enabled  # type: ignore[assignment]
            module._gradient_checkpointing_func = function  # type: ignore[assignment]
