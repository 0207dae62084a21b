"""Weights stored in 8 bits and used in a wider type: in memory (float8) and in files (integers).

In memory: half of bf16, for inference.

A weight matrix becomes float8 (e4m3: 3 bits of mantissa, largest value 448) with one scale for each output channel.
Every call makes the wide matrix again, so the device needs no 8-bit arithmetic, and one layer at a time is wide. The
relative error of a weight is at most 1/16, about 3 % in the mean; errors of many weights partly cancel.

In files: a few large matrices as int8 with one scale for each output channel, half of float16. The error of a weight is
at most 1/254 of its channel's largest. `Model.part` makes floats of them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

STORED = torch.float8_e4m3fn
SMALLEST = 1 << 14
"""Smaller weights stay: they cost nothing, and the first and last layers are among them."""


SCALE = ".scale8"
"""Suffix of the key of a stored matrix's scales."""


def pack_8_bits(parts: Mapping[str, Mapping[str, Tensor]], count: int) -> dict[str, dict[str, Tensor]]:
    """The same parts, their `count` largest matrices as int8 and scales; of equal ones the first by name."""
    sizes = [(-value.numel(), part, key) for part, tensors in parts.items() for key, value in tensors.items()]
    largest = {(part, key) for _, part, key in sorted(sizes)[:count] if parts[part][key].ndim > 1}
    packed: dict[str, dict[str, Tensor]] = {}
    for part, tensors in parts.items():
        packed[part] = {}
        for key, value in tensors.items():
            if (part, key) in largest:
                scales = (value.float().abs().flatten(1).amax(dim=1) / 127).clamp_min(1e-6).half()
                matrix = value.float().flatten(1) / scales.float()[:, None]
                packed[part] |= {key: matrix.round().clamp(-127, 127).to(torch.int8).view(value.shape)}
                packed[part] |= {key + SCALE: scales}
            else:
                packed[part][key] = value
    return packed


def unpack_8_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file with float16 matrices in place of int8 ones that have scales; all others as they are."""
    plain = {key: value for key, value in tensors.items() if not key.endswith(SCALE)}
    for key, scales in tensors.items():
        if key.endswith(SCALE):
            stored = plain[key.removesuffix(SCALE)]
            wide = stored.float().flatten(1) * scales.float()[:, None]
            plain[key.removesuffix(SCALE)] = wide.view(stored.shape).half()
    return plain


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


@torch.no_grad()
def write_weight(layer: Any, weight: Tensor) -> None:
    """Overwrite a layer's weight in place, in the precision in which it is stored."""
    if not parametrize.is_parametrized(layer, "weight"):
        layer.weight.copy_(weight)
        return
    stored = layer.parametrizations.weight
    scaled: _Scaled = stored[0]
    narrow, scales = scaled.right_inverse(weight.to(scaled.dtype))
    stored.original0.copy_(narrow)
    stored.original1.copy_(scales)


def store_in_8_bits(modules: Iterable[nn.Module]) -> None:
    """Store the weights of all linear layers and convolutions in 8 bits, in place; they give the dtype they had.

    The networks are then for inference: their weights have no gradients, and `to(dtype)` would widen them again.
    """
    for module in modules:
        for layer in list(module.modules()):
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.numel() >= SMALLEST:
                layer.requires_grad_(False)
                parametrize.register_parametrization(layer, "weight", _Scaled(layer.weight.dtype), unsafe=True)
