"""CUDA graphs of a network's calls: one launch starts all of the network's kernels.

At batch 1, a diffusion network keeps the GPU busy for less time than Python needs to start its kernels (at SDXL size,
89 of 124 ms a step on an H200). A graph holds the kernels and their addresses. So each call copies its inputs to the
recorded addresses, and copies the results out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_GRAPHS = 4
"""Most graphs of one function, each with its own tensors; the least recently used one is dropped first."""

WARM_UPS = 2
"""Calls before the capture. They compile, choose algorithms and allocate workspaces; a capture cannot do this."""

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""(tensors that change in every call, tensors that stay constant over many calls) -> results."""


def can_record(device: torch.device) -> bool:
    """Whether calls on this device can be captured now: without gradients, and without autocast, which caches casts."""
    return device.type == "cuda" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")


class GraphedFunction:
    """A function of tensors on one GPU, captured once for each combination of shapes, strides and dtypes.

    The function's control flow must not depend on the tensors' values. It must not read other state that changes; put
    such state into `also`. The results are copies that the caller owns.

    Args:
        function: see Function. It runs without gradients.
        limit: most graphs to keep.
    """

    def __init__(self, function: Function, limit: int = MAX_GRAPHS) -> None:
        self._function, self._limit = function, limit
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()

    def __call__(
        self, changing: Sequence[Tensor], constant: Sequence[Tensor], also: Hashable = None
    ) -> Sequence[Tensor]:
        """Return the function's results.

        Args:
            changing: tensors that every call copies.
            constant: tensors that a call copies only if the sequence is a different object than in the call before. The
                caller must not change them in place.
            also: other values that the function depends on.
        """
        key = (also, tuple(_form(t) for t in changing), len(constant), tuple(_form(t) for t in constant[:4]))
        recording = self._recordings.pop(key, None)
        if recording is None or not recording.fits(constant):
            while len(self._recordings) >= self._limit:
                self._recordings.popitem(last=False)
            recording = _Recording(self._function, changing, constant)
        self._recordings[key] = recording
        return recording(changing, constant)


class _Recording:
    """One graph with its input tensors and its result tensors."""

    def __init__(self, function: Function, changing: Sequence[Tensor], constant: Sequence[Tensor]) -> None:
        # outside inference mode: a later call could not write to inference tensors
        with torch.inference_mode(False), torch.no_grad():
            self.changing = [t.clone() for t in changing]
            self.constant = [t.clone() for t in constant]
            self.source, self.forms = constant, [_form(t) for t in constant]
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                for _ in range(WARM_UPS):
                    function(self.changing, self.constant)
            torch.cuda.current_stream().wait_stream(side_stream)
            self.graph = torch.cuda.CUDAGraph()
            # other threads, such as a service's, may allocate during the capture
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.results = list(function(self.changing, self.constant))

    def fits(self, constant: Sequence[Tensor]) -> bool:
        return constant is self.source or self.forms == [_form(t) for t in constant]

    def __call__(self, changing: Sequence[Tensor], constant: Sequence[Tensor]) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(self.changing, list(changing))
            if constant is not self.source:
                torch._foreach_copy_(self.constant, list(constant))
                self.source = constant
            self.graph.replay()
            return [t.clone() for t in self.results]


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
