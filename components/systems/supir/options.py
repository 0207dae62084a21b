"""SUPIR's options of a request. Torch-free, for checks before a job starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from components.options import apply_preset, typed_options

Words = Literal["none", "paper", "released"]
Preset = Literal[
    "default",
    "paper",
    "released",
    "quality",
    "fidelity",
    "lightning",
    "advice-4",
    "advice-4.5",
    "advice-5",
    "advice-5.5",
]

_RELEASED_FORM: Mapping[str, Any] = {
    "encoding": "sample",
    "resize": "released",
    "min_side_px": 0,
    "sizes": "released",
    "joined_words": False,
    "long_texts": "cut",
    "autoencoder_tiles": "released",
    "tiles": "released",
    "color_from": "first",
}
"""How the official tools prepare pictures, texts and tiles."""

_TEST: Mapping[str, Any] = {
    "sampler": "edm",
    "steps": 50,
    "cfg_scale": 4.0,
    "cfg_start": 1.0,
    "tau": 0.0,
    "algorithm": "released",
    "churn": 5.0,
    "noise_scale": 1.01,
    "control_scale": 1.0,
    "control_start": -1.0,
    "positive_words": "released",
    "negative_words": "released",
    "color": "wavelet",
}
"""Command line of the official code (supir.md, section 4.4)."""

_PAGE: Mapping[str, Any] = {**_TEST, "noise_scale": 1.003}
"""The official demo page's settings."""


