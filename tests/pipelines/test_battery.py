"""The data part of the battery of bad input, numbered as in its list: every file and archive member ends with its
expected reason code, in a measured part, without Ray. Addresses are in test_fetch, faults of machines in tests/cluster.
"""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from components.corpora import CorpusSpec, FilterSpec, SourceSpec
from pipelines import shards
from pipelines.curation import measure
from pipelines.sources import list_parts


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
    """A PNG whose header promises a size, with hardly any data behind it."""

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


def measured(made: CorpusSpec, out: Path) -> dict[str, dict[str, Any]]:
    """Measured rows by source; flat pictures are judged as `select` does."""
    found: dict[str, dict[str, Any]] = {}
    for part in list_parts(made, out).parts:
        summary = measure.measure_part(part, made, out)
        rows = pq.read_table(measure.measured_path(out, part)).to_pylist()
        assert summary["rows"] == len(rows)
        for row in rows:
            assert row["source"] not in found
            if not row["code"] and row["score/luma_std"] < made.filters.flat_below:
                row["code"] = "flat"
            found[row["source"]] = row
    return found


def test_every_bad_picture_has_its_code(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, (data, _) in FILES.items():
        (folder / name).write_bytes(data)
    found = measured(spec(SourceSpec(kind="folder", path=str(folder))), tmp_path / "out")
    assert {source.removeprefix("folder:"): row["code"] for source, row in found.items()} == {
        name: code for name, (_, code) in FILES.items()
    }
    assert all(len(row["key"].encode()) <= shards.KEY_BYTES for row in found.values())
    assert all(row["detail"] and row["stage"] == "measure" for row in found.values() if row["code"] not in ("", "flat"))


def test_a_picture_without_mercy_for_memory_is_refused_by_its_header(tmp_path: Path) -> None:
    """6 and 7: nothing is decoded, so no memory is asked for."""
    import tracemalloc

    (tmp_path / "in").mkdir()
    for name in ("6-claims.png", "7-bomb.png"):
        (tmp_path / "in" / name).write_bytes(FILES[name][0])
    tracemalloc.start()
    measured(spec(SourceSpec(kind="folder", path=str(tmp_path / "in"))), tmp_path / "out")
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
    cut = (folder / "27-cut.tar").read_bytes()
    (folder / "27-cut.tar").write_bytes(cut[: cut.index(three) + 100])
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
    made = spec(SourceSpec(kind="tar", path=str(folder / "*.tar")), max_file_mib=2)
    found = measured(made, tmp_path / "out")
    codes: dict[str, dict[str, str]] = {}
    for source, row in found.items():
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
    keys = [row["key"] for row in found.values()]
    assert not any(set(key) & set("/\\.") or key.startswith("-") for key in keys)
    assert (tmp_path / "x.jpg").exists() is False  # nothing was ever unpacked


def test_a_full_disk_leaves_the_previous_shard_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """61: and nothing half-written under a name that means something."""
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


def test_the_manifest_of_another_day_is_noticed(tmp_path: Path) -> None:
    """36."""
    corpus = shards.write_corpus(tmp_path, "x", {"train": [("a", "jpg", JPEG, {})]})
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"key": "b"}) + "\n")
    assert ["changed after curation" in problem for problem in shards.verify(corpus)] == [True]
