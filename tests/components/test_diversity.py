"""The spread of results over seeds and their agreement with the input, in numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from components.evaluation.diversity import BLOCK_PX, block_means, coarse_error, spread


def blocks(values: list[list[float]], side: int) -> np.ndarray:
    """A gray picture of square blocks, [rows * side, columns * side, 3]."""
    return np.repeat(np.kron(np.array(values), np.ones((side, side)))[..., None], 3, axis=2)


def test_block_means_by_hand() -> None:
    """The third column and the fifth row are beyond the last block of 2 px."""
    picture = np.zeros((5, 3, 3), np.uint8)
    picture[:2, :2, 0] = [[1, 2], [3, 6]]
    picture[2:4, :2, 1] = [[255, 255], [255, 254]]
    picture[:, 2] = picture[4] = 99
    means = block_means(picture, 2)
    assert means.shape == (2, 1, 3) and means.dtype == np.float64
    assert means.tolist() == [[[3.0, 0.0, 0.0]], [[0.0, 254.75, 0.0]]]
    assert block_means(np.ones((8, 16, 3))).shape == (1, 2, 3) and BLOCK_PX == 8
    for shape in ((1, 2, 3), (2, 1, 3)):
        with pytest.raises(ValueError, match=f"{shape[1]} x {shape[0]} has no block of 2 px"):
            block_means(np.zeros(shape), 2)


def test_the_spread_by_hand() -> None:
    """Two pictures: blocks that differ by 6 levels, and within the blocks a checkerboard of 2 levels more or less."""
    checks = np.where((np.add.outer(np.arange(4), np.arange(6)) % 2 == 0)[..., None], 2, -2)
    flat = blocks([[100, 110, 120], [130, 140, 150]], 2)
    one, two = flat + checks, flat + 6 - checks
    numbers = spread([one.astype(np.uint8), two.astype(np.uint8)], 2)
    assert numbers.coarse == pytest.approx(math.sqrt(18))  # (6 / 2)^2 twice, over n - 1 = 1
    assert numbers.fine == pytest.approx(math.sqrt(8))  # differences of 4: 2^2 twice
    assert numbers.total == pytest.approx(math.sqrt(26))
    three = spread([flat, flat + 3, flat + 6], 2)
    assert (three.total, three.coarse, three.fine) == (pytest.approx(3), pytest.approx(3), pytest.approx(0, abs=1e-6))


def test_the_spread_counts_whole_blocks_only() -> None:
    one, two = np.zeros((5, 5, 3), np.uint8), np.zeros((5, 5, 3), np.uint8)
    two[4], two[:, 4] = 200, 200
    assert spread([one, two], 2).total == 0
    assert spread([one, two], 5).total > 0


def test_a_spread_needs_two_pictures_of_one_size() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    for pictures in ([], [picture], [picture, np.zeros((8, 16, 3), np.uint8)]):
        with pytest.raises(ValueError, match="at least two pictures of one size"):
            spread(pictures)


def test_the_coarse_error_by_hand() -> None:
    """Differences of 3 and 4 in two blocks: sqrt((9 + 16) / 2); detail within the blocks does not count."""
    base = blocks([[50, 60]], 8)
    other = base + blocks([[3, -4]], 8)
    assert coarse_error(base, other) == pytest.approx(math.sqrt(12.5))
    detail = base.copy()
    detail[::2] += 5
    detail[1::2] -= 5
    assert coarse_error(base, detail) == 0
