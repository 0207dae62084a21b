"""Writes TIFFs of every kind by hand (TIFF 6.0), so that their readers are not tested against themselves."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

NONE, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773
SHORT, LONG, RATIONAL, BYTES = 3, 4, 5, 7


def tiff(
    samples: np.ndarray,
    photometric: int,
    bits: int,
    *,
    order: str = "<",
    compression: int = NONE,
    planar: int = 1,
    tile: int = 0,
    rows_per_strip: int = 16,
    predictor: int = 1,
    sample_format: int = 1,
    extra: Sequence[int] = (),
    tags: Mapping[int, Sequence[int] | bytes] = {},
    pages: int = 1,
) -> bytes:
    """Return a TIFF.

    Args:
        samples: [H, W, S], whole numbers of `bits` bits, or floats for sample_format 3.
        order: "<" little-endian, ">" big-endian.
        tile: side of the tiles, a multiple of 16; 0: strips.
        predictor: 2 stores differences along the rows.
        extra: ExtraSamples: 0 unspecified, 1 premultiplied alpha, 2 alpha.
        tags: more tags; their numbers are SHORTs, or pairs for RATIONALs.
        pages: the picture is repeated as so many pages.
    """
    height, width, count = samples.shape
    planes = [samples] if planar == 1 else [samples[..., c : c + 1] for c in range(count)]
    chunks = []
    for plane in planes:
        if tile:
            padded = np.pad(plane, ((0, -height % tile), (0, -width % tile), (0, 0)), mode="edge")
            boxes = [
                padded[top : top + tile, left : left + tile]
                for top in range(0, height, tile)
                for left in range(0, width, tile)
            ]
        else:
            boxes = [plane[top : top + rows_per_strip] for top in range(0, height, rows_per_strip)]
        chunks += [_compress(_pack(box, bits, order, predictor), compression) for box in boxes]
    data = bytearray(b"II*\0" if order == "<" else b"MM\0*") + bytes(4)
    place = 4  # of the next directory's offset
    for _ in range(pages):
        offsets = []
        for chunk in chunks:
            offsets.append(len(data))
            data += chunk + bytes(len(chunk) % 2)
        entries: dict[int, tuple[int, Sequence[int] | bytes]] = {
            256: (LONG, [width]),
            257: (LONG, [height]),
            258: (SHORT, [bits] * count),
            259: (SHORT, [compression]),
            262: (SHORT, [photometric]),
            277: (SHORT, [count]),
            284: (SHORT, [planar]),
            339: (SHORT, [sample_format] * count),
        }
        if tile:
            entries |= {322: (SHORT, [tile]), 323: (SHORT, [tile]), 324: (LONG, offsets)}
            entries[325] = (LONG, [len(chunk) for chunk in chunks])
        else:
            entries |= {273: (LONG, offsets), 278: (LONG, [rows_per_strip])}
            entries[279] = (LONG, [len(chunk) for chunk in chunks])
        if predictor != 1:
            entries[317] = (SHORT, [predictor])
        if extra:
            entries[338] = (SHORT, list(extra))
        for tag, value in tags.items():
            numbers = not isinstance(value, bytes)
            kind = RATIONAL if numbers and len(value) and isinstance(value[0], tuple) else SHORT if numbers else BYTES
            entries[tag] = (kind, value)
        place = _directory(data, entries, order, place)
    return bytes(data)


def _directory(
    data: bytearray, entries: Mapping[int, tuple[int, Sequence[int] | bytes]], order: str, place: int
) -> int:
    """Append a directory; return where the next one's offset stands."""
    endian = "little" if order == "<" else "big"
    rows = b""
    for tag, (kind, value) in sorted(entries.items()):
        if isinstance(value, bytes):
            body, count = value, len(value)
        elif kind == RATIONAL:
            body, count = b"".join(n.to_bytes(4, endian) for pair in value for n in pair), len(value)  # type: ignore[attr-defined]
        else:
            size = 2 if kind == SHORT else 4
            body, count = b"".join(int(n).to_bytes(size, endian) for n in value), len(value)
        if len(body) > 4:
            at, body = len(data), body + bytes(len(body) % 2)
            data += body
            body = at.to_bytes(4, endian)
        rows += tag.to_bytes(2, endian) + kind.to_bytes(2, endian) + count.to_bytes(4, endian) + body.ljust(4, b"\0")
    data[place : place + 4] = len(data).to_bytes(4, endian)
    data += len(entries).to_bytes(2, endian) + rows
    data += bytes(4)
    return len(data) - 4


def _pack(box: np.ndarray, bits: int, order: str, predictor: int) -> bytes:
    if predictor == 2:
        first = np.zeros_like(box[:, :1])
        box = np.diff(box.astype(np.int64), axis=1, prepend=first) % 2**bits
    if box.dtype.kind == "f":
        return box.astype(f"{order}f{bits // 8}").tobytes()
    if bits in (8, 16, 32):
        return (box % 2**bits).astype(f"{order}u{bits // 8}").tobytes()
    rows = box.reshape(len(box), -1).astype(np.int64)
    bit = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(bit.astype(np.uint8).reshape(len(rows), -1), axis=1).tobytes()


def _compress(data: bytes, compression: int) -> bytes:
    if compression == DEFLATE:
        return zlib.compress(data)
    if compression == PACKBITS:
        parts = [data[at : at + 128] for at in range(0, len(data), 128)]
        return b"".join(bytes([len(part) - 1]) + part for part in parts)
    if compression == LZW:  # literals only; a clear code keeps the codes at 9 bits
        codes = [256]
        for number, byte in enumerate(data, 1):
            codes.append(byte)
            if number % 200 == 0:
                codes.append(256)
        text = "".join(f"{code:09b}" for code in [*codes, 257])
        text += "0" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big")
    return data
