"""A denoiser in memory that several models use in turns: each merges its LoRA into the weights for its turn."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from components.priors.lora import LoraFactors, take_lora
from components.weight_storage import write_weight

Updates = Mapping[str, LoraFactors]
"""A model's LoRA by the names of the layers."""


class ResidentNetwork:
    """The denoiser's weights are there once. Of the layers that have a LoRA, their plain weights are kept beside them.

    Subtracting an update would change bits, so each turn starts from the kept weights: a model's results do not depend
    on the models before it, and are those of a network with only its LoRA merged.

    Args:
        network: without LoRA, on the CPU. What is kept, and the LoRAs, stay there, and every merge is computed there,
            also when the network moves to a GPU: so a merge has the same bits everywhere, and takes no memory of it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._plain: dict[str, Tensor] = {}
        self._merged: Updates = {}
        self._lock = threading.RLock()

    def take(self, name: str) -> Updates:
        """Take a LoRA out of the network, for its turns. Not after the first turn."""
        updates = take_lora(self.network, name)
        for key in updates.keys() - self._plain.keys():
            weight: Tensor = self.network.get_submodule(key).weight  # type: ignore[assignment]
            self._plain[key] = weight.detach().clone()
        return updates

    @contextlib.contextmanager
    def turn(self, updates: Updates) -> Iterator[None]:
        """The network has this LoRA and no other inside; other threads wait."""
        with self._lock:
            if updates is not self._merged:
                self._switch(updates)
            yield

    @torch.inference_mode(False)
    @torch.no_grad()
    def _switch(self, updates: Updates) -> None:
        self._merged = {}  # after a failure the next turn merges again
        for key, plain in self._plain.items():
            weight = updates[key].merged(plain) if key in updates else plain
            write_weight(self.network.get_submodule(key), weight.to(plain.dtype))
        self._merged = updates

    def kept_bytes(self) -> int:
        """Bytes of the plain weights that are kept, once for all models."""
        return sum(plain.nbytes for plain in self._plain.values())
