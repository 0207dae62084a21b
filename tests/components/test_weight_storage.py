"""Weights in 8 bits: the arithmetic by hand, the memory, and what stays as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from components.models import ModelCard, save_model
from components.weight_storage import SCALE, SMALLEST, pack_8_bits, store_in_8_bits, unpack_8_bits


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


def test_the_largest_matrices_of_a_file_are_stored_in_8_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = {
        "a": {"large": torch.randn(8, 4, 3, 3), "bias": torch.randn(1000)},
        "b": {"larger": torch.randn(16, 64), "small": torch.randn(2, 2)},
    }
    parts["b"]["larger"][3] = 0
    packed = pack_8_bits(parts, 3)
    assert {key for tensors in packed.values() for key in tensors if key.endswith(SCALE)} == {
        f"large{SCALE}",
        f"larger{SCALE}",
    }, "a vector is no matrix, although it is large"
    model = save_model(tmp_path / "m", ModelCard(name="m", system="s"), packed, half=True)
    for part, tensors in parts.items():
        stored = model.part(part)
        assert stored.keys() == tensors.keys() and {value.dtype for value in stored.values()} == {torch.float16}
        for key, value in tensors.items():
            bound = value.abs().flatten(1).amax(1) / 254 if value.ndim > 1 else value.abs()
            error = (stored[key].float() - value).abs().reshape(len(value), -1).amax(1)
            assert bool((error <= bound * 1.02 + value.abs().max() * 2**-11).all()), key
    with safe_open(tmp_path / "m" / "parts" / "b.safetensors", "pt") as file:
        assert file.get_tensor("larger").dtype == torch.int8 and file.get_tensor("small").dtype == torch.float16
    assert pack_8_bits(parts, 0) == parts and unpack_8_bits(parts["a"]) == parts["a"]
