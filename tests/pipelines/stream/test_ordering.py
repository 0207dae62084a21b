"""Orders and mixtures: every sample of every source comes exactly once per epoch, as a function of the position."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.randomness import generator
from pipelines.core.errors import Failure
from pipelines.stream.ordering import BLOCK, Mixture, Order, rank_positions, shares

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def starts(counts: list[int]) -> list[int]:
    return list(itertools.accumulate(counts, initial=0))


@settings(max_examples=80, deadline=None)
@given(counts=SHARDS, window=st.integers(1, 40), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_every_epoch_holds_every_sample_once(counts: list[int], window: int, seed: int, epoch: int) -> None:
    order, n = Order(starts(counts), seed, window), sum(counts)
    samples = order.samples(np.arange(n * epoch, n * (epoch + 1)))
    assert sorted(samples.tolist()) == list(range(n))
    one_by_one = [int(Order(starts(counts), seed, window).samples([n * epoch + p])[0]) for p in range(0, n, 3)]
    assert one_by_one == samples[::3].tolist()  # independent of earlier calls


def test_a_split_of_one_window_has_the_plain_permutation() -> None:
    words = generator(7, "order", 2).bit_generator.random_raw(100)
    plain = sorted(range(100), key=lambda n: (int(words[n]), n))
    for counts in ([100], [30, 30, 40], [1] * 100):
        assert Order(starts(counts), 7).samples(np.arange(200, 300)).tolist() == plain


def test_the_order_depends_on_epoch_and_seed_and_is_uniform() -> None:
    order = Order([0, 100], 7)
    first = order.samples(np.arange(100))
    assert not np.array_equal(first, order.samples(np.arange(100, 200)))
    assert not np.array_equal(first, Order([0, 100], 8).samples(np.arange(100)))
    heads = Counter(int(Order([0, 2, 6], 1).samples([6 * epoch])[0]) for epoch in range(3000))
    assert all(400 < heads[n] < 600 for n in range(6))  # 500 expected of each, standard deviation 20


def test_a_window_stays_within_its_shards() -> None:
    """The samples of a window lie in few shards, and the order of shards differs between epochs."""
    counts = [10] * 50
    order = Order(starts(counts), 3, window=40)
    samples = order.samples(np.arange(1000)).reshape(2, -1)
    for epoch in samples:
        for begin in range(0, 500, 40):
            assert len(set((epoch[begin : begin + 40] // 10).tolist())) <= 4
    assert (samples[0] // 10).tolist() != (samples[1] // 10).tolist()


def test_memory_does_not_grow_with_the_split() -> None:
    import tracemalloc

    tracemalloc.start()
    order = Order(np.arange(0, 20_000_001, 1000), 1, window=4096)
    order.samples(np.arange(19_000_000, 19_000_256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_an_empty_split_is_a_failure() -> None:
    with pytest.raises(Failure, match="empty"):
        Order([0, 0], 1)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rank_positions_cover_the_global_batches(world: int) -> None:
    parts = [rank_positions(8, 32, 8, rank, world).reshape(3, -1) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts, axis=1).ravel(), np.arange(8, 32))


@pytest.mark.parametrize(
    ("start", "stop", "batch", "rank", "world"), [(0, 8, 8, 0, 3), (0, 9, 8, 0, 2), (0, 8, 8, 2, 2), (8, 8, 8, 0, 1)]
)
def test_rank_positions_refuse_numbers_that_do_not_divide(
    start: int, stop: int, batch: int, rank: int, world: int
) -> None:
    with pytest.raises(ValueError, match="batch"):
        rank_positions(start, stop, batch, rank, world)


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), seed=st.integers(0, 3))
def test_each_source_of_a_mixture_has_its_own_positions(weights: list[float], seed: int) -> None:
    """The own positions of a source are 0, 1, 2, ... without gaps and repeats."""
    mixture = Mixture(weights, seed)
    places = [mixture.at(position) for position in range(2 * BLOCK)]
    for source in range(len(weights)):
        own = [place for number, place in places if number == source]
        assert sorted(own) == list(range(len(own)))
        assert own == sorted(own)
        share = weights[source] / sum(weights)
        assert abs(len(own) / (2 * BLOCK) - share) <= max(2, len(weights)) / BLOCK
    assert [Mixture(weights, seed).at(p) for p in (1500, 3)] == [places[1500], places[3]]


def test_shares_add_up() -> None:
    assert shares([3, 1], 1024) == [768, 256]
    assert shares([1e-9, 1], 1024) == [1, 1023]
    assert sum(shares([1, 1, 1], 1024)) == 1024
    for weights in ([], [1, 0], [1.0] * 5):
        with pytest.raises(ValueError, match="positive weights"):
            shares(weights, 4)
