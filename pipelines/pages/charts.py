"""Loss curves as inline SVG in the page's colours, without a plotting library; about 10 kB for each chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from pipelines.core.metrics import MetricRow
from pipelines.pages.page import evenly

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 260, 56, 16, 14, 34
MAX_POINTS = 400
HELD_OUT = "heldout/"

Series = list[tuple[int, float]]


def loss_pairs(rows: Sequence[MetricRow]) -> list[tuple[str, Series, Series]]:
    """Group a stage's metrics into charts: (name, training points, held-out points).

    A held-out loss is named "heldout/<trainable>". Its training loss is named "<trainable>", "<trainable>/loss",
    "<trainable>_loss" or "loss". Every other training loss gets its own chart. If a step has several rows, the last one
    counts: a resumed job repeats the steps since its checkpoint.
    """
    series: dict[str, dict[int, float]] = {}
    for row in rows:
        if math.isfinite(row.value):
            series.setdefault(row.name, {})[row.step] = row.value
    points = {name: sorted(values.items()) for name, values in series.items()}
    held_out = {name.removeprefix(HELD_OUT): values for name, values in points.items() if name.startswith(HELD_OUT)}
    losses = {n: v for n, v in points.items() if not n.startswith(HELD_OUT) and (n in held_out or n.endswith("loss"))}
    pairs, matches = [], set[str]()
    for name, values in held_out.items():
        match = next((n for n in (name, f"{name}/loss", f"{name}_loss", "loss") if n in losses), None)
        matches |= {match} if match else set()
        pairs.append((name, losses.get(match or "", []), values))
    return pairs + [(name, values, []) for name, values in losses.items() if name not in matches]


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean [n] over about a twentieth of the curve; the window is cut off at its ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((total[high] - total[low]) / (high - low))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high]."""
    span = (high - low) or 1.0
    raw = span / count
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 5, 10) if raw <= factor * step * 1.0001)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def curve_chart(name: str, training: Series, held_out: Series) -> dict[str, Any]:
    """One chart.

    Returns:
        "name", "svg" (safe markup), "kind", "start", "end", "change" (in per cent), "has_training" and "has_held_out".
        "kind" names the loss of the three numbers: the held-out loss, or the smoothed training loss if there is none.
        They are None for a curve of fewer than two points, and "change" also if the curve starts at 0.
    """
    mean = smooth(np.array([value for _, value in training])) if training else np.array([])
    running_mean: Series = [(step, float(value)) for (step, _), value in zip(training, mean, strict=True)]
    curve = held_out or running_mean
    start, end = (curve[0][1], curve[-1][1]) if len(curve) > 1 else (None, None)
    change = 100 * (end - start) / start if start and end is not None else None
    everything = [value for _, value in running_mean + held_out]
    if training:  # a few spikes of single batches may lie outside the chart
        everything += np.quantile([value for _, value in training], (0.02, 0.98)).tolist()
    low, high = min(everything), max(everything)
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = (max(0.0, low - pad) if low >= 0 else low - pad), high + pad
    last = max(step for step, _ in training + held_out) or 1

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        share = (min(max(value, low), high) - low) / (high - low)
        return round(x, 1), round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    def path(points: Series) -> str:
        return " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))

    parts = []
    for tick in nice_ticks(low, high):
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>')
    for tick in nice_ticks(0, last):
        x, _ = place(tick, low)
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">step</text>')
    if training:
        parts.append(f'<polyline class="raw" points="{path(evenly(training, MAX_POINTS))}"/>')
        parts.append(f'<polyline class="smooth" points="{path(evenly(running_mean, MAX_POINTS))}"/>')
    if held_out:
        parts.append(f'<polyline class="held" points="{path(held_out)}"/>')
        for step, value in held_out:
            x, y = place(step, value)
            parts.append(
                f'<circle class="dot" cx="{x}" cy="{y}" r="4"><title>step {step}: {value:.5g}</title></circle>'
            )
    label = escape(f"{name}: loss over {last} steps")
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return {
        "name": name,
        "svg": Markup(svg),  # all parts are numbers but the name, which is escaped
        "start": start,
        "end": end,
        "change": change,
        "kind": "held-out" if held_out else "training (smoothed)",
        "has_training": bool(training),
        "has_held_out": bool(held_out),
    }
