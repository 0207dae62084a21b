"""Scores of detail and noise: texture, sharpness, effective resolution, noise level.

All are measured in patches at full resolution, because a reduced copy shows no blur and no noise.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from components.quality.views import View

BINS = 32  # number of bins of the spectrum, from 0 to the pixel grid's limit
FALL = 0.1  # ours: gradient energy below this share of its peak counts as none (amplitude: about a third)
TILE_PX = 15  # ours: side of the tiles for the noise level
QUIET_SHARE = 0.1  # ours: quantile of the tiles' levels; the noise level
SECOND = np.array([1, -2, 1], np.float32)


def spectral_detail(view: View) -> dict[str, float]:
    """Measure texture, sharpness and resolution from spectra of the busiest patches.

    texture is the RMS of detail between 4 and 16 pixels in the busiest patch. sharpness is the RMS of detail below 4
    pixels in the sharper quarter of the patches. Both are in grey levels. resolution is the frequency where the
    gradient's energy falls to FALL of its peak, as a share of the pixel grid's limit: about 1.4 / s for a picture
    enlarged s times.
    """
    patches = view.patches[view.busy].astype(np.float32)
    count, height, width = patches.shape
    window, weights, middle, fine = _spectral_weights(height, width)
    patches = (patches - patches.mean(axis=(1, 2), keepdims=True)) * window
    power = np.stack([cv2.dft(patch) for patch in patches]).reshape(count, -1) ** 2
    bands = np.sqrt(power @ np.stack([middle, fine], axis=1))
    gradient = np.convolve(power.sum(axis=0) @ weights, np.ones(3) / 3, "same")
    sharper = np.sort(bands[:, 1])[::-1]
    return {
        "texture": float(bands[:, 0].max()),
        "sharpness": float(sharper[count // 4]),
        "resolution": _fall(gradient),
    }


def noise(view: View) -> float:
    """Return the standard deviation of noise in grey levels, from the calmest tiles.

    The mask of Immerkaer 1996 ("Fast noise variance estimation") cancels linear gradients. The mean of its absolute
    responses is sqrt(2 / pi) * 6 sigma. It responds to texture too, hence the low quantile over tiles.
    """
    patches = view.patches[view.calm]
    height, width = patches.shape[1:]
    if min(height, width) < 3:
        return 0.0
    responses = cv2.sepFilter2D(patches.reshape(-1, width), cv2.CV_16S, SECOND, SECOND).reshape(patches.shape)
    level = np.sort(_tiles(np.abs(responses[:, 1:-1, 1:-1])))
    return float(level[int(QUIET_SHARE * len(level))] * np.sqrt(np.pi / 2) / 6)


def _tiles(patches: np.ndarray) -> np.ndarray:
    """Return the means of tiles of [N, h, w], flat; incomplete tiles are left out."""
    count, height, width = patches.shape
    rows, columns = min(TILE_PX, height), min(TILE_PX, width)
    inside = patches[:, : height // rows * rows, : width // columns * columns]
    strips = inside.reshape(count, height // rows, rows, -1).sum(axis=2, dtype=np.int32)  # whole lines at once: fast
    return strips.reshape(-1, columns).sum(axis=1) / (rows * columns)


@lru_cache(maxsize=64)
def _spectral_weights(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return for one size the window [h, w], the bins' weights [h * w, BINS + 1] and the weights of two bands [h * w].

    Weights apply to the squared entries of OpenCV's packed spectrum.
    """
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1]).astype(np.float32)
    frequency, twice = _spectrum_layout(height, width)
    bins = np.minimum(np.rint(2 * BINS * frequency).astype(int), BINS)
    weights = np.zeros((frequency.size, BINS + 1), np.float32)
    inside = frequency <= 0.5
    weights[np.nonzero(inside)[0], bins[inside]] = (twice * frequency**2)[inside]
    # Parseval: makes the summed power the mean square of the windowed patch
    scale = twice / (height * width * float((window**2).sum()))
    middle = np.where((frequency >= 1 / 16) & (frequency < 1 / 4), scale, 0).astype(np.float32)
    fine = np.where(frequency >= 1 / 4, scale, 0).astype(np.float32)
    return window, weights, middle, fine


def _spectrum_layout(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return frequency (cycles per pixel) and multiplicity (1 or 2) of the entries of a real picture's `cv2.dft`, flat.

    The packed form (OpenCV's "CCS") stores one of each pair of conjugates. Columns alternate between real and imaginary
    parts. The first column, and the last one of an even width, are packed in the same way along their rows.
    """
    row, column = np.mgrid[:height, :width]
    own_column = (column == 0) | ((column == width - 1) & (width % 2 == 0))
    across = (column + 1) // 2 / width
    down = np.where(own_column, (row + 1) // 2 / height, np.minimum(row, height - row) / height)
    is_single = own_column & ((row == 0) | ((row == height - 1) & (height % 2 == 0)))
    return np.hypot(down, across).ravel(), np.where(is_single, 1.0, 2.0).ravel()


def _fall(gradient: np.ndarray) -> float:
    """Return where the profile [BINS + 1] last exceeds FALL of its peak, interpolated, 0..1; 0 for an empty profile."""
    limit = FALL * gradient.max()
    if limit <= 0:
        return 0.0
    last = int(np.nonzero(gradient > limit)[0].max())
    if last == BINS:
        return 1.0
    step = (gradient[last] - limit) / (gradient[last] - gradient[last + 1])
    return float((last + step) / BINS)
