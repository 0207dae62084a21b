"""Histograms of corpora of any size, as inline SVG. A sample sets the bins, and batches are counted one at a time.

A chart has two populations: accepted pictures (wide bars) and rejected pictures (narrow bars in front of them). The
thresholds are edges of bins, so no bar has pictures of both sides. The page's style sets the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from components.corpora import Bounds
from pipelines.pages.charts import nice_ticks
from pipelines.pages.numbers import KIB, count_text, number_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 180, 42, 10, 22, 24
BINS = 40
TAILS = (0.005, 0.995)  # ours: values outside these quantiles may go into the outermost bars
LOG_SPREAD, LOG_MEDIAN = 30.0, 0.25
"""Ours: positive values get a log axis if the high quantile of TAILS is at least LOG_SPREAD times the low one, and the
median lies in the lowest LOG_MEDIAN of the range between them."""
LOG_COUNTS = 0.03  # ours: counts get a log axis if the median bar is lower than this share of the highest bar
LETTER_PX, LABEL_GAP_PX = 6.2, 10  # approximate width of a label's letter; least gap between two labels
LEAST_PX = 2  # least height of a bar, so that one picture is visible next to thousands


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The bins.

    Attributes:
        edges: float64 [n + 1], ascending; bin i holds edges[i] <= value < edges[i + 1], the last bin also its upper
            edge.
        log: whether the bins have equal widths in the logarithm.
        bounds: thresholds of the accepted values; those on the axis are edges.
    """

    edges: np.ndarray
    log: bool
    bounds: Bounds


class Histogram:
    """Counts of accepted and rejected values on one axis; values beyond the axis count in the outermost bars.

    Attributes:
        counts: int64 [2, n], accepted and rejected.
        low, high: least and greatest value so far; inf and -inf before the first value.
        below, above: number of values beyond each end of the axis.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.counts = np.zeros((2, len(axis.edges) - 1), np.int64)
        self.low, self.high = math.inf, -math.inf
        self.below = self.above = 0

    @property
    def total(self) -> int:
        """Number of all values."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray, rejected: np.ndarray) -> None:
        """Count values [k], with `rejected` bool [k]; values that are not finite do not count."""
        finite = np.isfinite(values)
        if not finite.any():
            return
        values, rejected = values[finite].astype(np.float64), rejected[finite]
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.below += int((values < self.axis.edges[0]).sum())
        self.above += int((values > self.axis.edges[-1]).sum())
        n = self.counts.shape[1]
        edges = self.axis.edges.copy()
        if self.axis.bounds.max is not None:  # the threshold itself is accepted, so it counts left of the edge
            edges[edges == self.axis.bounds.max] = np.nextafter(self.axis.bounds.max, np.inf)
        bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, n - 1)
        for kind in (0, 1):
            self.counts[kind] += np.bincount(bins[rejected == bool(kind)], minlength=n)


def choose_axis(sample: np.ndarray, bounds: Bounds | None = None, bins: int = BINS) -> Axis | None:
    """The bins for a sample of the values.

    The axis spans the sample without its outermost half per cent on each side. It also covers the outermost values and
    the thresholds if they are not too far away.

    Args:
        sample: values [k]; values that are not finite are ignored.
        bounds: thresholds of the accepted values.
        bins: approximate number of bins.

    Returns:
        None if the sample has no finite value.
    """
    bounds = bounds or Bounds()
    sample = sample[np.isfinite(sample)].astype(np.float64)
    if not len(sample):
        return None
    low, median, high = (float(value) for value in np.quantile(sample, (TAILS[0], 0.5, TAILS[1])))
    log = low > 0 and high / low >= LOG_SPREAD and median - low <= LOG_MEDIAN * (high - low)
    ends = [bound for bound in (bounds.min, bounds.max) if bound is not None and (bound > 0 or not log)]
    to_axis: Callable[[float], float] = math.log10 if log else float
    low, high = to_axis(low), to_axis(high)
    reach = (high - low) or max(abs(high), 1.0) * 0.5
    for extreme in float(sample.min()), float(sample.max()):
        if extreme > 0 or not log:
            low, high = _reach(low, high, to_axis(extreme), reach, 0.2 * reach)
    for end in ends:
        low, high = _reach(low, high, to_axis(end), 1.5 * reach)
    low, high = _with_rejected(low, high, sample[sample > 0] if log else sample, bounds, to_axis)
    if high <= low:  # a single value gets a bar in the middle
        low, high = low - reach, high + reach
    inside = [to_axis(end) for end in ends if low <= to_axis(end) <= high]
    positions = _positions(low, high, inside, min(bins, max(10, 2 * math.isqrt(len(sample)))))
    edges = 10.0**positions if log else positions.copy()
    for end in ends:  # removes the rounding errors of logarithms and steps
        edges[np.abs(positions - to_axis(end)) < 1e-6 * (high - low)] = end
    extra = [end for end in ends if edges[0] < end < edges[-1]]  # a second threshold less than a bar from the first
    return Axis(edges=np.unique([*edges, *extra]), log=log, bounds=bounds)


