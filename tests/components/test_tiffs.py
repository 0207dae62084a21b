"""TIFFs of every kind and depth decode as their 8-bit twins or are refused by name.

`_tiffs.tiff` writes the files by the standard. The expected pixels come from the samples by TIFF 6.0's definitions.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from helper_modules import load_helper

from components.images import Limits, decode, decode_parts, probe
from components.types import SampleError

tiff = load_helper("components/_tiffs.py").tiff
NONE, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773  # compressions
HEIGHT, WIDTH = 21, 34
Y, X = np.mgrid[0:HEIGHT, 0:WIDTH]
GRAY = (X * 5 + Y) % 256
COLORS = np.stack([X * 5 % 256, Y * 6 % 256, (X + Y) * 2 % 256], -1)
ALPHA = 64 + X % 3 * 64
LAB = np.stack([80 + X * 4, X - 17, Y - 10], -1)  # L* as 0 .. 255, signed a* and b*; inside sRGB

LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {},  # each with the other byte order
    {"compression": LZW},
    {"compression": DEFLATE},
    {"compression": PACKBITS},
    {"compression": LZW, "predictor": 2},
    {"compression": DEFLATE, "predictor": 2},
    {"compression": DEFLATE, "predictor": 2, "planar": 2},
    {"tile": 16},
    {"planar": 2},
    {"planar": 2},
    {"planar": 2, "tile": 16, "compression": LZW},
)


def scaled(levels: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of `bits` bits next to 8-bit levels, and the 8-bit levels of these samples."""
    samples = np.rint(levels * ((2**bits - 1) / 255)).astype(np.int64)
    return samples, np.rint(samples * (255 / (2**bits - 1))).astype(int)


def gray(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[..., None], 3, -1)


