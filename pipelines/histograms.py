"""Histograms of corpora of any size: bins chosen once from a sample, counted a batch at a time, drawn as inline SVG.

Two populations share a chart: what was accepted (wide bars) and what was rejected (narrow bars before them). Bins meet
at the thresholds, so no bar holds both sides of one. The drawing takes its colours from the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from components.corpora import Bounds
from pipelines.charts import nice_ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 180, 42, 10, 22, 24
BINS = 40
TAILS = (0.005, 0.995)  # ours: what lies outside of these quantiles may be drawn in the last bar
LOG_SPREAD, LOG_MEDIAN = 30.0, 0.25
"""Ours: positive values that differ so many times, half of them in so small a part of the range, get a log axis."""
LOG_COUNTS = 0.03  # ours: so much smaller than the highest bar, and the others can no longer be read
LETTER_PX, LABEL_GAP_PX = 6.2, 10  # width of a letter of the labels, about; least gap between two
LEAST_PX = 2  # height of a single picture's bar, which must be seen beside thousands
KIB = 1024.0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Where the bins lie.

    Attributes:
        edges: float64 [n + 1], ascending; bin i holds edges[i] <= value < edges[i + 1], the last also its upper edge.
        log: whether they are equally wide in the logarithm.
        bounds: what is accepted; its ends are edges wherever they lie on the axis.
    """

    edges: np.ndarray
    log: bool
    bounds: Bounds


