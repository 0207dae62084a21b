"""Philox 4x64-10 in torch: the same words as numpy's Philox, on any device (Salmon et al. 2011).

Torch has no unsigned 64-bit arithmetic. int64 wraps the same way, so only the high half of a product needs care.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from components.degradations.batched.transfer import to_device

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
ROUNDS = 10
BLOCK = 16  # 16-bit words of one counter


def as_int64(value: int) -> int:
    """The int64 value with the same bits as an unsigned 64-bit number."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


@dataclass(frozen=True)
class Words:
    """Random 16-bit words of several streams, one stream after the other.

    Attributes:
        flat: int32 in 0..65535.
        starts: index of the first word of each stream.
    """

    flat: Tensor
    starts: list[int]


def words(seeds: Sequence[int], counts: Sequence[int], device: torch.device) -> Words:
    """The first `counts` random 16-bit words of each seed, as noise.words, rounded up to whole blocks of 16.

    All streams are made together, since a GPU's time depends on the number of steps.

    Args:
        seeds: 0 .. 2**63 - 1.
        counts: words of each seed.
    """
    blocks = [-(-count // BLOCK) for count in counts]
    begins = [0, *accumulate(blocks)]
    numbers = to_device([seeds, begins[:-1], blocks], device)
    owner = torch.repeat_interleave(torch.arange(len(seeds), device=device), numbers[2], output_size=begins[-1])
    counter = torch.arange(1, begins[-1] + 1, device=device) - numbers[1][owner]  # numpy counts first
    zeros = torch.zeros_like(counter)
    # of the four words of the state, the first and third are multiplied, the other two are only mixed in
    even, odd = torch.stack([counter, zeros]), torch.stack([zeros, zeros])
    keys = torch.stack([numbers[0][owner], zeros])
    factors = to_device([as_int64(m) for m in MULTIPLIERS], device)[:, None]
    weyl = to_device([as_int64(w) for w in WEYL], device)[:, None]
    parts = factors & MASK32, (factors >> 32) & MASK32
    for _ in range(ROUNDS):
        high, low = _high(even, *parts), even * factors
        even, odd = high.flip(0) ^ odd ^ keys, low.flip(0)
        keys = keys + weyl
    state = torch.stack([even[0], odd[0], even[1], odd[1]], -1).flatten()
    lanes = [((state >> shift) & 0xFFFF).int() for shift in (0, 16, 32, 48)]
    return Words(torch.stack(lanes, -1).flatten(), [begin * BLOCK for begin in begins[:-1]])


def _high(a: Tensor, low1: Tensor, high1: Tensor) -> Tensor:
    """The high 64 bits of unsigned products of `a` with a constant; low1 and high1 are the constant's 32-bit halves."""
    low0, high0 = a & MASK32, (a >> 32) & MASK32
    middle = high0 * low1 + (((low0 * low1) >> 32) & MASK32)
    other = low0 * high1 + (middle & MASK32)
    return high0 * high1 + ((middle >> 32) & MASK32) + ((other >> 32) & MASK32)
