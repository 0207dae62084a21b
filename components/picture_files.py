"""Picture files to restore and restored ones: everything that a file carries besides pixels, read and written.

`read_file` gives one record (`PictureFile`), `encode_file` writes a result that has its source's record. The rules:

    orientation   applied, and 1 in the result; an embedded thumbnail is dropped
    EXIF, XMP     taken apart and rebuilt, see components.picture_metadata; IPTC's older block is dropped
    ICC           convert: the pixels become sRGB, and the result has no profile. keep: pixels with a profile for RGB
                  stay in its space, and the result carries it; a profile of another kind is converted as ever
    alpha         straight, colours filled from visible ones (components.images); JPEG has none: the result is on white
    gray          one channel in PNG, JPEG and TIFF, three equal ones in WebP and AVIF, which have no gray
    16 bits       restorers take 8 bits: a deeper file is reduced, and a note says so. A result of 16 bits (PNG, TIFF)
                  has the restorer's 256 levels

Several frames or pages are refused (`animated`). Torch-free.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image as Pillow

from components.images import (
    PNG_LEVEL,
    XMP_TAG,
    Decoded,
    FileParts,
    Info,
    Limits,
    decode_file,
    encode_png,
    flatten,
    probe,
    read_png_text,
    sniff,
)
from components.openers import opener_of
from components.picture_metadata import (
    MAX_XMP_OUT_BYTES,
    METADATA,
    Metadata,
    Tags,
    check_profile,
    exif_block,
    read_provenance,
    read_tags,
    xmp_packet,
)
from components.pngs import add_chunks, chunk, encode_png16, profile_chunk, xmp_chunk
from components.tiff_writing import encode_tiff
from components.tiffs import read_layout
from components.types import Image, SampleError

SUFFIXES: Mapping[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "avif": ".avif", "tiff": ".tiff"}
"""File name suffixes of the formats that are written."""

MEDIA_TYPES: Mapping[str, str] = {name: f"image/{name}" for name in SUFFIXES}
LIKE = "like"
"""The format of the input, or PNG if that is not written."""

FORMATS = (*SUFFIXES, LIKE)
DEEP_FORMATS = ("png", "tiff")
QUALITIES: Mapping[str, int] = {"jpeg": 92, "webp": 90, "avif": 80}  # ours: defaults of the lossy formats
FULL_CHROMA_QUALITY = 90  # ours: from here on JPEG keeps the chroma of every pixel
MAX_SIDES: Mapping[str, int] = {"jpeg": 65_500, "webp": 16_383, "avif": 65_536}  # of libjpeg, libwebp and libavif
ICC = ("convert", "keep")


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """How results are written.

    Attributes:
        format: as in FORMATS.
        quality: 1 to 100, for JPEG, WebP and AVIF; None: QUALITIES.
        bits: of a channel, 8 or 16.
        metadata: as in METADATA. The default keeps what a photographer would miss, without places, owners, serials.
        icc: as in ICC.

    Raises:
        ValueError: a wrong setting; one sentence that names it.
    """

    format: str = "png"
    quality: int | None = None
    bits: int = 8
    metadata: Metadata = "private"
    icc: str = "convert"

    def __post_init__(self) -> None:
        choices = {"format": FORMATS, "metadata": METADATA, "icc": ICC, "bits": (8, 16)}
        for name, values in choices.items():
            value = getattr(self, name)
            if value not in values or isinstance(value, bool):
                raise ValueError(f"{name} must be one of {', '.join(map(str, values))}, got {value!r:.80}")
        if self.quality is not None:
            if isinstance(self.quality, bool) or not isinstance(self.quality, int) or not 1 <= self.quality <= 100:
                raise ValueError(f"quality must be a whole number from 1 to 100, got {self.quality!r:.80}")
            if self.format in DEEP_FORMATS:
                raise ValueError(f"quality has no meaning for {self.format}, which is lossless; leave it out")
        if self.bits == 16 and self.format not in DEEP_FORMATS:
            raise ValueError(f"bits=16 needs format=png or format=tiff; {self.format} may hold 8 bits only")

    def document(self) -> dict[str, Any]:
        """The settings as JSON, without defaults."""
        default = FileSettings()
        return {name: value for name, value in vars(self).items() if value != getattr(default, name)}

    def format_of(self, source: str) -> str:
        """The format of a result whose source has a format of components.images or of an opener."""
        if self.format != LIKE:
            return self.format
        return source.lower() if source.lower() in SUFFIXES else "png"


SETTINGS = tuple(vars(FileSettings()))
"""Names of the settings, which are also parameters of the service and options of the command."""


@dataclass(frozen=True, kw_only=True)
class PictureFile:
    """A picture file, read.

    Attributes:
        parts: upright pixels with straight alpha; sRGB unless there is a profile.
        format: of the file: one of components.images, HEIC or JXL.
        bits: of a channel in the file.
        orientation: EXIF orientation that was applied, 1..8.
        profile: ICC profile of the pixels; b"" for sRGB.
        tags: EXIF and XMP, checked.
        notes: what was dropped or changed, one sentence each.
    """

    parts: Decoded
    format: str
    bits: int = 8
    orientation: int = 1
    profile: bytes = b""
    tags: Tags = field(default_factory=Tags)
    notes: tuple[str, ...] = ()

    def without_pixels(self) -> PictureFile:
        """The record without its pixels, for the time after the restoration."""
        empty = np.empty((0, 0, 3), np.uint8)
        return replace(self, parts=Decoded(image=empty, alpha=None, gray=self.parts.gray))


def probe_file(data: bytes, limits: Limits = Limits(), key: str = "") -> Info:
    """Read the header only; like components.images.probe, also for HEIC and JPEG XL."""
    return probe(data, limits, key, opener_of(data))


def read_file(
    data: bytes, limits: Limits = Limits(), key: str = "", settings: FileSettings = FileSettings()
) -> PictureFile:
    """Decode untrusted bytes, with what the file carries besides pixels.

    Raises:
        SampleError: with a code of components.images; no other exception is raised.
    """
    keep = settings.icc == "keep"
    file = decode_file(data, limits, key, keep, opener_of(data))
    notes = []
    if keep and file.profile and (reason := check_profile(file.profile)):
        file = decode_file(data, limits, key, False, opener_of(data))
        notes.append(f"the ICC profile was converted to sRGB: {reason}")
    if file.bits > 8:
        notes.append(f"{file.bits} bits of a channel were read as 8: the restorer takes 8")
    tags = read_tags(file.exif, file.xmp, settings.metadata, is_tiff=file.format == "TIFF")
    return _record(file, tags, tuple(notes))


def decode_any(data: bytes, limits: Limits = Limits(), key: str = "") -> Image:
    """Decode to uint8 [H, W, 3] on white, like components.images.decode, also HEIC and JPEG XL."""
    return flatten(decode_file(data, limits, key, False, opener_of(data)).parts)


def _record(file: FileParts, tags: Tags, notes: tuple[str, ...]) -> PictureFile:
    return PictureFile(
        parts=file.parts,
        format=file.format,
        bits=file.bits,
        orientation=file.orientation,
        profile=file.profile,
        tags=tags,
        notes=notes + tags.notes,
    )


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A written picture: its bytes, format as in SUFFIXES, and what was changed on the way, one sentence each."""

    data: bytes
    format: str
    notes: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.format]


