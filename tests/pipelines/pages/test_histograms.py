"""Thresholds are edges of bins, every value counts on its side of them, and charts stay inside their frame."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.corpora import Bounds
from components.randomness import generator
from pipelines.pages.histograms import HEIGHT, WIDTH, Histogram, axis_ticks, choose_axis, histogram_svg
from pipelines.pages.numbers import bytes_text, digits_text
from pipelines.pages.page import evenly

NUMBERS = st.floats(-(2.0**40), 2.0**40, width=32)


def count(values, rejected=None, bounds=None):
    values = np.array(values, float)
    histogram = Histogram(choose_axis(values, bounds))
    histogram.add(values, np.zeros(len(values), bool) if rejected is None else np.array(rejected))
    return histogram


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=60), st.lists(NUMBERS, max_size=2).map(sorted))
def test_every_number_counts_on_its_side_of_the_thresholds(values, ends):
    bounds = Bounds(min=ends[0] if ends else None, max=ends[1] if len(ends) > 1 else None)
    rejected = [not bounds.hold(value) for value in values]
    histogram = count(values, rejected, bounds)
    assert histogram.counts.sum(axis=1).tolist() == [rejected.count(False), rejected.count(True)]
    assert (histogram.low, histogram.high) == (min(values), max(values))
    edges = histogram.axis.edges
    assert (np.diff(edges) > 0).all()
    inside = [end for end in ends if edges[0] < end < edges[-1]]
    assert set(inside) <= set(edges.tolist())
    if inside == ends and len(set(ends)) == len(ends):
        assert not histogram.counts.astype(bool).all(axis=0).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=60), st.lists(NUMBERS, max_size=2).map(sorted))
def test_charts_stay_inside_their_frame(values, ends):
    bounds = Bounds(min=ends[0] if ends else None, max=ends[1] if len(ends) > 1 else None)
    svg = histogram_svg("x", count(values, bounds=bounds), "")
    assert "nan" not in svg
    assert "inf" not in svg
    for name, most in (("x", WIDTH), ("x1", WIDTH), ("x2", WIDTH), ("y", HEIGHT), ("y1", HEIGHT), ("y2", HEIGHT)):
        assert all(0 <= float(number) <= most for number in re.findall(rf' {name}="([^"]*)"', svg))
    assert all(0 <= float(number) <= WIDTH for number in re.findall(r"[MH]([\d.-]+)", svg))
    assert all(0 <= float(number) <= HEIGHT for number in re.findall(r"V([\d.-]+)", svg))


def test_a_threshold_itself_is_accepted():
    values = np.linspace(0, 10, 101)
    histogram = count(values, (values < 2) | (values > 7), Bounds(min=2.0, max=7.0))
    both = histogram.counts.astype(bool).all(axis=0)
    assert {2.0, 7.0} <= set(histogram.axis.edges.tolist())
    assert not both.any()


def test_values_beyond_the_axis_are_counted():
    values = np.concatenate([generator(1, "values").normal(5, 1, 2000), [1e6, -1e6, np.nan, np.inf]])
    histogram = count(values)
    assert (histogram.below, histogram.above, histogram.total) == (1, 1, 2002)
    assert histogram.axis.edges[0] > -20
    assert histogram.axis.edges[-1] < 30


def test_values_over_magnitudes_get_a_logarithmic_axis():
    sizes = 10 ** generator(2, "sizes").uniform(3, 7, 500)
    assert choose_axis(sizes).log
    assert not choose_axis(sizes - 5000).log  # some are negative
    assert not choose_axis(np.linspace(100, 200, 500)).log
    ratios = np.diff(np.log(choose_axis(sizes).edges))
    assert ratios == pytest.approx(ratios[0])


def test_few_rejected_pictures_have_room_on_the_axis():
    values = np.concatenate([np.linspace(0, 1, 100_000), [1.4] * 20])
    edges = choose_axis(values, Bounds(max=1.2)).edges
    assert 1.2 in edges
    assert edges[-1] >= 1.4


def test_without_numbers_there_is_no_axis():
    assert choose_axis(np.array([])) is None
    assert choose_axis(np.array([np.nan, np.inf])) is None


def test_names_are_escaped():
    assert "<b>" not in histogram_svg("<b>", count([1.0, 2.0]))


def test_bytes_are_in_binary_multiples():
    assert [bytes_text(n) for n in (0, 1023, 1024, 1536, 2**20, 250 * 2**20, 2**40)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "1 MiB",
        "250 MiB",
        "1 TiB",
    ]
    assert axis_ticks(900, 3 * 2**20, True, "bytes") == [1024, 10240, 102400, 2**20]
    assert axis_ticks(0, 4096, False, "bytes") == [0, 1024, 2048, 3072, 4096]


def test_a_number_of_digits():
    assert [digits_text(value) for value in (None, float("nan"), 0.12345, -12.345)] == ["–", "–", "0.123", "−12.3"]
    assert digits_text(2.0, sign=True) == "+2"


@given(st.integers(0, 40), st.integers(2, 12))
def test_even_items_hold_both_ends(n, count):
    items = evenly(range(n), count)
    assert items == sorted(set(items))
    assert len(items) == min(n, count)
    assert {*items[:1], *items[-1:]} == {*range(n)[:1], *range(n)[-1:]}
    gaps = np.diff(items)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
