"""What the scores look at: luma, a reduced copy, and a bounded number of patches at full resolution.

Scores that need the whole picture (bars, repetition) read the reduced copy; those that need single pixels (sharpness,
noise, block edges) read the patches: the busiest ones and the calmest ones. So their cost hardly grows with pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from components.types import Image

REDUCED_PX = 640  # ours: longest side of the reduced copy
PATCH_PX = 64  # ours
PATCHES = 16  # ours: of each kind; 130 000 pixels in all
GRID_PX = 8  # of JPEG; patches begin on its multiples, so that block edges have one phase in all of them
FLAT_CHANGE = 1.0  # ours: a patch whose neighbours in the reduced copy differ less, in grey levels, has no detail


@dataclass(frozen=True, kw_only=True)
class View:
    """One picture, prepared once for all scores.

    Attributes:
        luma: BT.601 luma, uint8 [H, W].
        reduced: luma shrunk by a power of two, uint8 [h, w] with a longest side of at most REDUCED_PX.
        patches: parts of luma, uint8 [N, p, q]; p and q are PATCH_PX, or the side where that is shorter.
        busy: numbers of the patches with most detail, at most PATCHES of them.
        calm: numbers of the patches with least detail, as many.
        flat_share: share of the picture's patches without any detail, 0..1.
    """

    luma: np.ndarray
    reduced: np.ndarray
    patches: np.ndarray
    busy: np.ndarray
    calm: np.ndarray
    flat_share: float


def view(picture: Image) -> View:
    """Prepare uint8 RGB [H, W, 3], any side from 1 pixel."""
    luma = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
    reduced = _halved(luma)
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


def _halved(luma: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, again and again until the longest side fits; an odd last row or column is left out."""
    while max(luma.shape) > REDUCED_PX:
        height, width = (max(side // 2, 1) for side in luma.shape)
        even = luma[: min(height * 2, luma.shape[0]), : min(width * 2, luma.shape[1])]
        luma = cv2.resize(even, (width, height), interpolation=cv2.INTER_AREA)
    return luma


def _starts(side: int) -> list[int]:
    """Where patches begin along one side: they cover it, on multiples of the JPEG grid."""
    if side <= PATCH_PX:
        return [0]
    count = -(-side // PATCH_PX)
    return [round(i * (side - PATCH_PX) / (count - 1)) // GRID_PX * GRID_PX for i in range(count)]


def _changes(reduced: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Mean step between neighbours (right plus below, grey levels) of every patch, float32 [rows * columns]."""
    change = np.zeros(reduced.shape, np.uint8)
    if reduced.shape[1] > 1:
        change[:, 1:] = cv2.absdiff(reduced[:, 1:], reduced[:, :-1])
    if reduced.shape[0] > 1:
        change[1:] = cv2.add(change[1:], cv2.absdiff(reduced[1:], reduced[:-1]))
    every_second = change[::2, ::2].astype(np.float32)  # enough for a mean
    return cv2.resize(every_second, (columns, rows), interpolation=cv2.INTER_AREA).ravel()
