"""Complexity of a picture: share of edges, number of segments, variety of hues. Torch-free.

All three are measured at one short side, so that they do not depend on resolution. All numbers are ours.
"""

from __future__ import annotations

import cv2
import numpy as np

from components.types import Image

SHORT_SIDE_PX = 128
EDGE_FROM = 0.1  # least change of luma (0..1) per pixel of an edge
HUE_BINS = 36
SEGMENT_SCALE, SEGMENT_MIN_PX = 100.0, 24
MEASURES = ("edges", "segments", "hues")


def complexity(picture: Image) -> dict[str, float]:
    """Measure a uint8 picture [H, W, 3]; the keys are MEASURES.

    edges: share of pixels whose luma differs by EDGE_FROM or more from the previous pixel, 0..1.
    segments: number of regions by Felzenszwalb and Huttenlocher's graph segmentation, at least 1.
    hues: entropy of the hues in bits, with pixels weighted by chroma; 0 for gray pictures and for a single hue.

    Raises:
        ValueError: the picture is not uint8 [H, W, 3].
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"expected uint8 [H, W, 3], got {picture.dtype} {picture.shape}")
    small = _shrink(picture)
    return {"edges": _edges(small), "segments": _segments(small), "hues": _hues(small)}


def joint_complexity(rows: list[dict[str, float]]) -> np.ndarray:
    """Return one number in 0..1 for each of n pictures: the mean of its ranks in the three measures."""
    from scipy.stats import rankdata

    if len(rows) < 2:
        return np.full(len(rows), 0.5)
    ranks = [(rankdata([row[name] for row in rows]) - 1) / (len(rows) - 1) for name in MEASURES]
    return np.asarray(np.mean(ranks, axis=0))


def _shrink(picture: Image) -> np.ndarray:
    """Return float32 [h, w, 3] in 0..1 with a short side of at most SHORT_SIDE_PX."""
    height, width = picture.shape[:2]
    factor = SHORT_SIDE_PX / min(height, width)
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

    # sigma 0: shrinking has already smoothed the picture, and a blur adds segments along sharp borders
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
