"""The data part of the battery of bad input, with its numbers: every file and archive member gets its expected reason
code in a measured part, without Ray. docs/battery.md lists the tests of each number.
"""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import pickle
import re
import struct
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from components.corpora import CorpusSpec, FilterSpec, SourceSpec
from pipelines.core.errors import Failure
from pipelines.corpus import shards
from pipelines.curation import journal, measure
from pipelines.curation.curate import curate
from pipelines.curation.sources import list_parts, stores


def pixels(height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.kron(draw, np.ones((8, 8, 1), np.uint8))


def encode(kind: str, picture: Pillow.Image | None = None, **options: Any) -> bytes:
    target = io.BytesIO()
    (picture or Pillow.fromarray(pixels())).save(target, kind, **options)
    return target.getvalue()


def gray16(mode: str = "I;16") -> Pillow.Image:
    ramp = np.linspace(0, 65535, 96 * 128).reshape(96, 128)
    return Pillow.fromarray(ramp.astype(np.uint16) if mode == "I;16" else ramp.astype(np.float32))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header announces a size, with hardly any data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def exif(orientation: int, extra: bytes = b"") -> bytes:
    data = Pillow.Exif()
    data[0x0112] = orientation
    if extra:
        data[0x010E] = extra.decode("latin-1")
    return encode("JPEG", exif=data)


def frames(kind: str) -> bytes:
    more = [Pillow.fromarray(pixels(seed=n)) for n in range(1, 4)]
    return encode(kind, save_all=True, append_images=more)


JPEG = encode("JPEG", quality=92)
FILES: dict[str, tuple[bytes, str]] = {
    "1-empty.jpg": (b"", "empty"),
    "2-html.jpg": (b"<html><body>404</body></html>", "not_image"),
    "2-text.jpg": (b"sorry, no picture here", "not_image"),
    "3-cut.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "3-cut.png": (encode("PNG")[:600], "truncated"),
    "3-cut.webp": (encode("WEBP", lossless=True)[:800], "truncated"),
    "4-trailing.jpg": (JPEG + b"\0" * 999, ""),
    "5-png-named.jpg": (encode("PNG"), ""),
    "6-claims.png": (png_of_size(20_000, 20_000), "too_large"),
    "7-bomb.png": (encode("PNG", Pillow.new("RGB", (6000, 6000), (9, 9, 9))), "too_large"),
    "8-zero.png": (png_of_size(0, 10), "too_small"),
    "8-small.png": (encode("PNG", Pillow.fromarray(pixels(8, 8)[:6, :6])), "too_small"),
    "9-strip.png": (encode("PNG", Pillow.fromarray(pixels(16, 800))), "aspect"),
    **{f"10-exif{n}.jpg": (exif(n), "") for n in range(10)},
    "11-cmyk.jpg": (encode("JPEG", Pillow.fromarray(pixels()).convert("CMYK")), ""),
    "12-gray16.png": (encode("PNG", gray16()), ""),
    "13-float.tiff": (encode("TIFF", gray16("F")), "unsupported_mode"),
    "14-palette.png": (encode("PNG", Pillow.fromarray(pixels()).quantize(64)), ""),
    "15-alpha.png": (encode("PNG", Pillow.fromarray(np.dstack([pixels(), pixels()[..., :1]]))), ""),
    "15-gray-alpha.png": (encode("PNG", Pillow.fromarray(np.dstack([pixels(), pixels()[..., :1]])).convert("LA")), ""),
    "16-bits.png": (encode("PNG", Pillow.fromarray(pixels()).convert("1")), ""),
    "17-frames.gif": (frames("GIF"), "animated"),
    "17-frames.webp": (frames("WEBP"), "animated"),
    "17-frames.png": (frames("PNG"), "animated"),
    "17-pages.tiff": (frames("TIFF"), "animated"),
    "18-broken-profile.jpg": (encode("JPEG", icc_profile=b"\0" * 300), ""),
    "19-progressive.jpg": (encode("JPEG", progressive=True), ""),
    "20-doc.eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n" + b" " * 99, "unsupported_format"),
    "20-psd.png": (b"8BPS" + bytes(99), "unsupported_format"),
    "20-svg.png": (b"<svg xmlns='x'></svg>" + b" " * 99, "unsupported_format"),
    "20-fits.jpg": (b"SIMPLE  =                    T" + b" " * 99, "unsupported_format"),
    "22-flat.png": (encode("PNG", Pillow.new("RGB", (99, 99), (40, 90, 200))), "flat"),
    "24-long-exif.jpg": (exif(1, b"x" * 60_000), ""),
    "30-a.b.c.JPG": (JPEG[:-2] + b"\xff\xd9", ""),
    "30-写真 é (1).jpg": (encode("JPEG", quality=80), ""),
    "30-" + "n" * 200 + ".jpg": (encode("JPEG", quality=81), ""),
}


