"""Buffers that are kept: fresh ones of megabytes cost as much as the arithmetic in them, for their page faults.

Each thread has its own few (four at most in use), as large as the largest picture needed; what comes out of here is
overwritten by a later `take`, so results for others are copied. Torch-free.
"""

from __future__ import annotations

import math
import threading

import numpy as np

KEEP_BYTES = 64 * 2**20  # a larger buffer is freed after use: one huge picture must not stay in memory


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []


_buffers = _Buffers()


def take(shape: tuple[int, ...], *avoid: np.ndarray) -> np.ndarray:
    """A float32 array of this shape with undefined values that shares no memory with those to avoid."""
    size, kept = math.prod(shape), _buffers.kept
    used = [array if array.base is None else array.base for array in avoid]
    if 4 * size > KEEP_BYTES:
        return np.empty(shape, np.float32)
    for index, buffer in enumerate(kept):
        if all(buffer is not other for other in used):
            if buffer.size < size:
                buffer = kept[index] = np.empty(size, np.float32)
            return buffer[:size].reshape(shape)
    kept.append(np.empty(size, np.float32))
    return kept[-1][:size].reshape(shape)
