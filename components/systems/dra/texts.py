"""DRA's fixed texts: the words of poor quality that guidance leads away from. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

NEGATIVE: Mapping[str, str] = {
    # ours: words of the training's degradation descriptors (section 3.3), see degradations.plans.descriptors
    "descriptors": "low quality, low resolution, blurry, noisy, compressed",
    # training has the null text too (section 3.3)
    "none": "",
}
"""Negative prompts by name."""


def negative_text(text: str, words: str) -> str:
    """A request's own negative prompt, or else the words of that name in NEGATIVE."""
    return text or NEGATIVE[words]