def spec(*sources: SourceSpec, **filters: Any) -> CorpusSpec:
    settings = {"min_side_px": 16, "max_aspect": 20.0, **filters}
    return CorpusSpec(name="battery", sources=list(sources), filters=FilterSpec(**settings))


def measured_rows(corpus_spec: CorpusSpec, out: Path) -> dict[str, dict[str, Any]]:
    """Measured rows by source; flat pictures are judged as `select` does."""
    rows_by_source: dict[str, dict[str, Any]] = {}
    for part in list_parts(corpus_spec, out).parts:
        summary = measure.measure_part(part, corpus_spec, out)
        rows = pq.read_table(measure.measured_path(out, part)).to_pylist()
        assert summary["rows"] == len(rows)
        for row in rows:
            assert row["source"] not in rows_by_source
            if not row["code"] and row["score/luma_std"] < corpus_spec.filters.flat_below:
                row["code"] = "flat"
            rows_by_source[row["source"]] = row
    return rows_by_source


def test_every_bad_picture_has_its_code(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (data, _) in FILES.items():
        (folder / name).write_bytes(data)
    rows = measured_rows(spec(SourceSpec(kind="folder", path=str(folder))), tmp_path / "out")
    assert {source.removeprefix("folder:"): row["code"] for source, row in rows.items()} == {
        name: code for name, (_, code) in FILES.items()
    }
    assert all(len(row["key"].encode()) <= shards.KEY_BYTES for row in rows.values())
    assert all(row["detail"] and row["stage"] == "measure" for row in rows.values() if row["code"] not in ("", "flat"))


def test_pictures_beyond_the_pixel_limit_are_refused_by_their_header(tmp_path: Path) -> None:
    """6 and 7: the pictures are not decoded, so they need no memory."""
    import tracemalloc

    (tmp_path / "in").mkdir()
    for name in ("6-claims.png", "7-bomb.png"):
        (tmp_path / "in" / name).write_bytes(FILES[name][0])
    tracemalloc.start()
    measured_rows(spec(SourceSpec(kind="folder", path=str(tmp_path / "in"))), tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 << 20


def tar(path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as target:
        for name, data in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = len(data)
            target.addfile(info, io.BytesIO(data))


def test_every_bad_archive_has_its_code(tmp_path: Path) -> None:
    import gzip

    folder = tmp_path / "in"
    folder.mkdir()
    one, two, three = (encode("JPEG", Pillow.fromarray(pixels(seed=n))) for n in range(3))
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
    device = tarfile.TarInfo("device.jpg")
    device.type = tarfile.CHRTYPE
    tar(folder / "26-interleaved.tar", [("a.jpg", one), ("b.jpg", two), ("a.json", b"{}"), ("c.jpg", three)])
    tar(folder / "27-cut.tar", [("a.jpg", one), ("b.jpg", two), ("c.jpg", three)])
    tar_bytes = (folder / "27-cut.tar").read_bytes()
    (folder / "27-cut.tar").write_bytes(tar_bytes[: tar_bytes.index(three) + 100])
    tar(folder / "28-nothing.tar", [])
    (folder / "28-one-byte.tar").write_bytes(b"x")
    (folder / "28-zero.tar").write_bytes(b"")
    (folder / "28-gz.tar").write_bytes(gzip.compress(one * 3))
    tar(folder / "29-twice.tar", [("a.jpg", one), ("a.jpg", two), ("b.jpg", three)])
    tar(folder / "30-names.tar", [("x/a.b.v1.JPG", one), ("x/a.b.v2.jpeg", two), ("写" * 90 + ".webp", encode("WEBP"))])
    tar(
        folder / "31-unsafe.tar",
        [("../../x.jpg", one), ("/etc/y.jpg", one), (link, b""), (device, b""), ("ok.jpg", three)],
    )
    tar(folder / "32-code.tar", [("a.jpg", one), ("a.pkl", b"cos\nsystem"), ("b.pt", b"x"), ("c.jpg", three)])
    tar(folder / "33-lacking.tar", [("a.json", b"{}"), ("b.jpg", two)])
    tar(folder / "34-large.tar", [("a.jpg", bytes(3 << 20)), ("b.jpg", two)])
    corpus_spec = spec(SourceSpec(kind="tar", path=str(folder / "*.tar")), max_file_mib=2)
    rows = measured_rows(corpus_spec, tmp_path / "out")
    codes: dict[str, dict[str, str]] = {}
    for source, row in rows.items():
        archive, _, member = source.removeprefix("tar:").partition("/")
        codes.setdefault(archive, {})[member] = row["code"]
    assert codes == {
        "26-interleaved.tar": {"a.jpg": "", "b.jpg": "", "a": "tar_order", "c.jpg": ""},
        "27-cut.tar": {"a.jpg": "", "b.jpg": "", "c": "truncated"},
        "28-nothing.tar": {"": "empty"},
        "28-one-byte.tar": {"": "truncated"},
        "28-zero.tar": {"": "empty"},
        "28-gz.tar": {"": "not_tar"},
        "29-twice.tar": {"a": "duplicate_member", "b.jpg": ""},
        "30-names.tar": {"x/a.b.v1.JPG": "", "x/a.b.v2.jpeg": "", "写" * 90 + ".webp": ""},
        "31-unsafe.tar": {
            "x_jpg": "unsafe_member", "etc__y_jpg": "unsafe_member", "link_jpg": "unsafe_member",
            "device_jpg": "unsafe_member", "ok.jpg": "",
        },
        "32-code.tar": {"a.jpg": "", "a_pkl": "unsafe_member", "b_pt": "unsafe_member", "c.jpg": ""},
        "33-lacking.tar": {"a": "no_picture", "b.jpg": ""},
        "34-large.tar": {"a": "too_large", "b.jpg": ""},
    }  # fmt: skip
    keys = [row["key"] for row in rows.values()]
    assert not any(set(key) & set("/\\.") or key.startswith("-") for key in keys)
    assert (tmp_path / "x.jpg").exists() is False  # no member was unpacked


def test_a_full_disk_leaves_the_previous_shard_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """61: and no incomplete file has a final name."""
    samples = [shards.Sample(key=f"k{n}", ext="jpg", info={"key": f"k{n}"}) for n in range(4)]
    before = shards.write_shard(tmp_path, "train-00000", samples, lambda sample: JPEG)
    real = os.fsync

    def full(handle: int) -> None:
        if os.fstat(handle).st_size > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        shards.write_shard(tmp_path, "train-00000", samples[:2], lambda sample: JPEG)
    assert [path.name for path in tmp_path.iterdir()] == [before["name"]]


def test_a_changed_manifest_is_reported(tmp_path: Path) -> None:
    """36."""
    corpus = shards.write_corpus(tmp_path, "x", {"train": [("a", "jpg", JPEG, {})]})
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"key": "b"}) + "\n")
    assert ["changed after curation" in problem for problem in shards.verify(corpus)] == [True]


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_columns_of_unknown_extension_types_are_bytes_and_run_no_code(tmp_path: Path) -> None:
    """35: an extension type of another program, and the pickled kind that old versions of pyarrow executed."""
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name, metadata in (("somebody.image", b"{}"), ("arrow.py_extension_type", trap)):
        marks = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": metadata}
        fields = [pa.field("image", pa.binary(), metadata=marks), pa.field("other", pa.int64(), metadata=marks)]
        table = pa.Table.from_arrays([pa.array([JPEG, b"<html>"]), pa.array([1, 2])], schema=pa.schema(fields))
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "x.parquet")
        rows = measured_rows(spec(SourceSpec(kind="parquet", path=str(tmp_path / name))), tmp_path / name / "out")
        assert [row["code"] for row in rows.values()] == ["", "not_image"]
    assert not (tmp_path / "sprung").exists()
    floors = re.findall(r'"pyarrow>=(\d+)', (Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert floors and min(map(int, floors)) >= 15  # CVE-2023-47248 was fixed in 14.0.1


@pytest.fixture
def corpus_of_six(tmp_path: Path) -> tuple[CorpusSpec, Path]:
    """A spec of six pictures in a tar, several shards each."""
    members = [(f"p{n}.jpg", encode("JPEG", Pillow.fromarray(pixels(seed=n)), quality=92)) for n in range(6)]
    tar(tmp_path / "a.tar", list(members))
    corpus_spec = spec(SourceSpec(kind="tar", path=str(tmp_path / "*.tar")))
    corpus_spec.shard_mib = 0.02
    return corpus_spec, tmp_path / "out"


@pytest.mark.usefixtures("without_ray")
def test_a_disk_that_fills_up_while_shards_are_written(
    corpus_of_six: tuple[CorpusSpec, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """61: the run ends with one sentence, the earlier corpus stays complete, and the same command continues later."""
    corpus_spec, out = corpus_of_six
    before = curate(corpus_spec, out)
    tar(tmp_path / "b.tar", [(f"q{n}.jpg", encode("JPEG", Pillow.fromarray(pixels(seed=n + 9)))) for n in range(6)])
    real, entries = shards.write_shard, []

    def filling(*arguments: Any, **more: Any) -> Any:
        if len(entries) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        entries.append(real(*arguments, **more))
        return entries[-1]

    monkeypatch.setattr(shards, "write_shard", filling)
    with pytest.raises(Failure, match="cannot be written: No space left"):
        curate(corpus_spec, out)
    corpus = shards.open_corpus(out)
    assert (corpus.digest, shards.verify(corpus)) == (before.digest, [])
    assert not [path for path in out.rglob(".*.tmp-*") if path.parent.name in ("train", "held_out")]
    monkeypatch.setattr(shards, "write_shard", real)
    assert curate(corpus_spec, out).accepted == 12
    assert shards.verify(shards.open_corpus(out)) == []


@pytest.mark.usefixtures("without_ray")
def test_a_disk_that_fills_up_while_pictures_are_measured(
    corpus_of_six: tuple[CorpusSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """61: this is not the fault of a picture, and earlier rows are kept."""
    corpus_spec, out = corpus_of_six
    monkeypatch.setattr(journal, "JOURNAL_ROWS", 1)
    keys: list[str] = []

    def looking(data: bytes, filters: FilterSpec, key: str) -> dict[str, Any]:
        keys.append(key)
        if keys == ["p0", "p1", "p2"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return measure.look(data, filters, key)

    with pytest.raises(Failure, match="No space left"):
        curate(corpus_spec, out, look_at=looking)
    result = curate(corpus_spec, out, look_at=looking)
    assert keys == ["p0", "p1", "p2", "p2", "p3", "p4", "p5"]
    assert (result.accepted, result.rejected) == (6, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_without_progress_is_ended(corpus_of_six: tuple[CorpusSpec, Path]) -> None:
    """58: a decoder that does not return, with a longer timeout for one picture than for the run."""
    corpus_spec, out = corpus_of_six
    corpus_spec.stall_timeout_s, corpus_spec.sample_timeout_s = 3.0, 1000.0

    def stuck(data: bytes, filters: FilterSpec, key: str) -> dict[str, Any]:
        time.sleep(20)
        raise AssertionError

    start = time.monotonic()
    with pytest.raises(Failure, match="measuring: no progress for 3 s"):
        curate(corpus_spec, out, look_at=stuck)
    assert time.monotonic() - start < 20


def test_a_store_that_fails_for_a_while(
    corpus_of_six: tuple[CorpusSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """62: a tar that cannot be opened has a row, which a rerun tries; after an error in the middle rows are kept."""
    corpus_spec, out = corpus_of_six
    real = stores.open_file

    def busy(*_: Any) -> Any:
        raise OSError(errno.EIO, "503 Slow Down")

    monkeypatch.setattr(stores, "open_file", busy)
    (row,) = measured_rows(corpus_spec, out).values()
    assert (row["code"], row["detail"]) == ("unreadable", "a.tar: 503 Slow Down")
    assert "unreadable" in measure_again()

    class Failing(io.BytesIO):
        """Fails once in the middle."""

        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > len(self.getvalue()) // 2 and not broken:
                broken.append(self.tell())
                raise OSError(errno.EIO, "503 Slow Down")
            return super().read(size)

    broken: list[int] = []
    data = Path(corpus_spec.sources[0].path.replace("*", "a")).read_bytes()
    monkeypatch.setattr(stores, "open_file", lambda *_: Failing(data))
    monkeypatch.setattr(journal, "JOURNAL_ROWS", 1)
    (part,) = list_parts(corpus_spec, out).parts
    with pytest.raises(OSError, match="503"):
        measure.measure_part(part, corpus_spec, out, measure_again())
    keys: list[str] = []

    def looking(data: bytes, filters: FilterSpec, key: str) -> dict[str, Any]:
        keys.append(key)
        return measure.look(data, filters, key)

    summary = measure.measure_part(part, corpus_spec, out, measure_again(), looking)
    assert (summary["rows"], summary["codes"]) == (6, {})
    assert 0 < len(keys) < 6
    monkeypatch.setattr(stores, "open_file", real)
    (Path(corpus_spec.sources[0].path.replace("*", "a"))).unlink()  # a stale list names a removed file
    assert measure.measure_part(part, corpus_spec, out / "stale")["codes"] == {"unreadable": 1}


def measure_again() -> frozenset[str]:
    """Codes that a plain rerun tries again."""
    from pipelines.curation.curate import RETRIED

    return RETRIED


def test_every_number_has_its_test(repository: Path) -> None:
    """docs/battery.md names existing tests for every number of the data part."""
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (repository / "docs" / "battery.md").read_text(), re.MULTILINE)
    numbers = [int(number) for number, _ in rows]
    assert numbers == [*range(1, 48), *range(57, 63), *range(72, 75)]
    for number, row in rows:
        tests = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", row)
        assert tests, number
        for path, test in tests:
            tree = ast.parse((repository / path).read_text())
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (number, path, test)
