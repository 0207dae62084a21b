"""The second run: changed sources and settings, lost and damaged files, and pictures that kill their process."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.corpora import CorpusSpec, FilterSpec, SourceSpec, SplitSpec
from pipelines.core.errors import UsageError
from pipelines.corpus import shards
from pipelines.curation.curate import curate, replay
from pipelines.curation.measure import look

pytestmark = pytest.mark.slow
with_ray = pytest.mark.usefixtures("ray_session")
in_process = pytest.mark.usefixtures("without_ray")


def bmp(seed: int) -> bytes:
    """Every picture has the same length, so that a changed tar keeps its offsets."""
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return cv2.imencode(".bmp", pixels)[1].tobytes()


def spec(*sources: SourceSpec, **changes: Any) -> CorpusSpec:
    settings: dict[str, Any] = {"name": "again", "filters": FilterSpec(min_side_px=16), "shard_mib": 0.02}
    return CorpusSpec(sources=list(sources), **{**settings, **changes})


def folder_of(path: Path, count: int = 6) -> SourceSpec:
    path.mkdir(exist_ok=True)
    for number in range(count):
        (path / f"p{number:04d}.bmp").write_bytes(bmp(number))
    return SourceSpec(kind="folder", path=str(path))


def tar_of(path: Path, seeds: list[int], caption: str = "") -> None:
    with tarfile.open(path, "w") as target:
        for place, seed in enumerate(seeds):
            members = {"bmp": bmp(seed), **({"txt": caption.encode()} if caption else {})}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"m{place}.{suffix}")
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in shards.open_corpus(out).rows()}


def codes(out: Path) -> dict[str, str]:
    return {row["key"]: row["code"] for row in map(json.loads, (out / "quarantine.jsonl").open())}


@in_process
def test_a_replaced_tar_is_read_anew_and_so_are_changed_settings(tmp_path: Path) -> None:
    tar, out = tmp_path / "a.tar", tmp_path / "out"
    tar_of(tar, [1, 2, 3])
    source = SourceSpec(kind="tar", path=str(tar), licence="CC0-1.0")
    first = curate(spec(source), out)
    tar_of(tar, [4, 5, 6])
    os.utime(tar, ns=(1, 1))
    second = curate(spec(source), out)
    assert (second.reused, second.accepted) == (0, 3)
    assert second.digest != first.digest
    assert second.digest == curate(spec(source), tmp_path / "fresh").digest
    curate(spec(SourceSpec(kind="tar", path=str(tar), licence="CC-BY-4.0")), out)
    assert {row["licence"] for row in rows(out).values()} == {"CC-BY-4.0"}
    table = pa.table({"image": [bmp(7)], "text": ["one"], "alt": ["two"]})
    pq.write_table(table, tmp_path / "t.parquet")
    for column in ("text", "alt"):
        source = SourceSpec(kind="parquet", path=str(tmp_path / "t.parquet"), caption_column=column)
        curate(spec(source), tmp_path / "table")
        assert [row["caption"] for row in rows(tmp_path / "table").values()] == [table.column(column)[0].as_py()]


@in_process
def test_an_edited_caption_is_read_again(tmp_path: Path) -> None:
    source, out = folder_of(tmp_path / "in"), tmp_path / "out"
    for text in ("first words", "and other ones"):
        (tmp_path / "in" / "p0001.txt").write_text(text)
        curate(spec(source), out)
        assert rows(out)["p0001"]["caption"] == text


def lose_decided(out: Path) -> None:
    for path in (out / "work" / "decided").glob("*"):
        path.unlink()


def cut_decided(out: Path) -> None:
    for path in (out / "work" / "decided").glob("*"):
        path.write_bytes(path.read_bytes()[:300])


def lose_quarantine(out: Path) -> None:
    (out / "work" / "quarantine.jsonl").unlink()


def cut_pieces(out: Path) -> None:
    for path in (out / "work" / "pieces").glob("*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_selection(out: Path) -> None:
    (out / "work" / "selected.json").write_text("7")


def lose_work(out: Path) -> None:
    import shutil

    shutil.rmtree(out / "work")


@pytest.mark.parametrize("damage", [lose_decided, cut_decided, lose_quarantine, cut_pieces, spoil_selection, lose_work])
@in_process
def test_damaged_work_files_are_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    out = tmp_path / "out"
    corpus_spec = spec(folder_of(tmp_path / "in"), split=SplitSpec(held_out_fraction=0.3))
    first = curate(corpus_spec, out)
    for shard in list(out.glob("train/*.tar"))[:1]:
        shard.unlink()
    damage(out)
    assert curate(corpus_spec, out).digest == first.digest
    assert shards.verify(shards.open_corpus(out)) == []


@in_process
def test_a_curation_of_another_spec_in_between_changes_nothing(tmp_path: Path) -> None:
    out, source = tmp_path / "out", folder_of(tmp_path / "in", 12)
    first = curate(spec(source, split=SplitSpec(held_out_fraction=0.3)), out)
    other = curate(spec(source, split=SplitSpec(held_out_fraction=0.9), shard_mib=0.01), out)
    assert other.digest != first.digest
    assert curate(spec(source, split=SplitSpec(held_out_fraction=0.3)), out).digest == first.digest
    with pytest.raises(UsageError, match='holds the corpus "again"'):
        curate(spec(source, name="another"), out)


@in_process
def test_a_file_that_changed_after_measuring_is_measured_again_by_the_next_run(tmp_path: Path) -> None:
    source, out = folder_of(tmp_path / "in"), tmp_path / "out"
    curate(spec(source), out)
    victim = tmp_path / "in" / "p0002.bmp"
    times = victim.stat()
    victim.write_bytes(bmp(99))
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size and time: listing cannot see the change
    for shard in out.glob("train/*.tar"):
        shard.unlink()
    with pytest.raises(Exception, match="changed while it was curated"):
        curate(spec(source), out)
    assert curate(spec(source), out).accepted == 6
    assert shards.verify(shards.open_corpus(out)) == []


def murderous(data: bytes, filters: Any, key: str) -> dict[str, Any]:
    if key in ("p0000", "p0001", "p0003", "p0004", "p0006"):
        os._exit(1)
    return look(data, filters, key)


@pytest.mark.full  # every death costs Ray some seconds
@with_ray
def test_many_lethal_pictures_in_one_part_do_not_affect_others(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = curate(spec(folder_of(tmp_path / "in", 8), max_bad_fraction=1.0), out, look_at=murderous)
    assert set(rows(out)) == {"p0002", "p0005", "p0007"}
    assert dict(result.reasons) == {"crashed": 5}
    assert replay(out).accepted == 8


@in_process
def test_names_links_and_hostile_members_do_not_affect_others(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    (tmp_path / "in" / os.fsdecode(b"x\xff.bmp")).write_bytes(bmp(20))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "in" / "p0000.txt")
    tar_of(tmp_path / "a.tar", [30, 31])
    with tarfile.open(tmp_path / "a.tar", "a") as target:
        deep, licence = b"[" * 200_000, json.dumps({"licence": "x\ud800", "caption": "fine"}).encode()
        for name, data in {
            "n.bmp": bmp(32),
            "n.json": deep,
            "o.bmp": bmp(33),
            "o.json": licence,
            "._o.bmp": b"x",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))
    out = tmp_path / "out"
    result = curate(spec(source, SourceSpec(kind="tar", path=str(tmp_path / "a.tar"))), out)
    assert dict(result.reasons) == {"linked_folder": 1, "unreadable": 1, "bad_json": 1}  # p0000.txt and n.json
    assert result.accepted == 9
    assert rows(out)["o"]["caption"] == "fine"


@in_process
def test_an_output_inside_a_tar_source_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tar_of(tmp_path / "in" / "a.tar", [1, 2, 3])
    source, out = SourceSpec(kind="tar", path=str(tmp_path / "in")), tmp_path / "in" / "out"
    assert [curate(spec(source), out).accepted for _ in range(3)] == [3, 3, 3]


@in_process
def test_a_held_out_picture_is_not_trained_on_under_another_name(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in")
    (tmp_path / "in" / "a-copy.bmp").write_bytes(bmp(3))  # listed before p0003
    curate(spec(source, split=SplitSpec(held_out=["p0003"])), tmp_path / "out")
    assert {key: row["split"] for key, row in rows(tmp_path / "out").items()}["a-copy"] == "held_out"
    assert codes(tmp_path / "out") == {"p0003": "duplicate"}
