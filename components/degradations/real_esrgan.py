"""The second-order degradation of Real-ESRGAN: blur, resize, noise and JPEG, twice, then a low-pass.

Torch-free. `draw` writes every number into a plan; `apply` reads nothing but the plan, so that a plan found in a log
replays to the same bits. Numbers without another source are those of the x4plus training options of Real-ESRGAN
(Wang et al. 2021, section 4.1; xinntao/Real-ESRGAN, options/train_realesrgan_x4plus.yml).

Every draw is made per picture; the original draws the resizes, the noise kinds, the second blur and the final order per
batch and hides it behind a pool of 180 pairs. The marginal distributions are the same. Mended against the original:
resizes go to a size, so that LQ stays aligned with HQ; gray noise is drawn per picture; pictures of any side from
MIN_SIDE_PX work; and, unless `faithful`, JPEG keeps its table upright and pads by repeating the edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from components.degradations import kernels, noise
from components.degradations.jpeg import jpeg
from components.degradations.resize import MODES, resize
from components.randomness import generator, stream_key
from components.types import Image, Plan, SampleError

MIN_SIDE_PX = 32  # ours: below this a quarter-size LQ picture says nothing
WIDE_SINC_FROM_PX = 13  # kernels from this size on may have the lower cutoff pi / 5, smaller ones pi / 3
PLAN_KIND, PLAN_VERSION = "real_esrgan", 1  # a plan that would replay to other bits gets another version
SEED_BITS = 63  # noise seeds fit a signed 64-bit column

Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One order of the model; the defaults are those of the first.

    Attributes:
        blur_prob: probability of blurring at all.
        sinc_prob: probability that the blur is a circular low-pass instead of a bell.
        families: probabilities of the bell families, in the order of `kernels.FAMILIES`.
        sigma: standard deviation of the bells, pixels; both axes are drawn alone for the anisotropic ones.
        beta_generalized, beta_plateau: shape exponents; half of the draws lie below 1, half above.
        resize_probs: probabilities of enlarging, shrinking, keeping.
        resize: smallest and largest factor.
        gaussian_prob: probability of Gaussian noise; Poisson otherwise.
        gaussian: standard deviation, 8-bit levels.
        poisson: scale of shot noise; 1 = as many photons as levels.
        gray_prob: probability of gray noise, of either kind.
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
            if not math.isclose(sum(getattr(self, name)), 1.0, abs_tol=1e-6):
                raise ValueError(f"{name} must sum to 1, got {getattr(self, name)}")
        if len(self.families) != len(kernels.FAMILIES):
            raise ValueError(f"families needs {len(kernels.FAMILIES)} probabilities, got {len(self.families)}")
        for name in ("blur_prob", "sinc_prob", "gaussian_prob", "gray_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        for name in ("sigma", "beta_generalized", "beta_plateau", "resize", "gaussian", "poisson", "quality"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be a positive rising range, got {(low, high)}")
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
"""The second order of Real-ESRGAN x4plus; what it does not name is as in the first."""


@dataclass(frozen=True, kw_only=True)
class RealESRGAN:
    """The model's numbers, and a `Degradation`.

    Attributes:
        factor: how much smaller LQ is before it is enlarged (bicubic) back to HQ's size.
        kernel_sizes: smallest and largest kernel side, odd pixels; all odd sizes between are equally likely.
        first, second: the two orders.
        final_sinc_prob: probability of the closing low-pass.
        clean_prob: share of pictures left undegraded.
        sharpen: sharpen HQ before degrading it. The training target is then usually sharpened too: see `target`.
        sharpen_target: what `target` returns is sharpened.
        round_small: round to 8 bits at LQ size, before enlarging.
        faithful: reproduce the two accidents of the original's JPEG simulator (degradations/jpeg.py).
    """

    factor: int = 4
    kernel_sizes: tuple[int, int] = (7, 21)
    first: Stage = field(default_factory=Stage)
    second: Stage = SECOND
    final_sinc_prob: float = 0.8
    clean_prob: float = 0.0
    sharpen: bool = False
    sharpen_target: bool = False
    round_small: bool = True
    faithful: bool = False

    def __post_init__(self) -> None:
        low, high = self.kernel_sizes
        if not (1 <= low <= high and low % 2 == 1 and high % 2 == 1):
            raise ValueError(f"kernel_sizes must be two odd rising numbers, got {self.kernel_sizes}")
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        for name in ("final_sinc_prob", "clean_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """All numbers of one degradation, JSON-serialisable; the same arguments give the same plan anywhere."""
        draw = generator(seed, "degradation", key, position)
        plan: dict[str, Any] = {"kind": PLAN_KIND, "version": PLAN_VERSION, "sharpen": self.sharpen}
        if draw.random() < self.clean_prob:
            return plan | {"clean": True}
        plan |= {"clean": False, "factor": self.factor, "faithful": self.faithful, "round_small": self.round_small}
        for number, stage in ((1, self.first), (2, self.second)):
            blurred = draw.random() < stage.blur_prob
            kernel = _draw_kernel(stage, self.kernel_sizes, draw)
            plan[f"blur{number}"] = kernel if blurred else None
            plan[f"resize{number}"] = {"factor": _draw_factor(stage, draw), "mode": _draw_mode(draw)}
            noise_seed = stream_key(seed, "degradation", key, position, f"noise{number}") >> (128 - SEED_BITS)
            plan[f"noise{number}"] = _draw_noise(stage, draw) | {"seed": noise_seed}
            plan[f"jpeg{number}"] = float(draw.uniform(*stage.quality))
        plan["jpeg_first"] = bool(draw.random() < 0.5)
        plan["resize3"] = _draw_mode(draw)
        final = _draw_sinc(_draw_size(self.kernel_sizes, draw), math.pi / 3, draw)
        plan["final"] = final if draw.random() < self.final_sinc_prob else None
        return plan

    def apply(self, hq: Image, plan: Plan) -> Image:
        """Degrade float32 [H, W, 3] in [0, 1] by a plan of `draw`; nothing but the plan counts.

        Returns:
            float32 [H, W, 3] in [0, 1].

        Raises:
            SampleError: hq has a wrong shape ("shape"), is below MIN_SIDE_PX ("too_small"), holds NaN or infinity
                ("nan") or leaves 0..1 ("range").
        """
        return apply_plan(hq, plan)

    def target(self, hq: Image) -> Image:
        """The training target that belongs to `hq`, float32 [H, W, 3]: sharpened where the recipe says so."""
        check_picture(hq)
        return kernels.sharpen(hq) if self.sharpen_target else hq


def apply_plan(hq: Image, plan: Plan) -> Image:
    """Execute a plan of RealESRGAN.draw; see RealESRGAN.apply. ValueError where the plan is of another kind."""
    if plan.get("kind") != PLAN_KIND or plan.get("version") != PLAN_VERSION:
        raise ValueError(f"expected a {PLAN_KIND} plan of version {PLAN_VERSION}, got {plan.get('kind')!r}")
    check_picture(hq)
    image = kernels.sharpen(hq) if plan["sharpen"] else hq
    if plan["clean"]:
        return image.copy()
    height, width = hq.shape[:2]
    factor, faithful = plan["factor"], plan["faithful"]
    small = (max(1, height // factor), max(1, width // factor))

    image = _blur(image, plan["blur1"])
    scale = plan["resize1"]["factor"]
    image = _resize(image, height * scale, width * scale, plan["resize1"]["mode"])
    image = add_noise(image, plan["noise1"])
    image = jpeg(image, plan["jpeg1"], faithful)

    image = _blur(image, plan["blur2"])
    scale = plan["resize2"]["factor"]
    image = _resize(image, height / factor * scale, width / factor * scale, plan["resize2"]["mode"])
    image = add_noise(image, plan["noise2"])

    if plan["jpeg_first"]:
        image = jpeg(image, plan["jpeg2"], faithful)
        image = _blur(resize(image, *small, plan["resize3"]), plan["final"])
    else:
        image = _blur(resize(image, *small, plan["resize3"]), plan["final"])
        image = jpeg(image, plan["jpeg2"], faithful)

    image = image.clip(0, 1)
    if plan["round_small"]:
        image = np.rint(image * np.float32(255)) / np.float32(255)
    return resize(image, height, width, "bicubic").clip(0, 1)


def add_noise(image: Image, spec: Mapping[str, Any]) -> Image:
    """Add a plan's noise, {"kind", "level", "gray", "seed"}, to float32 [H, W, 3], and clip to 0..1."""
    draw = generator(spec["seed"], "noise")
    if spec["kind"] == "gaussian":
        made = noise.gaussian_field(image.shape[0], image.shape[1], spec["level"], spec["gray"], draw)
    else:
        made = noise.poisson_field(image, spec["level"], spec["gray"], draw)
    return (image + made).clip(0, 1)


