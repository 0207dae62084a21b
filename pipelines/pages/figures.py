"""Plots of studies as PNG. They use matplotlib without pyplot's global state, in the colours of our pages."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

COLOURS = ("#0f6b5c", "#c2571a", "#3d5a98", "#8a6d1b", "#7a3e7e", "#5f6368")
INK, SOFT, LINE, PAPER = "#1c1d20", "#62656c", "#dfdfdb", "#ffffff"
PANEL_IN, DPI = (4.3, 3.3), 110  # inches, dots per inch
BAND_ALPHA = 0.16


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve over a panel's x, with an optional band. Values that are not finite leave a gap."""

    label: str
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot.

    Attributes:
        x: positions [n] on the axis, shared by all lines.
        ticks: labels of these positions; empty for numbers.
        points: (x [n], y [n]) of a scatter plot, which needs no lines.
        log: logarithmic y axis.
        reference: y and label of a dashed horizontal line.
        reverse: larger x to the left, for time steps in the order of sampling.
    """

    title: str
    x_label: str
    y_label: str
    x: np.ndarray = field(default_factory=lambda: np.zeros(0))
    lines: Sequence[Line] = ()
    ticks: Sequence[str] = ()
    points: tuple[np.ndarray, np.ndarray] | None = None
    log: bool = False
    reference: tuple[float, str] | None = None
    reverse: bool = False


def draw(panels: Sequence[Panel], columns: int = 3) -> bytes:
    """The panels in a grid, as PNG; raises ValueError without panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("a figure needs a panel")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL_IN[0] * columns, PANEL_IN[1] * rows), dpi=DPI, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        _panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})  # equal numbers give equal bytes
    return stream.getvalue()


def _panel(axis: Any, panel: Panel) -> None:
    axis.set_title(panel.title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel(panel.x_label, fontsize=9, color=SOFT)
    axis.set_ylabel(panel.y_label, fontsize=9, color=SOFT)
    axis.tick_params(which="both", labelsize=8, colors=SOFT)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(LINE)
    axis.grid(axis="y", color=LINE, linewidth=0.7)
    axis.set_axisbelow(True)
    if panel.points is not None:
        axis.scatter(*panel.points, s=18, color=COLOURS[0], alpha=0.75, linewidths=0)
    for number, line in enumerate(panel.lines):
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(panel.x, line.y, color=colour, linewidth=1.7, label=line.label, marker="o", markersize=3)
        if line.low is not None and line.high is not None:
            axis.fill_between(panel.x, line.low, line.high, color=colour, alpha=BAND_ALPHA, linewidth=0)
    if panel.reference is not None:
        axis.axhline(panel.reference[0], color=SOFT, linewidth=1, linestyle="--", label=panel.reference[1] or None)
    if panel.log and any(np.nanmax(line.y, initial=0) > 0 for line in panel.lines):
        axis.set_yscale("log")
    if panel.ticks:
        axis.set_xticks(panel.x, panel.ticks)
    if len(panel.x) > 1:  # the whole axis, even if a curve begins late
        margin = 0.04 * float(np.ptp(panel.x))
        axis.set_xlim(float(panel.x.min()) - margin, float(panel.x.max()) + margin)
    if panel.reverse:
        axis.invert_xaxis()
    if len(panel.lines) > 1 or panel.reference is not None:
        axis.legend(fontsize=8, frameon=False, labelcolor=INK)