class Histogram:
    """Counts of accepted and rejected values on one axis; values beyond the axis are counted in the last bars.

    Attributes:
        counts: int64 [2, n], accepted and rejected.
        low, high: least and greatest value seen; inf and -inf while there is none.
        below, above: how many lay beyond the axis.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.counts = np.zeros((2, len(axis.edges) - 1), np.int64)
        self.low, self.high = math.inf, -math.inf
        self.below = self.above = 0

    @property
    def total(self) -> int:
        """All values counted."""
        return int(self.counts.sum())

    def add(self, values: np.ndarray, rejected: np.ndarray) -> None:
        """Count values [k], of which those with `rejected` bool [k] were rejected; what is no number is left out."""
        finite = np.isfinite(values)
        if not finite.any():
            return
        values, rejected = values[finite].astype(np.float64), rejected[finite]
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.below += int((values < self.axis.edges[0]).sum())
        self.above += int((values > self.axis.edges[-1]).sum())
        n = self.counts.shape[1]
        edges = self.axis.edges.copy()
        if self.axis.bounds.max is not None:  # what equals the upper threshold is accepted, so it lies left of it
            edges[edges == self.axis.bounds.max] = np.nextafter(self.axis.bounds.max, np.inf)
        place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, n - 1)
        for kind in (0, 1):
            self.counts[kind] += np.bincount(place[rejected == bool(kind)], minlength=n)


def choose_axis(sample: np.ndarray, bounds: Bounds | None = None, bins: int = BINS) -> Axis | None:
    """Bins for values like these.

    The axis spans the sample without its outermost half per cent on each side, and reaches out to the rest and to the
    thresholds where these are not too far away.

    Args:
        sample: values [k]; what is no number is left out.
        bounds: what is accepted.
        bins: about how many.

    Returns:
        None where the sample holds no number.
    """
    bounds = bounds or Bounds()
    sample = sample[np.isfinite(sample)].astype(np.float64)
    if not len(sample):
        return None
    low, median, high = (float(value) for value in np.quantile(sample, (TAILS[0], 0.5, TAILS[1])))
    log = low > 0 and high / low >= LOG_SPREAD and median - low <= LOG_MEDIAN * (high - low)
    ends = [bound for bound in (bounds.min, bounds.max) if bound is not None and (bound > 0 or not log)]
    there: Callable[[float], float] = math.log10 if log else float
    low, high = there(low), there(high)
    reach = (high - low) or max(abs(high), 1.0) * 0.5
    for extreme in float(sample.min()), float(sample.max()):
        if extreme > 0 or not log:
            low, high = _reach(low, high, there(extreme), reach, 0.2 * reach)
    for end in ends:
        low, high = _reach(low, high, there(end), 1.5 * reach)
    low, high = _with_refused(low, high, sample[sample > 0] if log else sample, bounds, there)
    if high <= low:  # one value only: a bar in the middle
        low, high = low - reach, high + reach
    inside = [there(end) for end in ends if low <= there(end) <= high]
    places = _aligned(low, high, inside, min(bins, max(10, 2 * math.isqrt(len(sample)))))
    edges = 10.0**places if log else places.copy()
    for end in ends:  # to the bit, whatever logarithms and steps did to it
        edges[np.abs(places - there(end)) < 1e-6 * (high - low)] = end
    extra = [end for end in ends if edges[0] < end < edges[-1]]  # a second threshold less than a bar from the first
    return Axis(edges=np.unique([*edges, *extra]), log=log, bounds=bounds)


def _reach(low: float, high: float, place: float, by: float, else_by: float = 0.0) -> tuple[float, float]:
    """Widen [low, high] to take in `place` where that lies no further outside than `by`; else by `else_by`."""
    if place < low:
        return (place if place >= low - by else low - else_by), high
    if place > high:
        return low, (place if place <= high + by else high + else_by)
    return low, high


def _with_refused(
    low: float, high: float, sample: np.ndarray, bounds: Bounds, there: Callable[[float], float]
) -> tuple[float, float]:
    """Widen [low, high] by up to a half for most of what is refused, however little that is."""
    room, wide = 0.5 * (high - low), []
    if bounds.min is not None and (under := sample[sample < bounds.min]).size:
        wide.append(max(there(float(np.quantile(under, 0.1))), low - room))
    if bounds.max is not None and (over := sample[sample > bounds.max]).size:
        wide.append(min(there(float(np.quantile(over, 0.9))), high + room))
    return min([low, *wide]), max([high, *wide])


def _aligned(low: float, high: float, inside: list[float], bins: int) -> np.ndarray:
    """Equal bins that cover [low, high] and meet at the given places, where two of these are not too close for it."""
    step = (high - low) / bins
    if not inside:
        return low + step * np.arange(bins + 1)
    first, last = min(inside), max(inside)
    if last - first >= step:
        step = (last - first) / round((last - first) / step)
    before, after = math.ceil((first - low) / step - 1e-6), math.ceil((high - first) / step - 1e-6)
    return first + step * np.arange(-max(before, 0), max(after, 1) + 1)


def shown_number(value: float, unit: str = "") -> str:
    """A number for people: four significant digits, bytes in binary multiples, no exponent where it can be helped."""
    if unit == "bytes":
        return shown_bytes(value)
    text = f"{value:,.0f}" if abs(value) >= 1000 and abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("-", "−")


def shown_bytes(value: float) -> str:
    """B, KiB, MiB, GiB or TiB, with three significant digits."""
    if abs(value) < KIB:
        return f"{value:.0f} B"
    power = min(4, int(math.log(abs(value), KIB) + 1e-9))
    scaled = value / KIB**power
    return f"{scaled:,.0f} {'KMGT'[power - 1]}iB" if scaled >= 100 else f"{scaled:.3g} {'KMGT'[power - 1]}iB"


def shown_count(value: float) -> str:
    """A short count: 950, 1.2k, 35k, 4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def axis_ticks(low: float, high: float, log: bool, unit: str) -> list[float]:
    """Round values inside [low, high]: 1, 2, 5 or 1 of each power where the axis is logarithmic."""
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
    """The chart. Classes for the page's style: accepted, rejected, bound, outside, grid, tick.

    Args:
        name: of the value, for readers that do not see; any text.
        histogram: with at least one value.
        unit: of the values.
    """
    axis, counts = histogram.axis, histogram.counts
    edges, base, top = axis.edges, HEIGHT - BOTTOM, float(counts.max()) or 1.0
    there: Callable[[float], float] = math.log10 if axis.log else float
    first, last = there(edges[0]), there(edges[-1])
    seen = counts[counts > 0]
    log_counts = top >= 100 and float(np.median(seen)) < LOG_COUNTS * top

    def across(value: float) -> float:
        share = (there(value) - first) / (last - first)
        return round(LEFT + (WIDTH - LEFT - RIGHT) * min(max(share, 0.0), 1.0), 1)

    def up(count: float) -> float:
        share = math.log10(1 + count) / math.log10(1 + top) if log_counts else count / top
        return round(base - max((base - TOP) * share, LEAST_PX), 1)

    parts = [*_outside(axis, across, base), *_count_axis(top, log_counts, up)]
    parts += _value_axis(axis, unit, across, base)
    bars: tuple[list[str], list[str]] = ([], [])
    tips = []
    for place, (accepted, rejected) in enumerate(counts.T.tolist()):
        left, right = across(edges[place]), across(edges[place + 1])
        if accepted:
            gap = min(0.6, 0.1 * (right - left))
            bars[0].append(f"M{left + gap:.1f} {base}V{up(accepted)}H{right - gap:.1f}V{base}z")
        if rejected:
            inset = 0.27 * (right - left)
            bars[1].append(f"M{left + inset:.1f} {base}V{up(rejected)}H{right - inset:.1f}V{base}z")
        if accepted or rejected:
            span = f"{shown_number(edges[place], unit)} to {shown_number(edges[place + 1], unit)}"
            tip = escape(f"{span}: {accepted:,} accepted, {rejected:,} rejected")
            box = f'x="{left}" y="{TOP}" width="{round(right - left, 1)}" height="{base - TOP}"'
            tips.append(f'<rect class="tip" {box}><title>{tip}</title></rect>')
    parts += [
        f'<path class="{kind}" d="{"".join(d)}"/>' for kind, d in zip(("accepted", "rejected"), bars, strict=True) if d
    ]
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for end in (axis.bounds.min, axis.bounds.max):
        if end is not None and edges[0] <= end <= edges[-1]:
            parts.append(f'<line class="bound" x1="{across(end)}" x2="{across(end)}" y1="{TOP - 6}" y2="{base}"/>')
    label = escape(f"{name}: histogram of {histogram.total:,} pictures")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join([*parts, *tips])}</svg>'
    return Markup(svg)  # built from numbers; the name and the unit are escaped above


