"""Captions of measured facts: dominant hues, brightness, contrast and texture, in a few plain words.

Torch-free. No model guesses here: every word follows from a threshold, so that a caption is true of its picture and a
prompted word can be measured in a result (`hue_share`). All thresholds are ours, set by looking at photographs.

    >>> Tags().caption([image])
    ['blue and white, bright, low contrast, smooth']
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from components.naming import did_you_mean
from components.types import Image

MEASURED_SIDE_PX = 128  # pictures are measured at this short side, so that the words do not depend on resolution

# Colour words. Chroma is max - min of R, G, B and value is max, both in 0..1.
BLACK_BELOW_VALUE = 0.16
GRAY_BELOW_CHROMA = 0.10
GRAY_BELOW_SATURATION = 0.14
WHITE_FROM_VALUE = 0.82
BROWN_BELOW_VALUE = 0.60  # dark orange looks brown
PINK_BELOW_SATURATION = 0.50  # light red looks pink
PINK_FROM_VALUE = 0.70
HUE_ENDS = (12, 45, 70, 165, 200, 258, 305, 345)  # degrees at which red, orange, ... pink end; red again after the last
HUES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
NEUTRALS = ("gray", "white", "black", "brown")
COLOURS = HUES + NEUTRALS
SECOND_FROM_SHARE = 0.2  # a second colour is named from this share of the pixels

BRIGHTNESS = ((0.20, "dark"), (0.40, "dim"), (0.60, "light"), (1.01, "bright"))  # mean luma below the number
CONTRAST = ((0.14, "low"), (0.20, "medium"), (9.0, "high"))  # standard deviation of luma below the number
TEXTURE = ((0.025, "smooth"), (0.06, "textured"), (9.0, "detailed"))  # mean luma gradient a pixel below the number

VOCABULARY: tuple[str, ...] = (
    *COLOURS,
    "and",
    *(word for _, word in BRIGHTNESS),
    *(word for _, word in CONTRAST),
    "contrast",
    *(word for _, word in TEXTURE),
)
"""Every word that a caption can hold; punctuation is the comma."""


class Tags:
    """Captioner of measured facts."""

    def caption(self, images: Sequence[Image]) -> list[str]:
        """One caption for each uint8 or float32 [H, W, 3]: colours, brightness, contrast, texture."""
        return [describe(image) for image in images]


def describe(image: Image) -> str:
    """The caption of one uint8 or float32 picture [H, W, 3]."""
    small = _measured(image)
    shares = np.bincount(_colour_index(small).ravel(), minlength=len(COLOURS)) / (small.shape[0] * small.shape[1])
    first, second = np.argsort(-shares, kind="stable")[:2]
    colours = COLOURS[first] + (f" and {COLOURS[second]}" if shares[second] >= SECOND_FROM_SHARE else "")
    luma = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    steps = np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()
    brightness, contrast = _word(BRIGHTNESS, luma.mean()), _word(CONTRAST, luma.std())
    return f"{colours}, {brightness}, {contrast} contrast, {_word(TEXTURE, steps / 2)}"


def hue_share(image: Image, hue: str) -> float:
    """Share of the pixels, 0..1, that a caption would call `hue` (one of COLOURS).

    Raises:
        ValueError: an unknown colour word.
    """
    if hue not in COLOURS:
        raise ValueError(f"unknown colour {hue!r}. {did_you_mean(hue, COLOURS)}")
    return float((_colour_index(_measured(image)) == COLOURS.index(hue)).mean())


def _measured(image: Image) -> np.ndarray:
    """float32 [h, w, 3] in 0..1 with a short side of at most MEASURED_SIDE_PX."""
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected [H, W, 3], got {image.shape}")
    height, width = image.shape[:2]
    factor = MEASURED_SIDE_PX / min(height, width)
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if image.dtype == np.uint8:
        return image.astype(np.float32) * np.float32(1 / 255)
    return image.astype(np.float32, copy=False).clip(0, 1)


def _colour_index(small: np.ndarray) -> np.ndarray:
    """Index into COLOURS for each pixel of float32 [h, w, 3]: int64 [h, w]."""
    hsv = cv2.cvtColor(small, cv2.COLOR_RGB2HSV)  # hue in degrees, saturation and value in 0..1
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    index = np.digitize(hue, HUE_ENDS) % len(HUES)
    index[(index == COLOURS.index("orange")) & (value < BROWN_BELOW_VALUE)] = COLOURS.index("brown")
    light_red = (index == COLOURS.index("red")) & (saturation < PINK_BELOW_SATURATION) & (value >= PINK_FROM_VALUE)
    index[light_red] = COLOURS.index("pink")
    unsaturated = (saturation * value < GRAY_BELOW_CHROMA) | (saturation < GRAY_BELOW_SATURATION)
    index[unsaturated] = COLOURS.index("gray")
    index[unsaturated & (value >= WHITE_FROM_VALUE)] = COLOURS.index("white")
    index[value < BLACK_BELOW_VALUE] = COLOURS.index("black")
    return index


def _word(scale: Sequence[tuple[float, str]], measured: float) -> str:
    """The first word whose limit lies above the measured value."""
    return next(word for limit, word in scale if measured < limit)