def encode_file(
    image: Image,
    settings: FileSettings = FileSettings(),
    source: PictureFile | None = None,
    text: Mapping[str, str] | None = None,
    png_level: int = PNG_LEVEL,
    facts: Mapping[str, str] | None = None,
) -> Encoded:
    """Encode a picture; equal input gives equal bytes.

    Args:
        image: uint8 [H, W, 3], with alpha [H, W, 4], gray [H, W], or gray with alpha [H, W, 2].
        settings: format and depth.
        source: record of the file that it was made of; its tags and its profile are written too.
        text: what the result says about itself: text chunks of a PNG, XMP in the other formats, and in a PNG with XMP.
        png_level: of deflate, 0 to 9.
        facts: more of the same, for XMP only.

    Raises:
        SampleError: too_large: the format has no pictures of that size.
    """
    kind = settings.format_of(source.format if source is not None else "")
    side, longest = max(image.shape[:2]), MAX_SIDES.get(kind, 1 << 31)
    if side > longest:
        raise SampleError("too_large", f"a side of {side} pixels exceeds {longest}, the limit of {kind}")
    tags = source.tags if source is not None else Tags()
    profile = source.profile if source is not None else b""
    notes: list[str] = []
    provenance = {**(text or {}), **(facts or {})} if kind != "png" or tags.properties else {}
    xmp = xmp_packet(tags.properties, provenance)
    if len(xmp) > MAX_XMP_OUT_BYTES:
        notes.append("XMP of the source dropped: with the result's own it exceeds 48 KiB")
        xmp = xmp_packet((), provenance)
    if len(xmp) > MAX_XMP_OUT_BYTES:
        xmp = xmp_packet((), {name: value[:1000] for name, value in provenance.items()})
    exif = exif_block(tags, is_srgb=not profile)
    pixels = _with_channels(image, kind, bool(profile), notes)
    if kind == "png":
        data = _png(pixels, settings.bits, text or {}, png_level, exif, profile, xmp)
    elif kind == "tiff":
        deep = _sixteen(pixels) if settings.bits == 16 else pixels
        data = encode_tiff(deep, tags, profile=profile, xmp=xmp, software="restoray" if text else "")
    else:
        quality = settings.quality or QUALITIES[kind]
        data = _lossy(pixels, kind, quality, exif, profile, xmp)
    return Encoded(data=data, format=kind, notes=tuple(notes))


