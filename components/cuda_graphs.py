"""Calls recorded as CUDA graphs: a network of thousands of small kernels is then started as one.

A diffusion network at batch 1 keeps a card busy for less time than Python needs to start its kernels (at SDXL size, 89
of 124 ms a step on an H200). A graph holds the kernels and their addresses, so what a call is given is copied into the
places that were recorded, and what it makes is copied out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

KEPT_GRAPHS = 4
"""Graphs of one function, each with its own values; the longest unused goes first."""

WARM_UPS = 2
"""Calls before a recording: they compile, choose algorithms and make workspaces, which a recording may not."""

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""(what changes in every call, what stands for many) -> results."""


def can_record(device: torch.device) -> bool:
    """Whether calls on this device can be recorded now: no gradients, no autocast, which keeps casts of its own."""
    return device.type == "cuda" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")


class Graphed:
    """A function of tensors on one GPU, recorded once for each form of its arguments.

    The function must do the same whatever the values are, without looking at them, and read nothing else that changes;
    what it depends on besides goes into `also`. Results are the caller's own.

    Args:
        function: see Function. It runs without gradients.
        kept: how many forms are kept at most.
    """

    def __init__(self, function: Function, kept: int = KEPT_GRAPHS) -> None:
        self._function, self._limit = function, kept
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()

    def __call__(
        self, changing: Sequence[Tensor], standing: Sequence[Tensor], also: Hashable = None
    ) -> Sequence[Tensor]:
        """The function's results.

        Args:
            changing: copied in every call.
            standing: copied where the sequence is another object than in the call before, so its tensors must not be
                changed in place.
            also: what else decides what the function does.
        """
        key = (also, tuple(_form(t) for t in changing), len(standing), tuple(_form(t) for t in standing[:4]))
        recording = self._recordings.pop(key, None)
        if recording is None or not recording.fits(standing):
            while len(self._recordings) >= self._limit:
                self._recordings.popitem(last=False)
            recording = _Recording(self._function, changing, standing)
        self._recordings[key] = recording
        return recording(changing, standing)


class _Recording:
    """One graph, the tensors that it reads and those that it writes."""

    def __init__(self, function: Function, changing: Sequence[Tensor], standing: Sequence[Tensor]) -> None:
        # made outside inference mode, whose tensors could not be written to by a later call outside it
        with torch.inference_mode(False), torch.no_grad():
            self.changing = [t.clone() for t in changing]
            self.standing = [t.clone() for t in standing]
            self.given, self.forms = standing, [_form(t) for t in standing]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    function(self.changing, self.standing)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            # other threads (a service's) may go on allocating
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.results = list(function(self.changing, self.standing))

    def fits(self, standing: Sequence[Tensor]) -> bool:
        return standing is self.given or self.forms == [_form(t) for t in standing]

    def __call__(self, changing: Sequence[Tensor], standing: Sequence[Tensor]) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            torch._foreach_copy_(self.changing, list(changing))
            if standing is not self.given:
                torch._foreach_copy_(self.standing, list(standing))
                self.given = standing
            self.graph.replay()
            return [t.clone() for t in self.results]


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
