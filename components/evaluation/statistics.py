"""Means, bands and rank correlations over pictures, with bootstrap intervals.

All intervals are 95 % percentile intervals over resampled pictures, deterministic in (seed, name). They cover the
choice of pictures only, not the sampler's noise. Below about ten pictures they are slightly too narrow. A name always
gives the same resamples, so curves under one name are paired.
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
    """A mean over pictures and its interval, arrays of one shape; NaN where there is no value."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Spearman's rho of n pairs and its interval; NaN where undefined (fewer than three pairs, or constant values)."""

    rho: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def mean_band(values: np.ndarray, seed: int, *name: str, geometric: bool = False) -> Band:
    """The mean of values [n, ...] over pictures, with its interval [...].

    Each column ignores its values that are not finite. With fewer than two finite values the interval is NaN.

    Args:
        geometric: average logarithms, for ratios; values that are not positive are then ignored too.

    Raises:
        ValueError: `values` is empty.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 1 or not len(values):
        raise ValueError("a band needs at least one picture")
    shape = values.shape[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = np.log(values) if geometric else values
    flat = flat.reshape(len(values), -1)
    is_finite = np.isfinite(flat)
    zero_filled = np.where(is_finite, flat, 0.0)
    count = is_finite.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = zero_filled.sum(axis=0) / count
        weights = _resamples(len(values), seed, *name)
        resample_means = (weights @ zero_filled) / (weights @ is_finite)
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    for column in np.flatnonzero(count >= 2):
        finite = resample_means[np.isfinite(resample_means[:, column]), column]
        low[column], high[column] = np.quantile(finite, QUANTILES)
    parts = [np.exp(part) if geometric else part for part in (mean, low, high)]
    mean, low, high = (part.reshape(shape) for part in parts)
    return Band(mean=mean, low=low, high=high)


def rank_correlation(x: np.ndarray, y: np.ndarray, seed: int, *name: str) -> Correlation:
    """Spearman's rank correlation of x and y [n]; pairs with a value that is not finite are ignored.

    Raises:
        ValueError: the lengths differ.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"expected two lists of one length, got {x.shape} and {y.shape}")
    is_finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_finite], y[is_finite]
    n = len(x)
    rho = float(_spearman(x[None], y[None])[0]) if n >= 3 else float("nan")
    if not np.isfinite(rho):
        return Correlation(rho=float("nan"), low=float("nan"), high=float("nan"), n=n)
    picks = generator(seed, "bootstrap", *name).integers(0, n, size=(RESAMPLES, n))
    resample_rhos = _spearman(x[picks], y[picks])
    low, high = np.quantile(resample_rhos[np.isfinite(resample_rhos)], QUANTILES)
    return Correlation(rho=rho, low=float(low), high=float(high), n=n)


def rms_levels(a: Image, b: Image) -> float:
    """Root mean square difference of two uint8 pictures of one size, in 8-bit levels."""
    return float(np.sqrt(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))))


def psnr(a: Image, b: Image) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; infinite where they are equal."""
    difference = rms_levels(a, b)
    return float(20 * np.log10(255 / difference)) if difference else float("inf")


def _resamples(n: int, seed: int, *name: str) -> np.ndarray:
    """The number of times that each resample contains each picture, float64 [RESAMPLES, n]."""
    picks = generator(seed, "bootstrap", *name).integers(0, n, size=(RESAMPLES, n))
    weights = np.zeros((RESAMPLES, n))
    np.add.at(weights, (np.arange(RESAMPLES)[:, None], picks), 1.0)
    return weights


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rho of each pair of rows, [k, n] -> [k]; NaN for a constant row."""
    from scipy.stats import rankdata

    deviations = [ranks - ranks.mean(axis=1, keepdims=True) for ranks in (rankdata(x, axis=1), rankdata(y, axis=1))]
    with np.errstate(divide="ignore", invalid="ignore"):
        norm = np.sqrt(np.square(deviations[0]).sum(axis=1) * np.square(deviations[1]).sum(axis=1))
        return np.asarray((deviations[0] * deviations[1]).sum(axis=1) / norm)
