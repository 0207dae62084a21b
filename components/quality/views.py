"""Input of the scores: luma, a reduced copy, and a limited number of patches at full resolution.

Scores of the whole picture (bars, repetition) use the reduced copy. Scores of single pixels (sharpness, noise, block
edges) use the busiest and the calmest patches. So the cost hardly grows with the size of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from components.types import Image

REDUCED_PX = 640  # ours: most pixels of the reduced copy's long side
PATCH_PX = 64  # ours
PATCHES = 16  # ours: of each kind; 130 000 pixels in total
GRID_PX = 8  # JPEG's grid; patches start at its multiples, so that block edges have the same phase in all patches
FLAT_CHANGE = 1.0  # ours: a patch has no detail if neighbours in the reduced copy differ by fewer grey levels


@dataclass(frozen=True, kw_only=True)
class View:
    """One picture, prepared for all scores.

    Attributes:
        luma: BT.601 luma, uint8 [H, W].
        reduced: luma shrunk by a power of two, uint8 [h, w] with a long side of at most REDUCED_PX.
        patches: parts of luma, uint8 [N, p, q]; p and q are PATCH_PX, or the side if it is shorter.
        busy: indices of the patches with most detail, at most PATCHES of them.
        calm: indices of as many patches with least detail.
        flat_share: share of the picture's patches without detail, 0..1.
    """

    luma: np.ndarray
    reduced: np.ndarray
    patches: np.ndarray
    busy: np.ndarray
    calm: np.ndarray
    flat_share: float


def view(picture: Image) -> View:
    """Prepare uint8 RGB [H, W, 3] with sides of at least 1 pixel."""
    luma = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
    reduced = _reduce(luma)
    height, width = luma.shape
    rows, columns = _starts(height), _starts(width)
    change = _changes(reduced, len(rows), len(columns))
    order = np.argsort(change, kind="stable")
    busy = order[::-1][:PATCHES]
    calm = order[:PATCHES]
    numbers = np.unique(np.concatenate([busy, calm]))
    corners = [(rows[number // len(columns)], columns[number % len(columns)]) for number in numbers]
    return View(
        luma=luma,
        reduced=reduced,
        patches=np.stack([luma[top : top + PATCH_PX, left : left + PATCH_PX] for top, left in corners]),
        busy=np.searchsorted(numbers, busy),
        calm=np.searchsorted(numbers, calm),
        flat_share=float((change < FLAT_CHANGE).mean()),
    )


def _reduce(luma: np.ndarray) -> np.ndarray:
    """Average 2 x 2 pixels repeatedly until the long side fits; an odd last row or column is left out."""
    while max(luma.shape) > REDUCED_PX:
        height, width = (max(side // 2, 1) for side in luma.shape)
        even = luma[: min(height * 2, luma.shape[0]), : min(width * 2, luma.shape[1])]
        luma = cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA)
    return luma


def _starts(side: int) -> list[int]:
    """Return the first pixels of patches that cover one side, at multiples of the JPEG grid."""
    if side <= PATCH_PX:
        return [0]
    count = -(-side // PATCH_PX)
    return [round(i * (side - PATCH_PX) / (count - 1)) // GRID_PX * GRID_PX for i in range(count)]


def _changes(reduced: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return every patch's mean difference of neighbours (right plus below, grey levels), float32 [rows * columns]."""
    change = np.zeros(reduced.shape, np.uint8)
    if reduced.shape[1] > 1:
        change[:, 1:] = cv2.absdiff(reduced[:, 1:], reduced[:, :-1])
    if reduced.shape[0] > 1:
        change[1:] = cv2.add(change[1:], cv2.absdiff(reduced[1:], reduced[:-1]))
    every_second = change[::2, ::2].astype(np.float32)  # enough for a mean
    return cv2.resize(every_second, (columns, rows), interpolation=cv2.INTER_AREA).ravel()
