"""The score of repeated overlays: watermarks.

A watermark is the same strokes several times, over backgrounds that have nothing to do with each other. A facade or a
fence repeats as well, but there whatever lies around the strokes repeats with them.
"""

from __future__ import annotations

import cv2
import numpy as np

from components.quality.views import View

AREA_PX = 100_000  # ours: pixels of the copy that is looked at; more find no more
LEAST_SIDE = 96  # ours: smaller copies hold nothing that could be told from chance
LEAST_LAG = 16  # ours: px of the copy; nearer peaks are the strokes themselves
NORM_PX = 15  # ours: side of the window whose mean contrast strokes are divided by
NORM_FLOOR = 2.5  # ours: grey levels added to that mean, so that plain areas do not become noise
STROKE_LIMIT = 2.0  # ours: strokes are cut there, so that one hard edge counts as much as a thin letter
FINE, BROAD = 0.8, 1.4  # ours: blur in px of the copy that strokes stand out from, to find lags and to match
PEAK = 4.0  # ours: a lag is looked at when its peak stands out by so many standard deviations
TOPS = 64  # ours: local maxima whose rings are looked at
LAGS = 3  # ours: peaks looked at
CELL = 4  # ours: px of the copy in a cell of the match map
MATCH = 0.5  # ours: local correlation from which strokes count as equal
MATCH_FLOOR = 0.15  # ours: added to the strokes' energy, so that plain areas do not match
APART = 20.0  # ours: backgrounds differ by so many grey levels
BACKGROUND_PX = 17  # ours: side of the window that levels strokes out
CONTROLS = ((0, 4), (4, 0), (0, -4), (-4, 0), (3, 3), (3, -3))  # lags beside a peak: what matches there is no copy
CONTROL_WEIGHT = 3.0  # ours
WORTH = 0.004  # ours: a peak that matches less is not worth the controls


def watermark(view: View) -> float:
    """Share of the picture where the same strokes return over a different background, less what chance gives; 0..1."""
    reduced = view.reduced
    scale = (AREA_PX / reduced.size) ** 0.5
    if scale < 1:
        size = round(reduced.shape[1] * scale), round(reduced.shape[0] * scale)
        reduced = cv2.resize(reduced, size, interpolation=cv2.INTER_LINEAR)
    if min(reduced.shape) < LEAST_SIDE:
        return 0.0
    lags = _peaks(_autocorrelation(_strokes(reduced, FINE)))
    if not lags:
        return 0.0
    strokes = _strokes(reduced, BROAD)
    backgrounds = cv2.blur(reduced, (BACKGROUND_PX, BACKGROUND_PX)).astype(np.float32)
    found = 0.0
    for row, column in lags:
        share = _returning(strokes, backgrounds, row, column)
        if share > max(WORTH, found):
            beside = max(_returning(strokes, backgrounds, row + y, column + x) for y, x in CONTROLS)
            found = max(found, share - CONTROL_WEIGHT * beside)
    return found


def _strokes(reduced: np.ndarray, sigma: float) -> np.ndarray:
    """What stands out from a blur, at even contrast: float32 [h, w] in -STROKE_LIMIT..STROKE_LIMIT."""
    side = 3 if sigma < 1 else 7
    blurred = cv2.GaussianBlur(reduced, (side, side), sigma)
    contrast = cv2.blur(cv2.absdiff(reduced, blurred), (NORM_PX, NORM_PX)).astype(np.float32)
    contrast += NORM_FLOOR
    strokes = np.asarray(cv2.subtract(reduced, blurred, dtype=cv2.CV_32F))
    np.divide(strokes, contrast, out=strokes)
    return np.clip(strokes, -STROKE_LIMIT, STROKE_LIMIT, out=strokes)


def _autocorrelation(strokes: np.ndarray) -> np.ndarray:
    """Circular and unscaled; float32 [H, W] with sides that transform fast. Lags beyond half a side are negative."""
    height, width = strokes.shape
    below, right = cv2.getOptimalDFTSize(height) - height, cv2.getOptimalDFTSize(width) - width
    if below or right:
        strokes = cv2.copyMakeBorder(strokes, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0)
    spectrum = cv2.dft(strokes)
    power = cv2.mulSpectrums(spectrum, spectrum, 0, conjB=True)
    power[0, 0] = 0  # the mean
    return cv2.dft(power, flags=cv2.DFT_INVERSE)


def _peaks(correlation: np.ndarray) -> list[tuple[int, int]]:
    """Lags (row, column) that stand out from the ring around them, the best first, at most LAGS; opposite ones once.

    Long edges match along themselves, which makes ridges; the ring takes those away.
    """
    height, width = correlation.shape
    sample = np.sort(correlation[::8, ::8], axis=None)
    middle = len(sample) // 2
    deviation = 1.4826 * float(np.sort(np.abs(sample - sample[middle]))[middle])  # normal noise of that MAD
    upper = correlation[: height // 2 + 1]  # a lag and its opposite are one
    tops = (upper >= cv2.dilate(upper, np.ones((3, 3), np.uint8))) & (upper > PEAK * deviation)
    tops[:LEAST_LAG, np.minimum(np.arange(width), width - np.arange(width)) < LEAST_LAG] = False
    tops[0, width // 2 + 1 :] = False
    places = np.flatnonzero(tops)
    places = places[np.argsort(-correlation.ravel()[places], kind="stable")[:TOPS]]
    rows, columns = np.divmod(places, width)
    offsets = np.argwhere(_ring()) - 4
    ring = correlation[(rows[:, None] + offsets[:, 0]) % height, (columns[:, None] + offsets[:, 1]) % width]
    peak = correlation[rows, columns] - ring.max(axis=1, initial=0)
    found = np.argsort(-peak, kind="stable")[:LAGS]
    found = found[peak[found] > PEAK * deviation]
    return [(int(rows[i]), int(columns[i]) - (width if columns[i] > width // 2 else 0)) for i in found]


def _ring() -> np.ndarray:
    """bool [9, 9]: what is 3 to 4.3 from the middle."""
    distance = np.hypot(*np.mgrid[-4:5, -4:5])
    return (distance >= 3) & (distance <= 4.3)


def _returning(strokes: np.ndarray, backgrounds: np.ndarray, row: int, column: int) -> float:
    """Share of the overlap of the picture and itself, moved by a lag, with equal strokes on different backgrounds."""
    height, width = strokes.shape
    if row < 0:
        row, column = -row, -column
    rows, columns = (height - row) // CELL * CELL, (width - abs(column)) // CELL * CELL
    if rows < LEAST_LAG or columns < LEAST_LAG:
        return 0.0
    left, right = max(-column, 0), max(column, 0)
    here = np.s_[:rows, left : left + columns]
    there = np.s_[row : row + rows, right : right + columns]
    one, other = strokes[here], strokes[there]
    product = _cells(one * other)
    energy = _cells(one * one + other * other) / 2
    apart = np.abs(_cells(backgrounds[here]) - _cells(backgrounds[there])) > APART
    equal = product > MATCH * (energy + MATCH_FLOOR)
    return float((equal & apart).mean())


def _cells(values: np.ndarray) -> np.ndarray:
    """Means over 3 x 3 cells of CELL pixels, one for each cell of float32 [h, w]."""
    for _ in range(2):
        values = cv2.resize(values, (values.shape[1] // 2, values.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return cv2.blur(values, (3, 3))