def check_picture(hq: Image) -> None:
    """Refuse what cannot be degraded; SampleError codes as in RealESRGAN.apply."""
    if hq.ndim != 3 or hq.shape[2] != 3 or hq.dtype != np.float32:
        raise SampleError("shape", f"expected float32 [H, W, 3], got {hq.dtype} {list(hq.shape)}")
    if min(hq.shape[:2]) < MIN_SIDE_PX:
        raise SampleError("too_small", f"{hq.shape[1]} x {hq.shape[0]}: sides must have at least {MIN_SIDE_PX} pixels")
    low, high = float(hq.min()), float(hq.max())  # NaN spreads to both
    if not (math.isfinite(low) and math.isfinite(high)):
        raise SampleError("nan", "the picture holds NaN or infinity")
    if low < 0 or high > 1:
        raise SampleError("range", f"values reach from {low:g} to {high:g}, outside 0..1")


def _blur(image: Image, spec: Mapping[str, Any] | None) -> Image:
    return image if spec is None else kernels.blur(image, spec)


def _resize(image: Image, height: float, width: float, mode: str) -> Image:
    """Resize to the floored sides, at least 1 pixel each."""
    return resize(image, max(1, int(height)), max(1, int(width)), mode)


def _draw_kernel(stage: Stage, sizes: tuple[int, int], draw: np.random.Generator) -> dict[str, Any]:
    """A blur kernel's numbers: a low-pass with `sinc_prob`, else a bell."""
    size = _draw_size(sizes, draw)
    if draw.random() < stage.sinc_prob:
        return _draw_sinc(size, math.pi / 3 if size < WIDE_SINC_FROM_PX else math.pi / 5, draw)
    kind = kernels.FAMILIES[int(draw.choice(len(kernels.FAMILIES), p=stage.families))]
    sigma_x = sigma_y = float(draw.uniform(*stage.sigma))
    theta, beta = 0.0, None
    if kind.endswith("aniso"):
        sigma_y, theta = float(draw.uniform(*stage.sigma)), float(draw.uniform(-math.pi, math.pi))
    if kind.startswith("generalized"):
        beta = _draw_beta(stage.beta_generalized, draw)
    elif kind.startswith("plateau"):
        beta = _draw_beta(stage.beta_plateau, draw)
    return {"kind": kind, "size": size, "sigma_x": sigma_x, "sigma_y": sigma_y, "theta": theta, "beta": beta}


