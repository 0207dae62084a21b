"""PNGs as chunks: their checks, chunks that are added to a file, and 16-bit files, which Pillow does not write.

Torch-free. References are to the PNG specification, third edition.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from components.types import SampleError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by the number of channels (11.2.1, table 12)
UP = 2  # filter type: difference to the pixel above (9.2)
AFTER_HEADER = len(PNG_SIGNATURE) + 25  # the header chunk has 13 bytes of data
XMP_KEYWORD = b"XML:com.adobe.xmp"


def check_png_chunks(data: bytes) -> None:
    """Refuse a PNG without IEND or with a wrong checksum in a critical chunk; Pillow does not check pixel chunks."""
    view, offset = memoryview(data), len(PNG_SIGNATURE)
    while True:
        if offset + 12 > len(data):
            raise SampleError("truncated", "the PNG ends before its end chunk")
        length, name = int.from_bytes(view[offset : offset + 4], "big"), bytes(view[offset + 4 : offset + 8])
        end = offset + 12 + length
        if end > len(data):
            raise SampleError("truncated", f"the PNG ends inside its {name!r} chunk")
        critical = not name[0] & 0x20  # PNG specification 5.4: bit 5 of the first letter
        if critical and zlib.crc32(view[offset + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise SampleError("corrupt", f"wrong checksum in the PNG's {name!r} chunk")
        if name == b"IEND":
            return
        offset = end


def add_chunks(png: bytes, chunks: Sequence[bytes]) -> bytes:
    """Insert chunks behind the header chunk of a PNG."""
    return png[:AFTER_HEADER] + b"".join(chunks) + png[AFTER_HEADER:]


def chunk(name: bytes, data: bytes) -> bytes:
    """One chunk with its length and checksum."""
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def profile_chunk(profile: bytes) -> bytes:
    """An ICC profile as a chunk (11.3.2.3)."""
    return chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile))


def xmp_chunk(packet: bytes) -> bytes:
    """An XMP packet as a chunk: international text, not compressed (11.3.3.4)."""
    return chunk(b"iTXt", XMP_KEYWORD + b"\0\0\0\0\0" + packet)


def text_chunks(text: Mapping[str, str]) -> Iterator[bytes]:
    """Texts by keyword, sorted, as Latin-1 where that suffices (11.3.3)."""
    for keyword, value in sorted(text.items()):
        try:
            yield chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + value.encode("latin-1"))
        except UnicodeEncodeError:
            yield chunk(b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + value.encode())


def encode_png16(image: np.ndarray, text: Mapping[str, str], level: int) -> bytes:
    """Encode a 16-bit picture; equal input gives equal bytes.

    Args:
        image: uint16 [H, W] or [H, W, 2 to 4]: gray, gray with alpha, RGB, RGB with alpha.
        text: texts by keyword.
        level: of deflate, 0 to 9.
    """
    height, width = image.shape[:2]
    channels = 1 if image.ndim == 2 else image.shape[2]
    rows = image.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = UP
    filtered[0, 1:] = rows[0]
    filtered[1:, 1:] = rows[1:] - rows[:-1]  # modulo 256, as the filter wants it
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((16, COLOUR_TYPES[channels], 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(filtered.tobytes(), level))
    return b"".join([PNG_SIGNATURE, chunk(b"IHDR", header), *text_chunks(text), pixels, chunk(b"IEND", b"")])