def _advice(cfg_scale: float, cfg_start: float, noise_scale: float) -> dict[str, Any]:
    return {**_TEST, "cfg_scale": cfg_scale, "cfg_start": cfg_start, "noise_scale": noise_scale}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": {
        **_TEST,
        "steps": 100,
        "cfg_scale": 7.5,
        "cfg_start": -1.0,
        "tau": 4.0,
        "algorithm": "paper",
        "churn": 0.0,
        "noise_scale": 1.0,
        "positive_words": "paper",
        "negative_words": "paper",
        "resize": "native",
        "min_side_px": 1024,
        "sizes": "tile",
        "joined_words": True,
        "long_texts": "cut",
        "color": "none",
    },
    "released": {**_TEST, **_RELEASED_FORM},
    "quality": {**_PAGE, "cfg_scale": 7.5, "cfg_start": 4.0},
    "fidelity": {**_PAGE, "cfg_scale": 4.0, "cfg_start": 1.0},
    "lightning": {**_TEST, "sampler": "dpmpp2m", "steps": 8, "cfg_scale": 2.0, "cfg_start": -1.0, "noise_scale": 1.003},
    "advice-4": _advice(4.0, 1.0, 1.007),
    "advice-4.5": _advice(4.5, 1.5, 1.011),
    "advice-5": _advice(5.0, 2.0, 1.015),
    "advice-5.5": _advice(5.5, 2.5, 1.020),
}
"""Options of each preset. Explicit options override the preset, and the preset overrides a recipe's defaults.

paper: section 4.1, Algorithm 1 and appendix A.2, without the crop to 1024 px; it states no churn. Its formula of
guidance adds l times the difference to the positive prediction, so the code's scale is l + 1; the authors' own
configuration of the paper's test has 7.5 in the code's form, which stands here. released: test.py. quality and
fidelity: the two settings of the official demo page. lightning: the configuration for an accelerated SDXL. advice-N:
the four settings that a maintainer names for cfg_scale N (issue 150).
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A request's options; the defaults are the official command line's, without its sizes and its form of tiles.

    Attributes:
        preset: sets other options, see PRESETS.
        sampler: "edm" (Algorithm 1), "dpmpp2m" (for an accelerated prior; it ignores tau and churn, as released) or
            "substep" (for a prior distilled to at most four steps; it ignores them too).
        steps: sampler steps.
        cfg_scale: scale of guidance at noise level 0; 1 at both ends switches guidance off, at half the cost.
        cfg_start: at the highest level, linear in between; -1 for cfg_scale.
        tau: exponent of restoration guidance (tau_r); smaller pulls longer towards the first restoration, 0 is off.
            The paper has 4; the official code has it off, since its lower guidance needs none.
        algorithm: "released", or "paper": Algorithm 1 as printed starts from noise of sigma_max instead of
            sqrt(1 + sigma_max^2), pulls to the robust encoder's latents instead of those of the first restoration, and
            in every step, the last one too.
        churn: noise added before each step (s_churn).
        noise_scale: factor of added noise (s_noise).
        control_scale: weight of the adaptor at noise level 0; 0 is the prior alone.
        control_start: at the highest level, linear in between; -1 for control_scale.
        positive_words, negative_words: fixed texts of quality, see texts.py; a request's own negative_prompt replaces
            the latter.
        joined_words: whether a comma stands between caption and words; the official code has none.
        long_texts: "pieces" encodes a text of any length piece by piece; "cut" ends it at the text encoders' length, as
            released and as in training.
        tile_prompts: captions of the tiles in reading order, with | between them; "" gives each the whole caption.
        encoding: latents of the first restoration for tau: the "mode", or a seeded "sample" as released.
        color: colour transfer, see components.color.
        color_from: "first" (the first restoration, as released) or "lq".
        resize: "native" restores at the result's size. "released" enlarges a shorter short side to 1024 px, rounds
            sides to multiples of 64 and resizes the result as the official command line does; "page" works at
            the demo page's size.
        min_side_px: with "native": a shorter short side is enlarged to this for the networks; 0 for no limit.
        sizes: size ids: those of a "tile", or "released": 1024 x 1024 always.
        tile_px: pictures with a longer side are restored in tiles of this side; 0 takes 128 latents (1024 px at SDXL's
            factor of 8).
        tile_overlap: smallest share of a tile that neighbours share.
        autoencoder_tiles: of a picture larger than 128 latents: "exact" equals the whole, but stores the activations of
            a layer; "faded" has bounded memory; "auto" is exact up to 2048 x 2048 px; "released" is the official way.
        tiles: "even" (our places and weights), or "released": half a tile apart, with weights half a row off.

    Raises:
        ValueError: a value is outside its range, or options exclude each other.
    """

    preset: Preset = "default"
    sampler: Literal["edm", "dpmpp2m", "substep"] = "edm"
    steps: int = 50
    cfg_scale: float = 4.0
    cfg_start: float = 1.0
    tau: float = 0.0
    algorithm: Literal["released", "paper"] = "released"
    churn: float = 5.0
    noise_scale: float = 1.01
    control_scale: float = 1.0
    control_start: float = -1.0
    positive_words: Words = "released"
    negative_words: Words = "released"
    joined_words: bool = True
    long_texts: Literal["pieces", "cut"] = "pieces"
    tile_prompts: str = ""
    encoding: Literal["mode", "sample"] = "mode"
    color: Literal["none", "adain", "wavelet"] = "wavelet"
    color_from: Literal["first", "lq"] = "first"
    resize: Literal["native", "released", "page"] = "native"
    min_side_px: int = 0
    sizes: Literal["tile", "released"] = "tile"
    tile_px: int = 0
    tile_overlap: float = 0.25
    autoencoder_tiles: Literal["auto", "exact", "faded", "released"] = "auto"
    tiles: Literal["even", "released"] = "even"

    def __post_init__(self) -> None:
        limit = {"edm": 1000, "dpmpp2m": 1000, "substep": 4}[self.sampler]
        if not 1 <= self.steps <= limit:
            raise ValueError(f"steps must be between 1 and {limit} with sampler {self.sampler}, got {self.steps}")
        if self.sampler == "dpmpp2m" and self.steps < 2:
            raise ValueError(f"sampler dpmpp2m needs at least 2 steps, got {self.steps}")
        for name in ("cfg_scale", "tau", "churn", "noise_scale", "control_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("cfg_start", "control_start"):
            if getattr(self, name) < 0 and getattr(self, name) != -1:
                raise ValueError(f"{name} must be at least 0, or -1, got {getattr(self, name)}")
        if not 0 <= self.min_side_px <= 4096:
            raise ValueError(f"min_side_px must be between 0 and 4096, got {self.min_side_px}")
        if self.resize != "native" and self.min_side_px:
            raise ValueError(f"resize {self.resize} has its own shortest side: leave min_side_px out")
        if self.tile_px != 0 and not 64 <= self.tile_px <= 8192:
            raise ValueError(f"tile_px must be 0 or between 64 and 8192, got {self.tile_px}")
        if not 0 <= self.tile_overlap <= 0.75:
            raise ValueError(f"tile_overlap must be between 0 and 0.75, got {self.tile_overlap}")

    @property
    def cfg_ends(self) -> tuple[float, float]:
        """Scale of guidance at the highest level and at 0."""
        return (self.cfg_scale if self.cfg_start == -1 else self.cfg_start, self.cfg_scale)

    @property
    def control_ends(self) -> tuple[float, float]:
        """Weight of the adaptor at the highest level and at 0."""
        return (self.control_scale if self.control_start == -1 else self.control_start, self.control_scale)

    @property
    def guided(self) -> bool:
        """Whether negative predictions have any part."""
        return self.cfg_ends != (1.0, 1.0)


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

    A named min_side_px also replaces a default resize, which would exclude it.
    """
    values = typed_options(options, get_type_hints(Options))
    if values.get("min_side_px") and not {"resize", "preset"} & set(values):
        values["resize"] = "native"
    return apply_preset(values, defaults, PRESETS)
