"""How much goes on in a picture: share of edges, number of segments, variety of hues. Torch-free.

Three plain measures of a crowded scene, each taken at one short side so that they do not depend on resolution. All
numbers are ours.
"""

from __future__ import annotations

import cv2
import numpy as np

from components.types import Image

MEASURED_SIDE_PX = 128
EDGE_FROM = 0.1  # change of luma (0..1) a pixel from which a pixel counts as an edge
HUE_BINS = 36
SEGMENT_SCALE, SEGMENT_MIN_PX = 100.0, 24
MEASURES = ("edges", "segments", "hues")


def complexity(picture: Image) -> dict[str, float]:
    """The measures of a uint8 picture [H, W, 3], by name of MEASURES.

    edges: share of the pixels whose luma changes by EDGE_FROM or more from one pixel to the next, 0..1.
    segments: regions that Felzenszwalb and Huttenlocher's graph cut finds, at least 1.
    hues: entropy of the hues in bits, each pixel weighted by its chroma; 0 for gray pictures and for one hue.

    Raises:
        ValueError: not uint8 [H, W, 3].
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"expected uint8 [H, W, 3], got {picture.dtype} {picture.shape}")
    small = _measured(picture)
    return {"edges": _edges(small), "segments": _segments(small), "hues": _hues(small)}


def joint_complexity(rows: list[dict[str, float]]) -> np.ndarray:
    """One number a picture, 0..1: the mean of its ranks in the three measures, among these pictures [n]."""
    from scipy.stats import rankdata

    if len(rows) < 2:
        return np.full(len(rows), 0.5)
    ranks = [(rankdata([row[name] for row in rows]) - 1) / (len(rows) - 1) for name in MEASURES]
    return np.asarray(np.mean(ranks, axis=0))


def _measured(picture: Image) -> np.ndarray:
    """float32 [h, w, 3] in 0..1 with a short side of at most MEASURED_SIDE_PX."""
    height, width = picture.shape[:2]
    factor = MEASURED_SIDE_PX / min(height, width)
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return picture.astype(np.float32) * np.float32(1 / 255)


def _edges(small: np.ndarray) -> float:
    luma = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    across, down = np.zeros_like(luma), np.zeros_like(luma)
    across[:, 1:], down[1:] = np.diff(luma, axis=1), np.diff(luma, axis=0)
    return float((np.hypot(across, down) >= EDGE_FROM).mean())


def _segments(small: np.ndarray) -> float:
    from skimage.segmentation import felzenszwalb

    # not blurred: shrinking has done that already, and at a sharp border a blur makes segments of its own
    labels = felzenszwalb(small, scale=SEGMENT_SCALE, sigma=0, min_size=SEGMENT_MIN_PX)
    return float(len(np.unique(labels)))


def _hues(small: np.ndarray) -> float:
    hue = cv2.cvtColor(small, cv2.COLOR_RGB2HSV)[..., 0]  # degrees
    chroma = small.max(axis=2) - small.min(axis=2)
    bins = (hue / 360 * HUE_BINS).astype(np.int64) % HUE_BINS
    shares = np.bincount(bins.ravel(), weights=chroma.ravel().astype(np.float64), minlength=HUE_BINS)
    if shares.sum() <= 0:
        return 0.0
    shares = shares[shares > 0] / shares.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0
