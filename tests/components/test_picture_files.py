"""What a picture file carries besides pixels: round trips through every format, and what is dropped on the way."""

from __future__ import annotations

import io
import struct
import sys

import cv2
import numpy as np
import pytest
from PIL import ExifTags, ImageCms
from PIL import Image as Pillow
from PIL.TiffImagePlugin import IFDRational

from components.color_spaces import ADOBE_RGB, matrix_profile
from components.images import decode, encode_png, read_png_text
from components.picture_files import SUFFIXES, FileSettings, encode_file, probe_file, read_file, read_result_text
from components.picture_metadata import SOURCE_TYPE
from components.restoring import Identity, Picture, parse_ask, restore_pictures
from components.synthetic import dead_leaves
from components.types import Request, Restored, SampleError

IDENTITY = Identity(name="m", system="s", recipe="r", digest="d", licence="Apache-2.0")
ADOBE = matrix_profile(ADOBE_RGB, 2.2)
FORMATS = tuple(SUFFIXES)
LOSSLESS = ("png", "tiff")
XMP = b"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
 xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:evil="http://evil/" xmp:Rating="4" evil:payload="EVIL-XMP"
 photoshop:City="Porto"><dc:title><rdf:Alt><rdf:li xml:lang="x-default">A &amp; B</rdf:li></rdf:Alt></dc:title>
 <dc:subject><rdf:Bag><rdf:li>sea</rdf:li><rdf:li>&lt;script&gt;EVIL-TAG&lt;/script&gt;</rdf:li></rdf:Bag></dc:subject>
 </rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""


class Copier:
    """A restorer that gives the picture back."""

    def restore(self, requests, on_step=None, cancelled=None) -> list[Restored]:
        return [Restored(key=each.key, image=resized(each), info={}) for each in requests]


def resized(request: Request) -> np.ndarray:
    size = request.size or request.image.shape[:2]
    return cv2.resize(request.image, size[::-1], interpolation=cv2.INTER_CUBIC)


def photo_exif(orientation: int = 6) -> Pillow.Exif:
    """EXIF as a camera writes it, with a place, a serial number, an owner, a maker's note and markup."""
    exif = Pillow.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "Canon", orientation
    exif[ExifTags.Base.Artist], exif[ExifTags.Base.Copyright] = "Zoe", "(c) Zoe 2026"
    exif[ExifTags.Base.ImageDescription] = "<?php EVIL-EXIF ?>"
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.ExposureTime], details[ExifTags.Base.ISOSpeedRatings] = IFDRational(1, 250), 200
    details[ExifTags.Base.DateTimeOriginal] = "2026:11:30 10:00:00"
    details[ExifTags.Base.BodySerialNumber], details[ExifTags.Base.CameraOwnerName] = "SERIAL-77", "OWNER-77"
    details[ExifTags.Base.MakerNote] = b"EVIL-NOTE" * 9
    exif.get_ifd(ExifTags.IFD.GPSInfo).update({1: "N", 2: (41.0, 9.0, 2.5), 3: "W", 4: (8.0, 36.0, 0.0)})
    return exif


def photo(orientation: int = 6, format: str = "JPEG", **options: object) -> bytes:  # noqa: A002
    target = io.BytesIO()
    image = Pillow.fromarray(dead_leaves(48, 5, 0)[:32])
    image.save(target, format, exif=photo_exif(orientation), xmp=XMP, **options)
    return target.getvalue()


def restored(data: bytes, **options: object):
    """The encoded result of a restorer that changes nothing."""
    (result,) = restore_pictures(Copier(), IDENTITY, [Picture(key="a", data=data, seed=7)], parse_ask(options))
    assert not isinstance(result, SampleError), result
    return result.encode()


def opened(data: bytes) -> Pillow.Image:
    picture = Pillow.open(io.BytesIO(data))
    picture.load()
    return picture


@pytest.mark.parametrize("kind", FORMATS)
def test_exif_and_xmp_go_with_the_result_and_places_and_owners_do_not(kind: str) -> None:
    file = restored(photo(), format=kind)
    picture = opened(file.data)
    exif = picture.getexif()
    details = exif.get_ifd(ExifTags.IFD.Exif)
    assert (file.format, picture.size, exif.get(ExifTags.Base.Orientation, 1)) == (kind, (32, 48), 1)
    assert (exif[ExifTags.Base.Make], exif[ExifTags.Base.Artist]) == ("Canon", "Zoe")
    assert float(details[ExifTags.Base.ExposureTime]) == pytest.approx(0.004)
    assert (details[ExifTags.Base.ISOSpeedRatings], details[ExifTags.Base.DateTimeOriginal]) == (
        200,
        "2026:11:30 10:00:00",
    )
    assert details[ExifTags.Base.ColorSpace] == 1 and not exif.get_ifd(ExifTags.IFD.GPSInfo)
    xmp = picture.info["xmp"].decode()
    assert 'xml:lang="x-default">A &amp; B<' in xmp and "<xmp:Rating>4<" in xmp and "<rdf:li>sea<" in xmp
    for bad in (b"EVIL", b"<?php", b"SERIAL-77", b"OWNER-77", b"Porto"):
        assert bad not in file.data
    assert SOURCE_TYPE in xmp and "<restoray:licence>Apache-2.0<" in xmp
    text = read_result_text(file.data)
    assert {"key": "a", "seed": "7", "software": "restoray", "model_digest": "d"}.items() <= text.items()