def _reach(low: float, high: float, position: float, by: float, else_by: float = 0.0) -> tuple[float, float]:
    """Widen [low, high] to `position` if it lies at most `by` outside; otherwise widen that side by `else_by`."""
    if position < low:
        return (position if position >= low - by else low - else_by), high
    if position > high:
        return low, (position if position <= high + by else high + else_by)
    return low, high


def _with_rejected(
    low: float, high: float, sample: np.ndarray, bounds: Bounds, to_axis: Callable[[float], float]
) -> tuple[float, float]:
    """Widen [low, high] by up to a half on each side for most of the rejected values, however few they are."""
    room, wide = 0.5 * (high - low), []
    if bounds.min is not None and (under := sample[sample < bounds.min]).size:
        wide.append(max(to_axis(float(np.quantile(under, 0.1))), low - room))
    if bounds.max is not None and (over := sample[sample > bounds.max]).size:
        wide.append(min(to_axis(float(np.quantile(over, 0.9))), high + room))
    return min([low, *wide]), max([high, *wide])


def _positions(low: float, high: float, inside: list[float], bins: int) -> np.ndarray:
    """Edges of equal bins that cover [low, high]. The thresholds `inside` are edges, unless two lie within a bin."""
    step = (high - low) / bins
    if not inside:
        return low + step * np.arange(bins + 1)
    first, last = min(inside), max(inside)
    if last - first >= step:
        step = (last - first) / round((last - first) / step)
    below, above = math.ceil((first - low) / step - 1e-6), math.ceil((high - first) / step - 1e-6)
    return first + step * np.arange(-max(below, 0), max(above, 1) + 1)


def axis_ticks(low: float, high: float, log: bool, unit: str) -> list[float]:
    """Round values inside [low, high]; on a log axis 1, or 1 and 3, or 1, 2 and 5 times each power of ten."""
    if unit == "bytes" and not log:
        scale = KIB ** max(0, min(4, int(math.log(max(high, 1.0), KIB))))
        return [tick * scale for tick in nice_ticks(low / scale, high / scale)]
    if not log:
        return nice_ticks(low, high)
    if unit == "bytes":
        bases = [KIB**power * ten for power in range(5) for ten in (1, 10, 100)]
    else:
        bases = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [base * factor for base in bases for factor in factors if low <= base * factor <= high]
        if len(ticks) >= 3:
            break
    return ticks


