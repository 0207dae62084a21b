"""Weights stored in 8 bits and used in a wider type: half the memory of bf16, for inference.

A weight matrix becomes float8 (e4m3: 3 bits of mantissa, largest value 448) with one scale for each output channel.
Every call makes the wide matrix again, so the device needs no 8-bit arithmetic, and one layer at a time is wide. The
relative error of a weight is at most 1/16, about 3 % in the mean; errors of many weights partly cancel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

STORED = torch.float8_e4m3fn
SMALLEST = 1 << 14
"""Smaller weights stay: they cost nothing, and the first and last layers are among them."""


class _Scaled(nn.Module):
    """The wide weight of a stored one and its scales."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, stored: Tensor, scales: Tensor) -> Tensor:
        return stored.to(self.dtype) * scales

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = weight.detach().float().abs().flatten(1).amax(dim=1)
        scales = (largest / torch.finfo(STORED).max).clamp_min(torch.finfo(torch.float32).tiny)
        scales = scales.view(-1, *[1] * (weight.ndim - 1)).to(self.dtype)
        return (weight.detach().float() / scales.float()).to(STORED), scales


def store_in_8_bits(modules: Iterable[nn.Module]) -> None:
    """Store the weights of all linear layers and convolutions in 8 bits, in place; they give the dtype they had.

    The networks are then for inference: their weights have no gradients, and `to(dtype)` would widen them again.
    """
    for module in modules:
        for layer in list(module.modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.numel() >= SMALLEST:
                layer.requires_grad_(False)
                parametrize.register_parametrization(layer, "weight", _Scaled(layer.weight.dtype), unsafe=True)
