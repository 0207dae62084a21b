"""Weights in 8 bits: the arithmetic by hand, the memory, and what stays as it is."""

from __future__ import annotations

import torch
from torch import nn

from components.weight_storage import SMALLEST, store_in_8_bits


def test_weights_have_8_bits_and_a_scale_for_each_output() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {"linear": nn.Linear(256, 128), "convolution": nn.Conv2d(64, 64, 3, padding=1), "small": nn.Linear(16, 16)}
    ).to(torch.bfloat16)
    with torch.no_grad():
        layers["linear"].weight[3] *= 1000  # type: ignore[operator, index]
        layers["linear"].weight[5] = 0  # type: ignore[operator, index]
    before = {name: layer.weight.detach().float().clone() for name, layer in layers.items()}  # type: ignore[operator, union-attr]
    store_in_8_bits([layers])
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16
        rows = before[name].abs().flatten(1).amax(1)
        error = (weight.float() - before[name]).abs()
        # half a step of the 3-bit mantissa, a step of bf16's scales, and the subnormal step of small weights
        bound = before[name].abs() * (1 / 16 + 1 / 128) + (rows * 2**-9 / 448 * 1.01).view(-1, *[1] * (weight.ndim - 1))
        assert bool((error <= bound).all()), name
    assert torch.equal(layers["small"].weight.float(), before["small"])  # type: ignore[operator, union-attr]
    assert not layers["linear"].weight[5].any()  # type: ignore[index]
    stored = {p.dtype: 0 for p in layers.parameters()}
    for parameter in layers.parameters():
        stored[parameter.dtype] += parameter.numel()
    assert stored[torch.float8_e4m3fn] == 256 * 128 + 64 * 64 * 9 >= 2 * SMALLEST


def test_results_change_by_less_than_a_few_percent() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).requires_grad_(False)
    x = torch.randn(32, 256)
    exact = network(x)
    store_in_8_bits([network])
    error = (network(x) - exact).norm() / exact.norm()
    assert 0.001 < float(error) < 0.05
