"""Conversion between arrays and tensors: uint8 RGB [H, W, 3] and float32 [B, 3, H, W] in [-1, 1]."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.degradations.masks import mask_of
from components.types import Batch, Image, Plan, SampleError

OVERSHOOT = 0.5
"""Tolerance outside 0..1: larger than any interpolation overshoot, smaller than the 1 of pictures in -1..1."""

EXPLODED = 1e4
"""A decoded picture lies near -1..1. Values as large as this are no overshoot: the activations exploded. Ours."""

SATURATED = 10.0
"""A picture whose mean absolute value is as large shows black and white only. Ours."""

PRECOMPUTED = {
    "latents": {"latents": "latents"},
    "embeddings": {"text": "embeddings_text", "pooled": "embeddings_pooled"},
}
"""Optional columns of rows: names of the parts in a Batch and in a row; `<name>_known` is true if a row has them."""


def images_to_tensor(images: Sequence[Image] | np.ndarray) -> Tensor:
    """Pictures of one size, uint8 or float in [0, 1] -> float32 [B, 3, H, W] in [-1, 1].

    Raises:
        ValueError: floats far outside [0, 1], probably in -1..1 or 0..255.
    """
    pixels = _tensor(images)
    if pixels.is_floating_point() and pixels.numel():
        low, high = (float(bound) for bound in pixels.aminmax())
        if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # also refuses NaN
            raise ValueError(
                f"float pictures must lie in 0..1, got {low:.4g}..{high:.4g}: are they in -1..1 or 0..255?"
            )
    scale = 127.5 if pixels.dtype == torch.uint8 else 0.5
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div(scale).sub(1.0).contiguous()


def _stack(values: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Stack arrays of one shape to one array [B, ...]; a stacked array passes through."""
    is_stacked = isinstance(values, np.ndarray) and values.dtype != object
    return values if is_stacked else np.stack(list(values))  # type: ignore[return-value]


def _tensor(values: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """Convert arrays to one tensor; a single array, such as a read-only view of Ray's object store, is not copied."""
    with warnings.catch_warnings():  # torch warns of read-only arrays; this module does not write to the tensor
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(np.ascontiguousarray(_stack(values)))


def check_finite(values: Tensor, keys: Sequence[str] = ()) -> None:
    """Refuse values that a broken network made. Every conversion of pictures to 8 bits calls this before it clips.

    The check is here, and not where weights are loaded: finite weights can overflow too, above all in half precision,
    and a read of every weight would slow each start.

    Args:
        values: float [B, ...], pictures or latents; intact ones are of order one.
        keys: names of the B samples, for the error; may be empty.

    Raises:
        SampleError: "not_finite": a sample has NaN, infinite values, or values of EXPLODED or more. It names the first.
    """
    if not values.numel():
        return
    low, high = (float(bound) for bound in values.detach().aminmax())
    if low > -EXPLODED and high < EXPLODED:  # false for NaN, which aminmax passes on
        return
    rows = values.detach().flatten(1).to(torch.float32).abs()
    row = int((~(rows < EXPLODED)).any(1).nonzero()[0])
    count = int((~rows[row].isfinite()).sum())
    fault = (
        f"values that are not finite ({count} of {rows.shape[1]})" if count else f"values up to {rows[row].max():.3g}"
    )
    raise _not_finite(fault, keys, row)


def check_pictures(values: Tensor, keys: Sequence[str] = ()) -> None:
    """`check_finite` for decoded pictures [B, ...], which must also have a mean absolute value below SATURATED."""
    check_finite(values, keys)
    if not values.numel():
        return
    low, high = (float(bound) for bound in values.detach().aminmax())
    if low > -SATURATED and high < SATURATED:
        return
    means = values.detach().flatten(1).to(torch.float32).abs().mean(1)
    if float(means.max()) >= SATURATED:
        row = int(means.argmax())
        raise _not_finite(f"values of {means[row]:.3g} on average where 1 is white", keys, row)


def _not_finite(fault: str, keys: Sequence[str], row: int) -> SampleError:
    detail = f"the model made {fault}: its weights are broken, or their precision is too low"
    return SampleError("not_finite", detail, keys[row] if row < len(keys) else "")


def tensor_to_images(tensor: Tensor, keys: Sequence[str] = ()) -> list[Image]:
    """float [B, 3, H, W] in [-1, 1] (values outside are clipped) -> uint8 [H, W, 3] each, rounded to nearest.

    Raises:
        SampleError: "not_finite", see check_pictures; `keys` are the pictures' names for it.
    """
    check_pictures(tensor, keys)
    levels = tensor.detach().to(torch.float32).clamp(-1, 1).add(1.0).mul(127.5).round().to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).cpu().numpy())


