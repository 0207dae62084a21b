"""Scores of layout: bars around a picture, pages of text."""

from __future__ import annotations

import cv2
import numpy as np

from components.quality.views import View

BAR_SPREAD = 3.0  # ours: standard deviation within a line of a bar, and how far its mean may drift, grey levels
BAR_STEP = 8.0  # ours: a pixel that differs more from the bar is picture
BAR_EDGE = 0.5  # ours: share of the line behind the bar that must be picture; night skies end in a few bright dots
EDGE_PX = 8  # that line may be so many pixels of the full picture behind: a JPEG block smears the edge

PAPER = 12  # ours: pixels within so many levels of the paper's are paper
INK = 50  # ours: pixels further away are ink
PAPER_SHARE, INK_SHARE, BOTH_SHARE = 0.5, 0.09, 0.8  # ours: least shares of a patch of text
STROKES = 1.2, 1.0  # ours: least number of strokes met along a row and along a column of a patch


def letterbox(view: View) -> float:
    """Share of the picture's area in bars of one colour at its borders, 0..1.

    A bar ends in a straight edge with picture along most of it, which dark corners and plain skies do not.
    """
    height, width = view.reduced.shape
    behind = EDGE_PX * height // view.luma.shape[0] + 1
    rows, columns = (sum(_bar(side, behind) for side in (x, x[::-1])) for x in (view.reduced, view.reduced.T))
    return float(1 - (1 - min(1.0, rows / height)) * (1 - min(1.0, columns / width)))


def _bar(levels: np.ndarray, behind: int) -> int:
    """Lines of a bar at the top of uint8 [h, w], whose edge spans at most `behind` lines; 0 where there is none."""
    if cv2.meanStdDev(np.ascontiguousarray(levels[:1]))[1].item() >= BAR_SPREAD:
        return 0
    mean, spread = levels.mean(axis=1), levels.std(axis=1)
    plain = (spread < BAR_SPREAD) & (np.abs(mean - mean[0]) < BAR_SPREAD)
    lines = int(np.argmin(plain))
    if plain.all() or lines == 0:
        return 0
    picture = np.abs(levels[lines : lines + behind] - mean[:lines].mean()) > BAR_STEP
    return lines if picture.mean(axis=1).max() >= BAR_EDGE else 0


def text_page(view: View) -> float:
    """Share of the busiest patches that are strokes of ink on one common paper, 0..1; paper may be dark, ink light."""
    busy = view.patches[view.busy]
    count, height, width = busy.shape
    seen = cv2.calcHist([busy.reshape(-1, width)], [0], None, [256], [0, 256]).ravel()
    paper = int(np.convolve(seen, np.ones(9), "same").argmax())
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
