"""Shards: other readers read our shards, and our reader reads broken tars of others without an exception."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from components.restoring import file_key
from components.types import SampleError
from components.writing import replace_file
from pipelines.core.errors import UsageError
from pipelines.core.rows import read_lines
from pipelines.corpus import shards
from pipelines.corpus.shards import Sample
from pipelines.curation.sources import tars
from pipelines.curation.sources.tars import TarSample

LONG = "é" * 50 + "x" * 60  # 160 bytes: needs a PAX header twice over


def jpeg(seed: int, side: int = 24) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    target = io.BytesIO()
    Pillow.fromarray(pixels).save(target, "JPEG")
    return target.getvalue()


@pytest.fixture
def pictures() -> dict[str, bytes]:
    return {"plain": jpeg(0), "写真_é": jpeg(1), LONG: jpeg(2), "last": jpeg(3, side=40)}


def write(folder: Path, pictures: dict[str, bytes]) -> dict:
    samples = [Sample(key=key, ext="jpg", info={"key": key, "note": "ü"}) for key in pictures]
    return shards.write_shard(folder, "train-00000", samples, lambda sample: pictures[sample.key])


def tar(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as target:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            target.addfile(info, io.BytesIO(data))
    return path


def read(path: Path, **options: int) -> tuple[dict[str, dict[str, bytes]], list[tuple[str, str]]]:
    """(members by key, [(key, code)]) of a tar."""
    good: dict[str, dict[str, bytes]] = {}
    bad = []
    for item in tars.iter_tar(path, **options):
        if isinstance(item, TarSample):
            assert item.key not in good
            good[item.key] = dict(item.members)
        else:
            bad.append((item.key, item.code))
    return good, bad


def test_equal_input_gives_equal_files_named_by_content(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    first, second = write(tmp_path / "a", pictures), write(tmp_path / "b", pictures)
    assert first == second
    data = (tmp_path / "a" / first["name"]).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert (first["sha256"], first["bytes"]) == (digest, len(data))
    assert first["name"] == f"train-00000-{digest[:8]}.tar"
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first["name"]]  # no temporary file stays
    assert (tmp_path / "b" / first["name"]).read_bytes() == data


def test_index_offsets_are_ranged_reads(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    entry = write(tmp_path, pictures)
    data = (tmp_path / entry["name"]).read_bytes()
    contents = {row["key"]: data[row["offset"] : row["offset"] + row["size"]] for row in entry["samples"]}
    assert contents == pictures


def test_a_reader_that_fails_leaves_no_shard(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    def fail(sample: Sample) -> bytes:
        if sample.key == "last":
            raise OSError("gone")
        return pictures[sample.key]

    with pytest.raises(OSError, match="gone"):
        shards.write_shard(tmp_path, "train-00000", [Sample(key=k, ext="jpg", info={}) for k in pictures], fail)
    assert list(tmp_path.iterdir()) == []


def test_python_tarfile_and_webdataset_read_member_for_member(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    import webdataset

    path = tmp_path / write(tmp_path, pictures)["name"]
    with tarfile.open(path) as source:
        members = source.getmembers()
        assert [m.name for m in members] == [f"{key}.{ext}" for key in pictures for ext in ("jpg", "json")]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    rows = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [row["__key__"] for row in rows] == list(pictures)
    assert [row["jpg"] for row in rows] == list(pictures.values())
    assert [json.loads(row["json"]) for row in rows] == [{"key": key, "note": "ü"} for key in pictures]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_ray_read_webdataset_reads_member_for_member(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    import ray

    path = tmp_path / write(tmp_path, pictures)["name"]
    rows = ray.data.read_webdataset(str(path), decoder=None).take_all()
    assert {row["__key__"]: row["jpg"] for row in rows} == pictures
    assert {row["__key__"]: json.loads(row["json"])["key"] for row in rows} == {key: key for key in pictures}


def test_own_reader_reads_own_shard(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    good, bad = read(tmp_path / write(tmp_path, pictures)["name"])
    assert bad == []
    assert {key: members["jpg"] for key, members in good.items()} == pictures


def test_cut_anywhere_keeps_every_whole_sample_and_reports_the_tail(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    entry = write(tmp_path, pictures)
    data = (tmp_path / entry["name"]).read_bytes()
    ends = []  # first byte after each sample's JSON
    with tarfile.open(tmp_path / entry["name"]) as source:
        for member in source.getmembers():
            if member.name.endswith(".json"):
                ends.append(member.offset_data + member.size)
    path = tmp_path / "cut.tar"
    for at in [*range(1, len(data) - 2 * shards.BLOCK, 257), *ends, *(end - 1 for end in ends)]:
        path.write_bytes(data[:at])
        good, bad = read(path)
        whole = sum(end <= at for end in ends)
        assert [members["jpg"] for members in good.values()] == list(pictures.values())[:whole], at
        assert bad, at
        assert {code for _, code in bad} == {"truncated"}, at


def test_reading_continues_after_a_damaged_header(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    entry = write(tmp_path, {"a": jpeg(0), "b": jpeg(1), "c": jpeg(2)})
    data = bytearray((tmp_path / entry["name"]).read_bytes())
    header = entry["samples"][1]["offset"] - shards.BLOCK
    data[header : header + 200] = b"\xff" * 200
    (tmp_path / "broken.tar").write_bytes(data)
    good, bad = read(tmp_path / "broken.tar")
    assert good["a"]["jpg"] == jpeg(0)
    assert good["c"]["jpg"] == jpeg(2)
    assert ("", "tar_header") in bad
    assert "jpg" not in good.get("b", {})


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty"),
        (b"x", "truncated"),
        (b"<html>" * 200, "not_tar"),
        (gzip.compress(np.random.default_rng(0).bytes(3000), mtime=0), "not_tar"),
    ],
    ids=["empty", "one byte", "html", "gz"],
)
def test_files_that_are_not_tars(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    good, bad = read(path)
    assert good == {}
    assert {c for _, c in bad} == {code}


def test_missing_tar_is_reported(tmp_path: Path) -> None:
    assert read(tmp_path / "none.tar") == ({}, [("", "unreadable")])


@pytest.mark.parametrize(
    ("members", "intact", "problem"),
    [
        (["a.jpg", "b.jpg", "a.json", "b.json"], [], {("a", "tar_order"), ("b", "tar_order")}),
        (["a.jpg", "a.jpg", "b.jpg"], ["b"], {("a", "duplicate_member")}),
        (["../../x.jpg", "b.jpg"], ["b"], {("x_jpg", "unsafe_member")}),
        (["/etc/x.jpg", "b.jpg"], ["b"], {("etc__x_jpg", "unsafe_member")}),
        (["a.jpg", "a.pkl", "b.jpg"], ["a", "b"], {("a_pkl", "unsafe_member")}),
        (["noext", "b.jpg"], ["b"], {("noext", "no_suffix")}),
    ],
)
def test_tars_of_other_programs(
    tmp_path: Path, members: list[str], intact: list[str], problem: set[tuple[str, str]]
) -> None:
    good, bad = read(tar(tmp_path / "x.tar", [(name, b"data") for name in members]))
    assert problem <= set(bad)
    assert set(intact) <= set(good)
    assert all(".." not in key and not key.startswith("/") for key, _ in bad)
    if problem == {("a", "tar_order"), ("b", "tar_order")}:
        assert all(
            "json" not in members_of_key for members_of_key in good.values()
        )  # a half is never completed by a later member


def test_links_are_refused(tmp_path: Path) -> None:
    assert read(tar(tmp_path / "x.tar", [("a.jpg", b"")], kind=tarfile.SYMTYPE)) == ({}, [("a_jpg", "unsafe_member")])


def test_large_members_are_skipped_not_read(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", [("a.jpg", bytes(5000)), ("b.jpg", b"small")])
    assert read(path, max_member_bytes=1000) == ({"b": {"jpg": b"small"}}, [("a", "too_large")])


def test_offsets_are_where_the_data_lies(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", [("a.jpg", b"first"), ("a.json", b"{}"), ("b" * 200 + ".jpg", b"second")])
    samples = [item for item in tars.iter_tar(path) if isinstance(item, TarSample)]
    data = path.read_bytes()
    assert {s.key[:1]: data[s.offsets["jpg"] :][: len(s.members["jpg"])] for s in samples} == {
        "a": b"first",
        "b": b"second",
    }


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11])
def test_impossible_sizes_end_the_archive_and_nothing_else(tmp_path: Path, size: bytes) -> None:
    path = tar(tmp_path / "x.tar", [("a.jpg", b"first"), ("a.json", b"{}"), ("b.jpg", b"second")])
    data = bytearray(path.read_bytes())
    header = bytearray(data[2 * 1024 : 2 * 1024 + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[2 * 1024 : 2 * 1024 + 512] = header
    path.write_bytes(data)
    good, bad = read(path)
    assert good == {"a": {"jpg": b"first", "json": b"{}"}}
    assert {code for _, code in bad} <= {"truncated", "tar_header"} and bad


def test_several_dots_stay_one_sample(tmp_path: Path) -> None:
    good, bad = read(tar(tmp_path / "x.tar", [("f.d/img.lq.jpg", b"1"), ("f.d/img.hq.jpg", b"2")]))
    assert (good, bad) == ({"f.d/img": {"lq.jpg": b"1", "hq.jpg": b"2"}}, [])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("IMG.0001.v2.final", "IMG_0001_v2_final"),
        ("../../etc/passwd", "etc__passwd"),
        ("/abs/x", "abs__x"),
        ("-rf", "_-rf"),
        ("e\u0301", "é"),
        ("a b & (c)", "a_b_c_"),
        ("", "_"),
        ("..", "_"),
        ("a\\b\x00c", "a__b_c"),
    ],
)
def test_safe_key(name: str, key: str) -> None:
    assert shards.safe_key(name) == key


def test_safe_key_of_long_names_is_capped_and_stays_distinct() -> None:
    keys = {shards.safe_key("写" * 300 + tail) for tail in "abc"}
    assert len(keys) == 3
    assert all(len(key.encode()) <= shards.KEY_BYTES for key in keys)
    tail = hashlib.sha256(b"x" * 300).hexdigest()[:12]  # keys name files of corpora and results: they must not change
    assert shards.safe_key("x" * 300) == "x" * 107 + "-" + tail
    assert file_key("x" * 300) == "x" * 187 + "-" + tail


def corpus_of(folder: Path, pictures: dict[str, bytes]) -> shards.Corpus:
    """A corpus of one split in two shards, with table, index and manifest."""
    samples = [(key, "jpg", data, {"caption": f"of {key}"}) for key, data in pictures.items()]
    return shards.write_corpus(folder, "test", {"train": samples}, samples_per_shard=3)


def test_samples_by_number_across_shards(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    corpus = corpus_of(tmp_path, pictures)
    assert len(corpus.split("train")) == 4
    assert [shards.read_sample(corpus, "train", n) for n in range(4)] == list(pictures.values())
    assert [corpus.split("train").locate(n)[1]["caption"] for n in (0, 3)] == ["of plain", "of last"]
    assert [row["key"] for row in corpus.rows()] == list(pictures)
    assert shards.verify(corpus) == []
    assert pickle.loads(pickle.dumps(corpus)).split("train").locate(3) == corpus.split("train").locate(3)
    with pytest.raises(IndexError):
        shards.read_sample(corpus, "train", 4)
    with pytest.raises(UsageError, match='Did you mean "train"'):
        corpus.split("tran")


def test_manifest_lines_end_at_newlines_alone(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    row = {"key": "a", "source": "folder:holi\u2028day\x85.jpg"}
    assert read_lines(tmp_path / "absent.jsonl") == []
    corpus = corpus_of(tmp_path, pictures)
    (tmp_path / "manifest.jsonl").write_bytes((shards.json_line(row) + '{"key": "cu').encode())
    assert list(corpus.rows()) == [row]
    assert read_lines(tmp_path / "manifest.jsonl") == [row]


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    for sync in (False, True):
        replace_file(tmp_path / "a", b"new", sync=sync)
        (tmp_path / "folder" / "in the way").mkdir(parents=True, exist_ok=True)
        with pytest.raises(OSError, match="folder"):
            replace_file(tmp_path / "folder", b"new", sync=sync)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


def test_verify_names_what_changed(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    corpus = corpus_of(tmp_path, pictures)
    shard = tmp_path / "train" / corpus.split("train").shards[1]["name"]
    data = bytearray(shard.read_bytes())
    data[corpus.split("train").locate(3)[1]["offset"]] ^= 1
    shard.write_bytes(data)
    assert [shard.name in problem for problem in shards.verify(corpus)] == [True]
    shard.unlink()
    assert "No such file" in shards.verify(corpus)[0]
    with pytest.raises(SampleError, match="missing_shard"):
        shards.read_sample(corpus, "train", 3)
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    assert "changed after curation" in shards.verify(shards.open_corpus(tmp_path))[0]


def test_short_reads_of_a_file_system_are_joined(
    tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, pread, calls = corpus_of(tmp_path, pictures), os.pread, []

    def half(handle: int, size: int, offset: int) -> bytes:
        calls.append(size)
        return pread(handle, (size + 1) // 2, offset)

    expected = [shards.read_sample(corpus, "train", sample) for sample in range(len(corpus.split("train")))]
    monkeypatch.setattr(os, "pread", half)
    assert [shards.read_sample(corpus, "train", sample) for sample in range(len(expected))] == expected
    assert len(calls) > 2 * len(expected)


def test_cut_shard_is_a_sample_error_with_the_key(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    corpus = corpus_of(tmp_path, pictures)
    shard = tmp_path / "train" / corpus.split("train").shards[0]["name"]
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(SampleError, match="plain") as error:
        shards.read_sample(corpus, "train", 0)
    assert error.value.code == "truncated"


@pytest.mark.parametrize("content", [None, "{", '{"format": 1}', "[]"])
def test_folders_without_a_valid_index_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(UsageError, match=r"index|corpus"):
        shards.open_corpus(tmp_path)
