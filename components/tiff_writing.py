"""TIFFs of 8 or 16 bits with metadata, of one page in deflated strips. Pillow writes no 16-bit colours. Torch-free."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from components.picture_metadata import ASCII, BYTE, LONG, SHORT, UNDEFINED, Entry, Tags, directories

ROWS_PER_STRIP = 64  # ours
DEFLATE, DIFFERENCES, UNASSOCIATED_ALPHA = 8, 2, 2  # TIFF 6.0: compression (Adobe's number), predictor, extra sample


def encode_tiff(
    image: np.ndarray, tags: Tags, *, profile: bytes = b"", xmp: bytes = b"", level: int = 6, software: str = ""
) -> bytes:
    """Encode a picture; equal input gives equal bytes.

    Args:
        image: uint8 or uint16 [H, W] or [H, W, 2 to 4]: gray, gray with alpha, RGB, RGB with alpha.
        tags: EXIF, which becomes part of the directories.
        profile: ICC profile of the pixels; b"" for sRGB.
        xmp: packet.
        level: of deflate.
        software: value of the tag.
    """
    samples = image[..., None] if image.ndim == 2 else image
    height, width, channels = samples.shape
    differences = samples.copy()
    differences[:, 1:] -= samples[:, :-1]  # modulo the type's range, as the predictor wants it
    little = differences.astype(differences.dtype.newbyteorder("<"), copy=False)
    strips = [zlib.compress(little[top : top + ROWS_PER_STRIP].tobytes(), level) for top in range(0, height, 64)]
    sizes = [len(strip) for strip in strips]
    entries: list[Entry] = [
        _longs(256, width),
        _longs(257, height),
        _shorts(258, *(channels * [8 * image.itemsize])),
        _shorts(259, DEFLATE),
        _shorts(262, 2 if channels > 2 else 1),
        _shorts(277, channels),
        _longs(278, ROWS_PER_STRIP),
        _longs(279, *sizes),
        _longs(273, *sizes),
        _shorts(317, DIFFERENCES),
    ]
    if channels in (2, 4):
        entries.append(_shorts(338, UNASSOCIATED_ALPHA))
    if software:
        entries.append((305, ASCII, software.encode() + b"\0"))
    if xmp:
        entries.append((700, BYTE, xmp))
    if profile:
        entries.append((34675, UNDEFINED, profile))
    _, end = directories(tags, entries, not profile, sum(sizes))
    offsets = [end + sum(sizes[:number]) for number in range(len(sizes))]
    entries[8] = _longs(273, *offsets)
    head, _ = directories(tags, entries, not profile, sum(sizes))
    return head + b"".join(strips)


def _shorts(tag: int, *values: int) -> Entry:
    return tag, SHORT, struct.pack(f"<{len(values)}H", *values)


def _longs(tag: int, *values: int) -> Entry:
    return tag, LONG, struct.pack(f"<{len(values)}I", *values)
