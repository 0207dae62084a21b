"""Signatures of pictures that components.images does not decode, so that errors and openers can name the format."""

from __future__ import annotations

JPEG_XL, HEIC = "JPEG XL", "HEIC"
AVIF_BRANDS = frozenset({b"avif", b"avis"})
HEIC_BRANDS = frozenset(
    {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
)  # ISO/IEC 23008-12, annexes B and C
SEQUENCE_BRANDS = (b"hevc", b"hevx", b"msf1")
OTHER_PICTURES = (  # (offset, signature, name)
    (0, b"8BPS", "PSD"),
    (0, b"%!PS", "EPS"),
    (0, b"%PDF", "PDF"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"\x00\x00\x01\xba", "MPEG"),
    (0, b"\x00\x00\x01\xb3", "MPEG"),
    (0, b"\xff\x0a", JPEG_XL),
    (4, b"JXL ", JPEG_XL),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"II+\x00", "BigTIFF"),
    (0, b"MM\x00+", "BigTIFF"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"<svg", "SVG"),
    (4, b"ftyp", "HEIC or video"),
)


def other_format(data: bytes) -> str:
    """The name of the format; "" if the bytes have none of these signatures."""
    if is_heic(data):
        return HEIC
    return next((name for at, mark, name in OTHER_PICTURES if data[at : at + len(mark)] == mark), "")


def is_heic(data: bytes) -> bool:
    """Whether the bytes are a HEIC picture by their main brand or by a compatible one, and no AVIF."""
    brands = set(_brands(data)) if data[4:8] == b"ftyp" else set()
    return bool(brands & HEIC_BRANDS) and not brands & AVIF_BRANDS


def is_sequence(data: bytes) -> bool:
    """Whether the main brand is that of a sequence of pictures."""
    return data[4:8] == b"ftyp" and data[8:12] in SEQUENCE_BRANDS


def is_avif(data: bytes) -> bool:
    """Whether the bytes are an AVIF."""
    return data[4:8] == b"ftyp" and not AVIF_BRANDS.isdisjoint(_brands(data))


def _brands(data: bytes) -> list[bytes]:
    size = min(int.from_bytes(data[:4], "big"), 256, len(data))
    return [data[at : at + 4] for at in (8, *range(16, size - 3, 4))]
