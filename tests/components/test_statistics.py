"""Bands, rank correlations and complexity against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from components.complexity import complexity, joint_complexity
from components.evaluation.statistics import (
    mean_band,
    mean_interval,
    psnr,
    rank_correlation,
    rms_levels,
    share_band,
    training_band,
)
from components.randomness import generator

DEMO = {
    "psnr": (
        -1.4467,
        -2.4617,
        -2.2968,
        -4.3784,
        -2.3429,
        -2.6132,
        -3.6156,
        -2.5019,
        -2.5514,
        -3.3062,
        -3.2669,
        -3.8287,
    ),
    "ssim": (-0.1352, -0.116, -0.1106, -0.1197, -0.1445, -0.0663, -0.1198, 0.0201, -0.0652, -0.0612, -0.0572, -0.1852),
    "gmsd": (0.023, 0.0362, 0.056, 0.0475, 0.0373, 0.0307, 0.05, -0.0073, 0.037, 0.0303, 0.0383, 0.0599),
}
"""Restored minus input on the demo's 12 held-out pictures, recorded from its scores.jsonl."""


def samples(kind: str, n: int, runs: int = 20_000) -> tuple[np.ndarray, float]:
    """Values [n, runs] of pictures, and their true mean."""
    draw = generator(20261130, kind, n)
    if kind == "normal":
        return draw.standard_normal((n, runs)), 0.0
    if kind == "log-normal":
        return draw.lognormal(0.0, 0.5, (n, runs)), math.exp(0.125)
    values = np.array(DEMO[kind])
    return values[draw.integers(0, len(values), (n, runs))], float(values.mean())


@pytest.mark.parametrize("n", [6, 8, 12, 64])
@pytest.mark.parametrize("kind", ["normal", "log-normal", *DEMO])
def test_the_interval_of_a_mean_covers_95_percent(kind: str, n: int) -> None:
    """20,000 drawn evaluations of n pictures; a standard error is 0.15 %.

    At n = 6 a percentile bootstrap covers 86 % of normal means, z instead of t 88 %, and Student's t 92 % of the
    log-normal's. A one-sided interval covers 95 %, but misses on one side only.
    """
    values, truth = samples(kind, n)
    band = mean_band(values)
    above, below = float((band.low > truth).mean()), float((band.high < truth).mean())
    assert 0.93 <= 1 - above - below <= 0.97
    if kind == "normal":
        assert 0.01 < above < 0.035 and 0.01 < below < 0.035
    column = values[:, 7]
    assert mean_interval(column) == (float(band.low[7]), float(band.high[7])), "one column is as good as many"


@pytest.mark.parametrize("deviations", [(0, 1, 0.3), (1, 1, 0.5), (1, 0.1, 0.3), (0.3, 1, 1)])
@pytest.mark.parametrize("n", [6, 12])
def test_the_interval_over_trainings_holds_its_level(n: int, deviations: tuple[float, float, float]) -> None:
    """2,000 drawn studies with 3 trainings: a standard error of 0.5 %. An interval over pictures alone is too short."""
    draw = generator(20261201, "trainings", n)
    trainings, pictures, rest = deviations
    values = trainings * draw.standard_normal((1, 3, 2000)) + rest * draw.standard_normal((n, 3, 2000))
    values += pictures * (draw.lognormal(0.0, 0.5, (n, 1, 2000)) - math.exp(0.125))
    band, alone = training_band(values), mean_band(values.mean(axis=1))
    covered, covered_alone = (float(((b.low <= 0) & (b.high >= 0)).mean()) for b in (band, alone))
    assert covered >= 0.94
    assert trainings < 1 or covered_alone < 0.8
    one = training_band(values[:, :, 5])
    assert (float(one.low), float(one.high)) == (float(band.low[5]), float(band.high[5]))


def test_the_interval_over_trainings_by_hand() -> None:
    """Pictures without spread leave Student's interval of the trainings' means; one training leaves the pictures'."""
    values = np.tile([1.0, 2.0, 6.0], (6, 1))
    band = training_band(values)
    half = 4.302652729911275 * math.sqrt(7) / math.sqrt(3)  # t of 2 degrees of freedom; the variance of 1, 2, 6 is 7
    assert float(band.mean) == 3.0
    assert (float(band.low), float(band.high)) == pytest.approx((3 - half, 3 + half))
    pictures = np.array([1.0, 4.0, 2.0, 8.0, 5.0, 7.0])
    both, single = training_band(pictures[:, None] + np.array([0.0, 0.0, 0.0])), mean_band(pictures)
    assert (float(both.low), float(both.high)) == pytest.approx((float(single.low), float(single.high)))
    lacking = np.vstack([np.tile([1.0, 2.0, 6.0], (6, 1)), [[np.nan, 50.0, 60.0]]])
    assert float(training_band(lacking).high) == pytest.approx(3 + half), "a picture that a training lacks"
    assert math.isnan(float(training_band(values[:5]).low)) and float(training_band(values[:, :1]).mean) == 1.0
    with pytest.raises(ValueError, match="one training"):
        training_band(np.zeros(6))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_fewer_than_six_pictures_have_no_interval(n: int) -> None:
    values = np.linspace(5.0, 5.1, n)
    assert mean_interval(values) is None
    parts = (mean_band(values), share_band(np.ones(n)), rank_correlation(np.arange(n), np.arange(n)))
    assert all(math.isnan(part.low) and math.isnan(part.high) for part in parts)
    assert float(mean_band(values).mean) == pytest.approx(5.05)


