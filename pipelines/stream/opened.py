"""Open corpora, columns, orders and shards of a process, shared by all positions; shards in stores, whole or in parts.

A shard on a disk is read by offset. One in a store is read from the node's cache; or, where Reads says "ranged", by
ranges: `prepare` fetches the samples of a block in few requests, many at a time, before the rows are made.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from components.types import SampleError
from pipelines.corpus.columns.reading import open_column
from pipelines.corpus.recent import MOST_OPEN, Recent
from pipelines.corpus.shards import Corpus, ShardFile, Split, open_corpus
from pipelines.corpus.spans import Span, merged, read_span
from pipelines.corpus.stored import address_of, node_cache, on_this_node, set_cap, shard_object
from pipelines.stream.config import StreamConfig
from pipelines.stream.ordering import Order

REQUESTS = 16
"""Ranged reads of a task at the same time; ours: at 20 ms a request, 800 samples a second."""

FETCHES = 4
"""Whole shards that a node fetches ahead at the same time, unless stated; ours."""


@dataclass(frozen=True, kw_only=True)
class Reads:
    """How a stream reads corpora in stores. A stream of corpora on disks has the default, which changes nothing.

    Attributes:
        whole: names of the corpora's folders (`stored.corpus_folder`) that are read by whole shards; others by ranges.
        stores: (folder, address) of each corpus in a store, as the stream's first node opened it.
        fetches: whole shards that a node fetches at the same time, ahead of their use.
        cap_bytes: cap of the node's cache; 0: half of the disk's free bytes.
    """

    whole: frozenset[str] = frozenset()
    stores: tuple[tuple[str, str], ...] = ()
    fetches: int = FETCHES
    cap_bytes: int = 0


_reads: list[Reads] = [Reads()]


def use(reads: Reads) -> None:
    """Set how this process reads corpora in stores, and close the shards that have left the cache since."""
    _reads[0] = reads
    set_cap(reads.cap_bytes)
    if reads.stores:
        _files.drop(ShardFile.is_gone)


def localized(config: StreamConfig, reads: Reads) -> StreamConfig:
    """The configuration with this node's folders of the corpora in stores; opens them if this node has not yet."""
    if not reads.stores:
        return config
    own = {folder: on_this_node(folder, address) for folder, address in reads.stores}
    sources = tuple((own.get(source, source), weight) for source, weight in config.sources)
    return replace(config, sources=sources, unpaired=own.get(config.unpaired, config.unpaired))


# --- corpora ----------------------------------------------------------------------------------------------------------


def corpus_of(folder: str) -> Corpus:
    """Open a corpus; cached as long as the modification time of its index file stays the same."""
    return _corpus_at(folder, _mtime_ns(folder))


@lru_cache(maxsize=16)
def _corpus_at(folder: str, mtime_ns: int) -> Corpus:
    return open_corpus(folder)


def _mtime_ns(folder: str) -> int:
    try:
        return os.stat(f"{folder}/index.json").st_mtime_ns
    except OSError:
        return 0


def column_of(folder: str, name: str) -> Any:
    """Open a column of a corpus; cached like the corpus."""
    return _column_at(folder, _mtime_ns(folder), name)


@lru_cache(maxsize=16)
def _column_at(folder: str, mtime_ns: int, name: str) -> Any:
    return open_column(_corpus_at(folder, mtime_ns), name)


def order_of(folder: str, config: StreamConfig) -> Order:
    """The order of a corpus' samples in the stream."""
    return _order_at(folder, _mtime_ns(folder), config.split, config.seed, config.window_samples)


def unpaired_order(config: StreamConfig) -> Order:
    """The order of the corpus with the unpaired inputs.

    It has another seed: otherwise, with corpora of one layout, sample n always meets sample n of the other.
    """
    return order_of(config.unpaired, replace(config, seed=config.seed + 1))


@lru_cache(maxsize=16)
def _order_at(folder: str, mtime_ns: int, split: str, seed: int, window: int) -> Order:
    return Order(_corpus_at(folder, mtime_ns).split(split).starts, seed, window)


# --- shards -----------------------------------------------------------------------------------------------------------


class Shard:
    """An open shard of a corpus. A read costs a fifth of shards.read_sample, which opens the shard each time."""

    def __init__(self, split: Split, number: int) -> None:
        batch = split.batch(number)
        self.path, self.start = split.folder / split.shards[number]["name"], split.starts[number]
        self.split_samples = len(split)
        self.keys, self.captions = batch.column("key"), batch.column("caption")
        self.offsets, self.sizes = batch.column("offset").to_numpy(), batch.column("size").to_numpy()

    def read(self, index: int, key: str) -> bytes:
        """Return the picture's bytes of the sample at an index; errors as in ShardFile.read."""
        file = _files.get(self.path, lambda: ShardFile(self.path))
        return file.read(int(self.offsets[index]), int(self.sizes[index]), key)


