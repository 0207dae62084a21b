"""Synthetic training pictures: dead leaves, an endless and licence-free source with edges at every scale.

Torch-free. This is the occlusion model of Lee, Mumford and Huang (2001): shapes of power-law size cover each other
until no ground is visible. Its edges, scale invariance and spectrum resemble those of photographs. The numbers are
ours, chosen by eye.
"""

from __future__ import annotations

import colorsys
from typing import Literal

import cv2
import numpy as np

from components.randomness import generator
from components.types import Image

SUPERSAMPLING = 2  # edges are drawn at twice the size and averaged
RADIUS_EXPONENT = 3.0  # density of radii ~ r^-3: the scale-invariant case of Lee, Mumford and Huang
LARGEST_RADIUS = 0.45  # of the side
SMALLEST_RADIUS = (0.018, 0.06)  # of the side, drawn per picture; small for busy pictures, large for calm ones
LAYERS = 4.0  # expected number of shapes above a point; e^-4 = 2 % stays ground, so the ground has a leaf's colour too
CORNERS = (3, 8)  # of polygons, drawn in [3, 8)
PALETTES = ("one_hue", "two_hues", "any_hue", "muted")
PALETTE_SHARES = (0.4, 0.15, 0.3, 0.15)  # one dominant hue is frequent, so that a hue caption fits the picture

Palette = Literal["one_hue", "two_hues", "any_hue", "muted"]


def dead_leaves(size_px: int, seed: int, index: int) -> Image:
    """One dead-leaves picture.

    Args:
        size_px: side of the square, at least 16.
        seed, index: equal pairs give equal pictures.

    Returns:
        uint8 sRGB [size_px, size_px, 3].

    Raises:
        ValueError: size_px is below 16.
    """
    if size_px < 16:
        raise ValueError(f"dead leaves need a side of at least 16 pixels, got {size_px}")
    draw = generator(seed, "dead_leaves", index)
    side = size_px * SUPERSAMPLING
    smallest = draw.uniform(*SMALLEST_RADIUS)
    # E[r^2] under r^-3 on [a, b] is 2 ln(b/a) / (1/a^2 - 1/b^2)
    mean_area = np.pi * 2 * np.log(LARGEST_RADIUS / smallest) / (smallest**-2 - LARGEST_RADIUS**-2)
    count = int(LAYERS / mean_area) + 1
    leaves = _draw_shapes(draw, side, count, smallest)
    colours = _draw_colours(draw, count + 1)
    picture = _paint(draw, leaves, colours)
    small = cv2.resize(picture, (size_px, size_px), interpolation=cv2.INTER_AREA)
    return np.rint(small.clip(0, 255)).astype(np.uint8)


def _draw_shapes(draw: np.random.Generator, side: int, count: int, smallest: float) -> np.ndarray:
    """Draw a map [side, side] int32 of the leaf on top: 1..count, or 0 for the ground."""
    exponent = 1.0 - RADIUS_EXPONENT
    low, high = smallest**exponent, LARGEST_RADIUS**exponent
    radii = side * (low + (high - low) * draw.random(count)) ** (1 / exponent)  # inverse of the cumulative r^-2
    centres = draw.uniform(-0.1, 1.1, (count, 2)) * side
    angles = draw.uniform(0, np.pi, count)
    squash = draw.uniform(0.3, 1.0, count)
    kinds = draw.integers(0, 3, count)
    corners = draw.integers(*CORNERS, count)
    spokes = draw.uniform(0.6, 1.0, (count, CORNERS[1]))
    leaves = np.zeros((side, side), np.int32)
    for i in range(count):
        centre = (int(centres[i, 0]), int(centres[i, 1]))
        if kinds[i] == 0:
            cv2.circle(leaves, centre, max(1, int(radii[i])), i + 1, -1)
        elif kinds[i] == 1:
            axes = (max(1, int(radii[i])), max(1, int(radii[i] * squash[i])))
            cv2.ellipse(leaves, centre, axes, float(np.degrees(angles[i])), 0, 360, i + 1, -1)
        else:
            turns = angles[i] + np.arange(corners[i]) * (2 * np.pi / corners[i])
            reach = radii[i] * spokes[i, : corners[i]]
            points = centres[i] + np.stack([np.cos(turns), np.sin(turns)], 1) * reach[:, None]
            cv2.fillPoly(leaves, [points.astype(np.int32)], i + 1)
    return leaves


def _draw_colours(draw: np.random.Generator, count: int) -> np.ndarray:
    """Draw a colour for each leaf, float32 [count, 3] in 0..255."""
    palette: Palette = PALETTES[int(draw.choice(len(PALETTES), p=PALETTE_SHARES))]  # type: ignore[assignment]
    base = draw.random()
    hues = draw.random(count)
    near = np.mod(base + draw.normal(0, 0.03, count), 1.0)  # about 11 degrees around the base hue
    if palette == "one_hue":
        hues = np.where(draw.random(count) < 0.85, near, hues)
    elif palette == "two_hues":
        other = np.mod(base + draw.uniform(0.25, 0.75) + draw.normal(0, 0.03, count), 1.0)
        hues = np.where(draw.random(count) < 0.5, near, other)
    vivid = 0.08 if palette == "muted" else draw.uniform(0.35, 0.95)
    saturations = np.clip(draw.normal(vivid, 0.15, count), 0, 1)
    light = draw.uniform(0.25, 0.85)
    values = np.clip(draw.normal(light, 0.2, count), 0.03, 1)
    hsv = np.stack([hues, saturations, values], axis=1)
    return np.array([colorsys.hsv_to_rgb(*leaf) for leaf in hsv.tolist()], np.float32) * 255


def _paint(draw: np.random.Generator, leaves: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Fill leaves with colour, a brightness gradient, and sometimes stripes or grain: float32 [side, side, 3]."""
    side, count = leaves.shape[0], len(colours)
    slope = draw.normal(0, 0.25, (2, count)).astype(np.float32)
    waves = draw.uniform(0.15, 1.2, count)  # radians per drawn pixel: periods of 5 to 42 pixels
    directions = draw.uniform(0, np.pi, count)
    roughness = draw.uniform(0, 1)  # some pictures are mostly plain, others mostly textured
    stripes = np.where(draw.random(count) < 0.4 * roughness, draw.uniform(0.05, 0.3, count), 0).astype(np.float32)
    grain = np.where(draw.random(count) < 0.6 * roughness, draw.uniform(0.02, 0.15, count), 0).astype(np.float32)
    wave_x = (waves * np.cos(directions)).astype(np.float32)
    wave_y = (waves * np.sin(directions)).astype(np.float32)
    steps = np.arange(side, dtype=np.float32)
    x, y = steps[None, :], steps[:, None]
    shade = 1 + slope[0][leaves] * (x / side - 0.5) + slope[1][leaves] * (y / side - 0.5)
    if stripes.any():
        shade += stripes[leaves] * np.sin(wave_x[leaves] * x + wave_y[leaves] * y)
    if grain.any():
        noise = draw.standard_normal((side // 2, side // 2), dtype=np.float32)  # grain of two drawn pixels survives
        shade += grain[leaves] * cv2.resize(noise, (side, side), interpolation=cv2.INTER_NEAREST)
    return colours[leaves] * shade[..., None]
