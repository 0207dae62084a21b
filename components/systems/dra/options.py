"""DRA's options of a request. Torch-free, for checks before a job starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_type_hints

from components.options import check_choices, replace_options, typed_options
from components.priors.families import family_of
from components.systems.dra.config import Shape, shape_of

STEPS = 100
"""T of section 4.1; rss_scaled keeps the total pull of a run of this many steps."""


SAMPLERS: Mapping[Shape, tuple[str, ...]] = {"maps": ("edm", "ddim", "ddpm"), "tokens": ("flow",)}
"""The samplers of a prior by the shape of its adapters; the first is the default."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a restoration. The defaults of steps, cfg_scale and rss_* are the paper's (section 4.1).

    Attributes:
        sampler: of noise-predicting priors "edm" (Euler steps with added noise, the paper's reference 19), "ddim" or
            "ddpm"; of priors trained by flow matching "flow" (Euler steps), their default.
        steps: T.
        cfg_scale: guidance; 1 for none.
        rss_mode: reading of the restoration sampling strategy, see samplers.restoration_pull: "latent" as printed, or
            "x0" or "renoised", which keep the noise of the latents.
        rss_weight: w of Eq. 1; 0 for no pull to the LQ latents.
        rss_threshold: a of Eq. 2: the share of steps left from which on there is a pull.
        rss_scaled: multiply the weight by 100 / steps (at most 1), since fewer steps pull less often.
        churn: edm: noise added before each step (s_churn), shared by all steps; ours, the paper has no number.
        noise_scale: edm: factor of added noise (s_noise); 1.003 in the sampler's paper (Karras et al. 2022, Table 5).
        negative_words: the negative prompt of a request without its own, see texts.NEGATIVE.
        color: colour transfer from LQ, see components.color; ours, the paper has none.
        min_side_px: a shorter short side is enlarged to this for the networks; 0 for no limit.
        tile_px: pictures with a longer side are restored in tiles of this side; 0 takes 128 latents (1024 px at SDXL's
            factor of 8). Tiles are ours.
        tile_overlap: smallest share of a tile that neighbours share.
        autoencoder_tiles: of a picture larger than 128 latents: "exact" equals the whole, but stores the activations of
            a layer; "faded" has bounded memory; "auto" is exact up to 2048 x 2048 px.

    Raises:
        ValueError: a value is outside its range.
    """

    sampler: Literal["edm", "ddim", "ddpm", "flow"] = "edm"
    steps: int = STEPS
    cfg_scale: float = 7.5
    rss_mode: Literal["latent", "x0", "renoised"] = "latent"
    rss_weight: float = 0.05
    rss_threshold: float = 0.8
    rss_scaled: bool = False
    churn: float = 5.0
    noise_scale: float = 1.003
    negative_words: Literal["descriptors", "none"] = "descriptors"
    color: Literal["none", "adain", "wavelet"] = "wavelet"
    min_side_px: int = 0
    tile_px: int = 0
    tile_overlap: float = 0.5
    autoencoder_tiles: Literal["auto", "exact", "faded"] = "auto"

    def __post_init__(self) -> None:
        check_choices(self)
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must be between 1 and 1000, got {self.steps}")
        for name in ("cfg_scale", "churn", "noise_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.rss_weight <= 1:
            raise ValueError(f"rss_weight must be between 0 and 1, got {self.rss_weight}")
        if not 0 <= self.rss_threshold < 1:
            raise ValueError(f"rss_threshold must be at least 0 and below 1, got {self.rss_threshold}")
        if not 0 <= self.min_side_px <= 4096:
            raise ValueError(f"min_side_px must be between 0 and 4096, got {self.min_side_px}")
        if self.tile_px != 0 and not 64 <= self.tile_px <= 8192:
            raise ValueError(f"tile_px must be 0 or between 64 and 8192, got {self.tile_px}")
        if not 0 <= self.tile_overlap <= 0.75:
            raise ValueError(f"tile_overlap must be between 0 and 0.75, got {self.tile_overlap}")

    @property
    def pull_weight(self) -> float:
        """w of this number of steps."""
        return min(1.0, self.rss_weight * STEPS / self.steps) if self.rss_scaled else self.rss_weight

    @property
    def guided(self) -> bool:
        """Whether negative predictions have any part."""
        return self.cfg_scale != 1


def restore_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Restorer options from a resolved recipe: its restore_options, and the default sampler of its prior's family."""
    own = dict(recipe.get("restore_options") or {})
    shape = shape_of(family_of(str(recipe.get("family") or "sdxl")))
    return own if shape == "maps" else {"sampler": SAMPLERS[shape][0], **own}


def check_sampler(sampler: str, shape: Shape) -> None:
    """Raises ValueError for a sampler that does not fit the prior."""
    if sampler not in SAMPLERS[shape]:
        raise ValueError(f"sampler must be {' or '.join(SAMPLERS[shape])} for this model's prior, got {sampler}")


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The options, converted to their types; see components.options.OptionCheck.

    Args:
        options: options by name.
        defaults: options from the model's recipe, see restore_defaults.

    Raises:
        ValueError: an unknown name (the error suggests the nearest one), a wrong type, or a value outside its range.
    """
    values = typed_options(options, get_type_hints(Options))
    own = replace_options(defaults, Options())
    changed = replace_options(values, own)  # checks the ranges
    check_sampler(changed.sampler, next(shape for shape, names in SAMPLERS.items() if own.sampler in names))
    return values
