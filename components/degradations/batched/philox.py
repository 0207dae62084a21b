"""Philox 4x64-10 in torch: the very words that numpy's Philox makes, on any device (Salmon et al. 2011).

Torch has no unsigned 64-bit arithmetic; int64 wraps the same way, so only the high half of a product needs care.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
ROUNDS = 10


def signed(value: int) -> int:
    """A 64-bit pattern as torch's int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def words(seeds: Tensor, count: int) -> Tensor:
    """The first `count` random 16-bit words of each seed, int64 [B, count] in 0..65535; as noise.words.

    Args:
        seeds: int64 [B], not negative.
        count: words a row.
    """
    blocks = -(-count // 16)
    counter = torch.arange(1, blocks + 1, device=seeds.device, dtype=torch.int64)  # numpy steps before it draws
    zero = torch.zeros(1, blocks, device=seeds.device, dtype=torch.int64)
    x0, x1, x2, x3 = counter[None].expand(len(seeds), blocks), zero, zero, zero
    key0, key1 = seeds[:, None], torch.zeros_like(seeds)[:, None]
    for _ in range(ROUNDS):
        high0, low0 = _product(x0, MULTIPLIERS[0])
        high1, low1 = _product(x2, MULTIPLIERS[1])
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = key0 + signed(WEYL[0]), key1 + signed(WEYL[1])
    full = torch.stack([x.expand(len(seeds), blocks) for x in (x0, x1, x2, x3)], -1).reshape(len(seeds), -1)
    lanes = torch.stack([(full >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], -1)
    return lanes.reshape(len(seeds), -1)[:, :count]


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of an unsigned product with a constant."""
    low0, high0 = a & MASK32, (a >> 32) & MASK32
    low1, high1 = b & MASK32, b >> 32
    inner = low0 * low1
    middle = high0 * low1 + ((inner >> 32) & MASK32)
    other = low0 * high1 + (middle & MASK32)
    return high0 * high1 + ((middle >> 32) & MASK32) + ((other >> 32) & MASK32), a * signed(b)