def _draw_size(sizes: tuple[int, int], draw: np.random.Generator) -> int:
    """An odd side between the two, both included."""
    return int(sizes[0] + 2 * draw.integers(0, (sizes[1] - sizes[0]) // 2 + 1))


def _draw_sinc(size: int, lowest: float, draw: np.random.Generator) -> dict[str, Any]:
    return {"kind": "sinc", "size": size, "cutoff": float(draw.uniform(lowest, math.pi))}


def _draw_beta(limits: Range, draw: np.random.Generator) -> float:
    """Half below 1 and half above; a lower limit of exactly 1 (plateau) gives beta 1 half the time, as recorded."""
    low, high = limits
    return float(draw.uniform(low, 1.0) if draw.random() < 0.5 else draw.uniform(1.0, high))


def _draw_factor(stage: Stage, draw: np.random.Generator) -> float:
    """Resize factor: enlarge, shrink or keep."""
    choice = int(draw.choice(3, p=stage.resize_probs))
    return float((draw.uniform(1.0, stage.resize[1]), draw.uniform(stage.resize[0], 1.0), 1.0)[choice])


def _draw_mode(draw: np.random.Generator) -> str:
    return tuple(MODES)[int(draw.integers(0, len(MODES)))]


def _draw_noise(stage: Stage, draw: np.random.Generator) -> dict[str, Any]:
    """Kind, level and gray flag; level is in 8-bit levels for Gaussian noise and a scale for Poisson."""
    kind: Literal["gaussian", "poisson"] = "gaussian" if draw.random() < stage.gaussian_prob else "poisson"
    level = float(draw.uniform(*(stage.gaussian if kind == "gaussian" else stage.poisson)))
    return {"kind": kind, "level": level, "gray": bool(draw.random() < stage.gray_prob)}
