"""The order of samples in the endless stream. Orders, mixtures and ranks are pure functions of the position.

    Order          position -> sample number in one split: shards in seeded order, taken window by window, and the
                   samples of a window in seeded order. Every epoch has every sample exactly once
    Mixture        position -> (source, the source's own position): in each block of BLOCK positions every source has
                   its fixed share, so that an epoch of a source has each of its positions exactly once
    rank_positions the positions of one rank in each global batch

All state between calls is a cache. Memory is that of a few windows plus 8 bytes per shard, for a split of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from components.randomness import generator
from pipelines.core.errors import Failure

WINDOW_SAMPLES = 1 << 16
"""Samples that are shuffled together. Ours: 256 batches of 256; a split of up to this many is shuffled as a whole."""

BLOCK = 1024
"""Positions in a block, within which a mixture's shares are exact; weights are rounded to 1 / BLOCK."""

CACHE_ENTRIES = 8  # windows, epochs and blocks in each cache; neighbours in the stream share them


def permutation(n: int, seed: int, *parts: int | str) -> np.ndarray:
    """Return a seeded permutation of 0 .. n-1: int64 [n], read-only.

    It sorts raw Philox words, since numpy keeps their bits in all versions; it does not for Generator.permutation.
    """
    words = generator(seed, *parts).bit_generator.random_raw(n)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def rank_positions(start: int, stop: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Return the positions of one rank, int64, in order: its contiguous part of each global batch.

    Args:
        start, stop: first position, and the one after the last; a whole number of global batches.
        batch_size: rows of a global batch; a multiple of `world`.
        rank, world: number of this worker, and number of workers.

    Raises:
        ValueError: the numbers do not divide.
    """
    count = rank_count(start, stop, batch_size, rank, world)
    return rank_position(np.arange(count), start, batch_size, rank, world)


def rank_count(start: int, stop: int, batch_size: int, rank: int, world: int) -> int:
    """Return the number of positions in `rank_positions`; raises the same errors."""
    if batch_size < 1 or batch_size % world or not 0 <= rank < world:
        raise ValueError(f"a global batch of {batch_size} cannot be shared by {world} workers (rank {rank})")
    if stop <= start or (stop - start) % batch_size:
        raise ValueError(f"positions {start}..{stop} are not a whole number of global batches of {batch_size}")
    return (stop - start) // world


def rank_position(local: np.ndarray, start: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Return the positions of a rank's local row numbers."""
    share = batch_size // world
    return start + local // share * batch_size + rank * share + local % share


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` into whole numbers in proportion to the weights, by largest remainder, each at least 1.

    Raises:
        ValueError: there are no weights or more than `total`, or a weight is not positive.
    """
    if not weights or min(weights) <= 0 or len(weights) > total:
        raise ValueError(f"expected 1 to {total} positive weights, got {list(weights)}")
    quotas = [weight / sum(weights) * total for weight in weights]
    counts = [max(1, int(quota)) for quota in quotas]
    while sum(counts) > total:  # because of the minimum of 1
        counts[int(np.argmax(counts))] -= 1
    while sum(counts) < total:
        counts[int(np.argmax([quota - count for quota, count in zip(quotas, counts, strict=True)]))] += 1
    return counts


@dataclass(frozen=True)
class _Epoch:
    """The order of shards in an epoch.

    Attributes:
        shards: shard numbers in the order of the epoch.
        window_shards: first shard of each window, as an index into `shards`; and the number of shards at the end.
        window_places: first place of each window in the epoch.
    """

    shards: np.ndarray
    window_shards: np.ndarray
    window_places: np.ndarray


@dataclass(frozen=True)
class _Window:
    """The order of samples in a window.

    Attributes:
        shards: shard numbers of the window, ascending.
        ends: cumulative number of samples after each of these shards.
        order: permutation of the window's samples.
    """

    shards: np.ndarray
    ends: np.ndarray
    order: np.ndarray


class Order:
    """The order of one split over all epochs.

    Args:
        starts: first sample number of each shard, and the number of all samples at the end.
        seed: seed of the run.
        window: samples that are shuffled together, rounded up to whole shards.

    Raises:
        Failure: the split is empty.
    """

    def __init__(self, starts: Sequence[int], seed: int, window: int = WINDOW_SAMPLES) -> None:
        self.starts = np.unique(np.asarray(starts, dtype=np.int64))  # without empty shards
        if len(self.starts) < 2:
            raise Failure("the split is empty: it has no sample for the stream.")
        if window < 1:
            raise ValueError(f"window must be at least 1 sample, got {window}")
        self.seed, self.window = seed, window
        self._sizes = np.diff(self.starts)
        self._epoch = lru_cache(maxsize=CACHE_ENTRIES)(self._make_epoch)
        self._window = lru_cache(maxsize=CACHE_ENTRIES)(self._make_window)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def samples(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the sample numbers at positions, int64; the epoch is position // len."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), len(self))
        samples = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            layout, here = self._epoch(epoch), np.flatnonzero(epochs == epoch)
            numbers = np.searchsorted(layout.window_places, places[here], side="right") - 1
            for number in np.unique(numbers).tolist():
                rows = here[numbers == number]
                window = self._window(epoch, number)
                inside = window.order[places[rows] - layout.window_places[number]]
                nth = np.searchsorted(window.ends, inside, side="right")
                shards = window.shards[nth]
                samples[rows] = self.starts[shards] + inside - (window.ends[nth] - self._sizes[shards])
        return samples

    def window_end(self, position: int) -> int:
        """Return the position after the last one of a position's window: there its shards are no longer needed."""
        epoch, place = divmod(position, len(self))
        places = self._epoch(epoch).window_places
        number = int(np.searchsorted(places, place, side="right"))
        return epoch * len(self) + (int(places[number]) if number < len(places) else len(self))

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = permutation(len(self._sizes), self.seed, "shards", epoch)
        ends = np.cumsum(self._sizes[shards])
        window_of = (ends - self._sizes[shards]) // self.window
        first = np.flatnonzero(np.diff(window_of, prepend=-1))
        return _Epoch(shards, np.append(first, len(shards)), (ends - self._sizes[shards])[first])

    def _make_window(self, epoch: int, number: int) -> _Window:
        layout = self._epoch(epoch)
        shards = np.sort(layout.shards[layout.window_shards[number] : layout.window_shards[number + 1]])
        ends = np.cumsum(self._sizes[shards])
        # With one window the stream's name has no window number, so the order is that of older versions.
        parts = () if len(layout.window_places) == 1 else (number,)
        return _Window(shards, ends, permutation(int(ends[-1]), self.seed, "order", epoch, *parts))


class Mixture:
    """The source at each position of the stream, and the position in the source's own order.

    Args:
        weights: weights of the sources, rounded to 1 / BLOCK; every source has at least one position per block.
        seed: seed of the run.

    Raises:
        ValueError: see `shares`.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.counts, self.seed = shares(weights, BLOCK), seed
        self._labels = np.repeat(np.arange(len(self.counts)), self.counts)
        self._ranks = np.concatenate([np.arange(count) for count in self.counts])
        self._block = lru_cache(maxsize=CACHE_ENTRIES)(self._make_block)

    def at(self, position: int) -> tuple[int, int]:
        """Return (source number, position in that source's own order) at a position of the stream."""
        if len(self.counts) == 1:
            return 0, position
        block, place = divmod(position, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[place])
        return source, block * self.counts[source] + int(ranks[place])

    def stream_position(self, source: int, own: int) -> int:
        """Return a position of the stream that a source's own position does not come after: its block's end."""
        return own if len(self.counts) == 1 else (own // self.counts[source] + 1) * BLOCK

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each place in a block, and the number of earlier places with the same source."""
        sources = self._labels[permutation(BLOCK, self.seed, "mixture", block)]
        ranks = np.empty(BLOCK, np.int64)
        ranks[np.argsort(sources, kind="stable")] = self._ranks
        return sources, ranks
