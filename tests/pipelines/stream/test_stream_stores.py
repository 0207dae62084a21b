"""The stream of a corpus in a store: the bytes and the order of a disk, whole shards and ranges, fetches ahead."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faulty_proxy
import numpy as np
import pytest
import store_servers

from components.images import encode_png
from components.synthetic import dead_leaves
from pipelines.core.cluster import local_ray
from pipelines.core.errors import Failure, UsageError
from pipelines.core.places.place import Place, place_of
from pipelines.corpus import partial_tables
from pipelines.corpus.shards import Corpus, open_corpus, write_corpus
from pipelines.corpus.spans import merged
from pipelines.corpus.stored import corpus_folder
from pipelines.stream import ahead, feed, opened
from pipelines.stream.ahead import FetchAhead, choose_reads, is_whole_better, planned
from pipelines.stream.config import DEAD_LEAVES, StreamConfig
from pipelines.stream.opened import Reads
from pipelines.stream.rows import load_columns, load_row
from pipelines.training.inputs import TrainInputs

COUNT, PER_SHARD, BATCH = 40, 4, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    samples = [(f"k{n:02d}", "png", encode_png(dead_leaves(24, 1, n)), {"caption": f"c{n}"}) for n in range(COUNT)]
    return write_corpus(tmp_path_factory.mktemp("disk") / "corpus", "test", {"train": samples}, PER_SHARD)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """(name, offset, bytes) of every read of an object; -1 bytes for a whole one."""
    rows: list[tuple[str, int, int]] = []
    fill, read = Place.fill, Place.read_bytes

    def reads(self: Place, start: int = 0, size: int = -1) -> bytes:
        rows.append((self.name, start, size))
        return read(self, start, size)

    def fills(self: Place, file: Path, size: int) -> None:
        rows.append((self.name, 0, -1))
        fill(self, file, size)

    monkeypatch.setattr(Place, "fill", fills)
    monkeypatch.setattr(Place, "read_bytes", reads)
    return rows


@pytest.fixture
def stored(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The folder of the corpus' copy in a store."""
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    place = place_of(f"memory://{uuid.uuid4().hex[:8]}/corpus")
    assert isinstance(place, Place)
    for path in corpus.folder.rglob("*"):
        if path.is_file():
            (place / path.relative_to(corpus.folder).as_posix()).write_bytes(path.read_bytes())
    yield str(corpus_folder(place))
    opened.use(Reads())


def config_of(folder: str | Path, **changes: object) -> StreamConfig:
    fields = {"seed": 5, "resolution": 16, "short_side": 20, "captioner": "manifest", "window_samples": 12}
    return StreamConfig(sources=((str(folder), 1.0),), **{**fields, **changes})  # type: ignore[arg-type]


