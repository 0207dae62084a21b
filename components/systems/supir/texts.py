"""SUPIR's fixed texts: words of quality that follow a caption, and words of poor quality for guidance. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

POSITIVE: Mapping[str, str] = {
    "none": "",
    # appendix A.2
    "paper": (
        "cinematic, High Contrast, highly detailed, unreal engine, taken using a Canon EOS R camera, hyper detailed "
        "photo-realistic maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, skin pore "
        "detailing, hyper sharpness, perfect without deformations, Unreal Engine 5, 4k render"
    ),
    # command line of the official code (supir.md, section 3)
    "released": (
        "Cinematic, High Contrast, highly detailed, taken using a Canon EOS R camera, hyper detailed photo - realistic "
        "maximum detail, 32k, Color Grading, ultra HD, extreme meticulous detailing, skin pore detailing, hyper "
        "sharpness, perfect without deformations."
    ),
}
"""Texts that describe good quality, by name."""

NEGATIVE: Mapping[str, str] = {
    "none": "",
    # section 3.2
    "paper": "oil painting, cartoon, blur, dirty, messy, low quality, deformation, low resolution, over-smooth",
    # command line of the official code; "unreal engine" is a good word in the paper and a poor one here
    "released": (
        "painting, oil painting, illustration, drawing, art, sketch, oil painting, cartoon, CG Style, 3D render, "
        "unreal engine, blurring, dirty, messy, worst quality, low quality, frames, watermark, signature, jpeg "
        "artifacts, deformed, lowres, over-smooth"
    ),
}
"""Texts that describe poor quality, by name."""

TILE_MARK = "|"
"""Separates the captions of tiles."""


def positive_text(caption: str, words: str, joined: bool = True) -> str:
    """A caption with words of quality.

    Args:
        caption: "" for none.
        words: a name in POSITIVE.
        joined: a comma and a blank stand between them; the official code puts nothing there.
    """
    ending = POSITIVE[words]
    return f"{caption}, {ending}" if joined and caption and ending else caption + ending


def negative_text(text: str, words: str) -> str:
    """A request's own negative prompt, or else the words of poor quality of that name in NEGATIVE."""
    return text or NEGATIVE[words]


def tile_captions(text: str) -> list[str]:
    """Captions of tiles in reading order; [] for none."""
    return [part.strip() for part in text.split(TILE_MARK)] if text.strip() else []
