"""Colour spaces of picture files: what a file declares, as an ICC profile, and the conversion to sRGB.

A file declares its colour space in one of these places; where several apply, the first decides:

    PNG     cICP, iCCP, sRGB, gAMA with cHRM, eXIf (PNG specification, third edition, 4.3); a text chunk with a profile
            goes before sRGB
    AVIF    an embedded profile, the nclx colour information of the primary item, EXIF
    TIFF    an embedded profile, TransferFunction with WhitePoint and PrimaryChromaticities, EXIF
    BMP     the header's colour space (versions 4 and 5)
    others  an embedded profile, EXIF

Without a declaration a picture is sRGB. A space that is not converted to sRGB, such as one with an HDR transfer
function, raises a SampleError `unsupported_color`. A broken declaration counts as none. Torch-free.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageCms

from components.types import Image, SampleError

Primaries = tuple[float, ...]
"""Chromaticities x, y of white, red, green and blue."""

D65 = (0.3127, 0.3290)
SRGB: Primaries = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # also BT.709
ADOBE_RGB: Primaries = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
ADOBE_GAMMA = 563 / 256  # Adobe RGB (1998) Color Image Encoding, 4.3.1.2
CICP_PRIMARIES: Mapping[int, Primaries] = {  # ITU-T H.273 (2021), table 2
    1: SRGB,
    2: SRGB,  # unspecified
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    8: (0.310, 0.316, 0.681, 0.319, 0.243, 0.692, 0.145, 0.049),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
CICP_GAMMAS: Mapping[int, float] = {  # ITU-T H.273 (2021), table 3; 0 stands for sRGB's curve
    **dict.fromkeys((1, 6, 14, 15), 0.0),  # BT.709's camera curve: screens and browsers show it with sRGB's
    2: 0.0,  # unspecified
    4: 2.2,
    5: 2.8,
    8: 1.0,
    13: 0.0,
}
CICP_OTHERS = {9: "logarithmic", 10: "logarithmic", 16: "PQ", 17: "SMPTE ST 428-1", 18: "HLG"}
PRIMARIES_TOLERANCE = 0.003  # ours: rounding of a chromaticity in a file
GAMMA_TOLERANCE = 0.05  # as libpng's PNG_GAMMA_THRESHOLD: gamma 2.2 to within 5 % is taken for sRGB's curve
SRGB_TOLERANCE = 8  # ours: levels that a profile named sRGB may differ from sRGB
MAX_ICC_TAGS = 100  # as lcms reads
D50 = np.array([0.9642, 1.0, 0.8249])  # ICC.1:2022, 7.2.16
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])  # ICC.1, annex E
CURVE_LEVELS = 4096  # ours: of a transfer function; lcms refuses tables above 65,530 levels, and 16 bits have 65,536
EXIF_IFD, INTEROP_IFD = 0x8769, 0xA005
EXIF_WHITE, EXIF_PRIMARIES, EXIF_SPACE, EXIF_GAMMA, INTEROP_INDEX = 0x013E, 0x013F, 0xA001, 0xA500, 1
TIFF_TRANSFER, ICC_TAG = 301, 34675
SRGB_SPACE, ADOBE_SPACE, WIDE_GAMUT_SPACE = 1, 2, 0xFFFD  # values of EXIF_SPACE; 2 and 0xFFFD are of cameras' makers
RAW_PROFILES = ("Raw profile type icc", "Raw profile type icm")
BMP_LINKED, BMP_EMBEDDED, BMP_CALIBRATED = b"KNIL", b"DEBM", bytes(4)  # letters of a little-endian number


def declared_profile(picture: Pillow.Image, kind: str, data: bytes) -> bytes | None:
    """Return the ICC profile of the colour space that a file declares; None for sRGB and without a declaration.

    Args:
        picture: the file as Pillow has opened it.
        kind: its format, such as "PNG".
        data: bytes of the file.

    Raises:
        SampleError: unsupported_color; the sentence names the space.
    """
    embedded = picture.info.get("icc_profile")
    if kind == "PNG":
        chunks = _png_chunks(data)
        if len(cicp := chunks.get(b"cICP", b"")) == 4:
            return _cicp_profile(cicp[0], cicp[1], full_range=cicp[3] != 0)
        if embedded:
            return bytes(embedded)
        if (raw := _raw_profile(picture.info)) is not None:
            return raw
        if b"sRGB" in chunks:
            return None
        if b"gAMA" in chunks or b"cHRM" in chunks:
            return _gama_profile(chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b""))
    if embedded:
        return bytes(embedded)
    if kind == "AVIF":
        nclx = _primary_nclx(data)
        if nclx is not None:  # libavif has converted narrow range and YCbCr
            return _cicp_profile(nclx[0], nclx[1], full_range=True)
    if kind == "BMP":
        return _bmp_profile(data)
    if kind == "TIFF":
        return tiff_profile(dict(picture.tag_v2), data)  # type: ignore[attr-defined]
    try:
        exif = picture.getexif()
    except Exception:  # noqa: BLE001 - metadata may be hostile; the picture is still used
        return None
    return _exif_profile(exif)


def srgb_and_alpha(picture: Pillow.Image, profile: bytes | None) -> tuple[Image, np.ndarray | None]:
    """Convert a loaded Pillow picture to uint8 sRGB [H, W, 3], and alpha [H, W] unless every pixel is opaque.

    Raises:
        SampleError: unsupported_mode.
    """
    alpha: np.ndarray | None = None
    if picture.mode.startswith("I;16"):
        wide = np.asarray(picture).astype(np.uint32)
        transparent = picture.info.get("transparency")
        if isinstance(transparent, int):
            alpha = np.where(wide == transparent, 0, 255).astype(np.uint8)
        picture = Pillow.fromarray(((wide + 128) // 257).astype(np.uint8))  # 65535 -> 255, 32768 -> 128
    elif picture.mode in ("I", "F"):
        raise SampleError("unsupported_mode", f"32-bit values (mode {picture.mode}) have no declared range")
    elif picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        rgba = _with_alpha(picture)
        alpha = np.asarray(rgba.getchannel("A"))
        if picture.format == "BMP" and not alpha.any():  # many writers leave the fourth byte at zero
            alpha = None
        picture = rgba.convert("RGB")
    elif picture.mode in ("1", "P"):
        picture = picture.convert("RGB")
    elif picture.mode not in ("L", "RGB", "CMYK", "YCbCr", "LAB", "HSV"):
        raise SampleError("unsupported_mode", f"pixels of mode {picture.mode}")
    srgb = to_srgb(picture, profile) if profile else None
    rgb = np.array((srgb if srgb is not None else picture).convert("RGB"))
    return rgb, alpha if alpha is not None and alpha.min() < 255 else None


def _with_alpha(picture: Pillow.Image) -> Pillow.Image:
    """Convert any transparent mode to RGBA."""
    transparent = picture.info.get("transparency")
    if picture.mode in ("RGB", "L") and transparent is not None:
        # PNG stores one transparent colour at the file's bit depth, but Pillow has already reduced 16 bits to 8
        colour = np.atleast_1d(np.asarray(transparent))
        colour = colour >> 8 if colour.max() > 255 else colour
        rgb = np.asarray(picture.convert("RGB"))
        alpha = np.where((rgb == colour).all(axis=-1), 0, 255).astype(np.uint8)
        return Pillow.fromarray(np.dstack([rgb, alpha]))
    if picture.mode in ("RGBa", "La"):
        picture = picture.convert("RGBA" if picture.mode == "RGBa" else "LA")
    return picture.convert("RGBA")


def to_srgb(picture: Pillow.Image, profile: bytes) -> Pillow.Image | None:
    """Convert with a profile; None if there is nothing to convert or the profile is unusable.

    Returns:
        A picture of mode RGB; of mode L for a picture of mode L with a profile for RGB.

    Raises:
        SampleError: unsupported_color: the profile is of an HDR transfer function.
    """
    transfer = _icc_transfer(profile)
    if transfer in CICP_OTHERS:  # the curves in such a profile are made for screens with its brightness
        raise _unsupported(f"a profile of transfer function {transfer} ({CICP_OTHERS[transfer]})")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and picture.mode in ("RGB", "L"):
            if _is_srgb(profile):
                return None
            if picture.mode == "L":  # gray values share one curve
                ramp = Pillow.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, -1))
                return picture.point(np.asarray(_converted(ramp, source))[0, :, 1].tolist())
        elif space == "GRAY" and picture.mode == "RGB" and _is_gray(picture):  # gray with alpha, or gray in a WebP
            return _converted(picture.getchannel("R"), source)
        elif {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}.get(picture.mode) != space:
            return None  # the profile belongs to another kind of picture
        return _converted(picture, source)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _icc_transfer(profile: bytes) -> int:
    """The transfer function of ITU-T H.273 in a profile's tag "cicp" (ICC.1:2022, 9.2.17); 2 (unspecified) for none."""
    for at in range(132, 132 + 12 * min(int.from_bytes(profile[128:132], "big"), MAX_ICC_TAGS), 12):
        if profile[at : at + 4] == b"cicp":
            body = profile[int.from_bytes(profile[at + 4 : at + 8], "big") :][:12]
            return body[9] if len(body) == 12 else 2
    return 2


