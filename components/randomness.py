"""Counter-based randomness: every random bit is a function of (seed, position in the stream, name).

There is no global or per-rank state. Seed, position and name are hashed into a 128-bit Philox key. So streams with
different names are independent, and any worker can replay any sample alone, in any order. numpy's Philox makes the bits
on the CPU and they are then moved, so they are the same on every device.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def stream_key(seed: int, *parts: int | str) -> int:
    """Return a 128-bit key for (seed, parts). Different parts give independent streams; 1 and "1" differ."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (seed, *parts):
        text = f"{'i' if isinstance(part, (int, np.integer)) else 's'}{part}"
        digest.update(f"{len(text)}:{text}".encode())
    return int.from_bytes(digest.digest(), "little")


def generator(seed: int, *parts: int | str) -> np.random.Generator:
    """Return a numpy generator for (seed, parts): Philox with the key `stream_key`. It takes about 10 microseconds."""
    key: Any = _Key(stream_key(seed, *parts))  # numpy accepts an ISeedSequence, but its type stubs do not declare it
    return np.random.Generator(np.random.Philox(key))


class _Key(np.random.bit_generator.ISeedSequence):
    """Pass a key to Philox unchanged. `Philox(key=...)` first reads system entropy, which takes twice as long."""

    def __init__(self, key: int) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: object = np.uint64) -> np.ndarray:
        return np.frombuffer(self.key.to_bytes(16, "little"), "<u8")


@contextlib.contextmanager
def seeded_init(seed: int, name: str) -> Iterator[None]:
    """Make the initial weights of torch layers depend on (seed, name) only; the global generator is restored."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(seed, "init", name) % 2**63)
        yield


class Noise:
    """Random tensors for a batch, with one independent row for each stream position.

    Args:
        seed: the run's seed.
        positions: [B] stream positions of the batch's samples.
        device: device of the tensors; the bits do not depend on it.
    """

    def __init__(self, seed: int, positions: np.ndarray, device: str = "cpu") -> None:
        self.seed, self.positions, self.device = seed, [int(p) for p in positions], device

    def __len__(self) -> int:
        return len(self.positions)

    def _rows(self, name: str, draw: object) -> Tensor:
        import torch

        rows = [draw(generator(self.seed, position, name)) for position in self.positions]  # type: ignore[operator]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 [B, *shape]."""
        return self._rows(name, lambda g: g.standard_normal(shape, dtype=np.float32))

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform float32 [B] in [low, high)."""
        return self._rows(name, lambda g: np.float32(low + (high - low) * g.random()))

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """Uniform int64 [B] in [low, high)."""
        return self._rows(name, lambda g: np.int64(g.integers(low, high)))
