"""InstantIR's options of a request and the settings of its loop. Torch-free, for checks before a job starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from components.options import apply_preset, typed_options

Reference = Literal["preview", "preview_dcp", "preview_unconditional", "mean", "lq", "hq"]
"""Kinds of reference, the Aggregator's second input: Table 2a, from the full preview ("+DCP +prompt") down."""

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
    "color": "wavelet",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": _BUILT_IN,
    "paper": {**_BUILT_IN, "steps": 30, "cfg_scale": 7.0, "start": "noise", "adaptive": "paper", "color": "none"},
    "released": {
        **_BUILT_IN,
        "steps": 30,
        "cfg_scale": 7.0,
        "sampler": "ddpm",
        "view": "crop",
        "encoding": "sample",
        "resize": "released",
        "color": "none",
    },
    "creative": {**_BUILT_IN, "aggregator_stop": 0.7},
}
"""Options of each preset. Explicit options override the preset, and the preset overrides a recipe's defaults.

paper: section 4.1 and Alg. 1. released: command line of the official code at commit 183ccf5. Neither transfers colours
(the code has a transfer and never calls it). creative: section 4.4, where the Aggregator stops at 0.7, the middle of
the 0.6 to 0.8 that the authors advise; it needs a prompt.
"""


def restore_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Restorer options from a resolved recipe: a restoration uses the view and the references of the training.

    `restore_options` in a recipe are options by their own names: an import writes released.RELEASE_DEFAULTS there.
    """
    names = {
        "steps": "steps_at_restore",
        "cfg_scale": "cfg_scale",
        "reference_noise": "reference_noise",
        "view": "view",
    }
    options = {option: recipe[key] for option, key in names.items() if key in recipe}
    options |= {"reference": "lq"} if recipe.get("reference") == "lq" else {}
    return options | dict(recipe.get("restore_options") or {})


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The options, converted to their types; see components.options.OptionCheck.

    Args:
        options: options by name.
        defaults: options from the model's recipe, see restore_defaults.

    Raises:
        ValueError: an unknown name (the error suggests the nearest one), a wrong type, a value outside its range, or
            two options that exclude each other; one of them may be the model's default.
    """
    parse_options(options, parse_options(defaults, Options()))  # checks the ranges
    return typed_options(options, get_type_hints(Options))


