"""What a request may ask of InstantIR, and how its loop is steered. Torch-free: judged before a job starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from components.options import on_top, typed_options

Reference = Literal["preview", "preview_dcp", "preview_unconditional", "mean", "lq", "hq"]
"""Table 2a, from the full one ("+DCP +prompt") down: what the Aggregator sees beside the LQ latents."""

Adaptive = Literal["none", "paper", "released"]
PREVIEWS = ("preview", "preview_dcp", "preview_unconditional")

_BUILT_IN: Mapping[str, Any] = {
    "sampler": "ddim",
    "start": "lq",
    "adaptive": "none",
    "aggregator_stop": 1.0,
    "view": "whole",
    "encoding": "mode",
    "resize": "native",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": _BUILT_IN,
    "paper": {**_BUILT_IN, "steps": 30, "cfg_scale": 7.0, "start": "noise", "adaptive": "paper"},
    "released": {
        **_BUILT_IN,
        "steps": 30,
        "cfg_scale": 7.0,
        "sampler": "ddpm",
        "view": "crop",
        "encoding": "sample",
        "resize": "released",
    },
    "creative": {**_BUILT_IN, "aggregator_stop": 0.7},
}
"""What each preset settles; explicit options win over it, and it wins over a recipe's defaults.

paper: section 4.1 and Alg. 1. released: command line of the official code at commit 183ccf5. creative: section 4.4,
with the Aggregator stopped at the middle of the 0.6 to 0.8 that the authors advise; it wants a prompt.
"""


def restore_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Restorer options that a resolved recipe settles; a model imported without a recipe takes the paper's.

    A model is restored with the view and the references that it was trained on.
    """
    names = {
        "steps": "steps_at_restore",
        "cfg_scale": "cfg_scale",
        "reference_noise": "reference_noise",
        "view": "view",
    }
    options = {option: recipe[key] for option, key in names.items() if key in recipe}
    return options | ({"reference": "lq"} if recipe.get("reference") == "lq" else {})


