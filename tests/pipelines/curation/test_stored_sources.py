"""Folders of a store as sources: pages, order, captions, tables, braces, and how often an object is fetched."""

from __future__ import annotations

import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import cv2
import listed_store
import numpy as np
import pytest

from components.corpora import CorpusSpec, FilterSpec, SourceSpec, SplitSpec
from components.types import SampleError
from pipelines.core.errors import UsageError
from pipelines.core.places import place as places
from pipelines.core.places.backends import Stat
from pipelines.core.places.patience import StoreUnavailable
from pipelines.curation import measure
from pipelines.curation.sources import Bytes, ComingParts, Part, candidates, check_sources, list_parts, remove_spool
from pipelines.curation.sources.ahead import map_ahead
from pipelines.curation.sources.files import SkippedFiles, identities
from pipelines.curation.sources.parts import iter_parts
from pipelines.curation.sources.patterns import expand

SOURCE = SourceSpec(kind="folder", path="s3://bucket/photos")
SPEC = CorpusSpec(name="t", sources=[SOURCE], filters=FilterSpec(min_side_px=16))


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def use(monkeypatch: pytest.MonkeyPatch, store: object) -> None:
    monkeypatch.setattr(places, "shared_store", store)


def many(count: int) -> dict[str, bytes]:
    return {f"bucket/photos/{number % 7}/{number:05d}.jpg": b"x" * (number % 5 + 1) for number in range(count)}


FILES = {
    "a.png": png(0),
    "a.txt": b"of a",
    "b.png": png(1),
    "b.png.caption": b"of b",
    "c.png": png(2),
    "c.caption": b"not this",
    "c.TXT": b"of c",
    "d.png": png(3),
    "e.v1.png": png(4),
    "e.v1.txt": b"of e.v1",
    "lonely.txt": b"of none",
    "CREDITS.csv": b"file,licence,credit\nd.png,CC0-1.0,somebody\nsub/z.png,CC-BY-4.0,else\n",
    "sub/metadata.jsonl": b'{"file_name": "z.png", "text": "of z"}\n{"file_name": "gone.png", "text": "?"}\n',
    "sub/a/x.png": png(5),
    "sub/a0.png": png(6),
    "sub/z.png": png(7),
    "zz.png": png(8),
    "zz.txt": b"\xff\xfe\xfd\x00\x01",
}


def facts(spec: CorpusSpec, out: Path) -> tuple[list[tuple[str, ...]], list[str]]:
    listing = list_parts(spec, out)
    items = [item for part in listing.parts for item in candidates(part, spec, out, lambda _: True)]
    rows = [(c.key, c.source, c.caption, c.licence, c.credit, c.problem.code if c.problem else "") for c in items]
    return rows, list(listing.sentences)


@pytest.mark.parametrize("page_size", [1, 2, 1000])
def test_captions_and_tables_of_a_store_are_read_as_beside_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page_size: int
) -> None:
    for name, data in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    local, sentences = facts(replace(SPEC, sources=[replace(SOURCE, path=str(tmp_path / "in"))]), tmp_path / "local")
    assert {row[0]: row[2] for row in local}.items() >= {
        "a": "of a",
        "b": "of b",
        "c": "of c",
        "sub__z": "of z",
    }.items()
    use(monkeypatch, listed_store.ListedStore({f"bucket/photos/{n}": d for n, d in FILES.items()}, page_size))
    stored, stored_sentences = facts(SPEC, tmp_path / "stored")
    assert sorted(stored) == sorted(local)  # keys of a store are in the order of whole names, folders are not first
    assert sorted(stored_sentences) == sorted(sentences)
    pattern, _ = facts(replace(SPEC, sources=[replace(SOURCE, path="s3://bucket/photos/**/z*.png")]), tmp_path / "p")
    assert next((row[0], row[2]) for row in pattern) == ("sub__z", "of z")


@pytest.mark.parametrize(("page_size", "is_reversed"), [(1, False), (64, False), (5000, False), (100, True)])
def test_the_parts_are_the_same_whatever_the_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page_size: int, is_reversed: bool
) -> None:
    def parts(*arguments: object) -> list[tuple[str, str]]:
        use(monkeypatch, listed_store.ListedStore(many(600), *arguments))
        return [(part.name, part.digest) for part in list_parts(SPEC, tmp_path / "out").parts]

    assert parts(page_size, is_reversed) == parts(1000)
    assert len(parts(1000)) > 4
    use(monkeypatch, listed_store.ListedStore(many(600), page_size, is_reversed))
    keys = [identity[0] for identity in identities(SPEC)]
    assert len(keys) == 600 and keys == sorted(keys)