def shards_read(requests: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    return [row for row in requests if row[0].endswith(".tar")]


def stream_of(config: StreamConfig, reads: Reads) -> Iterator[dict[str, np.ndarray]]:
    blocks = [np.arange(first, first + BATCH) for first in range(0, 2 * COUNT, BATCH)]
    opened.use(reads)
    for positions in feed.with_samples(config, reads, blocks):
        yield load_columns(config, positions)


@pytest.mark.parametrize("way", ["whole", "ranged"])
def test_a_store_gives_the_bytes_and_the_order_of_a_disk(
    way: str, corpus: Corpus, stored: str, requests: list[tuple[str, int, int]]
) -> None:
    on_disk, in_store = config_of(corpus.folder), config_of(stored)
    reads = choose_reads(in_store, 2 * COUNT, 1.0, way, 2, 1 << 20)
    assert bool(reads.whole) == (way == "whole")
    expected_blocks = list(stream_of(on_disk, Reads()))
    blocks = list(stream_of(in_store, reads))
    for block, expected in zip(blocks, expected_blocks, strict=True):
        assert block.keys() == expected.keys()
        assert all(np.array_equal(block[name], expected[name]) for name in block)
    assert len(blocks) == 2 * COUNT // BATCH
    fetches = Counter(shards_read(requests))
    if way == "whole":
        assert sorted(fetches) == sorted((shard["name"], 0, -1) for shard in corpus.split("train").shards)
        assert set(fetches.values()) == {1}  # once in two epochs
    else:
        sizes = sum(size for _, _, size in fetches.elements())
        pictures = sum(sum(corpus.split("train").batch(n).column("size").to_pylist()) for n in range(10))
        assert 2 * pictures <= sizes < 2 * sum(corpus.split("train").shards.sizes)  # each picture once an epoch
        assert sum(fetches.values()) < 2 * COUNT  # neighbours came together


def test_a_row_outside_of_a_block_and_a_damaged_picture(
    corpus: Corpus, stored: str, requests: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.use(choose_reads(config_of(stored), 1, 1.0, "ranged", 1, 0))
    row, expected = load_row(config_of(stored), 3), load_row(config_of(corpus.folder), 3)
    assert np.array_equal(row["hq"], expected["hq"]) and len(shards_read(requests)) == 1
    read = Place.read_bytes
    monkeypatch.setattr(Place, "read_bytes", lambda self, start=0, size=-1: bytes(len(read(self, start, size))))
    with pytest.raises(Failure, match=r"does not hold the picture k\d+ that its table names"):
        load_row(config_of(stored), 4)


def test_the_table_of_a_large_corpus_comes_in_parts(
    corpus: Corpus, stored: str, requests: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_tables, "LARGE_BYTES", 0)
    monkeypatch.setattr(partial_tables, "TAIL_BYTES", 64)
    monkeypatch.setattr(partial_tables, "HEAD_BYTES", 64)
    split, whole = open_corpus(stored).split("train"), corpus.split("train")
    size = whole.table.stat().st_size
    assert split.batch(3).equals(whole.batch(3))
    tables = [row for row in requests if row[0] == "train.arrow"]
    assert len(tables) == 4 and tables[-1][2] < size / 5
    split.fetch_rows([1, 2, 3, 8])
    assert len([row for row in requests if row[0] == "train.arrow"]) in (5, 6)  # neighbours 1 and 2 are one; 3 is here
    before = len(requests)
    for number in (1, 2, 3, 8):
        assert split.batch(number).equals(whole.batch(number))
    assert len(requests) == before
    assert all(split.batch(number).equals(whole.batch(number)) for number in range(10))


def test_neighbours_are_one_request() -> None:
    spans = [(100, 10), (0, 10), (12, 5), (110, 10), (400, 1)]
    assert merged(spans, gap=2) == [(0, 17), (100, 20), (400, 1)]
    assert merged(spans, gap=90) == [(0, 120), (400, 1)]
    assert merged(spans, gap=1000, most=120) == [(0, 120), (400, 1)]
    assert merged([(0, 50), (10, 5)], gap=0) == [(0, 50)]


@pytest.mark.parametrize(
    ("size", "samples", "rows", "share", "cap", "whole"),
    [
        (1000, 100, 1000, 1.0, 1000, True),  # ten epochs of a corpus that fits
        (1000, 100, 1000, 0.125, 1000, True),  # an eighth of ten epochs is more than one fetch of all
        (1000, 100, 100, 0.125, 1000, False),  # an eighth of each shard, once
        (1000, 100, 100, 0.5, 1000, True),
        (1000, 100, 2, 1.0, 1000, False),  # two samples out of a window of ten
        (1000, 100, 1000, 1.0, 199, False),  # two windows do not fit
        (1000, 100, 1000, 1.0, 200, True),
        (1000, 100, 1000, 0.25, 200, False),  # each epoch fetches all shards again
    ],
)
def test_the_rule_of_auto(size: int, samples: int, rows: int, share: float, cap: int, whole: bool) -> None:
    assert is_whole_better(size, samples, rows, 10, share, cap) is whole


def test_wrong_settings_are_refused(stored: str) -> None:
    with pytest.raises(UsageError, match=r'placement\.shard_reads.*"whole"'):
        choose_reads(config_of(stored), 1, 1.0, "hole", 1, 0)
    with pytest.raises(UsageError, match="shard_fetches >= 1"):
        choose_reads(config_of(stored), 1, 1.0, "whole", 0, 0)


def test_the_plan_is_the_order_of_first_use(corpus: Corpus) -> None:
    folder, split = str(corpus.folder), corpus.split("train")
    config = replace(config_of(folder), sources=((folder, 3.0), (DEAD_LEAVES, 1.0)))
    place = {"start": 16, "batch_size": BATCH, "rank": 1, "world": 2}
    uses = list(planned(config, frozenset([folder]), 0, 60, place))
    positions = [16 + 8 * step + 4 + row for step in range(15) for row in range(4)]
    expected: list[tuple[int, int]] = []
    for position in positions:
        for source, own, sample in ahead.places_of(config, [position]):
            if source == folder:
                number = int(np.searchsorted(split.starts, sample, side="right")) - 1
                expected.append((position, number))
                use = next(use for use in uses if use.number == number and use.position <= position < use.until)
                assert use.until > position and own >= 0
    firsts = list(dict.fromkeys(number for _, number in expected))
    assert list(dict.fromkeys(use.number for use in uses)) == firsts
    assert [use.position for use in uses] == sorted(use.position for use in uses)


def test_fetches_ahead_keep_the_order_the_limit_and_the_room(
    corpus: Corpus, stored: str, requests: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, split = config_of(stored), corpus.split("train")
    place = {"start": 0, "batch_size": BATCH, "rank": 0, "world": 1}
    largest = int(max(split.shards.sizes))
    reads = choose_reads(config, 2 * COUNT, 1.0, "whole", 2, 7 * largest)
    running, most, lock, fill = [0], [0], threading.Lock(), Place.fill

    def slow(self: Place, file: Path, size: int) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        fill(self, file, size)
        with lock:
            running[0] -= 1

    monkeypatch.setattr(Place, "fill", slow)
    both = [FetchAhead(config, reads, 2 * COUNT, place) for _ in range(2)]  # of two ranks of a node
    for fetcher in both:
        fetcher.start()
    deadline = time.monotonic() + 60
    while len(shards_read(requests)) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    order = [split.shards[use.number]["name"] for use in planned(config, frozenset([stored]), 0, COUNT, place)]
    first = [name for name, _, _ in shards_read(requests)]
    assert 6 <= len(first) <= 7 and set(first) == set(order[: len(first)])  # the room of seven, each once
    assert all(order.index(name) <= place + 4 for place, name in enumerate(first))  # two fetches of two ranks in work
    for fetcher in both:
        fetcher.advance(COUNT)  # the first epoch's shards are no longer needed
    while len(set(shards_read(requests))) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    for fetcher in both:
        fetcher.stop()
    assert most[0] <= 2
    after = len(shards_read(requests))
    time.sleep(0.2)
    assert len(shards_read(requests)) == after  # stopped
    assert opened.node_cache().size() <= 7 * largest


def test_a_shard_that_left_the_cache_is_closed(stored: str) -> None:
    reads = choose_reads(config_of(stored), 2 * COUNT, 1.0, "whole", 2, 1 << 20)
    opened.use(reads)
    load_columns(config_of(stored), np.arange(BATCH))
    cache = opened.node_cache()
    held = len(opened._files)
    assert held
    for _, _, path in cache._entries():
        path.unlink()
    opened.use(reads)
    assert len(opened._files) < held
    load_columns(config_of(stored), np.arange(BATCH))


def test_another_node_opens_the_corpus_in_its_own_home(
    corpus: Corpus, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = TrainInputs(corpora={"a": Path(stored), "b": corpus.folder})
    addresses = inputs.addresses()
    assert list(addresses) == ["a"] and addresses["a"].startswith("memory://")
    reads = choose_reads(config_of(stored), 2 * COUNT, 1.0, "whole", 2, 1 << 20)
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "other"))
    own = opened.localized(config_of(stored), reads)
    (folder, _), *_ = own.sources
    assert folder.startswith(str(tmp_path / "other")) and Path(folder).name == Path(stored).name
    assert inputs.on_this_node(addresses).corpora == {"a": Path(folder), "b": corpus.folder}
    assert np.array_equal(load_row(own, 3)["hq"], load_row(config_of(corpus.folder), 3)["hq"])
    place = place_of(addresses["a"])
    assert isinstance(place, Place)
    (place / "index.json").write_bytes((place / "index.json").read_bytes() + b" ")
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "late"))
    with pytest.raises(Failure, match="was curated again since the stream began"):
        opened.localized(config_of(stored), reads)


