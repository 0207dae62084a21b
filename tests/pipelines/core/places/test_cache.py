"""The cache of a machine: its cap, its order of removal, digests, killed fetches; a corpus that is read through it."""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from pathlib import Path

import pytest

from components.images import encode_png
from components.synthetic import dead_leaves
from pipelines.core.errors import Failure, UsageError
from pipelines.core.places.cache import NodeCache
from pipelines.core.places.place import Place, place_of
from pipelines.corpus.shards import Corpus, open_corpus, read_sample, verify, write_corpus
from pipelines.corpus.stored import corpus_folder, stored_shard


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    place = place_of(f"memory://{uuid.uuid4().hex[:8]}/corpus")
    assert isinstance(place, Place)
    return place


def put_object(place: Place, number: int, size: int = 100) -> tuple[Place, str, int]:
    data = bytes([number]) * size
    (place / str(number)).write_bytes(data)
    return place / str(number), hashlib.sha256(data).hexdigest(), size


def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    fill = Place.fill
    monkeypatch.setattr(Place, "fill", lambda self, file, size: (names.append(self.name), fill(self, file, size))[1])
    return names


def test_an_object_is_fetched_once(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched, entry = downloads(monkeypatch), put_object(place, 1)
    cache = NodeCache(tmp_path / "cache", 1000)
    assert [cache.path_of(*entry).read_bytes() for _ in range(3)] == [b"\x01" * 100] * 3
    threads = [threading.Thread(target=cache.path_of, args=put_object(place, 2)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["1", "2"]


def test_the_least_used_go_first_and_the_cap_holds(place: Place, tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 300)
    entries = {number: put_object(place, number) for number in range(5)}
    for used, number in enumerate((0, 1, 2)):
        os.utime(cache.path_of(*entries[number]), (used + 1, used + 1))
    os.utime(cache.path_of(*entries[0]), (10, 10))
    kept = cache.path_of(*entries[1]).open("rb")
    os.utime(cache.path_of(*entries[1]), (5, 5))
    for number in (3, 4):  # 2 has waited longest, then 1
        os.utime(cache.path_of(*entries[number]), (20 + number, 20 + number))
        assert cache.size() <= 300
    names = {path.name for path in (tmp_path / "cache").iterdir() if len(path.name) == 64}
    assert names == {entries[number][1] for number in (0, 3, 4)}
    assert kept.read() == b"\x01" * 100  # an open file stays readable
    kept.close()
    with pytest.raises(Failure, match="does not fit"):
        cache.path_of(*put_object(place, 9, 301))


def test_wrong_bytes_and_killed_fetches_leave_no_file(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = NodeCache(tmp_path / "cache", 1000)
    where, _, size = put_object(place, 1)
    with pytest.raises(Failure, match="does not have the sha256"):
        cache.path_of(where, "0" * 64, size)
    draft = tmp_path / "cache" / f".{'1' * 64}.tmp-99"
    draft.write_bytes(b"half")
    cache.path_of(*put_object(place, 3))
    path = cache.path_of(*put_object(place, 2, 1000))  # needs all of the room
    assert not draft.exists()
    assert {p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")} == {path.name, "room"}


# --- a corpus ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    samples = [(f"k{index}", "png", encode_png(dead_leaves(32, 1, index)), {}) for index in range(7)]
    return write_corpus(tmp_path / "corpus", "test", {"train": samples[:5], "held_out": samples[5:]}, 2)


def send(corpus: Corpus, place: Place) -> None:
    for path in sorted(corpus.folder.rglob("*")):
        if path.is_file():
            (place / path.relative_to(corpus.folder).as_posix()).write_bytes(path.read_bytes())


def test_a_corpus_in_a_store_is_read_as_one_on_a_disk(
    place: Place, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(corpus, place)
    fetched = downloads(monkeypatch)
    folder = corpus_folder(place)
    assert not [name for name in fetched if name.endswith(".tar")]
    stored = open_corpus(folder)
    assert stored.digest == corpus.digest
    for split in ("train", "held_out"):
        for number in range(len(corpus.split(split))):
            assert read_sample(stored, split, number) == read_sample(corpus, split, number)
    shards = [shard["name"] for split in corpus.splits.values() for shard in split.shards]
    assert sorted(name for name in fetched if name.endswith(".tar")) == sorted(shards)
    before = len(fetched)
    assert corpus_folder(place) == folder
    assert read_sample(open_corpus(folder), "train", 0) == read_sample(corpus, "train", 0)
    assert len(fetched) == before


def test_a_corpus_that_changes_in_its_place_gets_a_folder_of_its_own(place: Place, corpus: Corpus) -> None:
    send(corpus, place)
    first = corpus_folder(place)
    samples = [("other", "png", encode_png(dead_leaves(32, 1, 99)), {})]
    send(write_corpus(corpus.folder.parent / "next", "test", {"train": samples, "held_out": []}), place)
    second = corpus_folder(place)
    assert first != second and len(open_corpus(second).split("train")) == 1


def test_a_corpus_on_a_disk_stays_as_it_is(corpus: Corpus) -> None:
    assert corpus_folder(corpus.folder) == corpus.folder
    assert stored_shard(corpus.folder / "train" / "none.tar") is None
    assert verify(corpus) == []


def test_a_place_without_a_corpus_is_one_sentence(place: Place) -> None:
    with pytest.raises(UsageError, match=r"is not a curated corpus: it holds no index\.json"):
        corpus_folder(place)
