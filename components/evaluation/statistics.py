"""Means, bands and rank correlations over pictures, with intervals by the bootstrap.

All intervals are 95 % percentile intervals over resampled pictures, deterministic in (seed, name). They cover the
choice of pictures only, not the sampler's noise, and are a little too narrow below about ten pictures. One name gives
one set of resamples, so that curves under one name stay paired.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from components.randomness import generator
from components.types import Image

RESAMPLES = 2000
QUANTILES = (0.025, 0.975)


@dataclass(frozen=True, kw_only=True)
class Band:
    """A mean over pictures and its interval, arrays of one shape; NaN where there is nothing to average."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's rho of n pairs and its interval; NaN where it is not defined (fewer than three, or a constant)."""

    rho: float
    low: float
    high: float
    n: int

    @property
    def seen(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def mean_band(values: np.ndarray, seed: int, *name: str, geometric: bool = False) -> Band:
    """The mean of values [n, ...] over pictures, with its interval [...].

    What is not finite is left out, each column for itself. With fewer than two values the interval is NaN.

    Args:
        geometric: average logarithms, for ratios; values that are not positive are then left out too.

    Raises:
        ValueError: no pictures.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 1 or not len(values):
        raise ValueError("a band needs at least one picture")
    shape = values.shape[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = np.log(values) if geometric else values
    flat = flat.reshape(len(values), -1)
    there = np.isfinite(flat)
    filled = np.where(there, flat, 0.0)
    count = there.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = filled.sum(axis=0) / count
        weights = _resamples(len(values), seed, *name)
        drawn = (weights @ filled) / (weights @ there)
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    for column in np.flatnonzero(count >= 2):
        finite = drawn[np.isfinite(drawn[:, column]), column]
        low[column], high[column] = np.quantile(finite, QUANTILES)
    parts = [np.exp(part) if geometric else part for part in (mean, low, high)]
    mean, low, high = (part.reshape(shape) for part in parts)
    return Band(mean=mean, low=low, high=high)


def rank_correlation(x: np.ndarray, y: np.ndarray, seed: int, *name: str) -> Correlation:
    """Spearman's rank correlation of x and y [n]; pairs with a value that is not finite are left out.

    Raises:
        ValueError: lengths differ.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"expected two lists of one length, got {x.shape} and {y.shape}")
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    n = len(x)
    rho = float(_spearman(x[None], y[None])[0]) if n >= 3 else float("nan")
    if not np.isfinite(rho):
        return Correlation(rho=float("nan"), low=float("nan"), high=float("nan"), n=n)
    picks = generator(seed, "bootstrap", *name).integers(0, n, size=(RESAMPLES, n))
    drawn = _spearman(x[picks], y[picks])
    low, high = np.quantile(drawn[np.isfinite(drawn)], QUANTILES)
    return Correlation(rho=rho, low=float(low), high=float(high), n=n)


def rms_levels(a: Image, b: Image) -> float:
    """Root mean square difference of two uint8 pictures of one size, in 8-bit levels."""
    return float(np.sqrt(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))))


def psnr(a: Image, b: Image) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; infinite where they are equal."""
    difference = rms_levels(a, b)
    return float(20 * np.log10(255 / difference)) if difference else float("inf")


def _resamples(n: int, seed: int, *name: str) -> np.ndarray:
    """How often each of n pictures is drawn in each resample, float64 [RESAMPLES, n]."""
    picks = generator(seed, "bootstrap", *name).integers(0, n, size=(RESAMPLES, n))
    weights = np.zeros((RESAMPLES, n))
    np.add.at(weights, (np.arange(RESAMPLES)[:, None], picks), 1.0)
    return weights


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Row by row [k, n] -> [k]; NaN for a constant row."""
    from scipy.stats import rankdata

    centred = [ranks - ranks.mean(axis=1, keepdims=True) for ranks in (rankdata(x, axis=1), rankdata(y, axis=1))]
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = np.sqrt(np.square(centred[0]).sum(axis=1) * np.square(centred[1]).sum(axis=1))
        return np.asarray((centred[0] * centred[1]).sum(axis=1) / norm)
