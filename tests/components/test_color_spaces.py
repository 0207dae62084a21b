"""A declared colour space is converted to sRGB or refused by name; expected pixels come from the definitions."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from helper_modules import load_helper
from PIL import Image as Pillow

from components import color_spaces
from components.images import PNG_SIGNATURE, decode
from components.types import SampleError

tiff = load_helper("components/_tiffs.py").tiff
Y, X = np.mgrid[0:24, 0:32]
PIXELS = np.stack([80 + 3 * X, 90 + 3 * Y, 100 + X + Y], -1).astype(np.uint8)  # muted: inside sRGB in every space below
# chromaticities of red, green, blue; the white is D65
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
DISPLAY_P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
BT2020 = ((0.708, 0.292), (0.17, 0.797), (0.131, 0.046))
SRGB = ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06))


def to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """The matrix from linear RGB to XYZ (SMPTE RP 177), white D65."""
    x, y = np.array(primaries).T
    unscaled = np.stack([x / y, np.ones(3), (1 - x - y) / y])
    white = np.array([0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290])
    return unscaled * (np.linalg.inv(unscaled) @ white)


def expected(pixels: np.ndarray, primaries: Any, gamma: float) -> np.ndarray:
    """sRGB levels of pixels with these primaries and gamma; gamma 0 is sRGB's curve (IEC 61966-2-1)."""
    v = pixels / 255
    linear = v**gamma if gamma else np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    linear = (linear @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def file(kind: str, pixels: np.ndarray = PIXELS, **options: Any) -> bytes:
    target = io.BytesIO()
    lossy = {"quality": 100, "subsampling": "4:4:4"} if kind in ("JPEG", "AVIF") else {}
    lossless = {"lossless": True} if kind == "WEBP" else {}
    Pillow.fromarray(pixels).save(target, kind, **lossy, **lossless, **options)
    return target.getvalue()


def png(*chunks: tuple[bytes, bytes], pixels: np.ndarray = PIXELS, **options: Any) -> bytes:
    """A PNG with chunks after its header."""
    data = file("PNG", pixels, **options)
    added = b""
    for name, body in chunks:
        added += len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    end = len(PNG_SIGNATURE) + 25
    return data[:end] + added + data[end:]


def gama(exponent: float) -> tuple[bytes, bytes]:
    return b"gAMA", round(exponent * 100_000).to_bytes(4, "big")


def chrm(primaries: Any) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(n * 100_000) for pair in ((0.3127, 0.329), *primaries) for n in pair))


def exif(space: int | None, index: str = "", **tags: Any) -> Pillow.Exif:
    values = Pillow.Exif()
    values[0x010E] = "a picture"
    for name, value in tags.items():
        values[{"white": 0x013E, "primaries": 0x013F}[name]] = value
    inner = values.get_ifd(0x8769)
    if space is not None:
        inner[0xA001] = space
    if index:
        inner[0xA005] = {1: index}
    return values


def avif(primaries: int, transfer: int, **options: Any) -> bytes:
    """An AVIF with other code points than its writer's 1, 13."""
    data = file("AVIF", **options)
    place = data.index(b"colrnclx") + 8
    return data[:place] + struct.pack(">HH", primaries, transfer) + data[place + 4 :]


def bmp(space: bytes, primaries: Any = None, gamma: float = 0, profile: bytes = b"") -> bytes:
    """A BMP of version 5."""
    plain = file("BMP")
    pixels = plain[int.from_bytes(plain[10:14], "little") :]
    header = bytearray(struct.pack("<I", 124) + plain[18:54].ljust(120, b"\0"))
    header[56:60] = space
    if primaries is not None:
        header[60:96] = struct.pack("<9i", *(round(n * 2**30) for n in to_xyz(primaries).T.ravel()))
        header[96:108] = struct.pack("<3I", *[round(gamma * 2**16)] * 3)
    header[112:120] = struct.pack("<II", 124 + len(pixels), len(profile))
    start = 14 + 124
    return b"BM" + struct.pack("<IHHI", start + len(pixels) + len(profile), 0, 0, start) + header + pixels + profile


def tiff_with_exif(space: int, kind: int = 2) -> bytes:
    """EXIF has its own directory: one entry, the colour space."""
    samples = PIXELS.astype(int) * 257 if kind == 2 else PIXELS.astype(int)
    bits, planar = (16, 2) if kind == 2 else (8, 1)
    size = len(tiff(samples, 2, bits, planar=planar, tags={0x8769: [0]}))
    entry = struct.pack("<HHHIHHI", 1, 0xA001, 3, 1, space, 0, 0)
    return tiff(samples, 2, bits, planar=planar, tags={0x8769: [size]}) + entry


