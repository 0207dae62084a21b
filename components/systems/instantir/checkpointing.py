"""Gradient checkpointing of InstantIR's networks: activations are computed again in the backward pass.

diffusers' blocks do it by themselves where they are told to, and call back for each residual block and transformer
block. What they do not know is the Previewer: its LoRA is switched on for one call only, and must be found as it was
when the call is repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from components.systems.instantir.previewer import has_previewer, lora_layers

if TYPE_CHECKING:
    from components.systems.instantir.network import InstantIR


def checkpoint_gradients(network: InstantIR, enabled: bool = True) -> None:
    """Switch it on or off in the UNet and in the Aggregator; parts that are added later are not reached.

    Costs one more forward pass of what trains. Gradients equal the plain ones up to rounding; calls without gradients
    stay as they are.
    """
    layers = list(lora_layers(network.unet).values()) if has_previewer(network.unet) else []

    def repeat(module: nn.Module, *args: Any) -> Any:
        off = [layer.disable_adapters for layer in layers[:1]]

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), _switched_as(layers, off)

        # nothing random happens inside: the networks are in evaluation mode
        return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    _tell(network.unet, enabled, repeat)
    if network.aggregator is not None:
        _tell(network.aggregator, enabled, repeat)


@contextlib.contextmanager
def _switched_as(layers: Sequence[LoraLayer], off: Sequence[bool]) -> Iterator[None]:
    """Inside, the LoRA is as `off` says (empty where there is none); after, as it was before.

    Sets peft's flag and no more: a backward pass comes here a hundred times, and its own switch walks all parameters.
    """
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = off[0]
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def _tell(root: nn.Module, enabled: bool, function: Callable[..., Any]) -> None:
    """What diffusers' enable_gradient_checkpointing does, for modules that are no ModelMixin as well."""
    for module in root.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = enabled  # type: ignore[assignment]
            module._gradient_checkpointing_func = function  # type: ignore[assignment]
