"""Writing the rows of a part: memory does not depend on the tar, and a death costs seconds of work."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from components.corpora import CorpusSpec, FilterSpec, SourceSpec
from components.fingerprints import WORDS
from components.quality import SCORES
from components.types import SampleError
from pipelines.curation import journal, measure
from pipelines.curation.sources import Part, list_parts, tars


class Death(BaseException):
    """Stands for the end of a process: no handler catches it."""


def jpeg(seed: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as target:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))


def spec_and_part(folder: Path, **filters: Any) -> tuple[CorpusSpec, Part]:
    """A spec of the tars of a folder, and its one part."""
    spec = CorpusSpec(
        name="x",
        sources=[SourceSpec(kind="tar", path=str(folder / "*.tar"))],
        filters=FilterSpec(min_side_px=16, **filters),
    )
    (part,) = list_parts(spec, folder / "out").parts
    return spec, part


def quick(data: bytes, filters: FilterSpec, key: str) -> dict[str, Any]:
    """Fixed measures, without decoding."""
    return {
        "ext": "jpg",
        "width": 24,
        "height": 24,
        "scores": dict.fromkeys(SCORES, 50.0),
        "print": bytes(8 * WORDS),
    }


class Looker:
    """Notes the keys; dies at one of them, and refuses another."""

    def __init__(self, dies_at: str = "", refuses: str = "") -> None:
        self.keys: list[str] = []
        self.dies_at, self.refuses = dies_at, refuses

    def __call__(self, data: bytes, filters: FilterSpec, key: str) -> dict[str, Any]:
        self.keys.append(key)
        if key == self.dies_at:
            raise Death
        if key == self.refuses:
            raise SampleError("corrupt", "by the test", key)
        return quick(data, filters, key)


@pytest.fixture
def thirty(tmp_path: Path) -> tuple[CorpusSpec, Part]:
    write_tar(tmp_path / "a.tar", [(f"p{n:02d}.jpg", jpeg(n)) for n in range(30)])
    return spec_and_part(tmp_path)


def rows_of(out: Path, part: Part) -> list[dict[str, Any]]:
    return list(pq.read_table(measure.measured_path(out, part)).to_pylist())


def test_a_death_costs_the_last_rows_only(
    thirty: tuple[CorpusSpec, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, part = thirty
    whole = measure.measure_part(part, spec, tmp_path / "whole", look_at=quick)
    monkeypatch.setattr(journal, "JOURNAL_ROWS", 4)
    out = tmp_path / "out"
    first, second, third = Looker("p10"), Looker("p20"), Looker()
    for looker in (first, second):
        with pytest.raises(Death):
            measure.measure_part(part, spec, out, look_at=looker, run="1")
        assert not measure.measured_path(out, part).exists()
        assert not list((out / "work").rglob("*.tmp-*"))
    last = sorted((out / "work" / "partial").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-40])  # a kill in the middle of an append: its batch is measured again
    summary = measure.measure_part(part, spec, out, look_at=third, run="1")
    assert first.keys == [f"p{n:02d}" for n in range(11)]
    assert second.keys == [f"p{n:02d}" for n in range(8, 21)]  # two batches of four rows were stored
    assert third.keys == [f"p{n:02d}" for n in range(16, 30)]  # and of three more batches all but the incomplete one
    assert summary["fresh"] == 14
    assert {name: summary[name] for name in whole if name != "fresh"} == {n: whole[n] for n in whole if n != "fresh"}
    assert rows_of(out, part) == rows_of(tmp_path / "whole", part)
    assert not list((out / "work" / "partial").iterdir())


def test_only_another_run_measures_refused_rows_again(
    thirty: tuple[CorpusSpec, Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, part = thirty
    monkeypatch.setattr(journal, "JOURNAL_ROWS", 1)
    for run, expected in (("1", ["p05", "p06"]), ("2", ["p02", "p05", "p06"])):
        out = tmp_path / run
        with pytest.raises(Death):
            measure.measure_part(part, spec, out, ["corrupt"], Looker("p05", refuses="p02"), run="1")
        looker = Looker("p07")
        with pytest.raises(Death):
            measure.measure_part(part, spec, out, ["corrupt"], looker, run=run)
        assert looker.keys == [*expected, "p07"]
    other = Looker()
    other_spec, _ = spec_and_part(tmp_path, max_megapixels=1.0)  # with other rules no earlier row counts
    measure.measure_part(part, other_spec, tmp_path / "2", look_at=other, run="2")
    assert len(other.keys) == 30


def test_a_part_that_cannot_be_read_to_its_end_keeps_its_rows(thirty: tuple[CorpusSpec, Part], tmp_path: Path) -> None:
    spec, part = thirty
    out, cursors = tmp_path / "out", tmp_path / "out" / "work" / "cursors"
    cursors.mkdir(parents=True)
    (cursors / f"{part.name}.json").write_text(json.dumps({"": [1, 0]}))
    with pytest.raises(Death):  # after a death over the part every row is stored at once
        measure.measure_part(part, spec, out, look_at=Looker("p10"), run="1")
    (cursors / f"{part.name}.json").write_text(json.dumps({"": [3, 0]}))
    summary = measure.measure_part(part, spec, out, look_at=Looker(), run="1")
    assert (summary["rows"], summary["codes"]) == (11, {"crashed": 1})
    assert [row["key"] for row in rows_of(out, part)] == [*(f"p{n:02d}" for n in range(10)), part.name]
    # The next run tries again. If it dies too, no earlier row is lost.
    (cursors / f"{part.name}.json").write_text(json.dumps({"": [3, 0]}))
    again = measure.measure_part(part, spec, out, ["crashed"], Looker(), run="2")
    assert (again["rows"], again["codes"], again["fresh"]) == (11, {"crashed": 1}, 1)
    last = Looker()
    assert measure.measure_part(part, spec, out, ["crashed"], last, run="3")["codes"] == {}
    assert last.keys == [f"p{n:02d}" for n in range(10, 30)]


def peak_of(folder: Path, count: int) -> int:
    """Largest memory of Python objects while a tar of `count` members is measured, bytes."""
    folder.mkdir()
    data = jpeg(0)
    write_tar(folder / "a.tar", [(f"p{n:06d}.jpg", data) for n in range(count)])
    spec, part = spec_and_part(folder)
    tracemalloc.start()
    try:
        assert measure.measure_part(part, spec, folder / "out", look_at=quick)["rows"] == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_a_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row object takes about 2.5 kB; only the reader's set of keys grows."""
    monkeypatch.setattr(journal, "ROWS", 128)
    monkeypatch.setattr(journal, "JOURNAL_ROWS", 64)
    peak_of(tmp_path / "warm", 100)
    # other threads of the process (Ray's, in a run of all tests) allocate too: the least of several is the tar's own
    large, small = (min(peak_of(tmp_path / f"{n}-{turn}", n) for turn in range(8)) for n in (1300, 300))
    assert large - small < 300 * 1000


