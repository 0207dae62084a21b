"""Scores of layout: bars around a picture, and pages of text."""

from __future__ import annotations

import cv2
import numpy as np

from components.quality.views import View

BAR_SPREAD = 3.0  # ours: limit of the standard deviation in a line of a bar, and of the change of its mean, grey levels
BAR_STEP = 8.0  # ours: a pixel that differs more from the bar belongs to the picture
BAR_EDGE = 0.5  # ours: least share of picture in the line after the bar; night skies end in a few bright dots
EDGE_PX = 8  # that line may be this many pixels of the full picture away, because JPEG blocks blur the edge

PAPER = 12  # ours: pixels that differ by at most this many levels from the paper are paper
INK = 50  # ours: pixels that differ by more are ink
PAPER_SHARE, INK_SHARE, BOTH_SHARE = 0.5, 0.09, 0.8  # ours: least shares in a patch of text
STROKES = 1.2, 1.0  # ours: least number of strokes along a row and along a column of a patch


def letterbox(view: View) -> float:
    """Return the share of the picture's area in bars of one colour at its borders, 0..1.

    A bar ends in a straight edge with picture along most of it; dark corners and plain skies do not.
    """
    height, width = view.reduced.shape
    edge_lines = EDGE_PX * height // view.luma.shape[0] + 1
    rows, columns = (sum(_bar(side, edge_lines) for side in (x, x[::-1])) for x in (view.reduced, view.reduced.T))
    return float(1 - (1 - min(1.0, rows / height)) * (1 - min(1.0, columns / width)))


def _bar(levels: np.ndarray, edge_lines: int) -> int:
    """Count the lines of a bar at the top of uint8 [h, w]; its edge spans at most `edge_lines`; 0 if there is none."""
    if cv2.meanStdDev(np.ascontiguousarray(levels[:1]))[1].item() >= BAR_SPREAD:
        return 0
    mean, spread = levels.mean(axis=1), levels.std(axis=1)
    plain = (spread < BAR_SPREAD) & (np.abs(mean - mean[0]) < BAR_SPREAD)
    lines = int(np.argmin(plain))
    if plain.all() or lines == 0:
        return 0
    picture = np.abs(levels[lines : lines + edge_lines] - mean[:lines].mean()) > BAR_STEP
    return lines if picture.mean(axis=1).max() >= BAR_EDGE else 0


def text_page(view: View) -> float:
    """Return the share of the busiest patches with ink on one common paper, 0..1; paper may be darker than ink."""
    busy = view.patches[view.busy]
    count, height, width = busy.shape
    histogram = cv2.calcHist([busy.reshape(-1, width)], [0], None, [256], [0, 256]).ravel()
    paper = int(np.convolve(histogram, np.ones(9), "same").argmax())
    paper_share = ((busy >= paper - PAPER) & (busy <= paper + PAPER)).mean(axis=(1, 2))
    candidates = busy[paper_share >= PAPER_SHARE]
    if not len(candidates):
        return 0.0
    below, above = candidates < paper - INK, candidates > paper + INK
    ink = below if below.sum() > above.sum() else above
    ink_share = ink.mean(axis=(1, 2))
    across = (ink[:, :, 1:] & ~ink[:, :, :-1]).sum(axis=(1, 2)) / height
    down = (ink[:, 1:] & ~ink[:, :-1]).sum(axis=(1, 2)) / width
    both_share = ink_share + paper_share[paper_share >= PAPER_SHARE]
    text = (ink_share >= INK_SHARE) & (both_share >= BOTH_SHARE) & (across >= STROKES[0]) & (down >= STROKES[1])
    return float(text.sum() / count)