def _is_gray(picture: Pillow.Image) -> bool:
    """Whether the three channels of a picture are equal."""
    red, green, blue = picture.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


def _converted(picture: Pillow.Image, source: ImageCms.ImageCmsProfile) -> Pillow.Image:
    result = ImageCms.profileToProfile(
        picture,
        source,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert result is not None  # None only if the picture is converted in place
    return result


@lru_cache(maxsize=64)
def _is_srgb(profile: bytes) -> bool:
    """Whether a profile for RGB has the name and the values of sRGB; a linear one may have the name too."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if "sRGB" not in (source.profile.profile_description or ""):
        return False
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    difference = np.asarray(_converted(Pillow.fromarray(colors), source)).astype(int) - colors
    return bool(np.abs(difference).max() <= SRGB_TOLERANCE)


@lru_cache(maxsize=64)
def matrix_profile(primaries: Primaries, curve: float | tuple[int, ...]) -> bytes:
    """Return an ICC profile (version 4.3) of three primaries and one transfer curve.

    Args:
        primaries: chromaticities of white, red, green and blue.
        curve: exponent from stored to linear values; 0 for sRGB's curve; or a table of linear values, 0 .. 65535.

    Raises:
        ValueError: the primaries span no colours.
    """
    xy = np.array(primaries, np.float64).reshape(4, 2)
    if (xy[:, 1] <= 0).any() or not np.isfinite(xy).all():
        raise ValueError(f"chromaticities {primaries} are not positive")
    xyz = np.column_stack([xy, 1 - xy.sum(axis=1)]) / xy[:, 1:]  # Y = 1
    try:
        columns = xyz[1:].T * np.linalg.solve(xyz[1:].T, xyz[0])
    except np.linalg.LinAlgError as error:
        raise ValueError(f"chromaticities {primaries} span no colours") from error
    cones = (BRADFORD @ D50) / (BRADFORD @ xyz[0])
    adapted = np.linalg.solve(BRADFORD, cones[:, None] * BRADFORD) @ columns
    if isinstance(curve, tuple):
        trc = b"curv" + struct.pack(f">II{len(curve)}H", 0, len(curve), *curve)
    elif curve == 0:  # IEC 61966-2-1
        numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        trc = b"para" + struct.pack(">IHH5i", 0, 3, 0, *(round(number * 65536) for number in numbers))
    else:
        trc = b"para" + struct.pack(">IHHi", 0, 0, 0, round(curve * 65536))
    tags = {
        **{name: _icc_text(text) for name, text in ((b"desc", "declared by the file"), (b"cprt", "none"))},
        b"wtpt": _icc_xyz(D50),
        **{name: _icc_xyz(adapted[:, column]) for column, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), trc),
    }
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    size = start + len(body)
    header = struct.pack(">I4xI12s12x4s", size, 0x04300000, b"mntrRGB XYZ ", b"acsp").ljust(68, b"\0")
    return (header + struct.pack(">3i", *_fixed(D50))).ljust(128, b"\0") + table + body


def _fixed(numbers: np.ndarray) -> list[int]:
    return [round(float(number) * 65536) for number in numbers]


def _icc_xyz(numbers: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *_fixed(numbers))


def _icc_text(text: str) -> bytes:
    data = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(data), 28) + data


def _profile(primaries: Primaries, curve: float | tuple[int, ...]) -> bytes | None:
    """Return the profile of primaries and a curve; None if they are sRGB's, or span no colours."""
    near = max(abs(a - b) for a, b in zip(primaries, SRGB, strict=True)) <= PRIMARIES_TOLERANCE
    if not isinstance(curve, tuple) and curve and abs(curve / 2.2 - 1) <= GAMMA_TOLERANCE and near:
        curve = 0.0
    if near and curve == 0:
        return None
    try:
        return matrix_profile(SRGB if near else primaries, curve)
    except (ValueError, struct.error):
        return None


def _cicp_profile(primaries: int, transfer: int, *, full_range: bool) -> bytes | None:
    """Return the profile of code points of ITU-T H.273."""
    if transfer not in CICP_GAMMAS:
        name = CICP_OTHERS.get(transfer, "not converted")
        raise _unsupported(f"transfer function {transfer} ({name})")
    if primaries not in CICP_PRIMARIES:
        raise _unsupported(f"colour primaries {primaries}")
    if not full_range:
        raise _unsupported("narrow range")
    return _profile(CICP_PRIMARIES[primaries], CICP_GAMMAS[transfer])


def _unsupported(what: str) -> SampleError:
    return SampleError("unsupported_color", f"the file declares {what}, which is not converted to sRGB")


def _png_chunks(data: bytes) -> dict[bytes, bytes]:
    """Return the chunks before the pixels by name; of several with one name the first."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at + 12 <= len(data):
        length, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if name == b"IDAT":
            break
        if name in (b"cICP", b"sRGB", b"gAMA", b"cHRM"):
            chunks.setdefault(name, data[at + 8 : at + 8 + length])
        at += 12 + length
    return chunks


def _raw_profile(texts: Mapping[Any, Any]) -> bytes | None:
    """The ICC profile in a PNG's text chunk, as ImageMagick and GraphicsMagick write it: name, length, hex digits."""
    for name in RAW_PROFILES:
        _, _, rest = str(texts.get(name, "")).strip().partition("\n")
        length, _, digits = rest.strip().partition("\n")
        try:
            profile = bytes.fromhex(digits)
        except ValueError:
            continue
        if length.strip().isdecimal() and len(profile) == int(length) > 0:
            return profile
    return None


def _gama_profile(gama: bytes, chrm: bytes) -> bytes | None:
    """Return the profile of a PNG's gAMA (the exponent from light to stored values) and cHRM, each times 100,000."""
    exponent = int.from_bytes(gama, "big") / 100_000 if len(gama) == 4 else 0.0
    primaries = tuple(n / 100_000 for n in struct.unpack(">8I", chrm)) if len(chrm) == 32 else SRGB
    return _profile(primaries, 1 / exponent if exponent > 0 else 0.0)


def tiff_profile(tags: Mapping[int, Any], data: bytes) -> bytes | None:
    """Return the profile that a TIFF's tags declare; None for sRGB and without a declaration.

    Args:
        tags: of the first page: an embedded profile, or TransferFunction, WhitePoint and PrimaryChromaticities
            (TIFF 6.0, section 20).
        data: bytes of the file, for EXIF.

    Raises:
        SampleError: unsupported_color.
    """
    embedded = tags.get(ICC_TAG)
    if isinstance(embedded, bytes):
        return embedded
    table, white, primaries = (tags.get(name, ()) for name in (TIFF_TRANSFER, EXIF_WHITE, EXIF_PRIMARIES))
    curve: float | tuple[int, ...] = 0.0
    if isinstance(table, tuple) and len(table) >= 4:  # one table for all channels, or one for each
        channels = 3 if len(table) % 3 == 0 else 1
        curve = tuple(int(value) for value in table[: len(table) // channels])
        if any(table[at : at + len(curve)] != curve for at in range(0, len(table), len(curve))):
            raise _unsupported("a transfer function for each channel")
        if len(curve) > CURVE_LEVELS:
            places = np.linspace(0, len(curve) - 1, CURVE_LEVELS).round().astype(int)
            curve = tuple(curve[place] for place in places.tolist())
    elif not _is_numbers(primaries, 6):
        exif = Pillow.Exif()
        try:
            exif.load(data)  # EXIF has the structure of a TIFF
        except Exception:  # noqa: BLE001 - metadata may be hostile; the picture is still used
            return None
        return _exif_profile(exif)
    colors = _chromaticities(white, primaries)
    return _profile(colors if colors is not None else SRGB, curve)


def _exif_profile(exif: Pillow.Exif) -> bytes | None:
    """Return the profile that EXIF declares (EXIF 2.32; DCF 2.0 for the index R03).

    "Uncalibrated" without more says nothing, and many programs write it: such a picture counts as sRGB.
    """
    try:
        values = exif.get_ifd(EXIF_IFD)
        index = exif.get_ifd(INTEROP_IFD).get(INTEROP_INDEX, "") if values else ""
        space, gamma = values.get(EXIF_SPACE), values.get(EXIF_GAMMA)
        white, primaries = exif.get(EXIF_WHITE, ()), exif.get(EXIF_PRIMARIES, ())
    except Exception:  # noqa: BLE001 - metadata may be hostile; the picture is still used
        return None
    index = index.decode("latin-1") if isinstance(index, bytes) else str(index)
    if space == SRGB_SPACE:
        return None
    if space == ADOBE_SPACE or index.rstrip("\0 ") == "R03":
        return _profile(ADOBE_RGB, ADOBE_GAMMA)
    if space == WIDE_GAMUT_SPACE:
        raise _unsupported("Wide Gamut RGB")
    colors = _chromaticities(white, primaries)
    if colors is None and not _is_numbers((gamma,), 1):
        return None
    exponent = 2.2 if gamma is None or not _is_numbers((gamma,), 1) else float(gamma)
    return _profile(colors if colors is not None else SRGB, exponent)


def _chromaticities(white: Any, primaries: Any) -> Primaries | None:
    """Return white, red, green and blue of EXIF or TIFF tags; None if they are absent or broken."""
    if not _is_numbers(primaries, 6):
        return None
    return (*(float(n) for n in (white if _is_numbers(white, 2) else D65)), *(float(n) for n in primaries))


def _is_numbers(values: Any, count: int) -> bool:
    """Whether `values` are `count` finite positive numbers."""
    if not isinstance(values, Sequence) or len(values) != count:
        return False
    try:
        return all(0 < float(value) < 1e6 for value in values)
    except (TypeError, ValueError, ZeroDivisionError):
        return False


def _bmp_profile(data: bytes) -> bytes | None:
    """Return the profile of a BMP header of version 4 or 5 (Microsoft, BITMAPV5HEADER)."""
    size = int.from_bytes(data[14:18], "little")
    if size < 108 or len(data) < 14 + size:
        return None
    space = data[70:74]
    if space == BMP_LINKED:
        raise _unsupported("a linked profile")
    if space == BMP_EMBEDDED and size >= 124:
        start, length = struct.unpack("<II", data[126:134])
        return data[14 + start : 14 + start + length] or None
    if space != BMP_CALIBRATED:
        return None
    points = np.array(struct.unpack("<9i", data[74:110])).reshape(3, 3) / 2**30
    gammas = np.array(struct.unpack("<3I", data[110:122])) / 2**16
    if (points.sum(axis=1) <= 0).any() or points.sum(axis=0).min() <= 0 or gammas.min() <= 0:
        return None  # often zeros
    if gammas.max() - gammas.min() > 0.01:
        raise _unsupported("a transfer function for each channel")
    xyz = np.vstack([points.sum(axis=0), points])
    xy = xyz[:, :2] / xyz.sum(axis=1, keepdims=True)
    return _profile(tuple(float(n) for n in xy.ravel()), float(gammas.mean()))


def _primary_nclx(data: bytes) -> tuple[int, int] | None:
    """Return (primaries, transfer) of an AVIF's primary item; None if it has no nclx colour information.

    ISO/IEC 14496-12, 8.11 and 12.1.5: a `colr` property belongs to the items that `ipma` associates it with.
    """
    try:
        meta = next(body for name, body in _boxes(data) if name == b"meta")[4:]
        boxes = dict(_boxes(meta))
        pitm = boxes[b"pitm"]
        primary = int.from_bytes(pitm[4:6] if pitm[0] == 0 else pitm[4:8], "big")
        parts = list(_boxes(boxes[b"iprp"]))
        properties = [property_ for name, body in parts if name == b"ipco" for property_ in _boxes(body)]
        for name, body in parts:
            for index in _associations(body, primary) if name == b"ipma" else ():
                kind, value = properties[index - 1]
                if kind == b"colr" and value[:4] == b"nclx":
                    return int.from_bytes(value[4:6], "big"), int.from_bytes(value[6:8], "big")
    except (StopIteration, KeyError, IndexError, struct.error):
        return None
    return None


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, body) of the boxes in `data` (ISO/IEC 14496-12, 4.2)."""
    at = 0
    while at + 8 <= len(data):
        size, name, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        size = size or len(data) - at
        if size < head:
            return
        yield name, data[at + head : at + size]
        at += size


def _associations(body: bytes, item: int) -> list[int]:
    """Numbers of an item's properties, from 1, in an `ipma` box."""
    wide_item, wide_index = body[0] >= 1, bool(body[3] & 1)
    at, result = 8, []
    for _ in range(int.from_bytes(body[4:8], "big")):
        end = at + (4 if wide_item else 2)
        number, count, at = int.from_bytes(body[at:end], "big"), body[end], end + 1
        for _ in range(count):
            width = 2 if wide_index else 1
            index = int.from_bytes(body[at : at + width], "big") & (0x7FFF if wide_index else 0x7F)
            at += width
            if number == item and index:
                result.append(index)
    return result
