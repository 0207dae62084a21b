"""Plans: one degradation of one picture as a list of operations, as JSON, complete enough to replay it.

plan = {"kind": "operations", "version": 2, "ops": [{"op": "blur", "kernel": {...}}, {"op": "resize", ...}, ...]}

Both back ends (engine.py on numpy and OpenCV, batched/ on torch) execute only such lists. So a new degradation draws
other lists and needs no code in the back ends. The operations and their keys:

    sharpen      {exact, quick}                         unsharp masking, filters.sharpen
    blur         {kernel, exact}                        kernels.build(kernel); exact: no approximation
    resize       {base, divide, scale, mode, sampling}  see out_sides; mode of resize.MODES
    noise        {kind, level, gray, seed, mix?}        noise.noise_field
    salt_pepper  {amount, gray, seed}                   noise.salt_pepper
    jpeg         {quality, form}                        form of jpeg.FORMS
    strokes      {strokes, value}                       masks.draw
    clip         {}                                     to 0..1
    round        {}                                     to steps of 1/255

Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from components.types import Plan, SampleError

MAX_SIDE_PX = 65_500  # the limit of libjpeg
MAX_PIXELS = 1 << 28
MAX_KERNEL_PX = 255
FAMILIES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
"""Bell families, in the order of their probabilities (real_esrgan.Stage.families)."""
RESIZE_MODES = ("area", "bilinear", "bicubic", "pool", "antialias")
JPEG_FORMS = ("edge", "matched", "simulator")
PLAN_KIND, PLAN_VERSION = "operations", 2  # raise the version when a plan would replay to other bits
SEED_BITS = 63  # noise seeds fit a signed 64-bit column


def make_plan(ops: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A plan of operations."""
    return {"kind": PLAN_KIND, "version": PLAN_VERSION, "ops": [dict(op) for op in ops]}


def operations(plan: Plan) -> Sequence[Mapping[str, Any]]:
    """Checks a plan and returns its operations. Both back ends start with it, since plans may come from files.

    Raises:
        ValueError: the plan has another kind or version, or an operation is unknown, lacks a key or holds a number
            outside its range.
    """
    if not isinstance(plan, Mapping) or plan.get("kind") != PLAN_KIND or plan.get("version") != PLAN_VERSION:
        raise ValueError(
            f"expected a plan of kind {PLAN_KIND!r} and version {PLAN_VERSION}, "
            f"got {plan.get('kind')!r}, {plan.get('version')!r}"
            if isinstance(plan, Mapping)
            else f"expected a plan, got {type(plan).__name__}"
        )
    ops = plan.get("ops")
    if not isinstance(ops, Sequence) or isinstance(ops, str):
        raise ValueError("the plan needs a list under ops")
    for number, op in enumerate(ops, 1):
        name = op.get("op") if isinstance(op, Mapping) else None
        check = CHECKS.get(str(name))
        if check is None:
            raise ValueError(f"the plan holds the unknown operation {name!r}. Choose from {', '.join(CHECKS)}")
        try:
            check(op)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"operation {number} of the plan, {name}: {error} is missing or has a wrong type"
            ) from error
        except ValueError as error:
            raise ValueError(f"operation {number} of the plan, {name}: {error}") from error
    return ops


def out_sides(op: Mapping[str, Any], current: tuple[int, int], hq: tuple[int, int]) -> tuple[int, int]:
    """The height and width in pixels after a resize, at least 1 each.

    A side is int(base / divide * scale). base is the current side ("current") or the side of HQ ("hq"). With `whole`
    the quotient is truncated before it is scaled, as in InstaRevive.

    Raises:
        SampleError: "too_large": more than MAX_SIDE_PX or MAX_PIXELS.
    """
    sides = []
    for side in current if op["base"] == "current" else hq:
        base = side / op.get("divide", 1)
        sides.append(max(1, int((int(base) if op.get("whole") else base) * op.get("scale", 1))))
    height, width = sides
    if max(sides) > MAX_SIDE_PX or height * width > MAX_PIXELS:
        raise SampleError("too_large", f"a resize would give {width} x {height} pixels")
    return height, width


# -- checks of operations ---------------------------------------------------------------------------------------------


def _number(op: Mapping[str, Any], name: str, low: float, high: float, missing: float | None = None) -> float:
    """The number under a key; ValueError unless it is within low..high."""
    value = op[name] if missing is None else op.get(name, missing)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN compares false
        raise ValueError(f"{name} must be a number within {low:g}..{high:g}, got {value!r}")
    return float(value)