@pytest.mark.full
def test_a_hundred_thousand_members(tmp_path: Path) -> None:
    """Objects of 2,048 rows, and 100,000 keys."""
    assert peak_of(tmp_path / "a", 100_000) < 40 << 20


def test_a_sample_of_many_large_pictures_and_a_member_of_two_gibibytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """34."""
    monkeypatch.setattr(tars, "HELD_BYTES", 200_000)
    large = [jpeg(n, 220) for n in range(8)]
    assert all(50_000 < len(data) < 100_000 for data in large)
    members = [("a.txt", b"a caption"), *((f"a.v{n}.jpg", data) for n, data in enumerate(large))]
    write_tar(tmp_path / "a.tar", members)
    with open(tmp_path / "a.tar", "r+b") as target:  # a sparse file
        with tarfile.open(tmp_path / "a.tar") as archive:
            end = archive.getmembers()[-1].offset_data + -(-archive.getmembers()[-1].size // 512) * 512
        huge = tarfile.TarInfo("b.jpg")
        huge.size = 2 << 30
        target.seek(end)
        target.write(huge.tobuf())
        target.seek(end + 512 + huge.size)
        last = tarfile.TarInfo("c.jpg")
        last.size = len(large[0])
        target.write(last.tobuf() + large[0] + bytes(-len(large[0]) % 512) + bytes(1024))
    spec, part = spec_and_part(tmp_path)
    tracemalloc.start()
    measure.measure_part(part, spec, tmp_path / "out", look_at=quick)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows = {row["source"].partition("/")[2]: row for row in rows_of(tmp_path / "out", part)}
    assert {name: row["code"] for name, row in rows.items()} == {
        **{f"a.v{n}.jpg": "" for n in range(8)},
        "b": "too_large",
        "c.jpg": "",
    }
    assert [rows[f"a.v{n}.jpg"]["sha256"] for n in range(8)] == [hashlib.sha256(data).hexdigest() for data in large]
    assert {row["caption"] for name, row in rows.items() if name.startswith("a")} == {"a caption"}
    assert peak < 16 << 20


def test_members_beyond_the_memory_limit_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "HELD_BYTES", 1000)
    write_tar(tmp_path / "a.tar", [("a.jpg", jpeg(0)), ("a.json", bytes(2000)), ("b.jpg", jpeg(1))])
    items = list(tars.iter_tar(tmp_path / "a.tar"))
    assert [(item.key, getattr(item, "code", "")) for item in items] == [("a", "too_large"), ("b", "")]