def check_options(given: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The given options in their own types; see components.options.OptionCheck.

    Args:
        defaults: what the model's recipe settles, see restore_defaults.

    Raises:
        ValueError: an unknown name (with the near one), a wrong type, a value outside its range, or two options that
            exclude each other, one of them perhaps the model's own.
    """
    values = typed_options(given, get_type_hints(Options))
    on_top(values, parse_options(defaults, Options()), PRESETS)  # checks the ranges
    return values


def parse_options(given: Mapping[str, Any], defaults: Options) -> Options:
    """Options by name on top of their preset's, on top of defaults; raises as check_options."""
    return on_top(typed_options(given, get_type_hints(Options)), defaults, PRESETS)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the loop is steered; the defaults are the released pipeline's.

    Attributes:
        cfg_scale: guidance; 1 or less runs the positive half only.
        guidance_rescale: see samplers.guidance.guide.
        aggregator_scale: multiplies the residuals; one number or one for each step.
        aggregator_start, aggregator_stop: shares of the steps between which Previewer and Aggregator work. (The
            released pipeline fails where the start is above 0; here there are no residuals before it.)
        preview_start, preview_stop: shares of the steps between which references are made; outside, the LQ latents
            stand in for them.
        adaptive: "released" scales the residuals by the adaptive factor of the step before; "paper" moves the reference
            towards the LQ latents by it (Alg. 1, line 5).
        adaptive_clamp: "paper" only: keep the factor in 0 .. 1. The clamp is ours; without it the reference may lie
            beyond the LQ latents.
        reference: what the Aggregator sees beside the LQ latents.
        reference_noise: give the reference fresh noise of the current step.
        released_rules: the released pipeline's surprises: a step whose scale is 0.1 or less makes no preview and reuses
            the residuals of the step before, scaled once more; a factor over an unrenewed preview is infinite; and no
            scale exceeds 1, as the factor of 1 caps it. Otherwise only a scale of 0 leaves the Aggregator out, nothing
            is reused, a factor that cannot be renewed stays, and a scale is what it says.
        preview_every, aggregator_every: steps between two previews, and between two calls of the Aggregator; what lies
            between takes the last ones. 1 is exact; above, time is saved for a stated error (docs/benchmarks.md).

    Raises:
        ValueError: a share outside 0 .. 1, a negative scale, an interval below 1, or options that exclude each other.
    """

    cfg_scale: float = 7.0
    guidance_rescale: float = 0.0
    aggregator_scale: float | Sequence[float] = 1.0
    aggregator_start: float = 0.0
    aggregator_stop: float = 1.0
    preview_start: float = 0.0
    preview_stop: float = 1.0
    adaptive: Adaptive = "none"
    adaptive_clamp: bool = True
    reference: Reference = "preview"
    reference_noise: bool = False
    released_rules: bool = True
    preview_every: int = 1
    aggregator_every: int = 1

    def __post_init__(self) -> None:
        for name in ("preview_every", "aggregator_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("guidance_rescale", "aggregator_start", "aggregator_stop", "preview_start", "preview_stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale must be at least 0, got {self.cfg_scale}")
        if self.adaptive != "none" and self.reference not in PREVIEWS:
            raise ValueError(
                f"adaptive {self.adaptive} compares previews, so reference must be one of {', '.join(PREVIEWS)}, "
                f"got {self.reference}"
            )
        if self.reference_noise and self.adaptive == "released" and self.released_rules:
            raise ValueError("reference_noise is none of the released pipeline's, so preset released excludes it")

    @property
    def guided(self) -> bool:
        return self.cfg_scale > 1

    def scale_at(self, step: int, of: int) -> float:
        """The residuals' scale at a 0-based step, without the adaptive factor."""
        if step / of < self.aggregator_start or (step + 1) / of > self.aggregator_stop:
            return 0.0
        if isinstance(self.aggregator_scale, Sequence):
            return float(self.aggregator_scale[step])
        return float(self.aggregator_scale)

    def previews_at(self, step: int, of: int) -> bool:
        """Whether the reference is made at a 0-based step."""
        return not (step / of < self.preview_start or (step + 1) / of > self.preview_stop)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A request's options, with InstantIR's defaults.

    Attributes:
        preset: "default", "paper", "released" or "creative": sets others, see PRESETS.
        steps: sampler steps (paper 4.1: 30).
        cfg_scale: guidance (paper 4.1: 7.0); 1 or less switches it off and halves the cost.
        sampler: "ddim" as in the paper, "ddpm" (ancestral) as in the released tools.
        start: "lq" starts from the noised LQ latents (released), "noise" from pure noise (paper Alg. 1).
        reference: what the Aggregator sees beside the LQ latents (Table 2a): "preview" by the Previewer with picture
            and prompt, "preview_dcp" with the picture only, "preview_unconditional" with neither, "mean" the clean
            estimate of the UNet without Aggregator and guidance (Eq. 2), "lq" the LQ latents again, "hq" the picture
            given with the request.
        reference_noise: give the reference fresh noise of the current step; for an Aggregator trained so.
        adaptive: AdaRes. "paper": Alg. 1 moves the reference towards the LQ latents; "released": the adaptive factor
            scales the residuals; "none".
        adaptive_clamp: keep the paper's factor in 0 .. 1.
        preview_start, preview_stop: shares of the steps outside of which the LQ latents stand in for the reference; a
            start of 0.1 to 0.4 for fidelity.
        aggregator_start, aggregator_stop: shares of the steps between which the Aggregator works; a stop at 0.6 to 0.8
            for creative restoration.
        aggregator_scale: multiplies the aggregator's residuals.
        guidance_rescale: share of the guided prediction brought back to the unguided one's contrast.
        color: colour transfer from the input, see components.color.
        view: how the perceptor sees the picture, see preprocess.view_pixels: "whole", "crop" (released), "pad" or
            "crops".
        encoding: of the LQ picture: the "mode" of the encoder's distribution, or a "sample" of it (released), seeded.
        resize: "native" restores at the result's size; "released" at the size of the official command line (short side
            at least 768, long side at most 1024, multiples of 64), and resizes the result.
        min_side_px: with "native": a shorter short side is enlarged to it for the networks; 0 for no limit.
        tile_px: pictures with a longer side are restored in tiles of this side; 0 takes 128 latents (1024 px at SDXL's
            factor of 8).
        tile_overlap: share of a tile that neighbours share at least.
        preview_every, aggregator_every: see LoopSettings; 1 is exact.

    Raises:
        ValueError: a value outside its range, or options that exclude each other.
    """

    preset: Literal["default", "paper", "released", "creative"] = "default"
    steps: int = 30
    cfg_scale: float = 7.0
    sampler: Literal["ddim", "ddpm"] = "ddim"
    start: Literal["lq", "noise"] = "lq"
    reference: Reference = "preview"
    reference_noise: bool = False
    adaptive: Adaptive = "none"
    adaptive_clamp: bool = True
    preview_start: float = 0.0
    preview_stop: float = 1.0
    aggregator_start: float = 0.0
    aggregator_stop: float = 1.0
    aggregator_scale: float = 1.0
    guidance_rescale: float = 0.0
    color: Literal["none", "adain", "wavelet"] = "none"
    view: Literal["whole", "crop", "pad", "crops"] = "whole"
    encoding: Literal["mode", "sample"] = "mode"
    resize: Literal["native", "released"] = "native"
    min_side_px: int = 0
    tile_px: int = 0
    tile_overlap: float = 0.25
    preview_every: int = 1
    aggregator_every: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.aggregator_scale < 0:
            raise ValueError(f"aggregator_scale must be at least 0, got {self.aggregator_scale}")
        if not 0 <= self.min_side_px <= 4096:
            raise ValueError(f"min_side_px must be between 0 and 4096, got {self.min_side_px}")
        if self.tile_px != 0 and not 64 <= self.tile_px <= 8192:
            raise ValueError(f"tile_px must be 0 or between 64 and 8192, got {self.tile_px}")
        if not 0 <= self.tile_overlap <= 0.75:
            raise ValueError(f"tile_overlap must be between 0 and 0.75, got {self.tile_overlap}")
        if self.resize == "released" and self.min_side_px:
            raise ValueError("resize released has its own shortest side: leave min_side_px out")
        self.loop  # noqa: B018  the loop's own checks

    @property
    def loop(self) -> LoopSettings:
        return LoopSettings(
            cfg_scale=self.cfg_scale,
            guidance_rescale=self.guidance_rescale,
            aggregator_scale=self.aggregator_scale,
            aggregator_start=self.aggregator_start,
            aggregator_stop=self.aggregator_stop,
            preview_start=self.preview_start,
            preview_stop=self.preview_stop,
            adaptive=self.adaptive,
            adaptive_clamp=self.adaptive_clamp,
            reference=self.reference,
            reference_noise=self.reference_noise,
            released_rules=self.preset == "released",
            preview_every=self.preview_every,
            aggregator_every=self.aggregator_every,
        )