def test_parts_come_while_the_bucket_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    goes_on, saved = threading.Event(), []

    def wait_at(number: int) -> None:
        if number == 75:  # of 86 pages: 64 parts are about 4,500 objects
            assert goes_on.wait(10)

    store = listed_store.ListedStore(many(7000), 100, on_page=wait_at)
    use(monkeypatch, store)
    coming = ComingParts(SPEC, tmp_path, saved.append)
    first = coming.take()
    assert len(first) >= 64 and coming.listing is None and store.pages <= 76
    goes_on.set()
    rest = [part for parts in iter(coming.take, []) for part in parts]
    coming.close()
    assert coming.listing is not None and saved == [coming.listing]
    assert [*first, *rest] == coming.listing.parts == list_parts(SPEC, tmp_path).parts


def test_a_wrong_held_out_name_ends_the_listing_before_any_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, listed_store.ListedStore(many(700)))
    coming = ComingParts(replace(SPEC, split=SplitSpec(held_out=["nobody"])), tmp_path, lambda _: None)
    with pytest.raises(UsageError, match='held-out picture "nobody"'):
        coming.take()


class Names:
    """A listing of any length that holds no names in memory."""

    def __init__(self, count: int) -> None:
        self.count, self.listed = count, 0

    def __call__(self, address: str, storage: object) -> Names:
        return self

    def page(self, path: str, token: str, prefix: str = "") -> tuple[list[Stat], str]:
        if prefix:
            return [], ""
        start = int(token or 0)
        self.listed = min(self.count, start + 1000)
        names = (f"bucket/photos/{number // 5000:06d}/{number:09d}.jpg" for number in range(start, self.listed))
        return [Stat(name, 10**5, f'"{name[-32:]}"') for name in names], str(self.listed) * (self.listed < self.count)


def test_a_listing_leaves_little_on_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = Names(3000)
    use(monkeypatch, store)
    parts: list[Part] = []
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for part in iter_parts(SPEC, tmp_path, SkippedFiles()):
        assert parts or store.listed == 1000  # the first part comes with the first page
        parts.append(part)
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (after - before) / store.count < 40


MILLION = """
import resource, sys
from pathlib import Path
from pipelines.core.places import place as places
from test_stored_sources import SPEC, Names
from pipelines.curation.sources.files import SkippedFiles
from pipelines.curation.sources.parts import iter_parts
store = Names(int(sys.argv[2]))
places.open_store = store
list(iter_parts(SPEC, Path(sys.argv[1]) / "few", SkippedFiles())) if store.count < 10_000 else None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parts = iter_parts(SPEC, Path(sys.argv[1]) / "out", SkippedFiles())
kept = [next(parts)]
first = store.listed
kept += parts
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(first, growth * 1024 / store.count, len(kept))
"""


@pytest.mark.full
def test_a_million_objects_take_under_40_bytes_each(tmp_path: Path) -> None:
    here = Path(__file__).parent
    path = ":".join(map(str, (here.parents[2], here, here.parents[1] / "helpers")))
    command = [sys.executable, "-c", MILLION, str(tmp_path), "1000000"]
    job = subprocess.run(command, env={"PYTHONPATH": path, "PATH": ""}, capture_output=True, text=True, check=True)
    first, growth, parts = map(float, job.stdout.split())
    assert first == 1000 and growth < 40 and parts > 10_000


def measured(spec: CorpusSpec, out: Path) -> list[dict[str, object]]:
    import pyarrow.parquet as pq

    rows = []
    for part in list_parts(spec, out).parts:
        measure.measure_part(part, spec, out)
        rows += pq.read_table(measure.measured_path(out, part)).to_pylist()
    return rows


@pytest.mark.parametrize(("spool_gib", "expected"), [(1.0, 1), (0.0, 2)])
def test_a_picture_is_fetched_once_if_the_spool_has_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spool_gib: float, expected: int
) -> None:
    pictures = {f"bucket/photos/{number}.png": png(number) for number in range(5)}
    store = listed_store.ListedStore(pictures)
    use(monkeypatch, store)
    spec = replace(SPEC, spool_gib=spool_gib)
    rows = measured(spec, tmp_path)
    reader = Bytes(spec, tmp_path)
    assert [reader.read(row["at"]) for row in rows] == list(pictures.values())
    assert store.reads == dict.fromkeys(pictures, expected)
    assert measured(spec, tmp_path) == rows  # a second run keeps the places of the bytes
    remove_spool(tmp_path)
    assert [reader.read(row["at"]) for row in rows] == list(pictures.values())  # a machine without the spool fetches


