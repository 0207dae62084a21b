"""Which networks are on the device: with little memory, a run moves only those of its current phase there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn


class Residence:
    """Groups of networks that take turns on a device.

    Args:
        device: where a phase computes.
        groups: networks by phase; a network may be in several.
        in_turns: networks of other phases wait on the CPU; False leaves all where they are.
    """

    def __init__(self, device: torch.device, groups: Mapping[str, Sequence[nn.Module]], in_turns: bool = False) -> None:
        self.device, self._groups = device, {name: tuple(modules) for name, modules in groups.items()}
        self.in_turns = in_turns and device.type != "cpu"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The networks of one group are on the device, and with turns no others.

        Raises:
            KeyError: there is no such group.
        """
        own = self._groups[name]
        if self.in_turns:
            for module in {each for group in self._groups.values() for each in group}:
                if not any(module is each for each in own):
                    module.to("cpu")
            for module in own:
                module.to(self.device)
        yield
