"""What a request may ask of InstantIR, and how its loop is steered. Torch-free: judged before a job starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_type_hints

from components.options import typed_options


def check_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given options in their own types; see components.options.OptionCheck.

    Raises:
        ValueError: an unknown name (with the near one), a wrong type or a value outside its range.
    """
    values = typed_options(given, get_type_hints(Options))
    Options(**values)  # checks the ranges
    return values


def parse_options(given: Mapping[str, Any], defaults: Options) -> Options:
    """Options by name on top of defaults; raises as check_options."""
    return replace(defaults, **check_options(given))


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the loop is steered; the defaults are the released pipeline's.

    Attributes:
        cfg_scale: guidance; 1 or less runs the positive half only.
        guidance_rescale: see samplers.guidance.guide.
        aggregator_scale: multiplies the residuals; one number or one for each step.
        aggregator_stop: share of the steps after which Previewer and Aggregator stop ("creative" restoration).
        preview_start, preview_stop: shares of the steps between which previews are made; outside, the LQ latents
            stand in for the preview.
        adaptive: scale the residuals by the adaptive factor of the step before (AdaRes, as released).
        preview_every, aggregator_every: steps between two previews, and between two calls of the Aggregator; what lies
            between takes the last ones. 1 is exact; above, time is saved for a stated error (docs/benchmarks.md).

    Raises:
        ValueError: a share outside 0 .. 1, a negative scale, or an interval below 1.
    """

    cfg_scale: float = 7.0
    guidance_rescale: float = 0.0
    aggregator_scale: float | Sequence[float] = 1.0
    aggregator_stop: float = 1.0
    preview_start: float = 0.0
    preview_stop: float = 1.0
    adaptive: bool = False
    preview_every: int = 1
    aggregator_every: int = 1

    def __post_init__(self) -> None:
        for name in ("preview_every", "aggregator_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("guidance_rescale", "aggregator_stop", "preview_start", "preview_stop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale must be at least 0, got {self.cfg_scale}")

    @property
    def guided(self) -> bool:
        return self.cfg_scale > 1

    def scale_at(self, step: int, of: int) -> float:
        """The residuals' scale at a 0-based step, without the adaptive factor."""
        if (step + 1) / of > self.aggregator_stop:
            return 0.0
        if isinstance(self.aggregator_scale, Sequence):
            return float(self.aggregator_scale[step])
        return float(self.aggregator_scale)

    def previews_at(self, step: int, of: int) -> bool:
        """Whether the Previewer runs at a 0-based step."""
        return not (step / of < self.preview_start or (step + 1) / of > self.preview_stop)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A request's options, with InstantIR's defaults.

    Attributes:
        steps: sampler steps (paper 4.1: 30).
        cfg_scale: guidance (paper 4.1: 7.0); 1 or less switches it off and halves the cost.
        sampler: "ddim" as in the paper, "ddpm" (ancestral) as in the released tools.
        start: "lq" starts from the noised LQ latents (released), "noise" from pure noise (paper Alg. 1).
        preview_start: share of the steps before which the LQ latents stand in for the preview; 0.1 to 0.4 for fidelity.
        aggregator_stop: share of the steps after which the aggregator stops; 0.6 to 0.8 for creative restoration.
        aggregator_scale: multiplies the aggregator's residuals.
        guidance_rescale: share of the guided prediction brought back to the unguided one's contrast.
        preview_every, aggregator_every: see LoopSettings; 1 is exact.

    Raises:
        ValueError: a value outside its range.
    """

    steps: int = 30
    cfg_scale: float = 7.0
    sampler: Literal["ddim", "ddpm"] = "ddim"
    start: Literal["lq", "noise"] = "lq"
    preview_start: float = 0.0
    aggregator_stop: float = 1.0
    aggregator_scale: float = 1.0
    guidance_rescale: float = 0.0
    preview_every: int = 1
    aggregator_every: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.aggregator_scale < 0:
            raise ValueError(f"aggregator_scale must be at least 0, got {self.aggregator_scale}")
        self.loop  # noqa: B018  the loop's own checks

    @property
    def loop(self) -> LoopSettings:
        return LoopSettings(
            cfg_scale=self.cfg_scale,
            guidance_rescale=self.guidance_rescale,
            aggregator_scale=self.aggregator_scale,
            aggregator_stop=self.aggregator_stop,
            preview_start=self.preview_start,
            preview_every=self.preview_every,
            aggregator_every=self.aggregator_every,
        )