def collate_rows(rows: Sequence[Mapping[str, Any]], device: str = "cpu", target: Plan | None = None) -> Batch:
    """Stream rows -> Batch on `device`; see `collate`."""
    return collate({name: [row[name] for row in rows] for name in rows[0]}, device, target)


def collate(columns: Mapping[str, Any], device: str = "cpu", target: Plan | None = None) -> Batch:
    """Columns of stream rows, as in Ray Data -> Batch on `device`.

    Args:
        columns: one value per row. Pixels [B, H, W, 3] and other arrays of one shape may be one array or a list.
        target: plan that turns hq into the training target, for rows without lq; their plans then make lq here.
    """
    keys, plans = [str(k) for k in columns["key"]], [json.loads(p) for p in columns["plan"]]
    if "lq" in columns:
        hq, lq = (images_to_tensor(columns[name]).to(device) for name in ("hq", "lq"))
    else:
        hq, lq = _degrade(columns["hq"], plans, keys, device, target)
    return Batch(
        keys=keys,
        positions=np.asarray(columns["position"], dtype=np.int64),
        hq=hq,
        lq=lq,
        prompts=[str(p) for p in columns["prompt"]],
        plans=plans,
        masks=_masks(plans, hq),
        sizes=torch.from_numpy(_stack(columns["sizes"]).astype(np.int64)).to(device),
        **_precomputed(columns, device),
    )


def _masks(plans: Sequence[Plan], hq: Tensor) -> Tensor | None:
    """Return masks of the plans' strokes, as in Batch.masks; None if no plan has strokes."""
    height, width = hq.shape[-2:]
    has_strokes = [any(op.get("op") == "strokes" for op in plan.get("ops", ())) for plan in plans]
    if not any(has_strokes):
        return None
    masks = [mask_of(plan, height, width) if has else None for plan, has in zip(plans, has_strokes, strict=True)]
    blank = np.zeros((height, width), bool)
    all_masks = np.stack([blank if mask is None else mask for mask in masks])
    return torch.from_numpy(all_masks).to(hq)[:, None]


def _precomputed(columns: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Return the Batch fields of precomputed columns, as float32; pipelines.stream.columns writes the columns."""
    result: dict[str, Any] = {}
    for what, parts in PRECOMPUTED.items():
        if f"{what}_known" not in columns:
            continue
        missing = [n for n, present in enumerate(columns[f"{what}_known"]) if not present]
        if len(missing) == len(columns[f"{what}_known"]):
            continue  # a column without values counts as absent
        tensors = {part: _tensor(columns[name]).to(device).to(torch.float32) for part, name in parts.items()}
        result |= {what: tensors if what == "embeddings" else tensors["latents"], f"{what}_missing": missing}
    return result


def _degrade(
    images: Sequence[Image] | np.ndarray, plans: Sequence[Plan], keys: Sequence[str], device: str, target: Plan | None
) -> tuple[Tensor, Tensor]:
    """Return (hq, lq) in [-1, 1], rounded to 256 levels as in a picture file."""
    from components.degradations.batched import apply_plans

    clean = _tensor(images).permute(0, 3, 1, 2).to(device)
    lq = apply_plans(clean, plans, keys)
    hq = clean.to(torch.float32) / 255 if target is None else apply_plans(clean, [target] * len(images), keys)
    sides = [side.mul(255).round().clamp(0, 255).div(127.5).sub(1.0).contiguous() for side in (hq, lq)]
    return sides[0], sides[1]


def psnr_of_batch(images: Tensor, hq: Tensor) -> Tensor:
    """Return PSNR in dB [B] of two batches [B, 3, H, W] in [0, 1]; `images` are clipped, and PSNR is at most 100."""
    error = (images.clamp(0, 1) - hq).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))