def text_profile(name: str, profile: bytes) -> tuple[bytes, bytes]:
    """A profile as ImageMagick writes it into a compressed text chunk."""
    rows = "".join(f"{profile[at : at + 36].hex()}\n" for at in range(0, len(profile), 36))
    text = f"\n{name}\n{len(profile):8}\n{rows}".encode()
    return b"zTXt", f"Raw profile type {name}\0\0".encode() + zlib.compress(text)


def profile_with_transfer(transfer: int) -> bytes:
    """A profile with the tag "cicp" (ICC.1:2022, 9.2.17), which takes the place of the copyright."""
    profile = color_spaces.matrix_profile(color_spaces.CICP_PRIMARIES[9], 2.4)
    at = profile.index(b"cprt")
    start = int.from_bytes(profile[at + 4 : at + 8], "big")
    body = b"cicp\0\0\0\0" + bytes([9, transfer, 0, 1])
    profile = profile[:start] + body + profile[start + 12 :]
    return profile[:at] + b"cicp" + struct.pack(">II", start, 12) + profile[at + 12 :]


P3_LINEAR = (DISPLAY_P3, 1.0)
CONVERTED = {
    "JPEG EXIF ColorSpace 2": (lambda: file("JPEG", exif=exif(2)), ADOBE, 563 / 256),
    "JPEG EXIF R03": (lambda: file("JPEG", exif=exif(65535, "R03")), ADOBE, 563 / 256),
    "JPEG EXIF R03 alone": (lambda: file("JPEG", exif=exif(None, "R03")), ADOBE, 563 / 256),
    "PNG EXIF R03": (lambda: png(exif=exif(65535, "R03")), ADOBE, 563 / 256),
    "WebP EXIF ColorSpace 2": (lambda: file("WEBP", exif=exif(2)), ADOBE, 563 / 256),
    "TIFF EXIF ColorSpace 2": (lambda: tiff_with_exif(2, kind=1), ADOBE, 563 / 256),
    "deep TIFF EXIF ColorSpace 2": (lambda: tiff_with_exif(2), ADOBE, 563 / 256),
    "JPEG EXIF primaries": (
        lambda: file("JPEG", exif=exif(65535, white=(0.3127, 0.329), primaries=(0.68, 0.32, 0.265, 0.69, 0.15, 0.06))),
        DISPLAY_P3,
        2.2,
    ),
    "AVIF Display P3": (lambda: avif(12, 13), DISPLAY_P3, 0),
    "AVIF BT.2020 with sRGB's curve": (lambda: avif(9, 13), BT2020, 0),
    "AVIF linear": (lambda: avif(1, 8), SRGB, 1),
    "AVIF gamma 2.2 P3": (lambda: avif(12, 4), DISPLAY_P3, 2.2),
    "PNG cICP Display P3": (lambda: png((b"cICP", bytes([12, 13, 0, 1]))), DISPLAY_P3, 0),
    "PNG cICP BT.2020": (lambda: png((b"cICP", bytes([9, 1, 0, 1]))), BT2020, 0),
    "PNG cICP over sRGB": (lambda: png((b"cICP", bytes([12, 13, 0, 1])), (b"sRGB", b"\0")), DISPLAY_P3, 0),
    "PNG gAMA 1": (lambda: png(gama(1)), SRGB, 1),
    "PNG gAMA 1.8": (lambda: png(gama(1 / 1.8)), SRGB, 1.8),
    "PNG gAMA and cHRM": (lambda: png(gama(1 / 2.2), chrm(ADOBE)), ADOBE, 2.2),
    "PNG cHRM alone": (lambda: png(chrm(DISPLAY_P3)), DISPLAY_P3, 0),
    "BMP calibrated": (lambda: bmp(bytes(4), ADOBE, 2.2), ADOBE, 2.2),
    "BMP with a profile": (
        lambda: bmp(b"DEBM", profile=color_spaces.matrix_profile(color_spaces.ADOBE_RGB, 2.2)),
        ADOBE,
        2.2,
    ),
    "TIFF primaries": (
        lambda: tiff(PIXELS.astype(int), 2, 8, tags={319: [(round(n * 1000), 1000) for p in DISPLAY_P3 for n in p]}),
        DISPLAY_P3,
        0,
    ),
    "TIFF transfer function": (
        lambda: tiff(PIXELS.astype(int), 2, 8, tags={301: [round((n / 255) ** 1.8 * 65535) for n in range(256)]}),
        SRGB,
        1.8,
    ),
    "TIFF transfer function of 16 bits": (
        lambda: tiff(
            PIXELS.astype(int) * 257, 2, 16, tags={301: [round((n / 65535) ** 1.8 * 65535) for n in range(65536)]}
        ),
        SRGB,
        1.8,
    ),
    "PNG with a profile as text": (
        lambda: png(text_profile("icc", color_spaces.matrix_profile(color_spaces.ADOBE_RGB, 2.2)), (b"sRGB", b"\0")),
        ADOBE,
        2.2,
    ),
    "PNG with an old profile as text": (
        lambda: png(text_profile("icm", color_spaces.matrix_profile(color_spaces.SRGB, 1.0))),
        SRGB,
        1,
    ),
    "a profile of linear values named sRGB": (
        lambda: png(
            icc_profile=color_spaces.matrix_profile(color_spaces.SRGB, 1.0).replace(
                "declared".encode("utf-16-be"), "sRGB lin".encode("utf-16-be")
            )
        ),
        SRGB,
        1,
    ),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_declared_space_is_converted(name: str) -> None:
    write, primaries, gamma = CONVERTED[name]
    kind = name.split()[0]
    stored = decode(file(kind)) if kind in ("JPEG", "AVIF") else PIXELS  # lossy
    levels = expected(stored, primaries, gamma)
    assert np.abs(stored - levels).max() > 8  # else this test could not fail
    assert np.abs(decode(write()) - levels).max() <= 2


SAME = {
    "PNG": lambda: png(),
    "PNG gAMA of sRGB": lambda: png(gama(0.45455), chrm(SRGB)),
    "PNG sRGB over gAMA": lambda: png((b"sRGB", b"\0"), gama(1)),
    "PNG cICP of sRGB over gAMA": lambda: png((b"cICP", bytes([1, 13, 0, 1])), gama(1)),
    "PNG cICP unspecified": lambda: png((b"cICP", bytes([2, 2, 0, 1]))),
    "PNG broken profiles as text": lambda: png(
        (b"tEXt", b"Raw profile type icc\0\nicc\n       9\n00ff\n"), (b"tEXt", b"Raw profile type icm\0no digits")
    ),
    "PNG broken gAMA and cHRM": lambda: png(gama(0), (b"cHRM", bytes(32))),
    "PNG EXIF sRGB": lambda: png(exif=exif(1, "R98")),
    "PNG EXIF uncalibrated": lambda: png(exif=exif(65535)),
    "WebP": lambda: file("WEBP"),
    "BMP sRGB": lambda: bmp(b"BGRs"),
    "BMP of zeros": lambda: bmp(bytes(4)),
    "TIFF primaries of sRGB": lambda: tiff(
        PIXELS.astype(int), 2, 8, tags={319: [(round(n * 1000), 1000) for p in SRGB for n in p]}
    ),
    "a profile of sRGB": lambda: png(icc_profile=color_spaces.matrix_profile(color_spaces.SRGB, 0.0)),
}


@pytest.mark.parametrize("name", SAME)
def test_srgb_in_every_spelling_stays(name: str) -> None:
    assert np.abs(decode(SAME[name]()).astype(int) - PIXELS).max() <= (1 if "profile" in name else 0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: avif(9, 16), "transfer function 16 .PQ"),
        (lambda: avif(9, 18), "transfer function 18 .HLG"),
        (lambda: avif(1, 9), "logarithmic"),
        (lambda: avif(99, 13), "primaries 99"),
        (lambda: png((b"cICP", bytes([9, 16, 0, 1]))), "PQ"),
        (lambda: png((b"cICP", bytes([1, 13, 0, 0]))), "narrow range"),
        (lambda: bmp(b"KNIL"), "linked profile"),
        (lambda: file("PNG", icc_profile=profile_with_transfer(16)), "a profile of transfer function 16 .PQ"),
        (lambda: file("JPEG", icc_profile=profile_with_transfer(18)), "a profile of transfer function 18 .HLG"),
        (lambda: tiff(PIXELS.astype(int) * 257, 2, 16, planar=2, tags={34675: profile_with_transfer(16)}), "PQ"),
        (lambda: file("JPEG", exif=exif(0xFFFD)), "Wide Gamut"),
    ],
)
def test_other_spaces_are_refused_by_name(data: Any, words: str) -> None:
    with pytest.raises(SampleError, match=words) as error:
        decode(data(), key="hdr")
    assert (error.value.code, error.value.key) == ("unsupported_color", "hdr")