def stream_under_ray(address: str, folder: str, way: str) -> None:
    """Compare two epochs of a stream from a bucket with the rows of a disk. It runs in a process of its own."""
    config = config_of(corpus_folder(place_of(address)))
    with local_ray(num_cpus=2, object_store_mib=100):
        reads = choose_reads(config, 2 * COUNT, 1.0, way, 2, 1 << 20)
        batches = feed.rank_batches(config, 0, 2 * COUNT, BATCH, own_process=False, reads=reads)
        for number, columns in enumerate(batches):
            expected = load_columns(config_of(Path(folder)), np.arange(BATCH * number, BATCH * (number + 1)))
            assert columns["key"].tolist() == expected["key"].tolist()
            assert np.array_equal(columns["hq"], expected["hq"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ranged", "whole"])
def test_tasks_and_the_actor_fetch_each_shard_once_near_the_trainer(corpus: Corpus, tmp_path: Path, way: str) -> None:
    """The stream under Ray, of a bucket: the rows of a disk, one GET a shard in two epochs; and by ranges.

    Tasks read their own process' variables, so this Ray must not be that of other tests.
    """
    with store_servers.moto_server() as server, faulty_proxy.faulty_proxy(server, every=0) as proxy:
        storage = store_servers.storage(proxy.endpoint)
        address = f"s3://{store_servers.BUCKET}/ray-{way}"
        for path in corpus.folder.rglob("*"):
            if path.is_file():
                target = place_of(f"{address}/{path.relative_to(corpus.folder).as_posix()}", storage)
                assert isinstance(target, Place)
                target.write_bytes(path.read_bytes())
        proxy.lines.clear()
        variables = {**store_servers.environment(proxy.endpoint), "RESTORAY_HOME": str(tmp_path / "home")}
        code = f"import test_stream_stores as t; t.stream_under_ray({address!r}, {str(corpus.folder)!r}, {way!r})"
        paths = os.pathsep.join([str(Path(__file__).parent), *(place for place in sys.path if place)])
        environment = {**os.environ, **variables, "PYTHONPATH": paths}
        process = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280
        )
        assert process.returncode == 0, process.stderr[-3000:]
        shards = Counter(line for line in proxy.lines if line.endswith(".tar"))
    assert len(shards) == 10 and (set(shards.values()) == {1}) == (way == "whole")
