"""The peak memory of a computation, without computing it: tensors on the meta device have sizes and no values.

Attention is counted as the memory-efficient kernels run it, without the matrix of scores. A kernel's own workspace and
an allocator's fragments are not seen, so a real peak is larger, by a few hundred MB on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a restoration.

    Attributes:
        name: for people.
        weights: bytes of the networks that it needs.
        peak: bytes of the tensors that exist at once beside them.
    """

    name: str
    weights: int
    peak: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory of a restoration with some settings.

    Attributes:
        settings: what was assumed, for people and as options: precision, offload, tile_px, autoencoder_tiles.
        phases: in their order.
        in_turns: whether the networks of other phases are elsewhere.
    """

    settings: dict[str, Any]
    phases: tuple[Phase, ...]
    in_turns: bool

    @property
    def total(self) -> int:
        """The largest number of bytes at once."""
        if self.in_turns:
            return max(phase.weights + phase.peak for phase in self.phases)
        return sum(phase.weights for phase in self.phases) + max(phase.peak for phase in self.phases)


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, until they are freed; views share their storage."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._users: dict[int, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._users:
            self._users[key] = [0, storage.nbytes()]
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
        self._users[key][0] += 1
        weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        entry = self._users.get(key)
        if entry is None:
            return
        entry[0] -= 1
        if not entry[0]:
            self.now -= entry[1]
            del self._users[key]


class _LeanAttention(TorchFunctionMode):
    """Attention makes its result alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, value = args[0], args[2] if len(args) > 2 else (kwargs or {})["value"]
            return torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
        return func(*args, **(kwargs or {}))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Bytes of the tensors that exist at once while a function runs, without those that it starts with.

    Args:
        function: runs networks on the meta device.
    """
    with torch.no_grad(), _Live() as live, _LeanAttention():
        function()
    return live.peak


def parameter_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
