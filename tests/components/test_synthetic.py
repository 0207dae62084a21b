"""Dead leaves: deterministic, with every hue, and with edges at every scale."""

from __future__ import annotations

import numpy as np
import pytest

from components.captions.tags import HUES, hue_share
from components.synthetic import dead_leaves


def test_equal_arguments_give_equal_pictures_and_others_differ() -> None:
    picture = dead_leaves(64, 3, 5)
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, dead_leaves(64, 3, 5))
    assert not np.array_equal(picture, dead_leaves(64, 3, 6))
    assert not np.array_equal(picture, dead_leaves(64, 4, 5))


def test_every_hue_dominates_some_picture_and_brightness_varies() -> None:
    pictures = [dead_leaves(32, 0, index) for index in range(150)]
    for hue in HUES:
        assert max(hue_share(picture, hue) for picture in pictures) > 0.5, hue
    means = [picture.mean() for picture in pictures]
    assert min(means) < 60
    assert max(means) > 170


def test_the_spectrum_falls_like_that_of_photographs() -> None:
    """Power falls with frequency at an exponent near -2; noise would give 0, a single edge -3 in this plane."""
    spectrum = np.zeros((64, 64))
    for index in range(24):
        gray = dead_leaves(64, 1, index).mean(-1)
        window = np.hanning(64)[:, None] * np.hanning(64)
        spectrum += np.abs(np.fft.fft2((gray - gray.mean()) * window)) ** 2
    fy, fx = np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64), indexing="ij")
    radius = np.hypot(fx, fy)
    inside = (radius > 0.04) & (radius < 0.35)
    slope = np.polyfit(np.log(radius[inside]), np.log(spectrum[inside]), 1)[0]
    assert -3.2 < slope < -1.5


@pytest.mark.parametrize("size", [16, 17, 96, 200])
def test_pictures_of_any_size_from_16_have_contrast(size: int) -> None:
    picture = dead_leaves(size, 0, 0)
    assert picture.shape == (size, size, 3)
    assert picture.std() > 10


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="16"):
        dead_leaves(15, 0, 0)
