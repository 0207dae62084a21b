"""Numbers from the host to the device that works, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sent(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device, of (nested) numbers or of a tensor of the host's.

    From pageable memory, as `torch.tensor(values, device=...)` sends them, a copy would first let the GPU end all that
    it was given, and nothing would be prepared meanwhile.
    """
    made = values.to(dtype) if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