def lab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """CIE 15 and IEC 61966-2-1, after Bradford's adaptation from D50; L* as 0 .. 255, signed a* and b*."""
    light = lab[..., 0] / 255 * 100
    fy = (light + 16) / 116
    f = np.stack([fy + lab[..., 1] / 500, fy, fy - lab[..., 2] / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.96422, 1.0, 0.82521]
    red, green, blue = ((3.13386, -1.61687, -0.49061), (-0.97877, 1.91614, 0.03345), (0.07195, -0.22899, 1.40524))
    linear = (xyz @ np.array([red, green, blue]).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(("layout", "order"), [(layout, "<>"[n % 2]) for n, layout in enumerate(LAYOUTS)], ids=str)
def test_every_kind_decodes_as_its_eight_bit_twin(layout: dict[str, Any], order: str) -> None:
    """Gray of both polarities, palettes, RGB, CMYK, alpha of both forms, L*a*b* of both forms; 1 to 16 bits."""
    wrong = []

    def check(
        name: str, expected: np.ndarray, samples: np.ndarray, kind: int, bits: int, most: float = 1, **more: Any
    ) -> None:
        data = tiff(samples, kind, bits, order=order, **layout, **more)
        try:
            difference = np.abs(decode(data).astype(float) - expected).max()
            assert probe(data).width == WIDTH
        except SampleError as error:
            wrong.append(f"{name} {bits}: {error}")
        else:
            wrong.extend([f"{name} {bits}: {difference:.0f} levels"] if difference > most else [])

    for bits in (1, 2, 4, 6, 8, 12, 16):
        if "predictor" in layout and bits not in (8, 16):
            continue
        samples, levels = scaled(GRAY[..., None], bits)
        check("white is zero", gray(levels[..., 0]), 2**bits - 1 - samples, 0, bits)
        check("black is zero", gray(levels[..., 0]), samples, 1, bits)
        if bits <= 8:
            table = np.stack([np.arange(2**bits), np.arange(2**bits)[::-1], np.arange(2**bits) // 3]) * (65535 >> bits)
            check("palette", (table >> 8).T[samples[..., 0]], samples, 3, bits, tags={320: table.ravel().tolist()})
    for bits in (8, 12, 16) if "predictor" not in layout else (8, 16):
        samples, levels = scaled(COLORS, bits)
        top = 2**bits - 1
        opaque = np.full((HEIGHT, WIDTH, 1), top)
        check("RGB", levels, samples, 2, bits)
        check("RGB and unspecified", levels, np.dstack([samples, 0 * opaque]), 2, bits, extra=[0])
        check("RGB and alpha", levels, np.dstack([samples, opaque]), 2, bits, extra=[2])
        check("CMYK", levels, np.dstack([top - samples, 0 * opaque]), 5, bits)
        check("CMYK and alpha", levels, np.dstack([top - samples, 0 * opaque, opaque]), 5, bits, extra=[2])
        alpha, alpha_levels = scaled(ALPHA, bits)
        weight = alpha_levels[..., None] / 255
        on_white = levels * weight + 255 * (1 - weight)
        check("RGB under alpha", on_white, np.dstack([samples, alpha]), 2, bits, most=1.5, extra=[2])
        multiplied = np.rint(samples * (alpha[..., None] / top)).astype(int)
        check("RGB times alpha", on_white, np.dstack([multiplied, alpha]), 2, bits, most=2, extra=[1])
        gray_samples, gray_levels = scaled(GRAY, bits)
        gray_on_white = gray(gray_levels) * weight + 255 * (1 - weight)
        check("gray under alpha", gray_on_white, np.dstack([gray_samples, alpha]), 1, bits, most=1.5, extra=[2])
        check(
            "white is zero under alpha",
            gray_on_white,
            np.dstack([top - gray_samples, alpha]),
            0,
            bits,
            most=1.5,
            extra=[2],
        )
    for bits in (8, 16):
        full, wide = 257 if bits == 16 else 1, 256 if bits == 16 else 1
        expected = lab_to_srgb(LAB)
        check("CIELAB", expected, LAB * [full, wide, wide], 8, bits, most=4)
        check("ICCLAB", expected, (LAB + np.array([0, 128, 128])) * wide, 9, bits, most=4)
    assert wrong == []


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("order", "<>")
def test_extra_samples_need_no_tag(bits: int, order: str) -> None:
    """Many writers leave ExtraSamples out; such samples mean nothing, apart from the fourth of RGB."""
    scale, more = (257 if bits == 16 else 1), np.dstack([GRAY, ALPHA])
    cmyk = np.dstack([255 - COLORS, 0 * GRAY])
    weight = ALPHA[..., None] / 255
    for samples, kind, expected in (
        (np.dstack([GRAY, ALPHA]), 1, gray(GRAY)),
        (np.dstack([255 - GRAY, ALPHA]), 0, gray(GRAY)),
        (np.dstack([COLORS, more]), 2, COLORS),
        (np.dstack([COLORS, more, GRAY]), 2, COLORS),
        (np.dstack([cmyk, ALPHA]), 5, COLORS),
        (np.dstack([COLORS, ALPHA]), 2, COLORS * weight + 255 * (1 - weight)),
    ):
        assert np.abs(decode(tiff(samples * scale, kind, bits, order=order)) - expected).max() <= 1
    partly = tiff(np.dstack([COLORS, more, GRAY]) * scale, 2, bits, order=order, extra=[0])
    assert np.array_equal(decode(partly), COLORS)


def jpeg_of_12_bits(levels: np.ndarray) -> bytes:
    """A JPEG (ITU T.81) of flat blocks with these levels, 0 .. 4095: one DC coefficient each, all codes of 5 bits."""
    height, width = levels.shape
    bits, before = "", 0
    for level in levels.ravel().tolist():
        change, before = level - 2048 - before, level - 2048
        size = abs(change).bit_length()
        bits += f"{size:05b}" + (f"{change if change > 0 else change + 2**size - 1:0{size}b}" if size else "") + "0"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = struct.pack(">2sHBHHB3B", b"\xff\xc1", 11, 12, 8 * height, 8 * width, 1, 1, 0x11, 0)
    codes = struct.pack(">2sH", b"\xff\xc4", 19 + 16) + bytes([0, 0, 0, 0, 0, 16, *[0] * 11, *range(16)])
    ends = struct.pack(">2sH", b"\xff\xc4", 19 + 1) + bytes([0x10, 1, *[0] * 15, 0])
    tables = b"\xff\xdb\0\x43\0" + bytes([8] * 64)
    return b"\xff\xd8" + tables + frame + codes + ends + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + scan + b"\xff\xd9"


@pytest.mark.parametrize("kind", [0, 1])
def test_a_jpeg_of_12_bits_in_a_tiff_is_refused_by_name(kind: int) -> None:
    """Pillow decodes its levels, 0 .. 4095, as dark ones of 16 bits."""
    levels = np.arange(12).reshape(3, 4) * 300 + 200
    jpeg = jpeg_of_12_bits(levels)
    entries = [(256, 32), (257, 24), (258, 12), (259, 7), (262, kind), (273, 8), (277, 1), (278, 24), (279, len(jpeg))]
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    data = struct.pack("<2sHI", b"II", 42, 8 + len(jpeg)) + jpeg + struct.pack("<H", len(entries)) + rows + bytes(4)
    with pytest.raises(SampleError, match=r"12-bit gray.* as JPEG") as error:
        decode(data)
    assert error.value.code == "unsupported_mode"


@pytest.mark.parametrize("codec", [NONE, LZW])
@pytest.mark.parametrize("planar", [1, 2])
def test_uncompressed_and_packed_ycbcr_decode(codec: int, planar: int) -> None:
    """ITU-R BT.601 by its definition."""
    red, green, blue = (COLORS[..., c].astype(float) for c in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    samples = (
        np.stack([luma, 128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402], -1).round().astype(int).clip(0, 255)
    )
    data = tiff(samples, 6, 8, compression=codec, planar=planar, tags={530: [1, 1]})
    assert np.abs(decode(data).astype(int) - COLORS).max() <= 2


def test_ycbcr_with_half_the_colours_decodes() -> None:
    """A data unit has four luma values and one of each colour (TIFF 6.0, section 21)."""
    luma = np.kron(np.arange(64).reshape(8, 8) * 3 + 20, np.ones((2, 2))).astype(int)
    units = np.stack([luma[0::2, 0::2], luma[0::2, 1::2], luma[1::2, 0::2], luma[1::2, 1::2]], -1)
    stored = np.dstack([units, np.full((8, 8, 2), 128)])
    data = tiff(stored.reshape(16, 8 * 3, 1), 6, 8, rows_per_strip=16, tags={530: [2, 2]})
    data = bytearray(data)
    for tag, value in ((256, 16), (277, 3)):  # the writer has stored the units as one channel
        place = data.index(tag.to_bytes(2, "little") + (4 if tag == 256 else 3).to_bytes(2, "little") + b"\1\0\0\0")
        data[place + 8 : place + 12] = value.to_bytes(4, "little")
    assert np.abs(decode(bytes(data), Limits(min_side_px=1)).astype(int) - gray(luma)).max() <= 2


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("32-bit unsigned", {"bits": 32}),
        ("16-bit signed", {"sample_format": 2, "bits": 16}),
        ("8-bit signed", {"sample_format": 2}),
        ("16-bit float", {"sample_format": 3, "bits": 16}),
        ("32-bit float", {"sample_format": 3, "bits": 32}),
        ("64-bit float", {"sample_format": 3, "bits": 64}),
        ("a mask", {"photometric": 4}),
        ("ITU L\\*a\\*b\\*", {"photometric": 10}),
        ("colour filter array", {"photometric": 32803}),
        ("LogLuv", {"photometric": 32845}),
        ("linear raw", {"photometric": 34892}),
        ("interpretation 77", {"photometric": 77}),
        ("not CMYK", {"photometric": 5, "tags": {332: [2]}}),
        ("dot range", {"photometric": 5, "tags": {336: [255, 0]}}),
        ("reduced version", {"tags": {254: [1]}}),
        ("with 3 samples", {"photometric": 5, "channels": 3}),
        ("16-bit YCbCr", {"photometric": 6, "bits": 16}),
    ],
)
@pytest.mark.parametrize("codec", [NONE, DEFLATE])
def test_other_kinds_are_refused_by_name(words: str, arguments: dict[str, Any], codec: int) -> None:
    settings: dict[str, Any] = {"photometric": 2, "bits": 8, "compression": codec, **arguments}
    channels = settings.pop("channels", 4 if settings["photometric"] == 5 else 3)
    samples = np.repeat(GRAY[..., None], channels, -1) / (255 if settings.get("sample_format") == 3 else 1)
    data = tiff(samples if settings.get("sample_format") == 3 else samples.astype(int), **settings)
    for function in (decode, probe):
        with pytest.raises(SampleError, match=words) as error:
            function(data, key="scan")
        assert (error.value.code, error.value.key) == ("unsupported_mode", "scan")


def test_raw_files_of_cameras_are_refused_by_name() -> None:
    dng = tiff(COLORS, 2, 8, tags={50706: b"\1\4\0\0"})
    cr2 = bytearray(tiff(COLORS, 2, 8))
    cr2[8:12] = b"CR\2\0"
    for data, name in ((dng, "DNG"), (bytes(cr2), "CR2")):
        with pytest.raises(SampleError, match=name) as error:
            decode(data)
        assert error.value.code == "unsupported_format"


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("bits", [8, 16])
def test_several_pages_are_refused(kind: int, bits: int) -> None:
    with pytest.raises(SampleError) as error:
        decode(tiff(GRAY[..., None], kind, bits, pages=3))
    assert error.value.code == "animated"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_kind_that_pillow_does_not_read(orientation: int) -> None:
    pixels = GRAY[::-1] if orientation in (3, 4, 7, 8) else GRAY
    pixels = pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
    pixels = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    data = tiff(65535 - pixels[..., None] * 257, 0, 16, tags={274: [orientation]})
    assert np.array_equal(decode(data), gray(GRAY))
    assert (probe(data).height, probe(data).width) == (HEIGHT, WIDTH)


def test_alpha_and_gray_of_deep_pictures_are_kept_apart() -> None:
    parts = decode_parts(tiff(np.dstack([GRAY, ALPHA]) * 257, 1, 16, extra=[2]))
    assert parts.gray and parts.alpha is not None
    assert np.array_equal(parts.alpha, ALPHA) and np.array_equal(parts.image, gray(GRAY))


def test_a_cut_or_lying_deep_tiff_is_refused() -> None:
    whole = tiff(65535 - GRAY[..., None] * 257, 0, 16)
    place = whole.index((279).to_bytes(2, "little") + b"\4\0")
    for data in (
        tiff(GRAY[..., None] * 257, 0, 16, tags={278: [4]}),  # more strips than are listed
        tiff(GRAY[..., None] * 257, 0, 16, tile=16, tags={322: [0]}),
        tiff(GRAY[..., None] * 257, 0, 16, tile=16, tags={322: [60000], 323: [60000]}),
        tiff(GRAY[..., None] * 257, 0, 16, tags={273: [1 << 15] * 3}),
        whole[: place + 2],
        whole[: len(whole) - 9],
        tiff(GRAY[..., None], 3, 8, tags={320: [0] * 12}),
    ):
        with pytest.raises(SampleError) as error:
            decode(data)
        assert error.value.code in ("truncated", "corrupt"), error.value
