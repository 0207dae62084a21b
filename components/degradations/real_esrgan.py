"""The second-order degradation of Real-ESRGAN: blur, resize, noise and JPEG, twice, then a low-pass.

Torch-free; it draws plans, the back ends execute them. Numbers without another source are those of the x4plus training
options of Real-ESRGAN (Wang et al. 2021, section 4.1; xinntao/Real-ESRGAN, options/train_realesrgan_x4plus.yml).

Every draw is per picture. The original draws the resizes, the noise kinds, the second blur and the final order per
batch, and mixes batches in a pool of 180 pairs. The marginal distributions are the same.

The accidents of the original, and the two modes (`faithful` and default):

    accident                                              faithful          default
    first resize samples by its factor, LQ shifts         kept              mended: by size, LQ is aligned with HQ
    area takes whole pixels ("pool")                      kept              kept: fractional weights remove noise, and
                                                                            the distribution test detects it
    JPEG simulator with real-valued quality and tables    kept              mended: libjpeg, integer quality
    JPEG pads with black to multiples of 16, repeats      kept              kept: the distribution test detects each;
    chroma instead of interpolating it, and has its                         jpeg_form "edge" has none of them
    luma table transposed
    photon count follows the picture's distinct levels    kept              kept: it decides the strength of the noise
    one gray noise field for a whole batch                mended            mended
    fails below 74 pixels                                 mended            mended
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from components.degradations import kernels
from components.degradations.engine import apply_plan, as_picture
from components.degradations.filters import sharpen
from components.degradations.jpeg import FORMS
from components.degradations.plans import MAX_KERNEL_PX, SEED_BITS, make_plan
from components.naming import did_you_mean
from components.randomness import generator, stream_key
from components.types import Image, Plan

WIDE_SINC_FROM_PX = 13  # kernels from this size on may have the lower cutoff pi / 5, smaller ones pi / 3
SHRINK_MODES = ("pool", "bilinear", "bicubic")

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The numbers of one order of the model; the defaults are those of the first order.

    Attributes:
        blur_prob: probability of a blur.
        sinc_prob: probability that the blur is a circular low-pass instead of a bell.
        families: probabilities of the bell families, in the order of `kernels.FAMILIES`.
        sigma: standard deviation of the bells, pixels; anisotropic bells draw one for each axis.
        beta_generalized, beta_plateau: shape exponents; half of the draws are below 1, half above.
        resize_probs: probabilities of enlarging, shrinking, and keeping the size.
        resize: smallest and largest factor.
        gaussian_prob: probability of Gaussian noise; Poisson otherwise.
        gaussian: standard deviation, 8-bit levels.
        poisson: scale of shot noise; at 1 there are as many photons as levels.
        gray_prob: probability that noise of either kind is gray.
        quality: JPEG quality.
    """

    blur_prob: float = 1.0
    sinc_prob: float = 0.1
    families: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sigma: Range = (0.2, 3.0)
    beta_generalized: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)
    resize_probs: tuple[float, float, float] = (0.2, 0.7, 0.1)
    resize: Range = (0.15, 1.5)
    gaussian_prob: float = 0.5
    gaussian: Range = (1.0, 30.0)
    poisson: Range = (0.05, 3.0)
    gray_prob: float = 0.4
    quality: Range = (30.0, 95.0)

    def __post_init__(self) -> None:
        for name in ("families", "resize_probs"):
            if min(getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
            if not math.isclose(sum(getattr(self, name)), 1.0, abs_tol=1e-6):
                raise ValueError(f"{name} must sum to 1, got {getattr(self, name)}")
        if len(self.families) != len(kernels.FAMILIES):
            raise ValueError(f"families needs {len(kernels.FAMILIES)} probabilities, got {len(self.families)}")
        for name in ("blur_prob", "sinc_prob", "gaussian_prob", "gray_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        for name in ("sigma", "beta_generalized", "beta_plateau", "resize", "gaussian", "poisson", "quality"):
            low, high = getattr(self, name)
            if not 1e-3 <= low <= high <= 1e4:
                raise ValueError(f"{name} must be a rising range within 0.001..10000, got {(low, high)}")
        for name in ("beta_generalized", "beta_plateau"):
            if not getattr(self, name)[0] <= 1 <= getattr(self, name)[1]:
                raise ValueError(f"{name} must reach from at most 1 to at least 1, got {getattr(self, name)}")
        if not self.resize[0] <= 1 <= self.resize[1]:
            raise ValueError(f"resize must reach from below 1 to above 1, got {self.resize}")
        if not 1 <= self.quality[0] <= self.quality[1] <= 100:
            raise ValueError(f"quality must lie in 1..100, got {self.quality}")


SECOND = Stage(
    blur_prob=0.8,
    sigma=(0.2, 1.5),
    resize_probs=(0.3, 0.4, 0.3),
    resize=(0.3, 1.2),
    gaussian=(1.0, 25.0),
    poisson=(0.05, 2.5),
)
"""The second order of Real-ESRGAN x4plus; the other numbers are those of the first order."""


@dataclass(frozen=True, kw_only=True)
class RealESRGAN:
    """A `Degradation` with the numbers of Real-ESRGAN.

    Attributes:
        factors: LQ's size is HQ's divided by one of these, drawn per picture, before the (bicubic) enlarging back.
        kernel_sizes: smallest and largest kernel side, odd pixels; all odd sizes in between are equally likely.
        first, second: the two orders.
        final_sinc_prob: probability of the final low-pass.
        clean_prob: share of pictures without degradation (still sharpened where `sharpen` is true).
        sharpen: sharpen HQ before the degradation. The training target is then usually sharpened too, see `target`.
        sharpen_target: `target` returns a sharpened picture.
        quick_sharpen: sharpen approximately, see filters.sharpen; plans of a faithful degradation ignore it.
        round_small: round to 8 bits at LQ size, before the enlarging.
        clip_small: clip after the final low-pass where it comes last; otherwise its overshoots reach the enlarging.
        resize_back: enlarge LQ to HQ's size; otherwise LQ keeps 1 / factor of it.
        round_back: round to 8 bits after the enlarging.
        jpeg_form: one of jpeg.FORMS; `faithful` uses the simulator instead.
        whole_small: the second resize truncates twice, int(int(side / factor) * scale), as in InstaRevive.
        faithful: reproduce the accidents of the original, see the top of this file.
    """

    factors: tuple[int, ...] = (4,)
    kernel_sizes: tuple[int, int] = (7, 21)
    first: Stage = field(default_factory=Stage)
    second: Stage = SECOND
    final_sinc_prob: float = 0.8
    clean_prob: float = 0.0
    sharpen: bool = False
    sharpen_target: bool = False
    quick_sharpen: bool = False
    round_small: bool = True
    clip_small: bool = True
    resize_back: bool = True
    round_back: bool = False
    jpeg_form: Literal["edge", "matched", "simulator"] = "matched"
    whole_small: bool = False
    faithful: bool = False

    def __post_init__(self) -> None:
        low, high = self.kernel_sizes
        if not (1 <= low <= high <= MAX_KERNEL_PX and low % 2 == 1 and high % 2 == 1):
            raise ValueError(
                f"kernel_sizes must be two odd rising numbers up to {MAX_KERNEL_PX}, got {self.kernel_sizes}"
            )
        if not self.factors or min(self.factors) < 1:
            raise ValueError(f"factors must be at least one number from 1 on, got {self.factors}")
        if self.faithful and max(self.first.quality[1], self.second.quality[1]) >= 100:
            raise ValueError("faithful needs JPEG qualities below 100: the simulator gives NaN there")
        if self.jpeg_form not in FORMS:
            raise ValueError(f"unknown jpeg_form {self.jpeg_form!r}. {did_you_mean(self.jpeg_form, FORMS)}")
        for name in ("final_sinc_prob", "clean_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """Draws a plan, see plans.py. Equal arguments give equal plans in every process."""
        draw = generator(seed, "degradation", key, position)
        ops: list[dict[str, Any]] = []
        if self.sharpen:
            how = {"exact": True} if self.faithful else {"quick": True} if self.quick_sharpen else {}
            ops.append({"op": "sharpen", **how})
        if draw.random() < self.clean_prob:
            return make_plan(ops)
        factor = self.factors[int(draw.integers(0, len(self.factors)))] if len(self.factors) > 1 else self.factors[0]
        small = {"op": "resize", "base": "hq", "divide": factor, **({"whole": True} if self.whole_small else {})}
        for number, stage in ((1, self.first), (2, self.second)):
            has_blur = draw.random() < stage.blur_prob
            kernel = draw_kernel(stage, self.kernel_sizes, draw)
            if has_blur:
                ops.append(self._blur(kernel))
            base = {"op": "resize", "base": "current"} if number == 1 else small
            ops.append(base | {"scale": draw_factor(stage, draw)} | self._sampling(draw, by_factor=number == 1))
            noise_seed = stream_key(seed, "degradation", key, position, f"noise{number}") >> (128 - SEED_BITS)
            ops.append({"op": "noise", **_draw_noise(stage, draw), "seed": noise_seed})
            ops.append(self._jpeg(float(draw.uniform(*stage.quality))))
        last_jpeg = ops.pop()
        jpeg_first = draw.random() < 0.5
        shrink = small | self._sampling(draw)
        final = draw_sinc(draw_size(self.kernel_sizes, draw), math.pi / 3, draw)
        closing = [shrink, self._blur(final)] if draw.random() < self.final_sinc_prob else [shrink]
        clip = {"op": "clip"}
        ops += [last_jpeg, *closing] if jpeg_first else [*closing, clip, last_jpeg]
        if jpeg_first and self.clip_small:
            ops.append(clip)
        if self.round_small:
            ops.append({"op": "round"})
        if self.resize_back:
            ops += [{"op": "resize", "base": "hq", "mode": "bicubic"}, clip]
            if self.round_back:
                ops.append({"op": "round"})
        return make_plan(ops)

    def apply(self, hq: Image, plan: Plan) -> Image:
        """Executes a plan as engine.apply_plan does; the result depends on the picture and the plan only."""
        return apply_plan(hq, plan)

    def target(self, hq: Image) -> Image:
        """The training target of `hq`, float32 [H, W, 3] in 0..1; sharpened if `sharpen_target` is true."""
        picture = as_picture(hq)
        return sharpen(picture, quick=self.quick_sharpen) if self.sharpen_target else picture

    def target_plan(self) -> Plan | None:
        """`target` as a plan; None if the target is the picture itself."""
        return make_plan([{"op": "sharpen", "quick": self.quick_sharpen}]) if self.sharpen_target else None

    def _blur(self, kernel: Mapping[str, Any]) -> dict[str, Any]:
        return {"op": "blur", "kernel": dict(kernel), **({"exact": True} if self.faithful else {})}

    def _jpeg(self, quality: float) -> dict[str, Any]:
        return {"op": "jpeg", "quality": quality, "form": "simulator" if self.faithful else self.jpeg_form}

    def _sampling(self, draw: np.random.Generator, by_factor: bool = False) -> dict[str, Any]:
        """Keys of a resize: its mode, and with `by_factor` in a faithful degradation its sampling."""
        mode = SHRINK_MODES[int(draw.integers(0, len(SHRINK_MODES)))]
        return {"mode": mode, **({"sampling": "factor"} if by_factor and self.faithful else {})}


def draw_kernel(stage: Stage, sizes: tuple[int, int], draw: np.random.Generator) -> dict[str, Any]:
    """Draws the numbers of a blur kernel: a low-pass with probability `sinc_prob`, otherwise a bell."""
    size = draw_size(sizes, draw)
    if draw.random() < stage.sinc_prob:
        return draw_sinc(size, math.pi / 3 if size < WIDE_SINC_FROM_PX else math.pi / 5, draw)
    kind = kernels.FAMILIES[int(draw.choice(len(kernels.FAMILIES), p=stage.families))]
    sigma_x = sigma_y = float(draw.uniform(*stage.sigma))
    theta, beta = 0.0, None
    if kind.endswith("aniso"):
        sigma_y, theta = float(draw.uniform(*stage.sigma)), float(draw.uniform(-math.pi, math.pi))
    if kind.startswith("generalized"):
        beta = draw_beta(stage.beta_generalized, draw)
    elif kind.startswith("plateau"):
        beta = draw_beta(stage.beta_plateau, draw)
    return {"kind": kind, "size": size, "sigma_x": sigma_x, "sigma_y": sigma_y, "theta": theta, "beta": beta}


def draw_size(sizes: tuple[int, int], draw: np.random.Generator) -> int:
    """Draws an odd side between the two, both included."""
    return int(sizes[0] + 2 * draw.integers(0, (sizes[1] - sizes[0]) // 2 + 1))


def draw_sinc(size: int, lowest: float, draw: np.random.Generator) -> dict[str, Any]:
    return {"kind": "sinc", "size": size, "cutoff": float(draw.uniform(lowest, math.pi))}


def draw_beta(limits: Range, draw: np.random.Generator) -> float:
    """Draws half below 1, half above. A lower limit of 1 (plateau) gives beta 1 half the time, as in the recordings."""
    low, high = limits
    return float(draw.uniform(low, 1.0) if draw.random() < 0.5 else draw.uniform(1.0, high))


def draw_factor(stage: Stage, draw: np.random.Generator) -> float:
    """Draws a resize factor: enlarge, shrink or keep."""
    choice = int(draw.choice(3, p=stage.resize_probs))
    return float((draw.uniform(1.0, stage.resize[1]), draw.uniform(stage.resize[0], 1.0), 1.0)[choice])


def _draw_noise(stage: Stage, draw: np.random.Generator) -> dict[str, Any]:
    """Draws kind, level and gray; the level is in 8-bit levels for Gaussian noise and a scale for Poisson."""
    kind: Literal["gaussian", "poisson"] = "gaussian" if draw.random() < stage.gaussian_prob else "poisson"
    level = float(draw.uniform(*(stage.gaussian if kind == "gaussian" else stage.poisson)))
    return {"kind": kind, "level": level, "gray": bool(draw.random() < stage.gray_prob)}