def _one_of(op: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    if op[name] not in choices:
        raise ValueError(f"unknown {name} {op[name]!r}. Choose from {', '.join(choices)}")
    return str(op[name])


def _accept(op: Mapping[str, Any]) -> None:
    """Accepts every operation."""


def _check_blur(op: Mapping[str, Any]) -> None:
    kernel = op["kernel"]
    kind = _one_of(kernel, "kind", (*FAMILIES, "sinc", "given"))
    if kind == "given":
        rows = kernel["weights"]
        flat = [value for row in rows for value in row]
        if len(flat) != len(rows) ** 2 or len(rows) % 2 == 0 or len(rows) > MAX_KERNEL_PX:
            raise ValueError(f"weights must be a square of odd side up to {MAX_KERNEL_PX}")
        if not all(math.isfinite(value) for value in flat):
            raise ValueError("weights must be finite")
        return
    if _number(kernel, "size", 1, MAX_KERNEL_PX) % 2 != 1:
        raise ValueError(f"size must be odd, got {kernel['size']}")
    if kind == "sinc":
        _number(kernel, "cutoff", 1e-6, math.pi + 1e-9)
        return
    sigmas = [_number(kernel, name, 1e-3, 1e4) for name in ("sigma_x", "sigma_y")]
    _number(kernel, "theta", -1e4, 1e4)
    if kind == "iso" and sigmas[0] != sigmas[1]:
        raise ValueError(f"an iso kernel has one sigma, got {sigmas[0]} and {sigmas[1]}")
    if kind.startswith(("generalized", "plateau")):
        _number(kernel, "beta", 1e-3, 1e3)


def _check_resize(op: Mapping[str, Any]) -> None:
    _one_of(op, "base", ("current", "hq"))
    _one_of(op, "mode", RESIZE_MODES)
    _number(op, "divide", 1e-6, 1e6, missing=1)
    _number(op, "scale", 1e-6, 1e6, missing=1)
    if op.get("sampling") is not None:
        _one_of(op, "sampling", ("size", "factor"))
        _number(op, "scale", 1e-6, 1e6)


def _check_seed(op: Mapping[str, Any]) -> None:
    if not isinstance(op["seed"], int) or not 0 <= op["seed"] < 1 << SEED_BITS:
        raise ValueError(f"seed must be a whole number of {SEED_BITS} bits, got {op['seed']!r}")
    if not isinstance(op["gray"], bool):
        raise ValueError(f"gray must be true or false, got {op['gray']!r}")


def _check_noise(op: Mapping[str, Any]) -> None:
    _one_of(op, "kind", ("gaussian", "poisson"))
    _number(op, "level", 0, 1e4)
    _check_seed(op)
    mix = op.get("mix")
    if mix is not None:
        square = len(mix) == 3 and all(len(row) == 3 for row in mix)
        in_colour = op["kind"] == "gaussian" and not op["gray"]
        if not in_colour or not square or not all(math.isfinite(v) for row in mix for v in row):
            raise ValueError("mix must be a finite 3 x 3 matrix, and needs Gaussian noise in colour")


def _check_salt_pepper(op: Mapping[str, Any]) -> None:
    _number(op, "amount", 0, 1)
    _check_seed(op)


def _check_jpeg(op: Mapping[str, Any]) -> None:
    form = _one_of(op, "form", JPEG_FORMS)
    if _number(op, "quality", 1, 100) == 100 and form == "simulator":
        raise ValueError("the JPEG simulator needs a quality below 100")


def _check_strokes(op: Mapping[str, Any]) -> None:
    _number(op, "value", 0, 1)
    for stroke in op["strokes"]:
        _number(stroke, "width", 0, 1)
        numbers = [*stroke["start"], *(value for step in stroke["steps"] for value in step)]
        if len(numbers) != 2 + 2 * len(stroke["steps"]) or not all(abs(value) <= 1e3 for value in numbers):
            raise ValueError("a stroke needs start [x, y] and steps [[angle, length], ...]")


CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "sharpen": _accept,
    "blur": _check_blur,
    "resize": _check_resize,
    "noise": _check_noise,
    "salt_pepper": _check_salt_pepper,
    "jpeg": _check_jpeg,
    "strokes": _check_strokes,
    "clip": _accept,
    "round": _accept,
}


# -- strength of a plan, in numbers and in words ---------------------------------------------------------------------


def strength(plan: Plan) -> dict[str, float]:
    """The strength of a degradation, for analysis and for descriptors.

    Returns:
        blur_px: standard deviation of all bell blurs combined, in pixels of HQ.
        smallest: the smallest side of the picture on the way, as a share of HQ's side.
        noise: standard deviation of all noise at mid gray, 8-bit levels; shot noise for 256 distinct levels.
        quality: the lowest JPEG quality, 100 without JPEG.
        lost: share of pixels that salt and pepper replaces.
    """
    scale, blur, noise, smallest, quality, replaced_share = 1.0, 0.0, 0.0, 1.0, 100.0, 0.0
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
            replaced_share = 1 - (1 - replaced_share) * (1 - op["amount"])
    return {
        "blur_px": math.sqrt(blur),
        "smallest": smallest,
        "noise": math.sqrt(noise),
        "quality": quality,
        "lost": replaced_share,
    }


def descriptors(plan: Plan) -> list[str]:
    """Words for a prompt that describe the degradation, as the adapter paper trains on; the thresholds are ours."""
    numbers = strength(plan)
    words = [
        ("blurry", numbers["blur_px"] >= 1.0),
        ("low resolution", numbers["smallest"] <= 0.5),
        ("noisy", numbers["noise"] >= 5.0 or numbers["lost"] > 0),
        ("compressed", numbers["quality"] < 90),
        ("jpeg artifacts", numbers["quality"] < 70),
    ]
    return ["low quality", *(word for word, applies in words if applies)] if any(f for _, f in words) else []
