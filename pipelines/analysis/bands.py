"""Means, intervals and correlations as text, as JSON and as curves of a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.evaluation import MIN_PICTURES, TOO_FEW
from components.evaluation.statistics import Band, Correlation
from pipelines.analysis import levels as lv
from pipelines.pages.figures import Line, Panel
from pipelines.pages.numbers import digits_text

HIGHER, LOWER, NO_EFFECT = "higher", "lower", "no clear effect"
"""Verdicts on a difference, next to TOO_FEW."""


def interval_text(mean: float, low: float, high: float, sign: bool = True) -> str:
    """A mean with its interval, or alone if the interval is NaN."""
    text = digits_text(mean, sign=sign)
    return text if low != low else f"{text} [{digits_text(low, sign=sign)}, {digits_text(high, sign=sign)}]"


def band_text(band: Band, sign: bool = True) -> str:
    """A scalar band: the mean with its interval."""
    return interval_text(float(band.mean), float(band.low), float(band.high), sign)


def correlation_text(correlation: Correlation) -> str:
    """A rank correlation with its interval and its number of pictures."""
    interval = interval_text(correlation.rho, correlation.low, correlation.high)
    return f"rank correlation {interval}, {correlation.n} pictures"


def verdict(band: Band) -> str:
    """The sign of a difference (a scalar band), as far as its interval excludes zero."""
    return _word(float(band.low), float(band.high), HIGHER, LOWER)


def correlation_verdict(correlation: Correlation, rises: str, falls: str) -> str:
    """`rises` or `falls`, as far as the interval excludes zero."""
    if correlation.rho != correlation.rho and correlation.n >= MIN_PICTURES:
        return "no ranks, because all values are equal"
    return _word(correlation.low, correlation.high, rises, falls)


def _word(low: float, high: float, above: str, below: str) -> str:
    if low != low:
        return TOO_FEW
    return above if low > 0 else below if high < 0 else NO_EFFECT


def band_document(band: Band) -> dict[str, Any]:
    """A band for summary.json."""
    return {"mean": band.mean, "low": band.low, "high": band.high}


def correlation_document(correlation: Correlation) -> dict[str, Any]:
    """A correlation for summary.json."""
    return {"rho": correlation.rho, "low": correlation.low, "high": correlation.high, "n": correlation.n}


def stack_bands(bands: Sequence[Band]) -> Band:
    """Scalar bands as one band [n]."""
    return Band(
        mean=np.array([float(band.mean) for band in bands]),
        low=np.array([float(band.low) for band in bands]),
        high=np.array([float(band.high) for band in bands]),
    )


def band_line(label: str, band: Band) -> Line:
    """A band [n] as a curve of a plot."""
    return Line(label=label, y=band.mean, low=band.low, high=band.high)


def fault_panel(
    kind: str,
    levels: Sequence[lv.Level],
    bands: Mapping[str, Mapping[str, Band]],
    y_label: str,
    reference: tuple[float, str],
) -> Panel:
    """A plot of one fault over its strengths, from the clean picture on.

    Args:
        bands: scalar bands by the curve's label and the level's name.
        reference: see Panel.
    """
    faults = lv.levels_of_kind(levels, kind)
    names = [lv.HQ, *(level.name for level in faults)]
    return Panel(
        title=kind,
        x_label=lv.UNITS[kind],
        y_label=y_label,
        x=np.arange(len(names), dtype=float),
        ticks=["none", *(f"{level.strength:g}" for level in faults)],
        lines=[band_line(label, stack_bands([by[name] for name in names])) for label, by in bands.items()],
        reference=reference,
    )