class StoredShard(Shard):
    """A shard in a store: from the node's cache if it is there or comes whole, else its samples by ranges."""

    def __init__(self, split: Split, number: int) -> None:
        super().__init__(split, number)
        stored = shard_object(split.folder.parent, split.name, number, split.shards)
        assert stored is not None
        self.place, self.sha256, self.size = stored
        self.digests = split.batch(number).column("sha256")
        self.pictures: dict[int, bytes] = {}
        self.corpus = split.folder.parent.name

    def read(self, index: int, key: str) -> bytes:
        """As of Shard."""
        if index in self.pictures:
            return self.pictures[index]
        if self.is_whole():
            return super().read(index, key)
        try:
            return self.fetch([index])[index]
        except OSError as error:
            raise SampleError("missing_shard", f"{self.place} cannot be read: {error.strerror}", key) from error

    def is_whole(self) -> bool:
        """Whether the shard's file is read, which may be in the cache already."""
        return self.corpus in _reads[0].whole or node_cache().get(self.sha256) is not None

    def spans(self, indices: Iterable[int]) -> dict[Span, int]:
        """The samples at indices by their spans."""
        return {(int(self.offsets[index]), int(self.sizes[index])): index for index in indices}

    def requests(self, indices: Iterable[int]) -> list[tuple[StoredShard, Span, dict[Span, int]]]:
        """(this shard, span, its samples) of the requests that fetch samples."""
        spans = self.spans(indices)
        return [(self, span, spans) for span in merged(list(spans))]

    def fetch(self, indices: Iterable[int]) -> dict[int, bytes]:
        """The pictures at indices, by ranges."""
        pictures: dict[int, bytes] = {}
        for request in self.requests(indices):
            pictures |= _fetch(request)
        return pictures


def _fetch(request: tuple[StoredShard, Span, dict[Span, int]]) -> dict[int, bytes]:
    """The pictures of one request by their index in the shard."""
    shard, span, spans = request
    names = {own: (shard.keys[index].as_py(), shard.digests[index].as_py()) for own, index in spans.items()}
    return {spans[own]: picture for own, picture in read_span(shard.place, span, names).items()}


_shards: Recent[tuple[str, int, str, int], Shard] = Recent(lambda: MOST_OPEN)
_files: Recent[object, ShardFile] = Recent()


def shard_of(folder: str, split: str, sample: int) -> Shard:
    """Return the shard that holds a sample number."""
    mtime_ns = _mtime_ns(folder)
    number = bisect_right(_corpus_at(folder, mtime_ns).split(split).starts, sample) - 1
    place = folder, mtime_ns, split, number
    return _shards.get(place, lambda: _open_shard(_corpus_at(folder, mtime_ns).split(split), number))


def _open_shard(split: Split, number: int) -> Shard:
    in_store = shard_object(split.folder.parent, split.name, number, split.shards) is not None
    return StoredShard(split, number) if in_store else Shard(split, number)


class Prepared:
    """The bytes of a block's samples that were read by ranges; `release` drops them."""

    def __init__(self) -> None:
        self.pictures: list[tuple[StoredShard, list[int]]] = []

    def release(self) -> None:
        """Drop the bytes."""
        for shard, indices in self.pictures:
            for index in indices:
                shard.pictures.pop(index, None)


def prepare(split: str, samples: Sequence[tuple[str, int]]) -> Prepared:
    """Fetch what a block of rows needs of corpora in stores: rows of tables, whole shards, or ranges of shards.

    Args:
        split: of the samples.
        samples: (corpus folder, sample number); folders on disks are left out.

    Raises:
        Failure, OSError, StoreUnavailable: as of NodeCache.path_of, spans.read_span and PartialTable.fetch.
    """
    stored = {folder for folder in {folder for folder, _ in samples} if address_of(folder)}
    indices_of: dict[tuple[str, int], set[int]] = defaultdict(set)
    for folder, sample in samples:
        if folder in stored:
            starts = corpus_of(folder).split(split).starts
            number = bisect_right(starts, sample) - 1
            indices_of[folder, number].add(sample - starts[number])
    for folder in {folder for folder, _ in indices_of}:
        corpus_of(folder).split(split).fetch_rows([number for name, number in indices_of if name == folder])
    whole, requests = [], []
    for (folder, number), indices in indices_of.items():
        shard = shard_of(folder, split, corpus_of(folder).split(split).starts[number])
        assert isinstance(shard, StoredShard)
        if shard.is_whole():
            whole.append(partial(node_cache().path_of, shard.place, shard.sha256, shard.size))
        else:
            requests += shard.requests(indices)
    prepared = Prepared()
    if not whole and not requests:
        return prepared
    with ThreadPoolExecutor(REQUESTS if requests else _reads[0].fetches, "prepare") as pool:
        files = [pool.submit(fetch) for fetch in whole]
        parts = [(request[0], pool.submit(_fetch, request)) for request in requests]
        for shard, part in parts:
            with suppress(OSError):  # the row's own read makes a SampleError of it
                shard.pictures.update(part.result())
                prepared.pictures.append((shard, list(part.result())))
        for file in files:
            with suppress(OSError):
                file.result()
    return prepared