@pytest.mark.parametrize("kind", FORMATS)
def test_places_and_owners_are_kept_if_asked(kind: str) -> None:
    picture = opened(restored(photo(), format=kind, metadata="keep").data)
    gps = picture.getexif().get_ifd(ExifTags.IFD.GPSInfo)
    assert gps[1] == "N" and [float(value) for value in gps[2]] == [41.0, 9.0, 2.5]
    details = picture.getexif().get_ifd(ExifTags.IFD.Exif)
    assert details[ExifTags.Base.BodySerialNumber] == "SERIAL-77"
    assert "<photoshop:City>Porto<" in picture.info["xmp"].decode()
    none = restored(photo(), format=kind, metadata="none")
    assert not opened(none.data).getexif().get_ifd(ExifTags.IFD.Exif) and b"Canon" not in none.data


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int) -> None:
    data = photo(orientation, "PNG")
    first = read_file(data)
    assert first.orientation == orientation
    again = read_file(restored(data, format="tiff").data)
    assert again.orientation == 1 and np.array_equal(first.parts.image, again.parts.image)
    assert np.array_equal(first.parts.image, decode(data))


def test_a_picture_without_metadata_gives_the_bytes_of_earlier_versions() -> None:
    image = dead_leaves(32, 5, 1)
    file = restored(encode_png(image))
    assert file.data == encode_png(image, read_png_text(file.data), 1) and not file.notes


@pytest.mark.parametrize("kind", FORMATS)
def test_a_profile_is_kept_or_converted(kind: str) -> None:
    image = dead_leaves(32, 5, 2)
    target = io.BytesIO()
    Pillow.fromarray(image).save(target, "PNG", icc_profile=ADOBE)
    kept = restored(target.getvalue(), format=kind, icc="keep", **({} if kind in LOSSLESS else {"quality": 95}))
    assert opened(kept.data).info["icc_profile"] == ADOBE
    pixels = np.asarray(opened(kept.data).convert("RGB")).astype(int)
    assert np.abs(pixels - image).mean() < (0.01 if kind in LOSSLESS else 6)
    converted = restored(target.getvalue(), format=kind)
    assert "icc_profile" not in opened(converted.data).info
    expected = decode(target.getvalue()).astype(int)
    assert np.abs(expected - image).max() > 20
    assert np.abs(np.asarray(opened(converted.data).convert("RGB")) - expected).mean() < (
        0.01 if kind in LOSSLESS else 6
    )


def test_a_broken_or_foreign_profile_is_not_kept() -> None:
    image = Pillow.fromarray(dead_leaves(32, 5, 3))
    gray = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (ADOBE[:99], gray):
        target = io.BytesIO()
        image.save(target, "PNG", icc_profile=profile)
        file = read_file(target.getvalue(), settings=FileSettings(icc="keep"))
        assert file.profile == b"" and "converted" in file.notes[0]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("scale", [1, 2])
def test_alpha_and_gray(kind: str, scale: int) -> None:
    colors, alpha = dead_leaves(16, 5, 4), np.full((16, 16), 255, np.uint8)
    alpha[:8, :8] = 0
    colors[:8, :8] = (255, 0, 0)  # hidden red must not bleed
    data = restored(encode_png(np.dstack([colors, alpha])), format=kind, scale=scale).data
    picture = opened(data)
    if kind == "jpeg":
        assert picture.mode == "RGB" and np.asarray(picture)[1, 1].min() > 240
    else:
        mask = np.asarray(picture.convert("RGBA"))[..., 3]
        assert mask[1, 1] < 8 and mask[-2, -2] > 247 and mask.shape == (16 * scale, 16 * scale)
    gray = restored(encode_png(np.ascontiguousarray(colors[..., 1])), format=kind, scale=scale)
    assert opened(gray.data).mode == ("RGB" if kind in ("webp", "avif") else "L")
    levels = decode(gray.data).astype(int)
    assert np.ptp(levels, axis=-1).max() <= (2 if kind in ("webp", "avif") else 0)


