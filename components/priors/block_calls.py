"""Wrappers of the walks' block functions: compile once for each kind of block, or recompute to save memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from types import FunctionType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class BlockFunctions:
    """The base of a walk's block functions: a frozen dataclass whose fields are functions."""

    def wrap_all(self, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Self:
        """All block functions, each wrapped by `wrap` (a compiler)."""
        return replace(self, **{f.name: wrap(getattr(self, f.name)) for f in fields(self)})


def compile_by_kind(function: Callable[..., Tensor], compiler: Callable[..., Any]) -> Callable[..., Tensor]:
    """A block's function, compiled once for each kind of block and shape; a dictionary holds the compiled functions.

    torch stores compiled variants with the function's code object. With one code object it would try the guards of all
    kinds in every call (SDXL's networks have about 50), and stop compiling after a few. So each kind gets its own copy
    of the code.
    """
    functions: dict[Hashable, Callable[..., Tensor]] = {}
    kinds: dict[int, tuple[nn.Module, Hashable]] = {}  # the dictionary holds the module, so that its id is not reused

    def run(block: nn.Module, *arguments: Any) -> Tensor:
        entry = kinds.get(id(block))
        if entry is None:
            shapes = tuple((n, p.shape, p.requires_grad) for n, p in block.named_parameters())
            entry = kinds[id(block)] = (block, hash((type(block), shapes)))
        shape = tuple(None if a is None else a.shape for a in arguments if a is None or isinstance(a, Tensor))
        key = (entry[1], shape, torch.is_grad_enabled(), autocast_is_on(arguments[0].device.type))
        if key not in functions:
            code = function.__code__.replace(co_name=f"{function.__name__}_{len(functions)}")
            copy = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
            functions[key] = compiler(copy)
        return functions[key](block, *arguments)

    return run


def recompute(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function without stored activations: the backward pass computes them again."""

    def run(*arguments: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return function(*arguments)
        return checkpoint(function, *arguments, use_reentrant=False)  # type: ignore[no-any-return]

    return run


def autocast_is_on(device: str) -> bool:
    """Whether autocast is on for that type of device."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
