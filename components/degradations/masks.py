"""Irregular strokes for inpainting: a few thick poly-lines, as in the paper's sources (InstaRevive A.8, GPEN).

A stroke is {"width": share of the picture's shorter side, "start": [x, y] as shares of the sides, "steps": [[angle,
length], ...] with lengths as shares of the diagonal}. So a plan fits pictures of any size. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from components.degradations.plans import operations
from components.types import Plan

Stroke = Mapping[str, Any]
STEP = 1 / 8  # mean length of a step as a share of the diagonal; the spread is half of it, the longest step 1 / 4
TURN, TURN_SPREAD = 2 * math.pi / 5, 2 * math.pi / 15  # radians between two steps; the side alternates


def draw_strokes(
    draw: np.random.Generator, counts: tuple[int, int], vertices: tuple[int, int], widths: tuple[float, float]
) -> list[dict[str, Any]]:
    """Draws the numbers of strokes.

    Args:
        counts: fewest and most strokes.
        vertices: fewest and most steps of a stroke.
        widths: thinnest and thickest stroke, as shares of the shorter side.
    """
    strokes = []
    for _ in range(int(draw.integers(counts[0], counts[1] + 1))):
        number = int(draw.integers(vertices[0], vertices[1] + 1))
        low, high = TURN - draw.uniform(0, TURN_SPREAD), TURN + draw.uniform(0, TURN_SPREAD)
        angles = draw.uniform(low, high, number)
        angles[::2] = 2 * math.pi - angles[::2]
        lengths = draw.normal(STEP, STEP / 2, number).clip(0, 2 * STEP)
        strokes.append(
            {
                "width": float(draw.uniform(*widths)),
                "start": [float(value) for value in draw.random(2)],
                "steps": [[float(a), float(b)] for a, b in zip(angles, lengths, strict=True)],
            }
        )
    return strokes


def draw(height: int, width: int, strokes: Sequence[Stroke]) -> np.ndarray:
    """The strokes' mask: bool [height, width], True where a stroke covers."""
    canvas = np.zeros((height, width), np.uint8)
    diagonal = math.hypot(height, width)
    for stroke in strokes:
        thickness = max(1, round(stroke["width"] * min(height, width)))
        x, y = stroke["start"][0] * width, stroke["start"][1] * height
        points = [(x, y)]
        for angle, length in stroke["steps"]:
            x = min(max(x + math.cos(angle) * length * diagonal, 0), width)
            y = min(max(y + math.sin(angle) * length * diagonal, 0), height)
            points.append((x, y))
        corners = np.rint(points).astype(np.int32)
        cv2.polylines(canvas, [corners[:, None]], isClosed=False, color=255, thickness=thickness)
        for corner in corners:  # round joints
            cv2.circle(canvas, (int(corner[0]), int(corner[1])), thickness // 2, 255, cv2.FILLED)
    return canvas > 0


def mask_of(plan: Plan, height: int, width: int) -> np.ndarray | None:
    """The pixels that a plan's strokes cover, bool [height, width]; None for a plan without strokes."""
    strokes = [stroke for op in operations(plan) if op["op"] == "strokes" for stroke in op["strokes"]]
    return draw(height, width, strokes) if strokes else None