def test_alpha_of_a_jpeg_is_named() -> None:
    file = restored(encode_png(np.dstack([dead_leaves(16, 5, 4), np.full((16, 16), 9, np.uint8)])), format="jpeg")
    assert file.notes == ("alpha was put on white: JPEG has none",)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_out(kind: str, channels: int) -> None:
    image = np.dstack([dead_leaves(70, 5, 6), dead_leaves(70, 5, 7)[..., 0]])[:, :50, :channels]
    image = np.ascontiguousarray(image[..., 0] if channels == 1 else image)
    data = encode_file(image, FileSettings(format=kind, bits=16), text={"key": "ä", "prompt": "日本"}).data
    if channels != 2:  # OpenCV has no gray with alpha
        stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        order = {1: slice(None), 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
        assert stored.dtype == np.uint16 and np.array_equal(
            stored if channels == 1 else stored[..., order], image * 257.0
        )
    file = read_file(data)
    assert file.bits == 16 and "16 bits of a channel were read as 8" in file.notes[0]
    colors = image if channels == 1 else image[..., 0] if channels == 2 else image[..., :3]
    visible = image[..., -1] > 0 if channels in (2, 4) else np.ones(image.shape[:2], bool)
    expected = np.dstack([colors] * 3) if colors.ndim == 2 else colors
    assert np.array_equal(file.parts.image[visible], expected[visible])
    assert read_result_text(data) == {"key": "ä", "prompt": "日本"}


def test_sixteen_bits_in() -> None:
    deep = np.random.default_rng(1).integers(0, 65536, (9, 12, 3), dtype=np.uint16)
    data = cv2.imencode(".png", deep)[1].tobytes()
    file = restored(data, bits=16)
    assert read_file(file.data).bits == 16
    nearest = np.rint(deep[..., ::-1] / 257).astype(int)
    assert np.abs(read_file(data).parts.image - nearest).max() <= 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"format": "gif"}, "format must be one of png, jpeg, webp, avif, tiff, like, got 'gif'"),
        ({"format": "jpeg", "bits": 16}, "bits=16 needs format=png or format=tiff; jpeg may hold 8 bits only"),
        ({"format": "like", "bits": 16}, "bits=16 needs format=png or format=tiff"),
        ({"bits": 10}, "bits must be one of 8, 16, got 10"),
        ({"quality": 80}, "quality has no meaning for png, which is lossless"),
        ({"format": "webp", "quality": 0}, "quality must be a whole number from 1 to 100, got 0"),
        ({"metadata": "all"}, "metadata must be one of private, keep, none, got 'all'"),
        ({"icc": "drop"}, "icc must be one of convert, keep, got 'drop'"),
    ],
)
def test_wrong_settings(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_ask(options)


def test_like_takes_the_format_of_the_content() -> None:
    for kind in FORMATS:
        data = encode_file(dead_leaves(16, 5, 8), FileSettings(format=kind)).data
        assert restored(data, format="like").format == kind
    bmp = io.BytesIO()
    Pillow.fromarray(dead_leaves(16, 5, 8)).save(bmp, "BMP")
    assert restored(bmp.getvalue(), format="like").suffix == ".png"


def test_a_side_that_a_format_cannot_hold() -> None:
    with pytest.raises(SampleError, match=r"\[too_large\] a side of 16384 pixels exceeds 16383, the limit of webp"):
        encode_file(np.zeros((1, 16384, 3), np.uint8), FileSettings(format="webp"))


# --- hostile files ----------------------------------------------------------------------------------------------------


def jpeg_with(segment: bytes) -> bytes:
    target = io.BytesIO()
    Pillow.fromarray(dead_leaves(16, 5, 9)).save(target, "JPEG")
    data = target.getvalue()
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def loop() -> bytes:
    """EXIF whose directory of details is its first directory."""
    row = struct.pack("<HHII", 0x8769, 4, 1, 8)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + row + bytes(4)


def long_value() -> bytes:
    row = struct.pack("<HHII", 0x010F, 2, 0x7FFFFFFF, 8) + struct.pack("<HHII", 0x8298, 2, 9, 1 << 30)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + row + bytes(4)


ENTITIES = (
    b'<!DOCTYPE x [<!ENTITY a "EVIL"><!ENTITY b "&a;&a;&a;">]><x:xmpmeta xmlns:x="adobe:ns:meta/">&b;</x:xmpmeta>'
)
XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"


@pytest.mark.parametrize(
    ("segment", "note"),
    [
        (loop(), ""),
        (long_value(), "EXIF Make dropped"),
        (b"Exif\0\0II*\0\xff\xff\xff\x7f", "a directory lies outside the data"),
        (b"Exif\0\0EVIL" * 9, "it has no header"),
        (XMP_HEAD + ENTITIES, "it declares a document type or entities"),
        (XMP_HEAD + b"<x:xmpmeta EVIL", "it is not well-formed"),
        (XMP_HEAD + XMP.decode().encode("utf-16"), "it is not UTF-8"),
    ],
)
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_hostile_metadata_does_not_come_out(segment: bytes, note: str, kind: str) -> None:
    data = jpeg_with(segment) + b"EVIL-BEHIND-THE-END"
    source = read_file(data, settings=FileSettings(metadata="keep"))
    assert not note or any(note in line for line in source.notes), source.notes
    file = restored(data, format=kind, metadata="keep")
    assert b"EVIL" not in file.data and not opened(file.data).getexif().get_ifd(ExifTags.IFD.Exif).get(0x8769)


def test_text_chunks_of_a_png_do_not_come_out() -> None:
    data = encode_png(dead_leaves(16, 5, 9), {"Comment": "EVIL", "model": "EVIL", "XML:com.adobe.xmp": "<EVIL"})
    file = restored(data, metadata="keep")
    assert b"EVIL" not in file.data and read_png_text(file.data)["model"] == "m"


def test_too_much_metadata_is_dropped_with_a_note() -> None:
    notes = read_file(photo(1, "PNG"), settings=FileSettings(metadata="keep")).notes
    assert any(note.startswith("EXIF ImageDescription dropped") for note in notes)
    target = io.BytesIO()
    Pillow.fromarray(dead_leaves(16, 5, 9)).save(
        target, "WEBP", exif=b"II*\0" + bytes(1 << 20), xmp=b" " * (1 << 20) + b"<"
    )
    assert [note.partition(":")[0] for note in read_file(target.getvalue()).notes] == ["EXIF dropped", "XMP dropped"]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_animated_files_are_refused_by_name(kind: str) -> None:
    frames = [Pillow.fromarray(dead_leaves(16, 5, number)) for number in range(2)]
    target = io.BytesIO()
    frames[0].save(target, kind, save_all=True, append_images=frames[1:])
    with pytest.raises(SampleError, match=rf"\[animated\] k: the {kind} holds several frames or pages"):
        read_file(target.getvalue(), key="k")


# --- HEIC and JPEG XL -------------------------------------------------------------------------------------------------


def heic(**options: object) -> bytes:
    import pillow_heif

    target = io.BytesIO()
    file = pillow_heif.from_pillow(Pillow.fromarray(dead_leaves(64, 5, 0)))
    file.save(target, quality=95, exif=photo_exif(1).tobytes(), **options)
    return target.getvalue()


def jxl(**options: object) -> bytes:
    import pillow_jxl  # noqa: F401 - registers the format

    target = io.BytesIO()
    Pillow.fromarray(dead_leaves(64, 5, 0)[:40]).save(target, "JXL", lossless=True, **options)
    return target.getvalue()


def test_heic_comes_in_with_its_exif() -> None:
    data = heic()
    assert (probe_file(data).format, probe_file(data).width) == ("HEIC", 64)
    file = restored(data, format="like")
    assert file.format == "png" and opened(file.data).getexif()[ExifTags.Base.Make] == "Canon"
    assert np.abs(decode(file.data).astype(int) - dead_leaves(64, 5, 0)).mean() < 8


def test_jpeg_xl_comes_in_and_its_size_is_read_before_it_is_decoded() -> None:
    from components.openers import jxl_header

    data = jxl(exif=photo_exif(1).tobytes())
    assert jxl_header(data) == (64, 40, False)
    assert np.array_equal(read_file(data).parts.image, dead_leaves(64, 5, 0)[:40])
    with pytest.raises(SampleError, match=r"truncated|corrupt"):
        read_file(data[: len(data) // 2])


def test_jpeg_xl_header_by_hand() -> None:
    """A small picture of 8 x (3 + 1) rows and ratio 16:9; and a huge one that must not be decoded."""
    from components.openers import jxl_header

    bits = 1 | (3 << 1) | (5 << 6) | (1 << 9)  # small, rows, ratio, all defaults
    assert jxl_header(b"\xff\x0a" + bits.to_bytes(8, "little")) == (32 * 16 // 9, 32, False)
    huge = 0 | (3 << 1) | ((1 << 29) << 3) | (1 << 33) | (1 << 36)
    with pytest.raises(SampleError, match="too_large"):
        read_file(b"\xff\x0a" + huge.to_bytes(16, "little"))


@pytest.mark.parametrize(
    ("data", "extra"), [(b"\0\0\0\x18ftypheic" + bytes(20), "heic"), (b"\xff\x0a\x01\x02" + bytes(9), "jxl")]
)
def test_a_missing_package_is_named(data: bytes, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pillow_heif", "pillow_jxl", "pillow_jxl.JpegXLImagePlugin"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SampleError, match=rf'needs an extra: pip install "restoray\[{extra}\]"'):
        read_file(data)
