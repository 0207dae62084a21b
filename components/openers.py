"""HEIC and JPEG XL, which other packages decode: each is imported when its first picture is read. Torch-free.

HEIC       pillow-heif (`restoray[heic]`), with libheif, which applies its transformations: EXIF's is not
JPEG XL    pillow-jxl-plugin (`restoray[jxl]`), with libjxl; it decodes at once, so the size is read here before
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable

from PIL import Image as Pillow

from components.images import Limits, Opener, check_size
from components.signatures import HEIC, JPEG_XL, is_sequence, other_format
from components.types import SampleError

EXTRAS = {HEIC: "heic", JPEG_XL: "jxl"}
CONTAINER = 12  # bytes of the signature box of a JPEG XL container
RATIOS = ((0, 1), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # ISO/IEC 18181-1, annex D, size header


def opener_of(data: bytes) -> Opener | None:
    """The opener of a HEIC or JPEG XL picture; None for other bytes."""
    return {HEIC: _open_heic, JPEG_XL: _open_jxl}.get(other_format(data))


def _opener(module: str, name: str, kind: str) -> Callable[[io.BytesIO], Pillow.Image]:
    """A class of an optional package.

    Raises:
        SampleError: unsupported_format: it is not installed; the sentence names the extra.
    """
    try:
        opener: Callable[[io.BytesIO], Pillow.Image] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        sentence = f'{kind} needs an extra: pip install "restoray[{EXTRAS[kind]}]"'
        raise SampleError("unsupported_format", sentence) from error
    return opener


def _open_heic(data: bytes, limits: Limits) -> tuple[Pillow.Image, str, int]:
    if is_sequence(data):
        raise SampleError("animated", "the HEIC holds a sequence of pictures")
    open_file = _opener("pillow_heif", "HeifImageFile", HEIC)
    try:
        picture = open_file(io.BytesIO(data))  # the header; pixels come with load()
    except SyntaxError as error:
        raise SampleError("corrupt", f"the HEIC's header cannot be read: {error}") from error
    return picture, "HEIC", int(picture.info.get("bit_depth") or 8)


def _open_jxl(data: bytes, limits: Limits) -> tuple[Pillow.Image, str, int]:
    width, height, animated = jxl_header(data)
    check_size(width, height, len(data), limits)
    if animated:
        raise SampleError("animated", "the JPEG XL holds several frames")
    open_file = _opener("pillow_jxl.JpegXLImagePlugin", "JXLImageFile", JPEG_XL)
    try:
        picture = open_file(io.BytesIO(data))
    except SyntaxError as error:
        raise SampleError("corrupt", f"the JPEG XL cannot be read: {error}") from error
    if picture.size not in ((width, height), (height, width)):
        raise SampleError("corrupt", "the JPEG XL's pixels have another size than its header")
    return picture, "JXL", 16 if picture.mode.startswith("I;16") else 8


def jxl_header(data: bytes) -> tuple[int, int, bool]:
    """(width, height, whether it is animated) of a JPEG XL file, from its header.

    Raises:
        SampleError: truncated or corrupt.
    """
    bits = _Bits(_codestream(data)[2:66])
    width, height = _size(bits)
    if bits.take(1) or not bits.take(1):  # all defaults; no extra fields
        return width, height, False
    bits.take(3)  # orientation
    if bits.take(1):
        _size(bits)  # intrinsic size
    has_preview = bits.take(1)  # its header is not parsed; it is rare
    return width, height, not has_preview and bool(bits.take(1))


def _codestream(data: bytes) -> bytes:
    """The beginning of the codestream: the file itself, or a box of a container (ISO/IEC 18181-2)."""
    if data[:2] == b"\xff\x0a":
        return data[:66]
    at = CONTAINER
    while at + 16 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        head = 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        start = at + head + (4 if name == b"jxlp" else 0)
        if name in (b"jxlc", b"jxlp") and data[start : start + 2] == b"\xff\x0a":
            return data[start : start + 66]
        if size < head:
            break
        at += size
    raise SampleError("truncated", "the JPEG XL file has no pixels")


class _Bits:
    """Bits of a codestream, the lowest one of a byte first."""

    def __init__(self, data: bytes) -> None:
        self.rest, self.count = int.from_bytes(data, "little"), 8 * len(data)

    def take(self, count: int) -> int:
        if count > self.count:
            raise SampleError("truncated", "the JPEG XL file ends inside its header")
        value = self.rest & ((1 << count) - 1)
        self.rest >>= count
        self.count -= count
        return value


def _size(bits: _Bits) -> tuple[int, int]:
    """(width, height) of a size header."""
    small = bits.take(1)
    height = _side(bits, small)
    ratio = bits.take(3)
    width = height * RATIOS[ratio][0] // RATIOS[ratio][1] if ratio else _side(bits, small)
    return width, height


def _side(bits: _Bits, small: int) -> int:
    return 8 * (bits.take(5) + 1) if small else 1 + bits.take((9, 13, 18, 30)[bits.take(2)])
