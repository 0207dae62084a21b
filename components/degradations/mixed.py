"""A degradation that draws one of several kinds for each picture, for restorers of all of them. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from components.degradations.plans import make_plan
from components.degradations.real_esrgan import RealESRGAN
from components.degradations.simple import (
    FixedDegradation,
    PlanDegradation,
    Range,
    check_range,
    gaussian,
    noise_seed,
)
from components.randomness import generator
from components.types import Plan

TESTS: tuple[FixedDegradation, ...] = (
    FixedDegradation(factor=4),
    FixedDegradation(factor=8),
    FixedDegradation(sigma=2.0, factor=4),
    FixedDegradation(factor=4, noise=40.0),
    FixedDegradation(sigma=2.0, factor=4, noise=20.0, quality=50),
)
"""SUPIR's five test degradations (Table 1), whose kinds `Mixed` varies."""


@dataclass(frozen=True, kw_only=True)
class Mild:
    """Faults of good pictures: a little blur, noise, shrinking or JPEG, each drawn or not, or none at all.

    Attributes:
        clean_prob: probability of no fault.
        blur_prob, sigma: probability and standard deviation of a blur, pixels.
        shrink_prob, factor: probability and factor of a loss of size.
        noise_prob, noise: probability and standard deviation of noise, 8-bit levels.
        jpeg_prob, quality: probability and quality of JPEG.
    """

    clean_prob: float = 0.2
    blur_prob: float = 0.4
    sigma: Range = (0.2, 1.0)
    shrink_prob: float = 0.2
    factor: Range = (1.0, 2.0)
    noise_prob: float = 0.3
    noise: Range = (0.0, 8.0)
    jpeg_prob: float = 0.5
    quality: Range = (70.0, 98.0)

    def __post_init__(self) -> None:
        for name in ("clean_prob", "blur_prob", "shrink_prob", "noise_prob", "jpeg_prob"):
            check_range(name, (getattr(self, name), 1.0), 0, 1)
        check_range("sigma", self.sigma, 1e-3, 1e4)
        check_range("factor", self.factor, 1, 1e4)
        check_range("noise", self.noise, 0, 1e4)
        check_range("quality", self.quality, 1, 100)


@dataclass(frozen=True, kw_only=True)
class Mixed(PlanDegradation):
    """Draws one kind for each picture: Real-ESRGAN, one of the five test degradations, or a mild one.

    A test degradation is exact with probability `exact_prob`; else it has the same operations with drawn strengths.

    Attributes:
        shares: probabilities of the three kinds.
        realesrgan: of the first kind.
        test_shares: probabilities of the test degradations, in the order of TESTS.
        exact_prob: probability of a test degradation's own numbers.
        factor, sigma, noise, quality: ranges of the drawn strengths; a factor is drawn in whole numbers.
        mild: of the third kind.
    """

    shares: tuple[float, float, float] = (0.4, 0.4, 0.2)
    realesrgan: RealESRGAN = field(default_factory=RealESRGAN)
    test_shares: tuple[float, float, float, float, float] = (0.2, 0.2, 0.2, 0.2, 0.2)
    exact_prob: float = 0.5
    factor: tuple[int, int] = (2, 8)
    sigma: Range = (0.5, 3.0)
    noise: Range = (5.0, 50.0)
    quality: Range = (30.0, 90.0)
    mild: Mild = field(default_factory=Mild)

    def __post_init__(self) -> None:
        for name in ("shares", "test_shares"):
            values = getattr(self, name)
            if min(values) < 0 or abs(sum(values) - 1) > 1e-6:
                raise ValueError(f"{name} must be at least 0 and sum to 1, got {values}")
        check_range("exact_prob", (self.exact_prob, 1.0), 0, 1)
        check_range("factor", self.factor, 1, 1 << 16)
        check_range("sigma", self.sigma, 1e-3, 1e4)
        check_range("noise", self.noise, 0, 1e4)
        check_range("quality", self.quality, 1, 100)

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """Draws a plan, see plans.py. Equal arguments give equal plans in every process."""
        draw = generator(seed, "mixed degradation", key, position)
        kind = int(draw.choice(3, p=self.shares))
        if kind == 0:
            return self.realesrgan.draw(seed, key, position)
        if kind == 2:
            return self._mild(draw, seed, key, position)
        test = TESTS[int(draw.choice(len(TESTS), p=self.test_shares))]
        if draw.random() >= self.exact_prob:
            test = FixedDegradation(
                sigma=float(draw.uniform(*self.sigma)) if test.sigma else 0.0,
                factor=int(draw.integers(self.factor[0], self.factor[1] + 1)),
                noise=float(draw.uniform(*self.noise)) if test.noise else 0.0,
                quality=int(draw.uniform(*self.quality)) if test.quality else 0,
            )
        return test.draw(seed, key, position)

    def _mild(self, draw: Any, seed: int, key: str, position: int) -> Plan:
        mild, ops = self.mild, list[dict[str, Any]]()
        if draw.random() < mild.clean_prob:
            return make_plan([])
        if draw.random() < mild.blur_prob:
            sigma = float(draw.uniform(*mild.sigma))
            bell = {"kind": "iso", "size": 21, "sigma_x": sigma, "sigma_y": sigma, "theta": 0.0, "beta": None}
            ops.append({"op": "blur", "kernel": bell})
        shrinks = draw.random() < mild.shrink_prob
        if shrinks:
            divide = float(draw.uniform(*mild.factor))
            ops += [{"op": "resize", "base": "hq", "divide": divide, "mode": "antialias"}, {"op": "clip"}]
        if draw.random() < mild.noise_prob:
            ops.append(gaussian(draw.uniform(*mild.noise), noise_seed(seed, key, position, "noise")))
        if draw.random() < mild.jpeg_prob:
            ops.append({"op": "jpeg", "quality": int(draw.uniform(*mild.quality)), "form": "edge"})
        if ops:
            ops.append({"op": "round"})
        if shrinks:
            ops += [{"op": "resize", "base": "hq", "mode": "bicubic"}, {"op": "clip"}]
        return make_plan(ops)
