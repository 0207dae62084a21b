"""The score of repeated overlays: watermarks.

A watermark repeats the same strokes over unrelated backgrounds. A facade or a fence repeats too, but there the
surroundings of the strokes repeat with them.
"""

from __future__ import annotations

import cv2
import numpy as np

from components.quality.views import View

AREA_PX = 100_000  # ours: pixels of the reduced copy; more pixels do not improve the score
LEAST_SIDE = 96  # ours: in smaller copies, watermarks do not differ from chance
LEAST_LAG = 16  # ours: px of the copy; peaks at smaller lags come from single strokes
NORM_PX = 15  # ours: side of the window for the mean contrast that normalises strokes
NORM_FLOOR = 2.5  # ours: grey levels added to that mean, so that plain areas do not amplify noise
STROKE_LIMIT = 2.0  # ours: strokes are clipped to this, so that a hard edge counts as much as a thin letter
FINE, BROAD = 0.8, 1.4  # ours: sigma in px of the copy of the blur that is subtracted, to find lags and to match
PEAK = 4.0  # ours: least height of a lag's peak in standard deviations
TOPS = 64  # ours: number of local maxima that are compared with their rings
LAGS = 3  # ours: number of peaks to check
CELL = 4  # ours: side in px of the copy of a cell of the match map
MATCH = 0.5  # ours: least local correlation of equal strokes
MATCH_FLOOR = 0.15  # ours: added to the strokes' energy, so that plain areas do not match
APART = 20.0  # ours: least difference of the backgrounds in grey levels
BACKGROUND_PX = 17  # ours: side of the window that averages strokes out
CONTROLS = ((0, 4), (4, 0), (0, -4), (-4, 0), (3, 3), (3, -3))  # lags next to a peak: matches there are not copies
CONTROL_WEIGHT = 3.0  # ours
WORTH = 0.004  # ours: controls are not computed for a peak with a lower share


def watermark(view: View) -> float:
    """Return the share of the picture with repeated strokes on different backgrounds, minus that of chance, 0..1."""
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
    score = 0.0
    for row, column in lags:
        share = _repeated_share(strokes, backgrounds, row, column)
        if share > max(WORTH, score):
            control = max(_repeated_share(strokes, backgrounds, row + y, column + x) for y, x in CONTROLS)
            score = max(score, share - CONTROL_WEIGHT * control)
    return score


def _strokes(reduced: np.ndarray, sigma: float) -> np.ndarray:
    """Return the picture minus its blur, at normalised contrast: float32 [h, w] in -STROKE_LIMIT..STROKE_LIMIT."""
    side = 3 if sigma < 1 else 7
    smooth = cv2.GaussianBlur(reduced, (side, side), sigma)
    contrast = cv2.blur(cv2.absdiff(reduced, smooth), (NORM_PX, NORM_PX)).astype(np.float32)
    contrast += NORM_FLOOR
    strokes = np.asarray(cv2.subtract(reduced, smooth, dtype=cv2.CV_32F))
    np.divide(strokes, contrast, out=strokes)
    return np.clip(strokes, -STROKE_LIMIT, STROKE_LIMIT, out=strokes)


def _autocorrelation(strokes: np.ndarray) -> np.ndarray:
    """Return the circular, unscaled autocorrelation, float32 [H, W] of fast DFT size; lags above half a side wrap."""
    height, width = strokes.shape
    below, right = cv2.getOptimalDFTSize(height) - height, cv2.getOptimalDFTSize(width) - width
    if below or right:
        strokes = cv2.copyMakeBorder(strokes, 0, below, 0, right, cv2.BORDER_CONSTANT, value=0)
    spectrum = cv2.dft(strokes)
    power = cv2.mulSpectrums(spectrum, spectrum, 0, conjB=True)
    power[0, 0] = 0  # removes the mean
    return cv2.dft(power, flags=cv2.DFT_INVERSE)


def _peaks(correlation: np.ndarray) -> list[tuple[int, int]]:
    """Return at most LAGS lags (row, column) that exceed the ring around them, best first; opposite lags count once.

    Long edges match along themselves and make ridges; the comparison with the ring removes them.
    """
    height, width = correlation.shape
    sample = np.sort(correlation[::8, ::8], axis=None)
    middle = len(sample) // 2
    deviation = 1.4826 * float(np.sort(np.abs(sample - sample[middle]))[middle])  # normal noise with this MAD
    upper = correlation[: height // 2 + 1]  # opposite lags are equal
    tops = (upper >= cv2.dilate(upper, np.ones((3, 3), np.uint8))) & (upper > PEAK * deviation)
    tops[:LEAST_LAG, np.minimum(np.arange(width), width - np.arange(width)) < LEAST_LAG] = False
    tops[0, width // 2 + 1 :] = False
    places = np.flatnonzero(tops)
    places = places[np.argsort(-correlation.ravel()[places], kind="stable")[:TOPS]]
    rows, columns = np.divmod(places, width)
    offsets = np.argwhere(_ring()) - 4
    ring = correlation[(rows[:, None] + offsets[:, 0]) % height, (columns[:, None] + offsets[:, 1]) % width]
    peak = correlation[rows, columns] - ring.max(axis=1, initial=0)
    best = np.argsort(-peak, kind="stable")[:LAGS]
    best = best[peak[best] > PEAK * deviation]
    return [(int(rows[i]), int(columns[i]) - (width if columns[i] > width // 2 else 0)) for i in best]


def _ring() -> np.ndarray:
    """bool [9, 9]: cells at a distance of 3 to 4.3 from the middle."""
    distance = np.hypot(*np.mgrid[-4:5, -4:5])
    return (distance >= 3) & (distance <= 4.3)


def _repeated_share(strokes: np.ndarray, backgrounds: np.ndarray, row: int, column: int) -> float:
    """Return the share with equal strokes on different backgrounds, in the overlap with the picture moved by a lag."""
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
    """Return means over 3 x 3 cells of CELL pixels, for each cell of float32 [h, w]."""
    for _ in range(2):
        values = cv2.resize(values, (values.shape[1] // 2, values.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return cv2.blur(values, (3, 3))
