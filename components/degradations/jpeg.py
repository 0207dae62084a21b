"""JPEG round trips through libjpeg (OpenCV), 4:2:0.

Real-ESRGAN trains through a differentiable simulator with two accidents: its luma table is transposed, and it pads
with black to multiples of 16, which darkens the right and lower borders. `faithful` reproduces both with the real
encoder: the picture is turned before encoding and padded with black. The simulator's other habits (real-valued quality
and tables, chroma repeated instead of interpolated) are not reproduced: they change the result by less.
"""

from __future__ import annotations

import cv2
import numpy as np

from components.types import Image

BLOCK_PX = 16  # a 4:2:0 block: 8 chroma samples


def jpeg(image: Image, quality: float, faithful: bool = False) -> Image:
    """Encode and decode float32 [H, W, 3] at 8 bits.

    Args:
        image: values are clipped to 0..1 and rounded.
        quality: 1..100, rounded to the nearest integer (libjpeg knows no others).
        faithful: turn and pad as the original's simulator does.

    Returns:
        float32 [H, W, 3] in 0..1, in steps of 1/255.
    """
    height, width = image.shape[:2]
    pixels = np.rint(image.clip(0, 1) * np.float32(255)).astype(np.uint8)
    if faithful:
        pixels = np.pad(pixels, ((0, -height % BLOCK_PX), (0, -width % BLOCK_PX), (0, 0)))
        return round_trip(pixels.swapaxes(0, 1), round(quality)).swapaxes(0, 1)[:height, :width] / np.float32(255)
    return round_trip(pixels, round(quality)) / np.float32(255)


def round_trip(pixels: np.ndarray, quality: int) -> np.ndarray:
    """uint8 RGB [H, W, 3] through libjpeg at an integer quality and back."""
    encoded, data = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert encoded
    assert decoded is not None
    return decoded[..., ::-1]
