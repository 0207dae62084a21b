"""Which sample stands where in the endless stream: orders, mixtures and ranks, each a pure function of the position.

    Order          position -> sample number of one split: shards in seeded order, a window of them at a time, and the
                   samples of a window in seeded order. Every epoch holds every sample exactly once
    Mixture        position -> (source, the source's own position): in each run of BLOCK positions every source has its
                   fixed share, so that nothing of a source is lost or doubled within its epochs
    rank_positions the positions that one of several workers takes of each global batch

Nothing is kept between calls but what can be computed again. Memory is that of a window (and 8 bytes a shard), however
large the split is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from components.randomness import generator
from pipelines.errors import Failure

WINDOW_SAMPLES = 1 << 16
"""Samples that are shuffled together. Ours: 256 batches of 256; a split of up to this many is shuffled as a whole."""

BLOCK = 1024
"""Positions within which a mixture's shares are exact; weights are met to one part in so many."""

KEPT = 8  # windows, epochs and blocks that are remembered: neighbours in the stream share them


def permutation(n: int, seed: int, *parts: int | str) -> np.ndarray:
    """Seeded permutation of 0 .. n-1: int64 [n], read-only.

    Sorts raw Philox words: numpy promises those bits for all its versions, and not those of Generator.permutation.
    """
    words = generator(seed, *parts).bit_generator.random_raw(n)
    found = np.argsort(words, kind="stable")
    found.setflags(write=False)
    return found


def rank_positions(start: int, stop: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Positions that one rank works on, int64, in order: its contiguous part of each global batch.

    Args:
        start, stop: the stretch of the stream; a whole number of global batches.
        batch_size: of the global batch; a multiple of `world`.
        rank, world: this worker and how many there are.

    Raises:
        ValueError: the numbers do not divide.
    """
    count = rank_count(start, stop, batch_size, rank, world)
    return rank_position(np.arange(count), start, batch_size, rank, world)


def rank_count(start: int, stop: int, batch_size: int, rank: int, world: int) -> int:
    """How many positions `rank_positions` names; raises as it does."""
    if batch_size < 1 or batch_size % world or not 0 <= rank < world:
        raise ValueError(f"a global batch of {batch_size} cannot be shared by {world} workers (rank {rank})")
    if stop <= start or (stop - start) % batch_size:
        raise ValueError(f"positions {start}..{stop} are no whole number of global batches of {batch_size}")
    return (stop - start) // world


def rank_position(local: np.ndarray, start: int, batch_size: int, rank: int, world: int) -> np.ndarray:
    """Positions of a rank's local row numbers."""
    share = batch_size // world
    return start + local // share * batch_size + rank * share + local % share


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total` in the proportion of the weights, by largest remainder, at least 1 each.

    Raises:
        ValueError: no weights, one that is not positive, or more of them than `total`.
    """
    if not weights or min(weights) <= 0 or len(weights) > total:
        raise ValueError(f"expected 1 to {total} positive weights, got {list(weights)}")
    quotas = [weight / sum(weights) * total for weight in weights]
    counts = [max(1, int(quota)) for quota in quotas]
    while sum(counts) > total:  # the minimum of 1 took too much
        counts[int(np.argmax(counts))] -= 1
    while sum(counts) < total:
        counts[int(np.argmax([quota - count for quota, count in zip(quotas, counts, strict=True)]))] += 1
    return counts


@dataclass(frozen=True)
class _Epoch:
    """Shards in the order of an epoch, and where its windows begin: at which of these shards, at which place."""

    shards: np.ndarray
    window_shards: np.ndarray
    window_places: np.ndarray


@dataclass(frozen=True)
class _Window:
    """Shards of a window, rising; after how many of its samples each ends; and the order of these samples."""

    shards: np.ndarray
    ends: np.ndarray
    order: np.ndarray


class Order:
    """The order of one split, epoch after epoch.

    Args:
        starts: first sample number of each shard, and the number of all samples at the end.
        seed: of the run.
        window: samples that are shuffled together, to the next whole shard.

    Raises:
        Failure: the split is empty.
    """

    def __init__(self, starts: Sequence[int], seed: int, window: int = WINDOW_SAMPLES) -> None:
        self.starts = np.unique(np.asarray(starts, dtype=np.int64))  # an empty shard has no place in the order
        if len(self.starts) < 2:
            raise Failure("there is no sample to put in order: the split is empty.")
        if window < 1:
            raise ValueError(f"window must be at least 1 sample, got {window}")
        self.seed, self.window = seed, window
        self._sizes = np.diff(self.starts)
        self._epoch = lru_cache(maxsize=KEPT)(self._make_epoch)
        self._window = lru_cache(maxsize=KEPT)(self._make_window)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def samples(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Sample numbers at positions, int64; position // len is the epoch."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), len(self))
        found = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            layout, here = self._epoch(epoch), np.flatnonzero(epochs == epoch)
            numbers = np.searchsorted(layout.window_places, places[here], side="right") - 1
            for number in np.unique(numbers).tolist():
                rows = here[numbers == number]
                window = self._window(epoch, number)
                inside = window.order[places[rows] - layout.window_places[number]]
                nth = np.searchsorted(window.ends, inside, side="right")
                shards = window.shards[nth]
                found[rows] = self.starts[shards] + inside - (window.ends[nth] - self._sizes[shards])
        return found

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
        # A split of one window has the order that it had before there were windows.
        which = () if len(layout.window_places) == 1 else (number,)
        return _Window(shards, ends, permutation(int(ends[-1]), self.seed, "order", epoch, *which))


class Mixture:
    """Which source stands at each position, and at which of its own positions.

    Args:
        weights: of the sources; met to 1 / BLOCK, and every source has at least one position in BLOCK.
        seed: of the run.

    Raises:
        ValueError: see `shares`.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.counts, self.seed = shares(weights, BLOCK), seed
        self._labels = np.repeat(np.arange(len(self.counts)), self.counts)
        self._ranks = np.concatenate([np.arange(count) for count in self.counts])
        self._block = lru_cache(maxsize=KEPT)(self._make_block)

    def at(self, position: int) -> tuple[int, int]:
        """(source number, position in that source's own order) at a position of the stream."""
        if len(self.counts) == 1:
            return 0, position
        block, place = divmod(position, BLOCK)
        sources, ranks = self._block(block)
        source = int(sources[place])
        return source, block * self.counts[source] + int(ranks[place])

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each place of a block, and how many places before it have the same one."""
        sources = self._labels[permutation(BLOCK, self.seed, "mixture", block)]
        ranks = np.empty(BLOCK, np.int64)
        ranks[np.argsort(sources, kind="stable")] = self._ranks
        return sources, ranks
