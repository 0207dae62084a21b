"""The CPU back end: executes plans on one picture at a time with OpenCV, libjpeg and reused buffers (scratch.py).

Torch-free, for Ray Data workers. The result depends on the picture and the plan only, so equal plans give equal bits
in every process, order and batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from components.degradations import filters, masks, noise
from components.degradations.jpeg import jpeg
from components.degradations.plans import MAX_SIDE_PX, operations, out_sides
from components.degradations.resize import resample, resize
from components.degradations.scratch import take
from components.types import Image, Plan, SampleError

Operation = Mapping[str, Any]


def apply_plan(hq: Image, plan: Plan) -> Image:
    """Executes a plan.

    Args:
        hq: uint8 or float [H, W, 3], [H, W, 1] or [H, W]; floats in 0..1. A gray picture becomes RGB.
        plan: from `draw` of any degradation.

    Returns:
        float32 [H', W', 3] in 0..1; H' x W' is hq's size unless the plan ends smaller.

    Raises:
        SampleError: see check_picture.
        ValueError: plans.operations refuses the plan.
    """
    ops = operations(plan)
    image = as_picture(hq)
    start, sides = image, (image.shape[0], image.shape[1])
    for op in ops:
        image = OPERATIONS[op["op"]](image, op, sides)
    if image is start or image.base is not None:  # the result must not be the input or a reused buffer
        image = image.copy()
    return image


def as_picture(hq: Image) -> Image:
    """Converts any picture that apply_plan takes to float32 [H, W, 3]; raises SampleError as check_picture does."""
    check_picture(hq)
    if hq.dtype == np.uint8:
        hq = hq * np.float32(1 / 255)
    hq = np.ascontiguousarray(hq, dtype=np.float32)
    if hq.ndim == 2:
        hq = hq[..., None]
    return hq if hq.shape[2] == 3 else np.repeat(hq, 3, axis=2)


def check_picture(hq: Image) -> None:
    """Refuses a picture that cannot be degraded.

    Raises:
        SampleError: "shape" (wrong number of axes or channels, or an empty axis), "dtype" (not uint8 or float), "nan"
            (NaN or infinity), "range" (values outside 0..1), "too_large" (a side above MAX_SIDE_PX).
    """
    if hq.ndim not in (2, 3) or (hq.ndim == 3 and hq.shape[2] not in (1, 3)) or 0 in hq.shape:
        raise SampleError("shape", f"expected [H, W], [H, W, 1] or [H, W, 3], got {list(hq.shape)}")
    if max(hq.shape[:2]) > MAX_SIDE_PX:
        raise SampleError("too_large", f"{hq.shape[1]} x {hq.shape[0]}: a side exceeds {MAX_SIDE_PX} pixels")
    if hq.dtype == np.uint8:
        return
    if not np.issubdtype(hq.dtype, np.floating):
        raise SampleError("dtype", f"expected uint8 or floats in 0..1, got {hq.dtype}")
    low, high = float(hq.min()), float(hq.max())  # NaN spreads to both
    if not (math.isfinite(low) and math.isfinite(high)):
        raise SampleError("nan", "the picture holds NaN or infinity")
    if low < 0 or high > 1:
        raise SampleError("range", f"values reach from {low:g} to {high:g}, outside 0..1")


# -- operations: (float32 [H, W, 3], operation, sides of HQ) -> float32 [H', W', 3]; they do not change their input ---


def _sharpen(image: Image, op: Operation, sides: tuple[int, int]) -> Image:
    return filters.sharpen(image, quick=op.get("quick", False), out=take(image.shape, image))


def _blur(image: Image, op: Operation, sides: tuple[int, int]) -> Image:
    return filters.blur(image, op["kernel"], op.get("exact", False), take(image.shape, image))


def _resize(image: Image, op: Operation, sides: tuple[int, int]) -> Image:
    height, width = out_sides(op, (image.shape[0], image.shape[1]), sides)
    if op.get("sampling") == "factor" and op["mode"] in ("bilinear", "bicubic"):
        if op["scale"] == 1:
            return image
        return resample(image, height, width, op["mode"], 1 / op["scale"], 1 / op["scale"])
    if (height, width) == image.shape[:2]:
        return image
    return resize(image, height, width, op["mode"], take((height, width, 3), image))


def _noise(image: Image, op: Operation, sides: tuple[int, int]) -> Image:
    result = take(image.shape, image)
    field = noise.noise_field(image, op, result)
    if field.shape[2] == 1:
        field = cv2.cvtColor(field, cv2.COLOR_GRAY2RGB, dst=result)  # faster than numpy's broadcast
    np.add(image, field, out=result)
    return np.clip(result, 0, 1, out=result)


def _salt_pepper(image: Image, op: Operation, sides: tuple[int, int]) -> Image:
    return noise.salt_pepper(image, op)


def _jpeg(image: Image, op: Operation, sides: tuple[int, int]) -> Image:
    return jpeg(image, op["quality"], op["form"], take(image.shape, image))


def _strokes(image: Image, op: Operation, sides: tuple[int, int]) -> Image:
    mask = masks.draw(image.shape[0], image.shape[1], op["strokes"])
    return np.where(mask[..., None], np.float32(op["value"]), image)


def _clip(image: Image, op: Operation, sides: tuple[int, int]) -> Image:
    return np.clip(image, 0, 1, out=take(image.shape, image))


def _round(image: Image, op: Operation, sides: tuple[int, int]) -> Image:
    result = np.multiply(image, np.float32(255), out=take(image.shape, image))
    np.rint(result, out=result)
    result *= np.float32(1 / 255)
    return result


OPERATIONS: Mapping[str, Callable[[Image, Operation, tuple[int, int]], Image]] = {
    "sharpen": _sharpen,
    "blur": _blur,
    "resize": _resize,
    "noise": _noise,
    "salt_pepper": _salt_pepper,
    "jpeg": _jpeg,
    "strokes": _strokes,
    "clip": _clip,
    "round": _round,
}
"""The operations of plans.py by name; batched/ops.py holds the same for batches."""