def test_a_profile_with_another_transfer_function_in_its_tag_is_used() -> None:
    data = file("PNG", icc_profile=profile_with_transfer(1))
    assert np.abs(decode(data) - expected(PIXELS, BT2020, 2.4)).max() <= 2


def test_gray_values_take_the_curve_of_a_profile_for_colours_and_stay_gray() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for data in (png(gama(1), pixels=levels), file("JPEG", levels, exif=exif(2))):
        image = decode(data)
        gamma = 563 / 256 if data[:2] == b"\xff\xd8" else 1
        assert (image == image[..., :1]).all()
        assert np.abs(image[..., 0] - expected(np.repeat(levels[..., None], 3, -1), SRGB, gamma)[..., 0]).max() <= 2


def test_the_primary_item_of_an_avif_decides() -> None:
    """A second item's colour information, such as that of a thumbnail, does not count."""
    data = avif(12, 13)
    assert color_spaces._primary_nclx(data) == (12, 13)
    association = data.index(b"ipma") + 4 + 8  # version and flags, count of entries
    other = data[:association] + b"\0\7" + data[association + 2 :]
    assert color_spaces._primary_nclx(other) is None
    for cut in range(0, len(data), 7):
        color_spaces._primary_nclx(data[:cut])


def test_every_marker_of_a_jpeg_s_channels_is_read() -> None:
    """APP14 of Adobe: transform 0 stores RGB, 1 YCbCr; a JPEG of RGB without the mark would come out false."""
    stored = io.BytesIO()
    Pillow.fromarray(PIXELS).save(stored, "JPEG", quality=100, subsampling=0, keep_rgb=True)
    data = stored.getvalue()
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
    marked = data[:2] + adobe + data[2:] if b"Adobe" not in data else data
    assert np.abs(decode(marked).astype(int) - PIXELS).max() <= 3
    ycbcr = file("JPEG")
    marked = ycbcr[:2] + adobe[:-1] + b"\x01" + ycbcr[2:]
    assert np.array_equal(decode(marked), decode(ycbcr))


