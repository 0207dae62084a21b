"""Reusable buffers: the page faults of a new array of megabytes take as long as the arithmetic on it.

Each thread has its own buffers (it uses at most four), as large as its largest picture. A later `take` overwrites the
array of an earlier one, so copy a result that leaves the engine. Torch-free.
"""

from __future__ import annotations

import math
import threading

import numpy as np

KEEP_BYTES = 64 * 2**20  # larger arrays are not reused: one huge picture must not stay in memory


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []


_buffers = _Buffers()


def take(shape: tuple[int, ...], *avoid: np.ndarray) -> np.ndarray:
    """A float32 array of this shape with undefined values; it shares no memory with the arrays in `avoid`."""
    size, buffers = math.prod(shape), _buffers.arrays
    in_use = [array if array.base is None else array.base for array in avoid]
    if 4 * size > KEEP_BYTES:
        return np.empty(shape, np.float32)
    for index, buffer in enumerate(buffers):
        if all(buffer is not other for other in in_use):
            if buffer.size < size:
                buffer = buffers[index] = np.empty(size, np.float32)
            return buffer[:size].reshape(shape)
    buffers.append(np.empty(size, np.float32))
    return buffers[-1][:size].reshape(shape)