def _outside(axis: Axis, across: Callable[[float], float], base: float) -> list[str]:
    """Shades over what is refused."""
    ends = (float(axis.edges[0]), axis.bounds.min), (axis.bounds.max, float(axis.edges[-1]))
    found = []
    for low, high in ends:
        if low is None or high is None or high <= axis.edges[0] or low >= axis.edges[-1]:
            continue
        left, right = across(max(low, float(axis.edges[0]))), across(min(high, float(axis.edges[-1])))
        box = f'x="{left}" y="{TOP}" width="{round(right - left, 1)}" height="{base - TOP}"'
        found.append(f'<rect class="outside" {box}/>')
    return found


def _count_axis(top: float, log: bool, up: Callable[[float], float]) -> list[str]:
    if log:
        ticks = [float(10**power) for power in range(int(math.log10(top)) + 1)]
        ticks = ticks[:: max(1, math.ceil(len(ticks) / 4))]
    else:
        ticks = [tick for tick in nice_ticks(0, top, 3) if tick and tick == round(tick)]
    parts = []
    for tick in ticks:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{round(y + 4, 1)}" text-anchor="end">{shown_count(tick)}</text>'
        )
    told = "pictures (log)" if log else "pictures"
    return [*parts, f'<text class="tick" x="2" y="11">{told}</text>']


def _value_axis(axis: Axis, unit: str, across: Callable[[float], float], base: float) -> list[str]:
    taken = -math.inf
    parts: list[str] = []
    for tick in axis_ticks(float(axis.edges[0]), float(axis.edges[-1]), axis.log, unit):
        x, text = across(tick), shown_number(tick, unit)
        middle = min(x, WIDTH - LETTER_PX * len(text) / 2)
        parts.append(f'<line class="base" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
        if middle - LETTER_PX * len(text) / 2 >= taken + LABEL_GAP_PX:
            taken = middle + LETTER_PX * len(text) / 2
            parts.append(f'<text class="tick" x="{middle:.1f}" y="{base + 17}" text-anchor="middle">{text}</text>')
    return parts
