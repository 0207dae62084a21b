"""The order's arithmetic in numbers worked out by hand: ranks, shares, windows, epochs, sources."""

from __future__ import annotations

import numpy as np
import pytest

from components.randomness import generator
from pipelines.stream.ordering import (
    BLOCK,
    WINDOW_SAMPLES,
    Mixture,
    Order,
    permutation,
    rank_count,
    rank_positions,
    shares,
)


def sorted_words(n: int, seed: int, *parts: int | str) -> list[int]:
    """0 .. n-1 in the order of Philox words."""
    words = generator(seed, *parts).bit_generator.random_raw(n)
    return sorted(range(n), key=lambda index: (int(words[index]), index))


def test_a_permutation_is_the_order_of_the_words_and_cannot_be_changed() -> None:
    order = permutation(9, 4, "order", 1)
    assert order.tolist() == sorted_words(9, 4, "order", 1)
    assert order.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        order[0] = 1


def test_the_positions_of_each_rank_by_hand() -> None:
    """Two batches of six rows, from position 12 on; each of three ranks has two neighbours of each batch."""
    assert [rank_positions(12, 24, 6, rank, 3).tolist() for rank in range(3)] == [
        [12, 13, 18, 19],
        [14, 15, 20, 21],
        [16, 17, 22, 23],
    ]
    assert rank_count(12, 24, 6, 2, 3) == 4
    assert rank_positions(0, 1, 1, 0, 1).tolist() == [0]  # the smallest batch


@pytest.mark.parametrize(
    ("start", "stop", "batch", "rank", "world", "message"),
    [
        (0, 8, 0, 0, 1, "batch of 0 cannot be shared by 1 workers"),
        (0, 8, 4, -1, 2, r"rank -1"),
        (0, 8, 4, 2, 2, r"rank 2"),
        (8, 4, 4, 0, 1, "positions 8..4 are not a whole number"),
        (4, 4, 4, 0, 1, "positions 4..4 are not a whole number"),
        (1, 8, 4, 0, 1, "positions 1..8 are not a whole number"),
    ],
)
def test_wrong_ranks_are_refused_with_their_numbers(
    start: int, stop: int, batch: int, rank: int, world: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rank_count(start, stop, batch, rank, world)


def test_shares_by_hand() -> None:
    """Whole parts first, then the largest remainders; a small weight takes one from the largest share."""
    assert shares([5, 3, 2], 10) == [5, 3, 2]
    assert shares([0.5, 0.3, 0.2], 7) == [4, 2, 1]  # 3.5, 2.1, 1.4: the remainder 0.5 is largest
    assert shares([1, 1, 2.5], 5) == [1, 1, 3]  # 1.11, 1.11, 2.78
    assert shares([1, 1, 1], 3) == [1, 1, 1]  # as many sources as places
    assert shares([1000, 1, 1], 4) == [2, 1, 1]  # 3.99, 0.004, 0.004
    assert shares([7], 1) == [1]
    for weights in ([1, -1], [0.0, 1.0], [1, 1, 1, 1]):
        with pytest.raises(ValueError, match="expected 1 to 3 positive weights"):
            shares(weights, 3)


def test_an_order_of_two_windows_by_hand() -> None:
    """Four shards of 2, 3, 1, 2 samples in windows of 4: a window ends with the first shard that reaches its end."""
    seed, epoch = 6, 3
    sizes, starts = [2, 3, 1, 2], [0, 2, 5, 6]
    windows: list[list[int]] = []
    place = 0
    last_window = -1
    for shard in sorted_words(4, seed, "shards", epoch):
        if place // 4 != last_window:
            windows.append([])
            last_window = place // 4
        windows[-1].append(shard)
        place += sizes[shard]
    assert len(windows) == 2
    expected: list[int] = []
    for number, window in enumerate(windows):
        samples = [starts[shard] + n for shard in sorted(window) for n in range(sizes[shard])]
        expected += [samples[k] for k in sorted_words(len(samples), seed, "order", epoch, number)]
    order = Order([0, 2, 5, 6, 8], seed, window=4)
    assert len(order) == 8
    assert order.samples(np.arange(8 * epoch, 8 * epoch + 8)).tolist() == expected
    assert order.samples([8 * epoch + 7, 8 * epoch]).tolist() == [expected[7], expected[0]]
    assert order.samples([]).dtype == np.int64 and order.samples([5]).dtype == np.int64


def test_a_split_of_one_sample_repeats_it_and_a_window_has_at_least_one() -> None:
    assert Order([0, 1], 3, window=1).samples([0, 1, 7]).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        Order([0, 1], 3, window=0)
    assert (WINDOW_SAMPLES, BLOCK) == (65_536, 1024)
    assert Order([0, 1], 3).window == WINDOW_SAMPLES


def test_the_sources_of_two_blocks_by_hand() -> None:
    """Weights of 3 to 1: 768 and 256 of 1,024 places, in the order of the words; own positions count up over blocks."""
    mixture = Mixture([3, 1], 9)
    own = [0, 0]
    for block in range(2):
        for place, label in enumerate(sorted_words(BLOCK, 9, "mixture", block)):
            source = int(label >= 768)
            assert mixture.at(BLOCK * block + place) == (source, own[source])
            own[source] += 1
    assert own == [1536, 512]
    assert Mixture([0.2], 9).at(123_456) == (0, 123_456)
