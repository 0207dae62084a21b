"""Between arrays and tensors: uint8 RGB [H, W, 3] and float32 [B, 3, H, W] in [-1, 1]."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.degradations.masks import mask_of
from components.types import Batch, Image, Plan

OVERSHOOT = 0.5
"""What an interpolation may leave 0..1 by, and more; pictures of -1..1 leave it by 1."""

PRECOMPUTED = {
    "latents": {"latents": "latents"},
    "embeddings": {"text": "embeddings_text", "pooled": "embeddings_pooled"},
}
"""What rows may bring along: names of its parts in a Batch, and in a row; `<what>_known` says whether it is there."""


def images_to_tensor(images: Sequence[Image]) -> Tensor:
    """Pictures of one size, uint8 or float in [0, 1] -> float32 [B, 3, H, W] in [-1, 1].

    Raises:
        ValueError: floats far outside [0, 1]: of -1..1 or 0..255, which would come out as another picture.
    """
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(images)))
    if stacked.is_floating_point() and stacked.numel():
        low, high = (float(bound) for bound in stacked.aminmax())
        if low < -OVERSHOOT or high > 1 + OVERSHOOT:
            raise ValueError(
                f"pictures of floats must lie in 0..1, got {low:.4g}..{high:.4g}: are they of -1..1 or 0..255?"
            )
    scale = 127.5 if stacked.dtype == torch.uint8 else 0.5
    return stacked.permute(0, 3, 1, 2).to(torch.float32).div(scale).sub(1.0).contiguous()


def tensor_to_images(tensor: Tensor) -> list[Image]:
    """float [B, 3, H, W] in [-1, 1] (values outside are clipped) -> uint8 [H, W, 3] each, rounded to nearest."""
    levels = tensor.detach().to(torch.float32).clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())


def collate(
    rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], device: str = "cpu", target: Plan | None = None
) -> Batch:
    """Stream rows (a list of dicts, or one dict of columns as Ray Data gives) -> Batch on `device`.

    Args:
        target: for rows without lq, which is then made here from their plans: what makes the training target of hq.
    """
    columns = {k: [row[k] for row in rows] for k in rows[0]} if isinstance(rows, Sequence) else rows
    keys, plans = [str(k) for k in columns["key"]], [json.loads(p) for p in columns["plan"]]
    if "lq" in columns:
        hq, lq = (images_to_tensor(list(columns[name])).to(device) for name in ("hq", "lq"))
    else:
        hq, lq = _degraded(list(columns["hq"]), plans, keys, device, target)
    return Batch(
        keys=keys,
        positions=np.asarray(columns["position"], dtype=np.int64),
        hq=hq,
        lq=lq,
        prompts=[str(p) for p in columns["prompt"]],
        plans=plans,
        masks=_masks(plans, hq),
        sizes=torch.from_numpy(np.stack(list(columns["sizes"])).astype(np.int64)).to(device),
        **_precomputed(columns, device),
    )


def _masks(plans: Sequence[Plan], hq: Tensor) -> Tensor | None:
    """What the plans' strokes cover, as Batch.masks; None where no plan has any."""
    height, width = hq.shape[-2:]
    covered = [any(op.get("op") == "strokes" for op in plan.get("ops", ())) for plan in plans]
    if not any(covered):
        return None
    drawn = [mask_of(plan, height, width) if has else None for plan, has in zip(plans, covered, strict=True)]
    blank = np.zeros((height, width), bool)
    stacked = np.stack([blank if mask is None else mask for mask in drawn])
    return torch.from_numpy(stacked).to(hq)[:, None]


def _precomputed(columns: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Fields of a Batch for what rows bring along, as float32; see pipelines.stream_columns for the rows' side."""
    found: dict[str, Any] = {}
    for what, parts in PRECOMPUTED.items():
        if f"{what}_known" not in columns:
            continue
        missing = [n for n, known in enumerate(columns[f"{what}_known"]) if not known]
        if len(missing) == len(columns[f"{what}_known"]):
            continue  # nothing is as good as no column
        tensors = {
            part: torch.from_numpy(np.stack(list(columns[name]))).to(device).to(torch.float32)
            for part, name in parts.items()
        }
        found |= {what: tensors if what == "embeddings" else tensors["latents"], f"{what}_missing": missing}
    return found


def _degraded(
    images: Sequence[Image], plans: Sequence[Plan], keys: Sequence[str], device: str, target: Plan | None
) -> tuple[Tensor, Tensor]:
    """(hq, lq) in [-1, 1], of 256 levels as they would be after a picture file."""
    from components.degradations.batched import apply_plans

    clean = torch.from_numpy(np.ascontiguousarray(np.stack(images))).permute(0, 3, 1, 2).to(device)
    lq = apply_plans(clean, plans, keys)
    hq = clean.to(torch.float32) / 255 if target is None else apply_plans(clean, [target] * len(images), keys)
    made = [side.mul(255).round().clamp(0, 255).div(127.5).sub(1.0).contiguous() for side in (hq, lq)]
    return made[0], made[1]


def psnr_of_batch(images: Tensor, hq: Tensor) -> Tensor:
    """PSNR in dB of each picture [B] of two batches [B, 3, H, W] in [0, 1], `images` clipped to it; at most 100."""
    error = (images.clamp(0, 1) - hq).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))