def test_a_band_of_equal_values_has_no_width_and_ignores_missing_values() -> None:
    values = np.array([[2.0, np.nan], [2.0, 5.0], [2.0, 7.0], [2.0, 6.0], [2.0, 6.5], [2.0, 5.5], [2.0, 6.0]])
    band = mean_band(values)
    assert band.mean.tolist() == [2.0, 6.0]
    assert (band.low[0], band.high[0]) == (2.0, 2.0)
    assert (band.low[1], band.high[1]) == mean_interval(values[1:, 1])
    assert np.isnan(mean_band(values[:6]).low[1]), "five finite values"
    lonely = mean_band(np.array([[1.0, np.inf]]))
    assert lonely.mean[0] == 1.0
    assert np.isnan([lonely.low[0], lonely.high[0], lonely.mean[1]]).all()
    with pytest.raises(ValueError, match="at least one"):
        mean_band(np.zeros((0, 3)))


def test_an_interval_of_symmetric_values_is_students() -> None:
    values = np.array([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0])
    half = 2.570582 * math.sqrt(28 / 5 / 6)  # t of 5 degrees of freedom at 0.975, tables
    assert mean_interval(values) == pytest.approx((-half, half), rel=1e-6)


def test_an_interval_reaches_further_on_the_side_of_the_long_tail() -> None:
    """Hall's interval of 1, 2, 3, 4, 5, 9, by the definition: his cubic of (mean - end) / s is t's quantile."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 9.0])
    low, high = mean_interval(values) or (0.0, 0.0)
    scale, n = values.std(ddof=1), len(values)
    skew = ((values - 4) ** 3).mean() / scale**3
    w = (4 - high) / scale
    hall = w + skew * w**2 / 3 + skew**2 * w**3 / 27 + skew / (6 * n)
    assert hall == pytest.approx(-2.570582 / math.sqrt(n), rel=1e-6)
    assert low == pytest.approx(4 - 2.570582 * scale / math.sqrt(n), rel=1e-6), "the short side is Student's"
    assert mean_interval(-values) == pytest.approx((-high, -low), rel=1e-12)
    assert mean_interval(10 * values + 3) == pytest.approx((10 * low + 3, 10 * high + 3), rel=1e-12)


def test_a_geometric_mean_averages_logarithms() -> None:
    values = np.array([1.0, 100.0, 0.0, 1.0, 100.0, 1.0, 100.0])
    band = mean_band(values, geometric=True)
    assert float(band.mean) == pytest.approx(10.0)
    low, high = mean_interval(np.log(values[values > 0])) or (0.0, 0.0)
    assert (float(band.low), float(band.high)) == (pytest.approx(math.exp(low)), pytest.approx(math.exp(high)))


def test_a_share_of_all_or_none_has_a_width() -> None:
    """Clopper and Pearson: with n hits of n, the lower end p has p^n = 0.025."""
    every = share_band(np.ones(6))
    assert (float(every.mean), float(every.low), float(every.high)) == (1.0, pytest.approx(0.025 ** (1 / 6)), 1.0)
    none = share_band(np.zeros(10))
    assert (float(none.low), float(none.high)) == (0.0, pytest.approx(1 - 0.025 ** (1 / 10)))
    half = share_band(np.array([0.0, 1.0] * 5))
    assert (float(half.low), float(half.high)) == (pytest.approx(0.1871, abs=1e-4), pytest.approx(0.8129, abs=1e-4))
    with pytest.raises(ValueError, match="zeros and ones"):
        share_band(np.array([0.5] * 8))


def test_rank_correlation_of_known_orders() -> None:
    x = np.arange(20.0)
    up = rank_correlation(x, np.exp(x))
    assert (up.rho, up.high, up.n) == (pytest.approx(1), 1.0, 20)
    assert 0.9 < up.low < 1
    down = rank_correlation(x, -(x**3))
    assert (down.rho, down.low, down.high) == (pytest.approx(-1), -1.0, pytest.approx(-up.low))
    four = rank_correlation(np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3]))
    assert four.rho == pytest.approx(1 - 6 * 4 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    holes = rank_correlation(np.append(x, np.nan), np.append(x, 3.0))
    assert (holes.rho, holes.n) == (pytest.approx(1), 20)
    for y in (np.ones(20), np.full(20, np.nan)):
        undefined = rank_correlation(x, y)
        assert math.isnan(undefined.rho) and math.isnan(undefined.low) and math.isnan(undefined.high)


@pytest.mark.parametrize(("n", "correlation"), [(6, 0.0), (8, 0.6), (12, 0.95), (64, 0.95)])
def test_the_interval_of_a_rank_correlation_covers_95_percent(n: int, correlation: float) -> None:
    """1,000 drawn studies of n pictures: a standard error of 0.7 %. Fisher's own variance, 1 / (n - 3), covers 87 % at
    n = 12 and correlation 0.95.
    """
    draw = generator(4, "ranks", n)
    x, noise = draw.standard_normal((2, 1000, n))
    y = correlation * x + math.sqrt(1 - correlation**2) * noise
    truth = 6 / math.pi * math.asin(correlation / 2)  # Spearman's rho of a normal pair
    intervals = [rank_correlation(a, b) for a, b in zip(x, y, strict=True)]
    assert 0.93 - 0.015 <= np.mean([each.low <= truth <= each.high for each in intervals]) <= 0.97 + 0.015


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
