"""The mixed degradation: shares of its kinds, exact and drawn strengths, mild faults, and wrong numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from components.degradations import build_degradation
from components.degradations.mixed import TESTS, Mild, Mixed
from components.degradations.plans import operations
from components.images import to_float
from components.synthetic import dead_leaves

NAMES = ("x4", "x8", "blur2-x4", "x4-noise40", "blur2-x4-noise20-jpeg50")


def kind_of(plan: Any) -> str:
    """realesrgan, test or mild, by the operations that only they have."""
    ops = operations(plan)
    if any(op["op"] == "resize" and op["base"] == "current" for op in ops):
        return "realesrgan"
    shrinks = [op for op in ops if op["op"] == "resize" and "divide" in op]
    return "test" if shrinks and isinstance(shrinks[0]["divide"], int) else "mild"


def test_the_test_degradations_are_the_presets() -> None:
    assert list(TESTS) == [build_degradation(name) for name in NAMES]


def test_kinds_have_their_shares() -> None:
    mixed = Mixed()
    counts = Counter(kind_of(mixed.draw(1, "k", position)) for position in range(2000))
    for name, share in (("realesrgan", 0.4), ("test", 0.4), ("mild", 0.2)):
        assert counts[name] / 2000 == pytest.approx(share, abs=0.05)


def test_tests_are_exact_or_drawn_within_their_ranges() -> None:
    mixed = Mixed(shares=(0.0, 1.0, 0.0), exact_prob=0.5)
    exact, factors = 0, Counter[int]()
    for position in range(600):
        plan = mixed.draw(2, "k", position)
        if any(operations(plan) == operations(build_degradation(name).draw(2, "k", position)) for name in NAMES):
            exact += 1
            continue
        for op in operations(plan):
            if op["op"] == "resize" and "divide" in op:
                factors[op["divide"]] += 1
            elif op["op"] == "blur":
                assert 0.5 <= op["kernel"]["sigma_x"] <= 3
            elif op["op"] == "noise":
                assert 5 <= op["level"] <= 50
            elif op["op"] == "jpeg":
                assert 30 <= op["quality"] <= 90
    assert exact / 600 == pytest.approx(0.5, abs=0.07)
    assert set(factors) == set(range(2, 9))


def test_drawn_strengths_fill_their_ranges() -> None:
    for shares in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        mixed = Mixed(shares=shares, exact_prob=0.0)
        values: dict[str, list[float]] = {name: [] for name in RANGES[shares]}
        for position in range(3000):
            for op in operations(mixed.draw(5, "k", position)):
                if op["op"] == "blur":
                    values["sigma"].append(op["kernel"]["sigma_x"])
                elif op["op"] == "noise":
                    values["noise"].append(op["level"])
                elif op["op"] == "jpeg":
                    values["quality"].append(op["quality"])
                elif op["op"] == "resize" and "divide" in op:
                    values["factor"].append(op["divide"])
        for name, (low, high) in RANGES[shares].items():
            span = high - low
            assert low <= min(values[name]) <= low + 0.03 * span, name
            assert high - 0.03 * span - (name == "quality") <= max(values[name]) <= high, name


RANGES = {
    (0.0, 1.0, 0.0): {"sigma": (0.5, 3.0), "noise": (5.0, 50.0), "quality": (30, 90), "factor": (2, 8)},
    (0.0, 0.0, 1.0): {"sigma": (0.2, 1.0), "noise": (0.0, 8.0), "quality": (70, 98), "factor": (1.0, 2.0)},
}
"""Ranges of the strengths, of tests and of mild faults."""


def test_equal_arguments_give_equal_plans_and_pictures() -> None:
    mixed, hq = build_degradation("mixed"), to_float(dead_leaves(64, 0, 0))
    for position in range(40):
        plan = mixed.draw(3, "k", position)
        assert plan == build_degradation("mixed").draw(3, "k", position)
        lq = mixed.apply(hq, plan)
        assert lq.shape == hq.shape and np.array_equal(lq, mixed.apply(hq, plan))
    assert mixed.draw(3, "k", 0) != mixed.draw(4, "k", 0) != mixed.draw(4, "l", 0)


def test_mild_faults_keep_a_good_picture_good() -> None:
    mixed, hq = Mixed(shares=(0.0, 0.0, 1.0)), to_float(dead_leaves(64, 0, 0))
    errors, clean = [], 0
    for position in range(300):
        plan = mixed.draw(4, "k", position)
        clean += not operations(plan)
        errors.append(float(np.square(mixed.apply(hq, plan) - hq).mean()))
    assert 0.2 < clean / 300 < 0.4  # the share of clean_prob, and of faults that were all not drawn
    assert -10 * np.log10(np.median(errors) + 1e-12) > 28


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"shares": [0.5, 0.4, 0.2]}, "shares must be at least 0 and sum to 1"),
        ({"test_shares": [1.0, 0.0, 0.0, 0.0]}, "must hold 5 numbers"),
        ({"exact_prob": 1.5}, "exact_prob"),
        ({"factor": [0, 4]}, "factor"),
        ({"mild": {"jpeg_prob": -0.1}}, "jpeg_prob"),
        ({"mild": {"qualty": [1.0, 2.0]}}, 'Did you mean "quality"'),
        ({"realesrgan": {"clean_prob": 2.0}}, "clean_prob"),
    ],
)
def test_wrong_numbers_are_told(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build_degradation("mixed", **options)
    assert Mild().quality == (70.0, 98.0)
