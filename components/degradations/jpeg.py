"""JPEG round trips: the real encoder (libjpeg, 4:2:0), and the simulator that Real-ESRGAN trains through.

Torch-free. The forms:

    simulator   differentiable JPEG with its accidents. The luma table is transposed, black pads the sides to multiples
                of 16, tables and qualities are real-valued, chroma is repeated instead of interpolated, and only the
                coefficients are rounded.
    matched     the real encoder with the accidents that the distribution tests detect: the black padding (without it
                means shift by half a level), the repeated chroma (without it colour noise is too smooth), and the
                transposed table.
    edge        plain JPEG, as any viewer decodes it.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import simplejpeg

from components.degradations.plans import JPEG_FORMS as FORMS
from components.images import to_uint8
from components.types import Image

BLOCK_PX = 16  # a 4:2:0 block: 8 chroma samples

# ITU-T T.81, annex K.1 and K.2: rows are vertical frequencies
LUMA = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    np.float64,
)
CHROMA = np.full((8, 8), 99.0)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
# ITU-T T.871: RGB to Y, Cb, Cr without the offset of 128
TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
FROM_YCC = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])


def jpeg(image: Image, quality: float, form: str = "edge", out: np.ndarray | None = None) -> Image:
    """Encodes and decodes float32 [H, W, 3].

    Args:
        image: 0..1; values outside are clipped.
        quality: 1..100; the real encoder rounds it to an integer, the simulator takes any number below 100.
        form: one of FORMS.
        out: float32 [H, W, 3] for the result.

    Returns:
        float32 [H, W, 3] in 0..1; the real encoder gives steps of 1/255.

    Raises:
        ValueError: the form is unknown.
    """
    if form == "simulator":
        return simulate(image, quality)
    if form not in FORMS:
        raise ValueError(f"unknown JPEG form {form!r}. Choose from {', '.join(FORMS)}")
    height, width = image.shape[:2]
    pixels = to_uint8(image)
    if form == "edge":
        return cv2.LUT(round_trip(pixels, round(quality)), _levels(), dst=out)
    bottom, right = -height % BLOCK_PX, -width % BLOCK_PX
    if bottom or right:
        pixels = cv2.copyMakeBorder(pixels, 0, bottom, 0, right, cv2.BORDER_CONSTANT)
    data = _encode(cv2.transpose(pixels), round(quality))
    decoded = cv2.transpose(simplejpeg.decode_jpeg(data, colorspace="RGB", fastupsample=True))
    return cv2.LUT(np.ascontiguousarray(decoded[:height, :width]), _levels(), dst=out)


def round_trip(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Encodes uint8 RGB [H, W, 3] with libjpeg at an integer quality, and decodes it."""
    decoded = cv2.imdecode(_encode(pixels, quality), cv2.IMREAD_COLOR_RGB)
    assert decoded is not None
    return decoded


def _encode(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Encodes uint8 RGB [H, W, 3] with OpenCV: simplejpeg's encoder uses a coarser transform below quality 96."""
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert encoded
    return data


@lru_cache(maxsize=1)
def _levels() -> np.ndarray:
    """k / 255, float32 [256]."""
    return (np.arange(256) / 255).astype(np.float32)


# -- the simulator ---------------------------------------------------------------------------------------------------


def table_factor(quality: float) -> float:
    """The simulator's factor of the standard tables: 50 / quality below 50, otherwise 2 - quality / 50."""
    return 50 / quality if quality < 50 else 2 - quality / 50


@lru_cache(maxsize=1)
def cosines() -> np.ndarray:
    """The orthonormal 8-point DCT-II matrix D, float64 [8, 8]: coefficients = D x."""
    frequency, place = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    matrix = np.cos((2 * place + 1) * frequency * np.pi / 16) / 2
    matrix[0] /= np.sqrt(2)
    return matrix


def simulate(image: Image, quality: float) -> Image:
    """The simulator: float32 [H, W, 3] in 0..1 to the same. Raises ValueError for quality 100, where it gives NaN."""
    factor = table_factor(quality)
    if factor <= 0:
        raise ValueError(f"the JPEG simulator needs a quality below 100, got {quality}")
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % BLOCK_PX), (0, -width % BLOCK_PX), (0, 0))).astype(np.float64) * 255
    ycc = padded @ TO_YCC.T
    luma, chroma = ycc[..., 0] - 128, ycc[..., 1:]
    rows, columns = chroma.shape[0] // 2, chroma.shape[1] // 2
    chroma = chroma.reshape(rows, 2, columns, 2, 2).mean((1, 3))
    luma = _quantise(luma, LUMA.T * factor) + 128
    planes = [_quantise(chroma[..., index], CHROMA * factor).repeat(2, 0).repeat(2, 1) for index in (0, 1)]
    rgb = np.stack([luma, *planes], -1) @ FROM_YCC.T
    return (rgb[:height, :width].clip(0, 255) / 255).astype(np.float32)


def _quantise(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    """8 x 8 DCT, division by the table, rounding, and back: float64 [H, W], sides multiples of 8."""
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3)
    turn = cosines()
    coefficients = np.rint((turn @ blocks @ turn.T) / table) * table
    return (turn.T @ coefficients @ turn).transpose(0, 2, 1, 3).reshape(height, width)
