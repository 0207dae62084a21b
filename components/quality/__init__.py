"""Quality scores of pictures: the filter columns of curation. Torch-free.

scores = measure_scores(picture, data, "JPEG")
rejection = judge(scores, bounds_of("restoration", {}, flat_below=3.0))    # ("blurred", "sharpness is 0.4, below 1")

Scores do not depend on the bounds, so bounds can change without a new measurement. Scores are deterministic.
Thresholds and constants are ours unless a source is named; we chose them on photographs and on artificial faults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import cv2

from components.corpora import Bounds
from components.naming import did_you_mean
from components.quality.blocking import blockiness, jpeg_quality
from components.quality.detail import noise, spectral_detail
from components.quality.layout import letterbox, text_page
from components.quality.repetition import watermark
from components.quality.views import view
from components.types import Image


@dataclass(frozen=True, kw_only=True)
class Score:
    """Description of a score.

    Attributes:
        description: one sentence with range and unit.
        code: reason code of a picture whose score is out of bounds.
    """

    description: str
    code: str


SCORES: Mapping[str, Score] = {
    "luma_std": Score(description="Standard deviation of BT.601 luma, 0..128 grey levels.", code="flat"),
    "texture": Score(
        description="RMS of detail between 4 and 16 pixels in the busiest patch, 0..128 grey levels.", code="smooth"
    ),
    "flat_share": Score(description="Share of patches without any detail, 0..1.", code="flat"),
    "text_page": Score(
        description="Share of the busiest patches that show ink on one common paper, 0..1.", code="text_page"
    ),
    "letterbox": Score(description="Share of the area in one-coloured bars at the borders, 0..1.", code="letterbox"),
    "noise": Score(description="Standard deviation of noise in the calmest places, 0..128 grey levels.", code="noisy"),
    "jpeg_quality": Score(
        description="Quality by a JPEG's quantisation table, 1..100; 100 for other formats.", code="blocky"
    ),
    "blockiness": Score(
        description="Share of the hard steps that lie on one 8 x 8 grid beyond chance, 0..1.", code="blocky"
    ),
    "watermark": Score(
        description="Share of the picture where the same strokes return over another background, 0..1.",
        code="watermark",
    ),
    "resolution": Score(
        description="Finest detail of the busiest patches as a share of what the pixel grid can hold, 0..1.",
        code="upscaled",
    ),
    "sharpness": Score(
        description="RMS of detail below 4 pixels in the sharper quarter of the busiest patches, 0..128 grey levels.",
        code="blurred",
    ),
}
"""All scores by name, in the order of the columns and of `judge`."""

PRESETS: Mapping[str, Mapping[str, Bounds]] = {
    "none": {},
    "restoration": {
        "texture": Bounds(min=1.0),
        "flat_share": Bounds(max=0.97),
        "text_page": Bounds(max=0.55),
        "letterbox": Bounds(max=0.03),
        "noise": Bounds(max=7.0),
        "jpeg_quality": Bounds(min=40),
        "blockiness": Bounds(max=0.36),
        "watermark": Bounds(max=0.011),
        "resolution": Bounds(min=0.45),
        "sharpness": Bounds(min=1.0),
    },
}
"""Bounds by preset name. "restoration" is for targets of restoration training."""


def measure_scores(picture: Image, data: bytes = b"", format: str = "") -> dict[str, float]:  # noqa: A002 - as in Info
    """Measure all scores of a picture.

    Args:
        picture: uint8 RGB [H, W, 3] of any size.
        data: bytes of its file, if there is one; only jpeg_quality needs them.
        format: format of the file, as `components.images.sniff` returns it.

    Returns:
        The scores by name, in the order of SCORES; always finite.
    """
    inputs = view(picture)
    values = {
        "luma_std": float(cv2.meanStdDev(inputs.luma)[1].item()),
        "flat_share": inputs.flat_share,
        "letterbox": letterbox(inputs),
        "text_page": text_page(inputs),
        "noise": noise(inputs),
        "jpeg_quality": jpeg_quality(data, format),
        "blockiness": blockiness(inputs),
        "watermark": watermark(inputs),
        **spectral_detail(inputs),
    }
    return {name: values[name] for name in SCORES}


def bounds_of(preset: str, changes: Mapping[str, Bounds], flat_below: float) -> dict[str, Bounds]:
    """Return a preset's bounds with changes; a change replaces both bounds of a score.

    Args:
        preset: a name in PRESETS.
        changes: bounds by score name; Bounds() removes a score's bounds.
        flat_below: least luma_std in grey levels; it always applies.

    Raises:
        ValueError: an unknown preset or score, with a suggestion.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset of quality scores {preset!r}. {did_you_mean(preset, PRESETS)}")
    for name in changes:
        if name not in SCORES:
            raise ValueError(f"unknown quality score {name!r}. {did_you_mean(name, SCORES)}")
    bounds = {"luma_std": Bounds(min=flat_below), **PRESETS[preset], **changes}
    luma_bounds = bounds["luma_std"]
    if luma_bounds.min is None or luma_bounds.min < flat_below:
        bounds["luma_std"] = Bounds(min=flat_below, max=luma_bounds.max)
    return {name: replace(bounds[name]) for name in SCORES if name in bounds}


def judge(scores: Mapping[str, float], bounds: Mapping[str, Bounds]) -> tuple[str, str] | None:
    """Return reason code and a sentence for the first score out of bounds, in the order of SCORES; None if none is.

    NaN (a null in a table) is always out of bounds.
    """
    for name, score in SCORES.items():
        if name not in bounds or bounds[name].hold(scores[name]):
            continue
        value, least, most = scores[name], bounds[name].min, bounds[name].max
        if least is not None and value < least:
            return score.code, f"{name} is {value:.4g}, below {least:g}"
        if most is not None and value > most:
            return score.code, f"{name} is {value:.4g}, above {most:g}"
        return score.code, f"{name} is not a number"
    return None
