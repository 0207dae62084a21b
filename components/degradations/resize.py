"""Resizing to a given size with the three modes of Real-ESRGAN, none of which guards against aliasing when shrinking.

The original passes a factor for its first resize, so bilinear and bicubic sample with a step that does not fit the
floored size and the LQ picture shifts by up to 6.6 px against HQ. Here every resize goes to a size: aligned. OpenCV's
area mode weights fractions of pixels, the original's does not; the distributions agree.
"""

from __future__ import annotations

import cv2

from components.types import Image

MODES = {"area": cv2.INTER_AREA, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def resize(image: Image, height: int, width: int, mode: str) -> Image:
    """Resize float32 [H, W, 3] to [height, width, 3]; bicubic may overshoot 0..1, nothing is clipped.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"unknown resize mode {mode!r}; known are {', '.join(MODES)}")
    if image.shape[:2] == (height, width):
        return image
    return cv2.resize(image, (width, height), interpolation=MODES[mode])
