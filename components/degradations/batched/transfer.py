"""Copies numbers from the host to a device without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, from (nested) numbers or from a tensor on the host.

    `torch.tensor(values, device=...)` copies from pageable memory: that waits until the GPU has finished its queue, and
    the host prepares nothing in that time. Pinned memory avoids the wait.
    """
    tensor = values.to(dtype) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