def parse_options(options: Mapping[str, Any], defaults: Options) -> Options:
    """`defaults`, overridden by the preset's options, then by the named options; raises the errors of check_options.

    A named min_side_px also replaces a default working size, which would exclude it.
    """
    values = typed_options(options, get_type_hints(Options))
    if values.get("min_side_px") and not {"resize", "preset"} & set(values):
        values["resize"] = "native"
    return apply_preset(values, defaults, PRESETS)


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of the sampling loop; the defaults are the released pipeline's.

    Attributes:
        cfg_scale: scale of guidance; 1 or less runs the positive half only.
        guidance_rescale: see samplers.guidance.guide.
        aggregator_scale: factor of the residuals; one number or one for each step.
        aggregator_start, aggregator_stop: shares of the steps between which Previewer and Aggregator run. (The released
            pipeline fails with a start above 0; here there are no residuals before the start.)
        preview_start, preview_stop: shares of the steps between which references are computed; outside, the LQ latents
            replace them.
        adaptive: "released" scales the residuals by the adaptive factor of the step before; "paper" moves the reference
            towards the LQ latents by the factor (Alg. 1, line 5).
        adaptive_clamp: "paper" only: keep the factor in 0 .. 1. The paper has no clamp; without it the reference may
            lie beyond the LQ latents.
        reference: kind of the Aggregator's second input, next to the LQ latents.
        reference_noise: add fresh noise of the current step to the reference.
        released_rules: True follows three quirks of the released pipeline. A step whose scale is 0.1 or less makes no
            preview and reuses the residuals of the step before, scaled once more. The factor of a repeated preview is
            infinite. No scale exceeds 1, since the factor of 1 caps it. False: only a scale of 0 skips the Aggregator,
            residuals are not reused, the factor of a repeated preview does not change, and scales have no cap.
        preview_every, aggregator_every: steps between two previews, and between two calls of the Aggregator; the steps
            between use the last results. 1 is exact; above 1 saves time at an error in docs/benchmarks.md.

    Raises:
        ValueError: a share is outside 0 .. 1, a scale is negative, an interval is below 1, or two options exclude each
            other.
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
            raise ValueError("the released pipeline has no reference_noise: leave it out with preset released")

    @property
    def guided(self) -> bool:
        return self.cfg_scale > 1

    def scale_at(self, step: int, of: int) -> float:
        """The residuals' scale at a 0-based step of `of` steps, without the adaptive factor."""
        if step / of < self.aggregator_start or (step + 1) / of > self.aggregator_stop:
            return 0.0
        if isinstance(self.aggregator_scale, Sequence):
            return float(self.aggregator_scale[step])
        return float(self.aggregator_scale)

    def previews_at(self, step: int, of: int) -> bool:
        """Whether a reference is computed at a 0-based step of `of` steps."""
        return not (step / of < self.preview_start or (step + 1) / of > self.preview_stop)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A request's options, with InstantIR's defaults.

    Attributes:
        preset: "default", "paper", "released" or "creative"; sets other options, see PRESETS.
        steps: sampler steps (paper 4.1: 30).
        cfg_scale: scale of guidance (paper 4.1: 7.0); 1 or less switches guidance off and halves the cost.
        sampler: "ddim" as in the paper, "ddpm" (ancestral) as in the released tools.
        start: "lq" starts from the noised LQ latents (released), "noise" from pure noise (paper Alg. 1).
        reference: the Aggregator's second input next to the LQ latents (Table 2a). "preview": the Previewer's output
            with picture and prompt; "preview_dcp": with the picture only; "preview_unconditional": with neither;
            "mean": the clean estimate of the UNet without Aggregator and guidance (Eq. 2); "lq": the LQ latents again;
            "hq": the HQ picture of the request.
        reference_noise: add fresh noise of the current step to the reference; for an Aggregator trained with it.
        adaptive: AdaRes. "paper": Alg. 1 moves the reference towards the LQ latents; "released": the adaptive factor
            scales the residuals; "none".
        adaptive_clamp: keep the paper's factor in 0 .. 1.
        preview_start, preview_stop: shares of the steps between which references are computed; outside, the LQ latents
            replace them. A start of 0.1 to 0.4 raises fidelity.
        aggregator_start, aggregator_stop: shares of the steps between which the Aggregator runs; a stop at 0.6 to 0.8
            is for creative restoration.
        aggregator_scale: factor of the Aggregator's residuals.
        guidance_rescale: share of the guided prediction that is rescaled to the unguided one's contrast.
        color: colour transfer from the input, see components.color.
        view: the perceptor's view of the picture, see preprocess.view_pixels: "whole", "crop" (released), "pad" or
            "crops".
        encoding: encoding of the LQ picture: the "mode" of the encoder's distribution, or a seeded "sample" (released).
        resize: "native" restores at the result's size; "released" at the size of the official command line (short side
            at least 768, long side at most 1024, multiples of 64), and resizes the result.
        min_side_px: with "native": a shorter short side is enlarged to this for the networks; 0 for no limit.
        tile_px: pictures with a longer side are restored in tiles of this side; 0 takes 128 latents (1024 px at SDXL's
            factor of 8).
        tile_overlap: smallest share of a tile that neighbouring tiles share.
        preview_every, aggregator_every: see LoopSettings; 1 is exact.

    Raises:
        ValueError: a value is outside its range, or options exclude each other.
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
    color: Literal["none", "adain", "wavelet"] = "wavelet"
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
        self.loop  # noqa: B018  runs the checks of LoopSettings

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
