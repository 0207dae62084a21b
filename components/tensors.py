"""Between arrays and tensors: uint8 RGB [H, W, 3] and float32 [B, 3, H, W] in [-1, 1]."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.types import Batch, Image


def images_to_tensor(images: Sequence[Image]) -> Tensor:
    """Pictures of one size, uint8 or float in [0, 1] -> float32 [B, 3, H, W] in [-1, 1]."""
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(images)))
    scale = 127.5 if stacked.dtype == torch.uint8 else 0.5
    return stacked.permute(0, 3, 1, 2).to(torch.float32).div(scale).sub(1.0).contiguous()


def tensor_to_images(tensor: Tensor) -> list[Image]:
    """float [B, 3, H, W] in [-1, 1] (values outside are clipped) -> uint8 [H, W, 3] each, rounded to nearest."""
    levels = tensor.detach().to(torch.float32).clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())


def collate(rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], device: str = "cpu") -> Batch:
    """Stream rows (a list of dicts, or one dict of columns as Ray Data gives) -> Batch on `device`."""
    columns = {k: [row[k] for row in rows] for k in rows[0]} if isinstance(rows, Sequence) else rows
    return Batch(
        keys=[str(k) for k in columns["key"]],
        positions=np.asarray(columns["position"], dtype=np.int64),
        hq=images_to_tensor(list(columns["hq"])).to(device),
        lq=images_to_tensor(list(columns["lq"])).to(device),
        prompts=[str(p) for p in columns["prompt"]],
        plans=[json.loads(p) for p in columns["plan"]],
        sizes=torch.from_numpy(np.stack(list(columns["sizes"])).astype(np.int64)).to(device),
    )