def _sixteen(image: Image) -> np.ndarray:
    """8-bit levels as 16-bit ones: 255 becomes 65535."""
    return image.astype(np.uint16) * np.uint16(257)


def _with_channels(image: Image, kind: str, has_profile: bool, notes: list[str]) -> Image:
    """The picture with the channels that the format has; a profile for RGB needs three."""
    gray, alpha = image.ndim == 2 or image.shape[2] == 2, image.ndim == 3 and image.shape[2] in (2, 4)
    if gray and (has_profile or kind in ("webp", "avif")):
        planes = [image] if image.ndim == 2 else [image[..., 0]]
        image = np.dstack(planes * 3 + ([image[..., 1]] if alpha else []))
        gray = False
    if alpha and kind == "jpeg":
        notes.append("alpha was put on white: JPEG has none")
        colors = np.dstack([image[..., 0]] * 3) if gray else image[..., :3]
        flat = flatten(Decoded(image=colors, alpha=image[..., -1], gray=gray))
        image = flat[..., 0] if gray else flat
    return np.ascontiguousarray(image)


def _png(
    image: Image, bits: int, text: Mapping[str, str], level: int, exif: bytes, profile: bytes, xmp: bytes
) -> bytes:
    png = encode_png(image, text, level) if bits == 8 else encode_png16(_sixteen(image), text, level)
    chunks = [profile_chunk(profile)] if profile else []
    chunks += [chunk(b"eXIf", exif)] if exif else []
    chunks += [xmp_chunk(xmp)] if xmp else []
    return add_chunks(png, chunks) if chunks else png


def _lossy(image: Image, kind: str, quality: int, exif: bytes, profile: bytes, xmp: bytes) -> bytes:
    options: dict[str, Any] = {"quality": quality}
    if kind == "jpeg":
        options |= {"optimize": True, "subsampling": 0 if quality >= FULL_CHROMA_QUALITY else 2}
    elif kind == "avif":
        options |= {"max_threads": 1, "subsampling": "4:4:4" if quality >= FULL_CHROMA_QUALITY else "4:2:0"}
    if exif:
        options["exif"] = b"Exif\0\0" + exif
    if profile:
        options["icc_profile"] = profile
    if xmp:
        options["xmp"] = xmp
    target = io.BytesIO()
    Pillow.fromarray(image).save(target, kind.upper(), **options)
    return target.getvalue()


def read_result_text(data: bytes) -> dict[str, str]:
    """What a result of ours says about itself, by name: text chunks of a PNG, XMP of the other formats.

    Raises:
        SampleError: not a picture that can be opened.
    """
    if sniff(data) == "PNG":
        return read_png_text(data)
    try:
        if sniff(data) == "TIFF":
            xmp = read_layout(data).tags.get(XMP_TAG)
        else:
            with Pillow.open(io.BytesIO(data), formats=(sniff(data),)) as picture:
                xmp = picture.info.get("xmp")
    except Exception as error:
        raise SampleError("corrupt", f"{type(error).__name__}: {error}") from error
    return read_provenance(xmp) if isinstance(xmp, bytes) else {}
