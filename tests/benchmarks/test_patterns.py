"""The measure of drawn grids sees faint ones, and none in photographs and noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from patterns import grid_peak

from components.images import ANY_SHAPE, Image, center_crop, decode, resize_short_side
from components.randomness import generator

PHOTOGRAPHS = sorted((Path(__file__).parents[2] / "pipelines" / "demo_corpus").glob("*.jpg"))[:10]


def photographs() -> list[Image]:
    images = [decode(path.read_bytes(), ANY_SHAPE, path.stem) for path in PHOTOGRAPHS]
    return [center_crop(resize_short_side(image, 256), 256, 256) for image in images]


def test_photographs_and_noise_have_no_grid() -> None:
    noise = [generator(1, n).integers(0, 256, (256, 256, 3)).astype(np.uint8) for n in range(10)]
    assert grid_peak(photographs()) < 1.6
    assert grid_peak(noise) < 1.6


@pytest.mark.parametrize("period", [4, 8, 16])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_faint_grid_is_seen(period: int, axis: int) -> None:
    """Lines of one level in 255, which nobody measures with PSNR."""
    lines = np.where(np.arange(256) % period == 0, 2.0, 0.0)
    drawn = lines[:, None, None] if axis == 0 else lines[None, :, None]
    images = [np.clip(image + drawn, 0, 255).astype(np.uint8) for image in photographs()]
    assert grid_peak(images) > 2