def histogram_svg(name: str, histogram: Histogram, unit: str = "") -> Markup:
    """The chart. Its elements have classes for the page's style: accepted, rejected, bound, outside, grid, tick.

    Args:
        name: name of the value, for screen readers; any text.
        histogram: counts of at least one value.
        unit: unit of the values.
    """
    axis, counts = histogram.axis, histogram.counts
    edges, base, top = axis.edges, HEIGHT - BOTTOM, float(counts.max()) or 1.0
    to_axis: Callable[[float], float] = math.log10 if axis.log else float
    first, last = to_axis(edges[0]), to_axis(edges[-1])
    log_counts = top >= 100 and float(np.median(counts[counts > 0])) < LOG_COUNTS * top

    def x_of(value: float) -> float:
        share = (to_axis(value) - first) / (last - first)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * min(max(share, 0.0), 1.0), 1)

    def y_of(count: float) -> float:
        share = math.log10(1 + count) / math.log10(1 + top) if log_counts else count / top
        return round(base - max((base - TOP) * share, LEAST_PX), 1)

    parts = [*_outside(axis, x_of, base), *_count_axis(top, log_counts, y_of)]
    parts += _value_axis(axis, unit, x_of, base)
    bars: tuple[list[str], list[str]] = ([], [])
    tips = []
    for number, (accepted, rejected) in enumerate(counts.T.tolist()):
        left, right = x_of(edges[number]), x_of(edges[number + 1])
        if accepted:
            gap = min(0.6, 0.1 * (right - left))
            bars[0].append(f"M{left + gap:.1f} {base}V{y_of(accepted)}H{right - gap:.1f}V{base}z")
        if rejected:
            inset = 0.27 * (right - left)
            bars[1].append(f"M{left + inset:.1f} {base}V{y_of(rejected)}H{right - inset:.1f}V{base}z")
        if accepted or rejected:
            span = f"{number_text(edges[number], unit)} to {number_text(edges[number + 1], unit)}"
            tip = escape(f"{span}: {accepted:,} accepted, {rejected:,} rejected")
            box = f'x="{left}" y="{TOP}" width="{round(right - left, 1)}" height="{base - TOP}"'
            tips.append(f'<rect class="tip" {box}><title>{tip}</title></rect>')
    parts += [
        f'<path class="{kind}" d="{"".join(d)}"/>' for kind, d in zip(("accepted", "rejected"), bars, strict=True) if d
    ]
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for end in (axis.bounds.min, axis.bounds.max):
        if end is not None and edges[0] <= end <= edges[-1]:
            parts.append(f'<line class="bound" x1="{x_of(end)}" x2="{x_of(end)}" y1="{TOP - 6}" y2="{base}"/>')
    label = escape(f"{name}: histogram of {histogram.total:,} pictures")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join([*parts, *tips])}</svg>'
    return Markup(svg)  # all parts are numbers but the name and the unit, which are escaped


def _outside(axis: Axis, x_of: Callable[[float], float], base: float) -> list[str]:
    """Shades over the rejected ranges."""
    ends = (float(axis.edges[0]), axis.bounds.min), (axis.bounds.max, float(axis.edges[-1]))
    shades = []
    for low, high in ends:
        if low is None or high is None or high <= axis.edges[0] or low >= axis.edges[-1]:
            continue
        left, right = x_of(max(low, float(axis.edges[0]))), x_of(min(high, float(axis.edges[-1])))
        box = f'x="{left}" y="{TOP}" width="{round(right - left, 1)}" height="{base - TOP}"'
        shades.append(f'<rect class="outside" {box}/>')
    return shades


def _count_axis(top: float, log: bool, y_of: Callable[[float], float]) -> list[str]:
    if log:
        ticks = [float(10**power) for power in range(int(math.log10(top)) + 1)]
        ticks = ticks[:: max(1, math.ceil(len(ticks) / 4))]
    else:
        ticks = [tick for tick in nice_ticks(0, top, 3) if tick and tick == round(tick)]
    parts = []
    for tick in ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{round(y + 4, 1)}" text-anchor="end">{count_text(tick)}</text>'
        )
    label = "pictures (log)" if log else "pictures"
    return [*parts, f'<text class="tick" x="2" y="11">{label}</text>']


def _value_axis(axis: Axis, unit: str, x_of: Callable[[float], float], base: float) -> list[str]:
    last_end = -math.inf
    parts: list[str] = []
    for tick in axis_ticks(float(axis.edges[0]), float(axis.edges[-1]), axis.log, unit):
        x, text = x_of(tick), number_text(tick, unit)
        middle = min(x, WIDTH - LETTER_PX * len(text) / 2)
        parts.append(f'<line class="base" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
        if middle - LETTER_PX * len(text) / 2 >= last_end + LABEL_GAP_PX:
            last_end = middle + LETTER_PX * len(text) / 2
            parts.append(f'<text class="tick" x="{middle:.1f}" y="{base + 17}" text-anchor="middle">{text}</text>')
    return parts
