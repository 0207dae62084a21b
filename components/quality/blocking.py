"""Scores of JPEG damage: the quality a file declares, and block edges in the pixels, whatever the file says.

A picture that was once compressed hard and then saved again as PNG or as a good JPEG declares nothing, but its block
edges stay, also on a shifted grid after a crop.
"""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image as Pillow

from components.quality.views import GRID_PX, View

LUMA_TABLE = (  # ITU-T T.81, table K.1, row by row: what JPEG libraries scale by quality
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
JUMP = 20  # ours: third difference of a step by 10 grey levels between level sides
DOUBT_SHARE = 0.05  # ours: so many of all windows are added as evidence of no grid; pictures with few jumps stay low


def jpeg_quality(data: bytes, format: str) -> float:  # noqa: A002 - as in components.images.Info
    """Quality 1..100 of a JPEG file by its luma table, 100 for anything else.

    libjpeg's formula turned round: table = K.1 * 50 / quality below 50, K.1 * (2 - quality / 50) above.
    """
    if format != "JPEG" or not data:
        return 100.0
    try:
        with Pillow.open(io.BytesIO(data), formats=["JPEG"]) as file:
            tables = getattr(file, "quantization", {})
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError):
        return 100.0  # the pixels are judged anyway, and whether the file is broken is for the decoder to say
    table = tables.get(0, ())
    # an entry at either end of a byte may have been clipped and would spoil the ratio
    open_entries = [(entry, base) for entry, base in zip(table, LUMA_TABLE, strict=False) if 1 < entry < 255]
    if not open_entries:
        return 1.0 if table and min(table) >= 255 else 100.0
    scale = sum(entry for entry, _ in open_entries) / sum(base for _, base in open_entries)
    return float(min(100.0, max(1.0, 50 / scale if scale > 1 else 100 - 50 * scale)))


def blockiness(view: View) -> float:
    """Share of the hard steps that lie on one 8 x 8 grid beyond chance, 0..1; the weaker of both directions.

    In every run of 8 pixels the largest third difference is found; of those that jump by JUMP or more the position is
    counted. Without a grid all 8 positions are alike. Both directions must agree, as in JPEG: a fence has one.
    """
    count, height, width = view.patches.shape
    down = view.patches.swapaxes(0, 1).reshape(height, count * width)
    across = cv2.transpose(view.patches.reshape(count * height, width))
    return max(0.0, min(_on_grid(down), _on_grid(across)))


def _on_grid(lines: np.ndarray) -> float:
    """The share for steps from line to line of uint8 [L, M]."""
    step = np.diff(lines.astype(np.int16), axis=0)
    third = step[2:] + step[:-2]
    third -= step[1:-1]
    third -= step[1:-1]
    np.abs(third, out=third)
    excess, place = _excess(third)
    if place in (0, GRID_PX - 1):  # a step has side lobes, which mislead at the ends of a run: begin elsewhere
        excess = max(excess, _excess(third[GRID_PX // 2 :])[0])
    return excess


def _excess(third: np.ndarray) -> tuple[float, int]:
    """The share for runs from the first of the third differences [L, M] on, and the grid's place in a run."""
    usable = len(third) // GRID_PX * GRID_PX
    if not usable:
        return 0.0, GRID_PX // 2
    runs = third[:usable].reshape(-1, GRID_PX, third.shape[1])
    largest = runs.max(axis=1)
    hard = (runs == largest[:, None]) & (largest >= JUMP)[:, None]
    hits = np.array([np.count_nonzero(hard[:, place]) for place in range(GRID_PX)])
    hits = hits + DOUBT_SHARE * largest.size / GRID_PX
    excess = []
    for lines_of_grid in (1, 2):  # a grid of 8 or of 4
        chance = lines_of_grid / GRID_PX
        share = hits.reshape(lines_of_grid, -1).sum(axis=0).max() / hits.sum()
        excess.append((share - chance) / (1 - chance))
    return float(max(excess)), int(hits.argmax())
