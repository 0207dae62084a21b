"""Degradations with few draws: the face recipe, fixed test degradations, single faults, and none. Torch-free."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from components.degradations.engine import apply_plan, as_picture
from components.degradations.masks import draw_strokes
from components.degradations.plans import SEED_BITS, make_plan
from components.randomness import generator, stream_key
from components.types import Image, Plan

Range = tuple[float, float]
LARGER_THAN_ANY = 1 << 16


def noise_seed(seed: int, key: str, position: int, name: str) -> int:
    """The seed of one noise operation."""
    return stream_key(seed, "degradation", key, position, name) >> (128 - SEED_BITS)


class PlanDegradation:
    """Base class of degradations whose training target is the picture itself."""

    def apply(self, hq: Image, plan: Plan) -> Image:
        """PlanDegradation a plan as engine.apply_plan does; the result depends on the picture and the plan only."""
        return apply_plan(hq, plan)

    def target(self, hq: Image) -> Image:
        """The picture itself, float32 [H, W, 3]."""
        return as_picture(hq)

    def target_plan(self) -> Plan | None:
        """None: the target is the picture."""
        return None


@dataclass(frozen=True, kw_only=True)
class NoDegradation(PlanDegradation):
    """Leaves the picture as it is: for pairs whose LQ exists already, and for tests of the other steps."""

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """A plan without operations."""
        return make_plan([])


@dataclass(frozen=True, kw_only=True)
class FirstOrder(PlanDegradation):
    """Blur, shrink, noise, JPEG, enlarge: the face recipe of InstaRevive's released data set code.

    The paper says "high-order model of Real-ESRGAN" for faces too (A.5); the released training code does this instead.

    Attributes:
        kernel_size: side of the bell, odd pixels.
        anisotropic_prob: probability of a bell with two sigmas and an angle.
        sigma: standard deviation of the bell, pixels.
        shrink: LQ's side is int(side // x) with x drawn from this range.
        noise: standard deviation of colour Gaussian noise, 8-bit levels.
        quality: JPEG quality, int(x) with x drawn from this range.
    """

    kernel_size: int = 41
    anisotropic_prob: float = 0.5
    sigma: Range = (0.1, 10.0)
    shrink: Range = (4.0, 8.0)
    noise: Range = (0.0, 20.0)
    quality: Range = (60.0, 100.0)

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {self.kernel_size}")
        if not 0 <= self.anisotropic_prob <= 1:
            raise ValueError(f"anisotropic_prob must lie in 0..1, got {self.anisotropic_prob}")
        check_range("sigma", self.sigma, 1e-3, 1e4)
        check_range("shrink", self.shrink, 1, 1e4)
        check_range("noise", self.noise, 0, 1e4)
        check_range("quality", self.quality, 1, 101)

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """Draws a plan, see plans.py. Equal arguments give equal plans in every process."""
        draw = generator(seed, "degradation", key, position)
        sigma_x = sigma_y = float(draw.uniform(*self.sigma))
        kind, theta = "iso", 0.0
        if draw.random() < self.anisotropic_prob:
            kind = "aniso"
            sigma_y, theta = float(draw.uniform(*self.sigma)), float(draw.uniform(-math.pi, math.pi))
        kernel = {"kind": kind, "size": self.kernel_size, "sigma_x": sigma_x, "sigma_y": sigma_y, "theta": theta}
        ops: list[dict[str, Any]] = [
            {"op": "blur", "kernel": kernel | {"beta": None}},
            {"op": "resize", "base": "hq", "divide": float(draw.uniform(*self.shrink)), "mode": "bilinear"},
            gaussian(float(draw.uniform(*self.noise)), noise_seed(seed, key, position, "noise")),
            {"op": "jpeg", "quality": min(100, int(draw.uniform(*self.quality))), "form": "edge"},
            {"op": "resize", "base": "hq", "mode": "bilinear"},
        ]
        return make_plan(ops)


@dataclass(frozen=True, kw_only=True)
class FixedDegradation(PlanDegradation):
    """The same steps for every picture, for benchmarks; only the noise field depends on the picture's key.

    SUPIR's Table 1 names x4, x8, blur 2, noise 40 (or 20) and JPEG 50. It does not state kernel size, interpolation
    and clipping. Ours: a 21 x 21 bell, bicubic with antialiasing (the usual x4 of super-resolution tests), clipped
    colour noise, plain JPEG. The order is blur, shrink, noise, JPEG, then bicubic back to the picture's size.

    Attributes:
        sigma: standard deviation of the blur, pixels; 0 for none.
        factor: how much smaller LQ is.
        noise: standard deviation of the noise, 8-bit levels; 0 for none.
        quality: JPEG quality; 0 for none.
        resize_back: enlarge LQ to HQ's size.
    """

    sigma: float = 0.0
    factor: int = 4
    noise: float = 0.0
    quality: int = 0
    resize_back: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        if min(self.sigma, self.noise) < 0:
            raise ValueError(f"sigma and noise must not be negative, got {self.sigma} and {self.noise}")
        if not 0 <= self.quality <= 100:
            raise ValueError(f"quality must lie in 1..100, or be 0 for none, got {self.quality}")

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """Draws a plan, see plans.py."""
        ops: list[dict[str, Any]] = []
        if self.sigma:
            bell = {"kind": "iso", "size": 21, "sigma_x": self.sigma, "sigma_y": self.sigma, "theta": 0.0, "beta": None}
            ops.append({"op": "blur", "kernel": bell})
        ops += [{"op": "resize", "base": "hq", "divide": self.factor, "mode": "antialias"}, {"op": "clip"}]
        if self.noise:
            ops.append(gaussian(self.noise, noise_seed(seed, key, position, "noise")))
        if self.quality:
            ops.append({"op": "jpeg", "quality": self.quality, "form": "edge"})
        ops.append({"op": "round"})
        if self.resize_back:
            ops += [{"op": "resize", "base": "hq", "mode": "bicubic"}, {"op": "clip"}]
        return make_plan(ops)


@dataclass(frozen=True, kw_only=True)
class SaltPepper(PlanDegradation):
    """Pixels set to black or white with equal odds (InstaRevive A.8).

    Attributes:
        amount: range of the share of pixels.
        gray: set all channels of a pixel together; ours, the paper does not state it.
    """

    amount: Range = (0.02, 0.1)
    gray: bool = True

    def __post_init__(self) -> None:
        check_range("amount", self.amount, 0, 1)

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """Draws a plan, see plans.py."""
        amount = float(generator(seed, "degradation", key, position).uniform(*self.amount))
        noise = noise_seed(seed, key, position, "salt_pepper")
        return make_plan([{"op": "salt_pepper", "amount": amount, "gray": self.gray, "seed": noise}])


@dataclass(frozen=True, kw_only=True)
class Strokes(PlanDegradation):
    """White strokes over the picture, for inpainting (InstaRevive A.8); `masks.mask_of` returns the covered pixels.

    Attributes:
        counts: fewest and most strokes.
        vertices: fewest and most steps of a stroke.
        widths: thinnest and thickest stroke as shares of the shorter side; the original draws 12 to 80 px on 512.
        value: value of the covered pixels, 0..1.
    """

    counts: tuple[int, int] = (1, 3)
    vertices: tuple[int, int] = (8, 27)
    widths: Range = (12 / 512, 80 / 512)
    value: float = 1.0

    def __post_init__(self) -> None:
        check_range("counts", self.counts, 1, LARGER_THAN_ANY)
        check_range("vertices", self.vertices, 1, LARGER_THAN_ANY)
        check_range("widths", self.widths, 0, 1)
        check_range("value", (self.value, self.value), 0, 1)

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """Draws a plan, see plans.py."""
        draw = generator(seed, "degradation", key, position)
        strokes = draw_strokes(draw, self.counts, self.vertices, self.widths)
        return make_plan([{"op": "strokes", "strokes": strokes, "value": self.value}])


def gaussian(level: float, seed: int, gray: bool = False) -> dict[str, Any]:
    """Gaussian noise as an operation; `level` is its standard deviation in 8-bit levels."""
    return {"op": "noise", "kind": "gaussian", "level": level, "gray": gray, "seed": seed}


def check_range(name: str, limits: Range | tuple[int, int], low: float, high: float) -> None:
    """Raises ValueError unless low <= limits[0] <= limits[1] <= high."""
    if not low <= limits[0] <= limits[1] <= high:
        raise ValueError(f"{name} must be a rising range within {low:g}..{high:g}, got {limits}")
