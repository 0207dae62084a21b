"""Memory and open files of a process at 20 million samples, on small numbers of the same structures."""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import tracemalloc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest

from components.images import encode_png
from pipelines.core.errors import Failure
from pipelines.corpus.columns import caption_engine, line_places
from pipelines.corpus.columns.computing import compute_column
from pipelines.corpus.columns.line_places import LinePlaces
from pipelines.corpus.columns.reading import open_column
from pipelines.corpus.columns.spec import ColumnJob, ColumnSpec, ShardTask
from pipelines.corpus.columns.workers import OpenShard, open_shard
from pipelines.corpus.recent import LEAST_OPEN, MOST_OPEN, Recent, open_limit
from pipelines.corpus.shards import Corpus, ShardFile, ShardList, write_corpus
from pipelines.stream import opened as opened_module
from pipelines.stream import rows
from pipelines.stream.config import StreamConfig

PICTURE = encode_png(np.zeros((16, 16, 3), np.uint8))


def sha(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def test_a_place_of_a_caption_takes_16_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_places, "RUN", 1024)
    places, count = LinePlaces(), 12 * 1024
    names = [sha(number) for number in range(count)]
    tracemalloc.start()
    for number, name in enumerate(names):
        places.add(name, Path(f"{number % 3}.jsonl"), 100 * number)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(places) == count and size < 20 * count
    for number in (0, 1, 1023, 1024, 5000, count - 1):
        assert places.find(names[number]) == (Path(f"{number % 3}.jsonl"), 100 * number)
    assert sha(-1) not in places and places.find(sha(-2)) is None
    places.add(names[7], Path("later.jsonl"), 1)
    assert places.find(names[7]) == (Path("1.jsonl"), 700) and len(places) == count
    places.add(sha(-1), Path("far.jsonl"), 2**44 - 1)
    assert places.find(sha(-1)) == (Path("far.jsonl"), 2**44 - 1)


def test_the_index_of_many_small_shards_is_compact_and_unchanged() -> None:
    shards: list[dict[str, Any]] = [
        {"name": f"train-{n:06d}-{sha(n).hex()[:8]}.tar", "bytes": n << 33, "sha256": sha(n).hex(), "samples": n % 129}
        for n in range(20_000)
    ]
    tracemalloc.start()
    compact = ShardList(shards)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 100 * len(shards)
    assert list(compact) == shards and compact[-1] == shards[-1] and compact[3:9:2] == shards[3:9:2]
    assert list(pickle.loads(pickle.dumps(compact)))[5] == shards[5] and len(ShardList([])) == 0
    with pytest.raises(IndexError):
        compact[len(shards)]


def test_the_files_of_a_column_are_compact_in_every_process(tmp_path: Path) -> None:
    count = 20_000
    corpus = Corpus(tmp_path, "digest", {})
    rows = [{"name": f"train-{n:05d}.arrow", "bytes": 1, "sha256": sha(n).hex(), "samples": 1} for n in range(count)]
    document = {"format": 1, "kind": "text", "corpus": "digest", "producer": {}, "shape": [], "dtype": ""}
    (tmp_path / "columns" / "texts").mkdir(parents=True)
    path = tmp_path / "columns" / "texts" / "column.json"
    path.write_text(json.dumps({**document, "splits": {"train": rows}}))
    del rows
    tracemalloc.start()
    column = open_column(corpus, "texts")
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 50 * count
    with pytest.raises(Failure, match=r"train-19999\.arrow cannot be read"):
        column.value("train", count - 1)
    again = pickle.loads(pickle.dumps(column))
    assert again == column and list(again.starts["train"]) == list(range(count + 1))


def test_a_window_of_shards_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 shards, more than the 512 of a window: a second pass opens no file again."""
    assert min(MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 4) >= open_limit() >= LEAST_OPEN
    values: Recent[int, int] = Recent(lambda: 600)
    calls_of_get = [values.get(number, lambda: 0) for _ in range(2) for number in range(600)]
    assert len(values) == 600 and len(calls_of_get) == 1200
    calls: list[int] = []
    for number in (0, 599, 600, 1, 2):  # 600 pushes out the one that was read first: 1, since 0 was read again
        values.get(number, lambda number=number: calls.append(number) or 0)  # type: ignore[misc, func-returns-value]
    assert calls == [600, 1, 2]

    samples = [(f"p{number:03d}", "png", PICTURE, {}) for number in range(40)]
    corpus = write_corpus(tmp_path / "corpus", "test", {"train": samples}, samples_per_shard=1)
    opened: list[Path] = []

    def opens(path: Path) -> ShardFile:
        opened.append(path)
        return ShardFile(path)

    monkeypatch.setattr(opened_module, "ShardFile", opens)
    config = StreamConfig(sources=((str(corpus.folder), 1.0),), seed=0, resolution=16, short_side=16, batch_size=4)
    for position in (*range(40), *range(40)):
        rows.load_row(config, position)
    assert len(opened) == len(set(opened)) == 40


class Lines:
    """A Ray dataset of rows in this process."""

    def __init__(self, lines: Iterable[dict[str, Any]]) -> None:
        self.lines = lines

    def flat_map(self, work: Any, fn_kwargs: Mapping[str, Any]) -> Lines:
        return Lines(line for row in self.lines for line in work(row, **fn_kwargs))

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self.lines)


def test_the_driver_of_an_engine_holds_few_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 shards of 2 pictures: the driver opens each once, when its first answer arrives, and lets it go."""
    samples = [(f"p{number:03d}", "png", PICTURE, {}) for number in range(60)]
    corpus = write_corpus(tmp_path / "corpus", "test", {"train": samples}, samples_per_shard=2)
    held: WeakValueDictionary[int, OpenShard] = WeakValueDictionary()
    by_driver: list[int] = []
    in_worker = [False]

    def opens(job: ColumnJob, task: ShardTask) -> OpenShard:
        shard = open_shard(job, task)
        if not in_worker[0]:
            held[task.shard] = shard
            by_driver.append(task.shard)
        return shard

    def engine(pictures: Lines) -> Lines:
        def answers() -> Iterator[dict[str, Any]]:
            source = iter(pictures.lines)
            while True:
                in_worker[0] = True
                row = next(source, None)
                in_worker[0] = False
                if row is None:
                    return
                assert len(held) <= 3, len(held)
                yield {**{name: row[name] for name in ("split", "shard", "place")}, "text": f"text {row['shard']}"}

        return Lines(answers())

    monkeypatch.setattr(caption_engine, "open_shard", opens)
    monkeypatch.setattr(caption_engine, "running_ray", nullcontext)
    monkeypatch.setattr("ray.data.from_items", lambda items, override_num_blocks: Lines(items))
    spec = ColumnSpec(name="captions", kind="text", producer={"model": "echo"})
    compute_column(corpus.folder, spec, run=lambda job, tasks: caption_engine.run_engine(job, tasks, lambda: engine))
    assert sorted(by_driver) == sorted([0, *range(30)])  # the first one shows that something is missing
    captions = open_column(corpus, "captions")
    assert [captions.value("train", sample) for sample in range(60)] == [f"text {n // 2}" for n in range(60)]
