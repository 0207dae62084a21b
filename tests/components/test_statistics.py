"""Bands, rank correlations and complexity against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from components.complexity import complexity, joint_complexity
from components.evaluation.statistics import mean_band, psnr, rank_correlation, rms_levels
from components.randomness import generator


def test_a_band_of_equal_values_has_no_width_and_ignores_missing_values() -> None:
    band = mean_band(np.array([[2.0, np.nan], [2.0, 5.0], [2.0, 7.0]]), 0, "x")
    assert band.mean.tolist() == [2.0, 6.0]
    assert (band.low[0], band.high[0]) == (2.0, 2.0)
    assert 5.0 <= band.low[1] < 6.0 < band.high[1] <= 7.0
    lonely = mean_band(np.array([[1.0, np.inf]]), 0, "x")
    assert lonely.mean[0] == 1.0
    assert np.isnan([lonely.low[0], lonely.high[0], lonely.mean[1]]).all()
    with pytest.raises(ValueError, match="at least one"):
        mean_band(np.zeros((0, 3)), 0, "x")


def test_an_interval_is_about_two_standard_errors_wide() -> None:
    values = generator(0, "v").standard_normal(400)
    band = mean_band(values, 1, "x")
    error = values.std() / 20
    assert float(band.high - band.low) == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_one_name_gives_paired_curves() -> None:
    """The band of a difference is narrower than the difference of two bands only if both use the same resamples."""
    a = generator(0, "a").standard_normal(30) * 10
    assert mean_band(a - (a + 1), 0, "x").low == pytest.approx(-1)
    first, second = mean_band(a, 0, "x"), mean_band(a + 1, 0, "x")
    assert float(second.low - first.low) == pytest.approx(1)
    assert float(mean_band(a, 0, "y").low) != float(first.low)


def test_a_geometric_mean_averages_logarithms() -> None:
    band = mean_band(np.array([1.0, 100.0, 0.0]), 0, "x", geometric=True)
    assert float(band.mean) == pytest.approx(10.0)
    assert (float(band.low), float(band.high)) == (pytest.approx(1.0), pytest.approx(100.0))


def test_rank_correlation_of_known_orders() -> None:
    x = np.arange(20.0)
    up = rank_correlation(x, np.exp(x), 0, "x")
    assert (up.rho, up.low, up.high, up.n) == (pytest.approx(1), pytest.approx(1), pytest.approx(1), 20)
    assert up.excludes_zero
    assert rank_correlation(x, -(x**3), 0, "x").rho == pytest.approx(-1)
    four = rank_correlation(np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3]), 0, "x")
    assert four.rho == pytest.approx(1 - 6 * 4 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    holes = rank_correlation(np.append(x, np.nan), np.append(x, 3.0), 0, "x")
    assert (holes.rho, holes.n) == (pytest.approx(1), 20)
    for y in (np.ones(20), np.full(20, np.nan)):
        undefined = rank_correlation(x, y, 0, "x")
        assert math.isnan(undefined.rho)
        assert not undefined.excludes_zero


def test_unrelated_ranks_show_no_effect() -> None:
    draw = generator(3, "r")
    correlation = rank_correlation(draw.standard_normal(60), draw.standard_normal(60), 0, "x")
    assert not correlation.excludes_zero


def test_psnr_of_a_known_difference() -> None:
    a = np.full((4, 4, 3), 100, np.uint8)
    assert rms_levels(a, a + 5) == 5.0
    assert psnr(a, a + 5) == pytest.approx(20 * math.log10(51))
    assert psnr(a, a) == math.inf


def stripes(width: int) -> np.ndarray:
    """Black and white vertical stripes in a picture of 128 px."""
    row = np.repeat(np.arange(128 // width) % 2, width).astype(np.uint8) * 255
    return np.repeat(np.repeat(row[None], 128, 0)[..., None], 3, 2)


def test_edges_are_the_share_of_pixels_that_differ_from_their_left_or_upper_neighbour() -> None:
    assert complexity(stripes(8))["edges"] == pytest.approx(15 / 128)
    assert complexity(stripes(16))["edges"] == pytest.approx(7 / 128)
    assert complexity(stripes(128))["edges"] == 0


def test_segments_of_a_colour_chart() -> None:
    chart = np.zeros((128, 128, 3), np.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    for number, colour in enumerate(colours):
        top, left = 64 * (number // 2), 64 * (number % 2)
        chart[top : top + 64, left : left + 64] = colour
    measures = complexity(chart)
    assert measures["segments"] == 4
    assert measures["hues"] == pytest.approx(2.0)  # four hues of equal weight: two bits


def test_gray_has_no_hue_and_chroma_is_the_weight() -> None:
    gray = complexity(np.full((64, 64, 3), 90, np.uint8))
    assert gray == {"edges": 0.0, "segments": 1.0, "hues": 0.0}
    half = np.zeros((64, 64, 3), np.uint8)
    half[:32, :, 0], half[32:, :, 2] = 255, 85  # red with three times the chroma of blue
    shares = (0.75, 0.25)
    assert complexity(half)["hues"] == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-6)


def test_complexity_does_not_depend_on_resolution() -> None:
    small = stripes(16)
    large = np.repeat(np.repeat(small, 4, 0), 4, 1)
    assert complexity(large) == complexity(small)
    with pytest.raises(ValueError, match="uint8"):
        complexity(small.astype(np.float32))


def test_the_joint_measure_ranks() -> None:
    rows = [{"edges": e, "segments": s, "hues": h} for e, s, h in ((0.1, 9, 3), (0.2, 5, 2), (0.3, 7, 1))]
    assert joint_complexity(rows).tolist() == pytest.approx([(0 + 1 + 1) / 3, (0.5 + 0 + 0.5) / 3, (1 + 0.5 + 0) / 3])
    assert joint_complexity(rows[:1]).tolist() == [0.5]
