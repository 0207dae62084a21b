"""Shards in stores, fetched into the node's cache ahead of the stream, in the order in which the stream will open them.

A rank's feed starts a FetchAhead beside itself and states its progress. It fetches while the shards of the windows in
use, and those fetched ahead of them, fit into the cache: what it fetches never pushes out what the stream still needs.
All FetchAheads of a node share its slots (`Reads.fetches` at a time) and its cache, so a shard comes once.

Whole shards or ranges? `choose_reads` decides once for a rank's stream, by `placement.shard_reads`; "auto" takes whole
shards of a corpus if two windows of it fit into the cache and the node would read at least half as many bytes by
ranges. So small runs, and nodes that read a small part of every shard, read by ranges.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.recipes import SHARD_READS
from pipelines.core.errors import RestorayError, UsageError, unknown
from pipelines.core.places.place import Place
from pipelines.corpus.stored import address_of, node_cache, set_cap, shard_object
from pipelines.stream.config import DEAD_LEAVES, StreamConfig
from pipelines.stream.opened import Reads, corpus_of, localized, order_of, unpaired_order
from pipelines.stream.ordering import rank_position
from pipelines.stream.rows import mixture_of, places_of

WORTH = 2.0
"""Whole shards may cost so many times the bytes of ranges: they need no request for each sample. Ours."""

PLAN_ROWS = 4096  # positions that are planned at a time
RETRY_S = 5.0  # pause after a fetch that failed; the row's own read says why


def choose_reads(
    config: StreamConfig, rows: int, node_share: float, shard_reads: str, fetches: int, cap_bytes: int
) -> Reads:
    """How a stream reads its corpora in stores; the default Reads if it has none.

    Args:
        rows: positions of the stream that are left, of all ranks.
        node_share: share of them that this node's ranks take.
        shard_reads: one of SHARD_READS.
        fetches, cap_bytes: see Reads.

    Raises:
        UsageError: an unknown way to read.
    """
    if shard_reads not in SHARD_READS:
        raise unknown("placement.shard_reads", shard_reads, SHARD_READS)
    if fetches < 1 or cap_bytes < 0:
        raise UsageError("placement needs shard_fetches >= 1 and cache_gib >= 0.")
    weights = {folder: weight for folder, weight in config.sources if folder != DEAD_LEAVES}
    total = sum(weight for _, weight in config.sources)
    shares = {folder: weight / total for folder, weight in weights.items()}
    if config.unpaired:
        shares[config.unpaired] = 1.0
    stores = tuple((folder, address) for folder in shares if (address := address_of(folder)))
    if not stores:
        return Reads()
    set_cap(cap_bytes)
    cap, whole = node_cache().cap(), set()
    for folder, _ in stores:
        split = corpus_of(folder).split(config.split)
        size, samples = float(split.shards.sizes.sum()), len(split)
        if shard_reads == "whole" or (
            shard_reads == "auto"
            and is_whole_better(
                size, samples, rows * shares[folder], config.window_samples, node_share, cap / len(stores)
            )
        ):
            whole.add(Path(folder).name)
    return Reads(whole=frozenset(whole), stores=stores, fetches=fetches, cap_bytes=cap_bytes)


def is_whole_better(size: float, samples: int, rows: float, window: int, node_share: float, cap: float) -> bool:
    """Whether a node should fetch whole shards of a corpus.

    Args:
        size, samples: bytes and samples of the corpus' split.
        rows: samples that the stream takes from it, on all nodes; more than `samples` in several epochs.
        window: samples that are shuffled together.
        node_share: share of the rows that the node takes.
        cap: bytes of the cache.
    """
    if not samples:
        return False
    windows = -(-rows // window)
    touched = min(1.0, window / samples) * windows  # parts of the corpus whose shards the windows need, over all epochs
    if cap < min(1.0, 2 * window / samples) * size:
        return False
    if size <= cap:
        touched = min(1.0, touched)  # what was fetched once stays
    return touched * size <= WORTH * node_share * rows / samples * size


@dataclass(frozen=True, kw_only=True)
class Use:
    """A shard that the stream will open.

    Attributes:
        position: of the stream, where it is opened; until: from where on it is no longer needed.
        folder, number: corpus folder, and number of the shard in the stream's split.
    """

    position: int
    until: int
    folder: str
    number: int


def planned(
    config: StreamConfig, folders: frozenset[str], start: int, rows: int, place: dict[str, int]
) -> Iterator[Use]:
    """Yield the shards that a rank opens, each once a window, in the order of their first use.

    Args:
        folders: corpora that are planned.
        start: first of the rank's local rows.
        rows: one after the last of them.
        place: see ordering.rank_position.
    """
    last: dict[tuple[str, int], int] = {}
    index = {name: number for number, (name, _) in enumerate(config.sources)}
    for first in range(start, rows, PLAN_ROWS):
        positions = rank_position(np.arange(first, min(first + PLAN_ROWS, rows)), **place)
        opened: list[tuple[int, str, int, int]] = []  # position, folder, own position, sample
        for position, (source, own, sample) in zip(positions.tolist(), places_of(config, positions), strict=True):
            if source in folders:
                opened.append((position, source, own, sample))
        if config.unpaired in folders:
            samples = unpaired_order(config).samples(positions)
            opened += [(p, config.unpaired, p, s) for p, s in zip(positions.tolist(), samples.tolist(), strict=True)]
            opened.sort(key=lambda row: row[0])
        for folder in dict.fromkeys(row[1] for row in opened):
            starts = np.asarray(corpus_of(folder).split(config.split).starts)
            own_rows = [row for row in opened if row[1] == folder]
            numbers = np.searchsorted(starts, [row[3] for row in own_rows], side="right") - 1
            is_unpaired = folder == config.unpaired and folder not in index
            order = unpaired_order(config) if is_unpaired else order_of(folder, config)
            for (position, _, own, _), number in zip(own_rows, numbers.tolist(), strict=True):
                if last.get((folder, number), -1) > position:
                    continue
                until = order.window_end(own)
                if not is_unpaired:
                    until = mixture_of(config).stream_position(index[folder], until)
                last[folder, number] = max(until, position + 1)
                yield Use(position=position, until=until, folder=folder, number=number)


class FetchAhead:
    """Fetches what a rank's stream will open, in threads of this process, until it is stopped.

    Args:
        config: configuration of the stream, with the folders of the feed's node.
        reads: how it reads.
        rows: local rows of the rank.
        place: start, batch_size, rank and world, see ordering.rank_position.
    """

    def __init__(self, config: StreamConfig, reads: Reads, rows: int, place: dict[str, int]) -> None:
        self.config, self.reads, self.rows, self.place = localized(config, reads), reads, rows, place
        set_cap(reads.cap_bytes)
        self.position, self.stopped, self.moved = place["start"], threading.Event(), threading.Condition()
        self.held: deque[tuple[int, int]] = deque()  # (until, bytes) of the shards that the stream still needs
        self.count = 0
        self.thread = threading.Thread(target=self._run, daemon=True, name="fetch-ahead")

    def start(self) -> None:
        """Begin to fetch."""
        self.thread.start()

    def advance(self, position: int) -> None:
        """Say that the stream has passed a position."""
        with self.moved:
            self.position = max(self.position, position)
            self.moved.notify_all()

    def stop(self) -> None:
        """Begin no more fetches, and wait for those in work."""
        self.stopped.set()
        with self.moved:
            self.moved.notify_all()
        self.thread.join()

    def _run(self) -> None:
        folders = frozenset(f for f, _ in self.config.sources) | {self.config.unpaired}
        whole = frozenset(folder for folder in folders if Path(folder).name in self.reads.whole)
        cap = node_cache().cap()
        with ThreadPoolExecutor(self.reads.fetches, "fetch-ahead") as pool:
            pending: deque[Any] = deque()
            for use in planned(self.config, whole, 0, self.rows, self.place):
                split = corpus_of(use.folder).split(self.config.split)
                stored = shard_object(split.folder.parent, split.name, use.number, split.shards)
                assert stored is not None
                if not self._has_room(stored[2], cap):
                    return
                self.held.append((use.until, stored[2]))
                while len(pending) >= self.reads.fetches:
                    pending.popleft().result()
                pending.append(pool.submit(self._fetch, split, use.number, stored))

    def _has_room(self, size: int, cap: int) -> bool:
        """Wait until so many more bytes fit beside what the stream still needs; False if it was stopped."""
        with self.moved:
            while not self.stopped.is_set():
                self.held = deque(held for held in self.held if held[0] > self.position)
                if not self.held or sum(held[1] for held in self.held) + size <= cap:
                    return True
                self.moved.wait()
        return False

    def _fetch(self, split: Any, number: int, stored: tuple[Place, str, int]) -> None:
        try:
            split.fetch_rows([number])
            if node_cache().fetch_ahead(*stored, slots=self.reads.fetches, stopped=self.stopped) is not None:
                self.count += 1
        except (OSError, RestorayError):
            self.stopped.wait(RETRY_S)