def test_a_store_that_is_away_ends_the_part_and_is_no_fault_of_a_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = listed_store.ListedStore({"bucket/photos/0.png": png(0)})
    use(monkeypatch, store)
    (part,) = list_parts(SPEC, tmp_path).parts
    monkeypatch.setattr("pipelines.core.places.patience.PATIENCE_S", 0.0)
    monkeypatch.setattr(store, "read", lambda *_: (_ for _ in ()).throw(ConnectionError("reset")))
    with pytest.raises(StoreUnavailable, match="the same command continues"):
        measure.measure_part(part, SPEC, tmp_path)
    assert not measure.measured_path(tmp_path, part).exists()


def test_a_refused_key_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(number: int) -> None:
        raise PermissionError("InvalidAccessKeyId")

    use(monkeypatch, listed_store.ListedStore({}, on_page=refuse))
    with pytest.raises(UsageError, match=r"^s3://bucket/photos: the store refuses access \(InvalidAccessKeyId\)\.$"):
        check_sources(SPEC, tmp_path)


def test_an_unreachable_endpoint_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(number: int) -> None:
        raise ConnectionError("nobody listens")

    use(monkeypatch, listed_store.ListedStore({}, on_page=fail))
    monkeypatch.setattr("pipelines.core.places.patience.FIRST_PAUSE_S", 10.0)  # over the patience of a check
    with pytest.raises(StoreUnavailable, match=r"the store has failed for 0 s \(nobody listens\)") as caught:
        check_sources(SPEC, tmp_path)
    assert "\n" not in str(caught.value)


def test_one_object_may_be_a_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    objects = {"bucket/photos/a.png": png(0), "bucket/photos/a.txt": b"of a", "bucket/photos/a.png.old": b"x"}
    use(monkeypatch, listed_store.ListedStore(objects))
    rows, _ = facts(replace(SPEC, sources=[replace(SOURCE, path="s3://bucket/photos/a.png")]), tmp_path)
    assert [(row[0], row[2]) for row in rows] == [("a", "of a")]


def test_work_ahead_keeps_the_order_and_its_bounds() -> None:
    running, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)  # two items must be in work at the same time

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        if number < 2:
            both.wait(30)
        with lock:
            running -= 1
        if number == 5:
            raise SampleError("unreadable", "five")
        return number * number

    taken: list[int] = []
    items = (taken.append(number) or number for number in range(40))
    answers = map_ahead(work, items, 2)
    assert next(answers)[1].result() == 0
    assert len(taken) <= 5  # 2 * threads, and one that waits
    rest = [(item, type(future.exception()) if future.exception() else future.result()) for item, future in answers]
    assert rest == [(number, SampleError if number == 5 else number**2) for number in range(1, 40)]
    assert most == 2
    large = map_ahead(lambda item: item, (taken.append(-1) or 1 for _ in range(9)), 4, lambda _: 1 << 40)
    taken.clear()
    assert next(large)[0] == 1
    assert len(taken) == 2  # one in work; the next one waits for its turn


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("x-{000..002}.tar", ["x-000.tar", "x-001.tar", "x-002.tar"]),
        ("x-{8..10}", ["x-8", "x-9", "x-10"]),
        ("{2..0}{a,}", ["2a", "2", "1a", "1", "0a", "0"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{a,b{1,2}}/*.tar", ["a/*.tar", "b1/*.tar", "b2/*.tar"]),
        ("plain {x}", ["plain {x}"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert list(expand(pattern)) == expected


def test_braces_are_expanded_lazily() -> None:
    assert next(expand("x-{000000000..999999999}.tar")) == "x-000000000.tar"


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("x-{00..09.tar", r"^x-\{00..09.tar: the brace .* is not closed"),
        ("{a,{1..b}}", "is no range"),
        ("{0..9..0}", "step"),
    ],
)
def test_a_wrong_brace_is_refused_with_its_pattern(pattern: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        list(expand(pattern))


def test_braces_name_local_files_in_their_order(tmp_path: Path) -> None:
    for name in ("a-1.tar", "a-0.tar", "b-0.tar"):
        (tmp_path / name).write_bytes(b"x" * 1024)
    source = SourceSpec(kind="tar", path=f"{tmp_path}/{{b,a}}-{{0..0}}.tar")
    parts = list_parts(CorpusSpec(name="t", sources=[source]), tmp_path / "out").parts
    assert [part.where["label"] for part in parts] == ["b-0.tar", "a-0.tar"]
    missing = replace(source, path=f"{tmp_path}/a-{{0..2}}.tar")
    with pytest.raises(UsageError, match=r"a-\{0..2\}.tar names a file that does not exist: .*a-2.tar"):
        list_parts(CorpusSpec(name="t", sources=[missing]), tmp_path / "out")
