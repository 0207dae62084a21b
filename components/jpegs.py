"""JPEGs through libjpeg-turbo without Pillow. Torch-free.

Pillow calls the same library with the same settings, so the pixels are equal. For a small picture, opening and copying
in Pillow take nearly as long as decoding.
"""

from __future__ import annotations

import simplejpeg

from components.types import Image

FRAMES, SCAN = (0xC0, 0xC2), 0xDA  # ITU T.81, table B.1: baseline, progressive; start of scan
TABLES = (0xC4, 0xDB, 0xDD, 0xE0, 0xFE)  # Huffman, quantisation, restart interval; JFIF's segment; comment


def bare_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of a JPEG of 8 bits and three channels without metadata; None for others."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at, size = 2, None
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == SCAN:
            return size
        if marker in FRAMES:
            if size is not None or data[at + 4] != 8 or data[at + 9] != 3:
                return None
            size = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        elif marker not in TABLES:
            return None
        at += 2 + length
    return None


def decode_turbo(data: bytes, size: tuple[int, int]) -> Image | None:
    """Decode a JPEG to uint8 [H, W, 3]; None if it has faults or its size differs from (height, width)."""
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != size:
            return None
        rgb: Image = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:  # also for faults that Pillow tolerates, such as stray bytes between segments
        return None
    return rgb
