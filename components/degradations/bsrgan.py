"""BSRGAN's degradation: blur twice, shrink twice, noise and JPEG in a shuffled order, and a last JPEG.

Torch-free. Zhang et al. 2021 (arXiv 2103.14006), section 3; the numbers are those of its released code (cszn/KAIR,
utils/utils_blindsr.py). Deviations:

    camera-sensor noise     left out: it needs that project's trained raw-to-RGB model; its own default skips it too
    shrink by a shifted     a Gaussian blur and a bilinear shrink to the same size, which sample the same places (a
    Gaussian and picking    quarter of the first shrinks)
    correlated noise        the random rotation comes from a QR decomposition, not from an orthonormal basis by SVD
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.degradations.plans import make_plan
from components.degradations.simple import PlanDegradation, check_range, gaussian, noise_seed
from components.randomness import generator
from components.types import Plan

MODES = ("bilinear", "bicubic", "area")
LARGEST_SIZE_PX = 25


@dataclass(frozen=True, kw_only=True)
class BSRGAN(PlanDegradation):
    """BSRGAN's ranges and probabilities.

    Attributes:
        factor: how much smaller LQ is before it is enlarged back.
        halve_prob: probability that HQ is halved first; the other steps then run at half the factor. Factor 4 only.
        jpeg_prob: probability of the JPEG among the shuffled steps; the last JPEG always runs.
        noise: range of the standard deviation of Gaussian noise, whole 8-bit levels.
        quality: range of the JPEG quality, whole numbers.
        resize_back: enlarge LQ (bicubic) to HQ's size.
    """

    factor: int = 4
    halve_prob: float = 0.25
    jpeg_prob: float = 0.9
    noise: tuple[int, int] = (2, 25)
    quality: tuple[int, int] = (30, 95)
    resize_back: bool = True

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"factor must be at least 2, got {self.factor}")
        for name in ("halve_prob", "jpeg_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        check_range("noise", self.noise, 0, 255)
        check_range("quality", self.quality, 1, 100)

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """Draws a plan, see plans.py. Equal arguments give equal plans in every process."""
        draw = generator(seed, "degradation", key, position)
        ops: list[dict[str, Any]] = []
        factor = self.factor
        if factor == 4 and draw.random() < self.halve_prob:
            mode = _mode(draw) if draw.random() < 0.5 else "antialias"
            ops += [{"op": "resize", "base": "hq", "divide": 2, "mode": mode}, {"op": "clip"}]
            factor = 2
        order = [int(step) for step in draw.permutation(6)]
        first, last = sorted(order.index(step) for step in (2, 3))
        order[first], order[last] = 2, 3  # the shrink to LQ's size comes after the free shrink
        for step in order:
            if step in (0, 1):
                ops.append({"op": "blur", "kernel": _kernel(factor, draw)})
            elif step == 2:
                ops += _free_shrink(factor, draw)
            elif step == 3:
                ops += [{"op": "resize", "base": "hq", "divide": self.factor, "mode": _mode(draw)}, {"op": "clip"}]
            elif step == 4:
                ops.append(self._noise(draw, noise_seed(seed, key, position, "noise")))
            elif draw.random() < self.jpeg_prob:
                ops += [{"op": "clip"}, self._jpeg(draw)]
        ops += [{"op": "clip"}, self._jpeg(draw)]
        if self.resize_back:
            ops += [{"op": "resize", "base": "hq", "mode": "bicubic"}, {"op": "clip"}]
        return make_plan(ops)

    def _jpeg(self, draw: np.random.Generator) -> dict[str, Any]:
        return {"op": "jpeg", "quality": int(draw.integers(self.quality[0], self.quality[1] + 1)), "form": "edge"}

    def _noise(self, draw: np.random.Generator, seed: int) -> dict[str, Any]:
        """Colour noise and gray noise with probability 0.4 each, noise correlated between channels with 0.2."""
        level, kind = int(draw.integers(self.noise[0], self.noise[1] + 1)), draw.random()
        op = gaussian(float(level), seed, gray=bool(kind < 0.4))
        if not 0.4 <= kind <= 0.6:
            return op
        turn, _ = np.linalg.qr(draw.random((3, 3)))
        covariance = np.abs(self.noise[1] ** 2 * (turn.T @ np.diag(draw.random(3)) @ turn))
        values, axes = np.linalg.eigh(covariance)  # np.abs may make the covariance indefinite: clip
        mix = axes * np.sqrt(values.clip(0))
        return op | {"mix": [[float(v) for v in row] for row in mix], "level": float(np.sqrt((mix**2).sum() / 3))}


def _mode(draw: np.random.Generator) -> str:
    return MODES[int(draw.integers(0, len(MODES)))]


def _kernel(factor: int, draw: np.random.Generator) -> dict[str, Any]:
    """A bell of size 7 to 25: two variances U[0, 4 + factor] and an angle, or one sigma U[0, 2 + factor / 5]."""
    size = 2 * int(draw.integers(2, 12)) + 3
    if draw.random() < 0.5:
        sigma_x, sigma_y = (max(0.05, math.sqrt((4 + factor) * draw.random())) for _ in range(2))
        kind, theta = "aniso", float(draw.uniform(0, math.pi))
    else:
        sigma_x = sigma_y = max(0.05, (2 + 0.2 * factor) * draw.random())
        kind, theta = "iso", 0.0
    return {"kind": kind, "size": size, "sigma_x": sigma_x, "sigma_y": sigma_y, "theta": theta, "beta": None}


def _free_shrink(factor: int, draw: np.random.Generator) -> list[dict[str, Any]]:
    """A shrink by U[1, 2 factor] in any mode, or (a quarter) a blur U[0.1, 0.6 factor] and a shrink by the factor."""
    clip = {"op": "clip"}
    if draw.random() < 0.75:
        by = float(draw.uniform(1, 2 * factor))
        return [{"op": "resize", "base": "current", "divide": by, "mode": _mode(draw)}, clip]
    sigma = float(draw.uniform(0.1, 0.6 * factor))
    bell = {"kind": "iso", "size": LARGEST_SIZE_PX, "sigma_x": sigma, "sigma_y": sigma, "theta": 0.0, "beta": None}
    return [
        {"op": "blur", "kernel": bell},
        {"op": "resize", "base": "current", "divide": factor, "mode": "bilinear"},
        clip,
    ]