def gray_profile(gamma: float) -> bytes:
    """An ICC profile of gray values (version 4.3)."""
    bodies = {
        b"desc": color_spaces._icc_text("gray"),
        b"cprt": color_spaces._icc_text("none"),
        b"wtpt": color_spaces._icc_xyz(color_spaces.D50),
        b"kTRC": b"para" + struct.pack(">IHHi", 0, 0, 0, round(gamma * 65536)),
    }
    table, body, start = struct.pack(">I", len(bodies)), b"", 128 + 4 + 12 * len(bodies)
    for name, value in bodies.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">I4xI12s12x4s", start + len(body), 0x04300000, b"mntrGRAYXYZ ", b"acsp").ljust(68, b"\0")
    return (head + struct.pack(">3i", *color_spaces._fixed(color_spaces.D50))).ljust(128, b"\0") + table + body


def test_a_profile_of_gray_values_counts_with_alpha_and_where_gray_is_stored_as_colours() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with_alpha, colours = np.dstack([levels, np.full_like(levels, 255)]), np.repeat(levels[..., None], 3, -1)
    profile = {"icc_profile": gray_profile(1.6)}
    right = expected(colours, SRGB, 1.6)
    assert np.abs(colours - right).max() > 20
    for data in (
        file("PNG", levels, **profile),
        file("PNG", with_alpha, **profile),
        file("TIFF", with_alpha, **profile),
        file("PNG", levels, transparency=7, **profile),
        file("WEBP", colours, **profile),
    ):
        visible = decode(data) if b"tRNS" not in data else np.where(colours == 7, right, decode(data))
        assert np.abs(visible - right).max() <= 3  # dark levels of gray profiles are rounded twice
    assert np.array_equal(decode(png(**profile)), PIXELS), "colours have no gray profile"


def test_a_bmp_whose_fourth_bytes_are_all_zero_is_opaque() -> None:
    rows = np.dstack([PIXELS[::-1, :, ::-1], np.zeros(PIXELS.shape[:2], np.uint8)]).tobytes()
    height, width = PIXELS.shape[:2]
    header = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 32, 3, len(rows), 0, 0, 0, 0)
    header += struct.pack("<4I4s", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs")
    head = struct.pack("<IHHI", 138 + len(rows), 0, 0, 138) + header.ljust(124, b"\0")
    assert np.array_equal(decode(b"BM" + head + rows), PIXELS)
    some = bytearray(rows)
    some[3] = 255  # one pixel is visible, so the others are not
    assert (decode(b"BM" + head + bytes(some))[:-1] == 255).all()
