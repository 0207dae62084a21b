"""Scores of JPEG damage: the quality by the file's tables, and block edges in the pixels.

A picture that was strongly compressed and then saved as PNG or as a good JPEG still has block edges, after a crop on a
shifted grid. The new file's tables do not show the damage.
"""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image as Pillow

from components.quality.views import GRID_PX, View

LUMA_TABLE = (  # ITU-T T.81, table K.1, row by row; JPEG libraries scale it by quality
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
JUMP = 20  # ours: third difference of a step of 10 grey levels between flat sides
DOUBT_SHARE = 0.05  # ours: share of all windows added as evidence against a grid; few jumps then give a low score


def jpeg_quality(data: bytes, format: str) -> float:  # noqa: A002 - as in components.images.Info
    """Return quality 1..100 of a JPEG file by its luma table; 100 for other files.

    This inverts libjpeg's formula: table = K.1 * 50 / quality below 50, K.1 * (2 - quality / 50) above.
    """
    if format != "JPEG" or not data:
        return 100.0
    try:
        with Pillow.open(io.BytesIO(data), formats=["JPEG"]) as file:
            tables = getattr(file, "quantization", {})
    except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError):
        return 100.0  # the decoder reports broken files
    table = tables.get(0, ())
    # entries of 1 and 255 may be clipped, which would distort the ratio
    open_entries = [(entry, base) for entry, base in zip(table, LUMA_TABLE, strict=False) if 1 < entry < 255]
    if not open_entries:
        return 1.0 if table and min(table) >= 255 else 100.0
    scale = sum(entry for entry, _ in open_entries) / sum(base for _, base in open_entries)
    return float(min(100.0, max(1.0, 50 / scale if scale > 1 else 100 - 50 * scale)))


def blockiness(view: View) -> float:
    """Return the share of hard steps on one 8 x 8 grid beyond chance, 0..1; the smaller one of both directions.

    The largest third difference in each run of 8 pixels is a hard step if it is JUMP or more; the score counts the
    positions of hard steps. Without a grid, all 8 positions are equally frequent. JPEG has a grid in both directions, a
    fence in one only.
    """
    count, height, width = view.patches.shape
    down = view.patches.swapaxes(0, 1).reshape(height, count * width)
    across = cv2.transpose(view.patches.reshape(count * height, width))
    return max(0.0, min(_on_grid(down), _on_grid(across)))


def _on_grid(lines: np.ndarray) -> float:
    """Return the share for steps between the lines of uint8 [L, M]."""
    step = np.diff(lines.astype(np.int16), axis=0)
    third = step[2:] + step[:-2]
    third -= step[1:-1]
    third -= step[1:-1]
    np.abs(third, out=third)
    excess, place = _excess(third)
    if place in (0, GRID_PX - 1):  # side lobes of a step mislead at the ends of a run: shift the runs
        excess = max(excess, _excess(third[GRID_PX // 2 :])[0])
    return excess


def _excess(third: np.ndarray) -> tuple[float, int]:
    """Return the share for runs of the third differences [L, M] from the first on, and the grid's position in a run."""
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
