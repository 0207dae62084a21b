"""How a walk's block functions are called: compiled once for each kind of block, or computed twice to save memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def by_kind(function: Callable[..., Tensor], compiler: Callable[..., Any]) -> Callable[..., Tensor]:
    """A block's function compiled once for each kind of block and shape, and found again by a dictionary.

    torch keeps what it compiled with the function's code: it would try the guards of all kinds in turn in every call
    (SDXL's networks have about 50), and give up compiling after a few. So each kind gets a copy of the code.
    """
    compiled: dict[Hashable, Callable[..., Tensor]] = {}
    kinds: dict[int, tuple[nn.Module, Hashable]] = {}  # holds the module, so that its id stays its own

    def run(block: nn.Module, *arguments: Any) -> Tensor:
        known = kinds.get(id(block))
        if known is None:
            shapes = tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters())
            known = kinds[id(block)] = (block, hash((type(block), shapes)))
        shape = tuple(None if a is None else a.shape for a in arguments if a is None or isinstance(a, Tensor))
        key = (known[1], shape, torch.is_grad_enabled(), autocasts(arguments[0].device.type))
        if key not in compiled:
            code = function.__code__.replace(co_name=f"{function.__name__}_{len(compiled)}")
            copied = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
            compiled[key] = compiler(copied)
        return compiled[key](block, *arguments)

    return run


def computed_again(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, its inner values thrown away after the forward pass and made again for the backward one."""

    def run(*arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False)  # type: ignore[no-any-return]

    return run


def autocasts(device: str) -> bool:
    """Whether autocast is at work on that kind of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
