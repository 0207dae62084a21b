"""Plans: one drawn degradation as a list of operations, small enough for JSON and complete enough to replay.

plan = {"kind": "operations", "version": 2, "ops": [{"op": "blur", "kernel": {...}}, {"op": "resize", ...}, ...]}

Both back ends (engine.py on numpy and OpenCV, batched/ on torch) execute nothing but such lists, so a new system
draws other lists and needs no code of its own below. What an operation may hold:

    sharpen      {exact, quick}                            unsharp masking, filters.sharpen
    blur         {kernel, exact}                        kernels.build(kernel); exact: not trimmed, not split
    resize       {base, divide, scale, mode, sampling}  see out_side; mode of resize.MODES
    noise        {kind, level, gray, seed, mix?}        noise.add
    salt_pepper  {amount, gray, seed}                   noise.salt_pepper
    jpeg         {quality, form}                        form of jpeg.FORMS
    strokes      {strokes, value}                       masks.draw
    clip         {}                                     to 0..1
    round        {}                                     to steps of 1/255

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from components.types import Plan

PLAN_KIND, PLAN_VERSION = "operations", 2  # a plan that would replay to other bits gets another version
SEED_BITS = 63  # noise seeds fit a signed 64-bit column


def make_plan(ops: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A plan of operations."""
    return {"kind": PLAN_KIND, "version": PLAN_VERSION, "ops": [dict(op) for op in ops]}


def operations(plan: Plan) -> Sequence[Mapping[str, Any]]:
    """The operations of a plan.

    Raises:
        ValueError: the plan is of another kind or version.
    """
    if plan.get("kind") != PLAN_KIND or plan.get("version") != PLAN_VERSION:
        raise ValueError(
            f"expected a plan of kind {PLAN_KIND!r} and version {PLAN_VERSION}, "
            f"got {plan.get('kind')!r}, {plan.get('version')!r}"
        )
    ops: Sequence[Mapping[str, Any]] = plan["ops"]
    return ops


def out_side(op: Mapping[str, Any], current: int, hq: int) -> int:
    """The side in pixels that a resize leads to, at least 1.

    int(int?(base / divide) * scale): base is the side as it is ("current") or of the picture that came in ("hq");
    with `whole` the quotient loses its fraction first, as in InstaRevive.
    """
    base = (current if op["base"] == "current" else hq) / op.get("divide", 1)
    return max(1, int((int(base) if op.get("whole") else base) * op.get("scale", 1)))


# -- what a plan did, in numbers and in words ------------------------------------------------------------------------


def strength(plan: Plan) -> dict[str, float]:
    """How strong a degradation is, for analysis and for descriptors.

    Returns:
        blur_px: standard deviation of all bell blurs together, in pixels of HQ.
        smallest: the smallest side reached, as a share of HQ's.
        noise: standard deviation of all noise at mid gray, 8-bit levels; shot noise as if 256 levels were present.
        quality: the lowest JPEG quality, 100 without JPEG.
        lost: share of pixels replaced.
    """
    scale, blur, noise, smallest, quality, lost = 1.0, 0.0, 0.0, 1.0, 100.0, 0.0
    for op in operations(plan):
        if op["op"] == "blur" and "sigma_x" in op["kernel"]:
            kernel = op["kernel"]
            blur += kernel["sigma_x"] * kernel["sigma_y"] / scale**2
        elif op["op"] == "resize":
            base = scale if op["base"] == "current" else 1.0
            scale = base / op.get("divide", 1) * op.get("scale", 1)
            smallest = min(smallest, scale)
        elif op["op"] == "noise":
            gaussian = op["kind"] == "gaussian"
            noise += op["level"] ** 2 if gaussian else (op["level"] * 255) ** 2 * 0.5 / 256
        elif op["op"] == "jpeg":
            quality = min(quality, op["quality"])
        elif op["op"] == "salt_pepper":
            lost = 1 - (1 - lost) * (1 - op["amount"])
    return {
        "blur_px": math.sqrt(blur),
        "smallest": smallest,
        "noise": math.sqrt(noise),
        "quality": quality,
        "lost": lost,
    }


def descriptors(plan: Plan) -> list[str]:
    """What was done to a picture, as words for a prompt (the adapter paper trains on such; thresholds ours)."""
    found = strength(plan)
    words = [
        ("blurry", found["blur_px"] >= 1.0),
        ("low resolution", found["smallest"] <= 0.5),
        ("noisy", found["noise"] >= 5.0 or found["lost"] > 0),
        ("compressed", found["quality"] < 90),
        ("jpeg artifacts", found["quality"] < 70),
    ]
    return ["low quality", *(word for word, fired in words if fired)] if any(f for _, f in words) else []
