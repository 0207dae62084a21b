"""TIFFs: their layout from the tags, and the samples of layouts that Pillow refuses or misreads.

Pillow reads a fixed list of layouts. It misreads some of them (16-bit gray with white as zero comes out negative,
12-bit gray dark, separate planes of some kinds wrong) and calls many others broken. For those, libtiff (through Pillow)
unpacks each strip or tile as plain bytes, and this module interprets the samples as TIFF 6.0 defines them. Samples
without a definite meaning or range are refused by name. Torch-free.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import TiffImagePlugin

from components.types import SampleError

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, SEPARATED, YCBCR, CIELAB, ICCLAB = 0, 1, 2, 3, 5, 6, 8, 9
KINDS = {  # by photometric interpretation: (name, samples of a pixel)
    WHITE_IS_ZERO: ("gray with white as zero", 1),
    BLACK_IS_ZERO: ("gray", 1),
    RGB: ("RGB", 3),
    PALETTE: ("palette", 1),
    SEPARATED: ("CMYK", 4),
    YCBCR: ("YCbCr", 3),
    CIELAB: ("CIE L*a*b*", 3),
    ICCLAB: ("ICC L*a*b*", 3),
}
OTHER_KINDS = {
    4: "a mask",
    10: "ITU L*a*b*",
    32803: "a colour filter array",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw values",
}
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, SAMPLES = 256, 257, 258, 259, 262, 266, 277
PLANAR, PREDICTOR, EXTRA, FORMAT, COLOR_MAP, ORIENTATION = 284, 317, 338, 339, 320, 274
STRIPS, ROWS_PER_STRIP, STRIP_BYTES, TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 273, 278, 279, 322, 323, 324, 325
INK_SET, INKS, DOT_RANGE, SUBFILE, DNG_VERSION = 332, 334, 336, 254, 50706
YCBCR_TAGS = (529, 530, 532)  # coefficients, subsampling, reference black and white
UNCOMPRESSED, DEFLATE = 1, 8
BYTE_CODECS = (UNCOMPRESSED, 5, DEFLATE, 32946, 32773, 34925, 50000)
"""LZW, deflate (two numbers), PackBits, LZMA, Zstandard: lossless codecs of plain bytes."""
JPEG_CODECS = (6, 7)
PREMULTIPLIED, ALPHA = 1, 2
MAX_SAMPLES = 8  # ours; memory grows with them
MAX_TILE_PIXELS = 1 << 20  # ours: a tile may be larger than a small picture
UNPACK_ROWS = 64  # ours: rows that are split into bits at once


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the first page of a TIFF stores its samples.

    Attributes:
        width, height: in pixels, as stored, before the orientation is applied.
        photometric: what the samples mean, a key of KINDS.
        bits: of a sample, 1 to 16.
        samples: of a pixel, with the extra ones.
        extra: kinds of the extra samples, as in the tag ExtraSamples; 0 for those that it does not name.
        planar: whether each sample has its own plane.
        compression: as in the tag.
        pages: 1, or 2 for several.
        order: "<" for little-endian, ">" for big-endian.
        tags: all tags of the page by number.
    """

    width: int
    height: int
    photometric: int
    bits: int
    samples: int
    extra: tuple[int, ...]
    planar: bool
    compression: int
    pages: int
    order: str
    tags: Mapping[int, Any]

    @property
    def name(self) -> str:
        return f"{self.bits}-bit {KINDS[self.photometric][0]}"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)

    @property
    def orientation(self) -> int:
        """EXIF orientation, 1 to 8; 1 if it is absent or invalid."""
        value = _number(self.tags, ORIENTATION, 1)
        return value if 1 <= value <= 8 else 1

    @property
    def read_by_pillow(self) -> bool:
        """Whether Pillow reads this layout, and rightly."""
        if self.compression not in BYTE_CODECS:
            return True
        if self.photometric == YCBCR:
            return self.compression != UNCOMPRESSED  # libtiff converts to RGB; Pillow alone ignores the subsampling
        wide = self.photometric == RGB or (self.photometric == BLACK_IS_ZERO and self.samples == 1)
        depths = (1, 2, 4, 8, 16) if wide else (1, 2, 4, 8)
        if self.planar or self.photometric in (CIELAB, ICCLAB) or self.bits not in depths:
            return False
        if len(_sequence(self.tags.get(EXTRA, ()))) != len(self.extra) and (self.photometric, self.samples) != (RGB, 4):
            return False  # Pillow takes extra samples only with the tag
        fill = _number(self.tags, FILL_ORDER, 1)
        prefix = b"II" if self.order == "<" else b"MM"
        key = (prefix, self.photometric, (1,), fill, (self.bits,) * self.samples, self.extra)
        return key in TiffImagePlugin.OPEN_INFO and _same(self.tags, FORMAT, self.samples, 1) == 1


def read_layout(data: bytes) -> Layout:
    """Read the layout of a TIFF's first page.

    Raises:
        SampleError: unsupported_format: a camera's raw file; unsupported_mode: samples without a definite meaning or
            range, with the kind in the sentence.
    """
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    stream = io.BytesIO(data)
    first = directory.next
    stream.seek(first)
    directory.load(stream)
    if directory.next == first:  # unchanged: the end was not reached
        raise SampleError("truncated", "the TIFF ends inside its tags")
    tags = dict(directory)
    if DNG_VERSION in tags or data[8:10] == b"CR":
        raise SampleError("unsupported_format", f"a camera's raw file ({'DNG' if DNG_VERSION in tags else 'CR2'})")
    if _number(tags, SUBFILE, 0) & 1:
        raise _unsupported("a reduced version of another picture as its first page, as raw files have")
    photometric, compression = _number(tags, PHOTOMETRIC, 0), _number(tags, COMPRESSION, 1)
    if photometric not in KINDS:
        raise _unsupported(OTHER_KINDS.get(photometric, f"photometric interpretation {photometric}"))
    kind, channels = KINDS[photometric]
    samples = _number(tags, SAMPLES, channels if compression in JPEG_CODECS else 1)
    if not channels <= samples <= MAX_SAMPLES and (photometric, samples) != (YCBCR, 1):  # JPEG with luma only
        raise _unsupported(f"{kind} with {samples} samples for a pixel")
    bits, form = _same(tags, BITS, samples, 1), _same(tags, FORMAT, samples, 1)
    if bits is None or form is None:
        raise _unsupported(f"{kind} with samples of different types")
    if form not in (1, 4) or not 1 <= bits <= 16:  # 4: undefined; read as unsigned
        number = {1: "unsigned", 2: "signed", 3: "float"}.get(form, "other")
        raise _unsupported(f"{bits}-bit {number} values, which have no declared range")
    extra = tuple(_sequence(tags.get(EXTRA, ())))[: max(0, samples - channels)]
    if (photometric, samples, extra) == (RGB, 4, ()):
        extra = (ALPHA,)  # the tag is often absent
    layout = Layout(
        width=_number(tags, WIDTH, 0),
        height=_number(tags, HEIGHT, 0),
        photometric=photometric,
        bits=bits,
        samples=samples,
        extra=extra + (0,) * max(0, samples - channels - len(extra)),
        planar=_number(tags, PLANAR, 1) == 2,
        compression=compression,
        pages=2 if directory.next else 1,
        order="<" if data[:2] == b"II" else ">",
        tags=tags,
    )
    _check_inks(layout)
    if layout.photometric == PALETTE and len(_sequence(tags.get(COLOR_MAP, ()))) != 3 << bits:
        raise SampleError("corrupt", f"the TIFF's palette has not {1 << bits} colours")
    if layout.photometric == YCBCR and bits != 8:
        raise _unsupported(layout.name)
    if compression in JPEG_CODECS and bits != 8:  # Pillow gives the 12 bits of a JPEG as the low ones of 16
        raise _unsupported(f"{layout.name} as JPEG")
    return layout


@dataclass(frozen=True, kw_only=True)
class TiffPicture:
    """The first page of a TIFF that Pillow cannot read. `load` gives the pixels."""

    data: bytes
    layout: Layout

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture."""
        return self.layout.size

    def load(self) -> tuple[Pillow.Image, np.ndarray | None]:
        """Decode the pixels.

        Returns:
            A picture of mode L, RGB, CMYK or LAB, as stored; and alpha, uint8 [H, W], or None.

        Raises:
            SampleError: truncated or corrupt.
        """
        layout = self.layout
        if layout.photometric == YCBCR:
            return _recompressed(self.data, layout), None
        channels = KINDS[layout.photometric][1]
        samples = read_samples(self.data, layout)
        kinds = [kind for kind in layout.extra if kind in (PREMULTIPLIED, ALPHA)]
        alpha = to_eight_bits(samples[..., channels + layout.extra.index(kinds[0])], layout.bits) if kinds else None
        colors = samples[..., :channels]
        if alpha is not None and kinds[0] == PREMULTIPLIED:
            colors = _unmultiplied(colors, samples[..., channels + layout.extra.index(PREMULTIPLIED)], layout.bits)
        return _picture(colors, layout), alpha


def to_eight_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """Scale whole numbers of `bits` bits to 0 .. 255, rounded; uint8 of the same shape."""
    if bits == 8:
        return samples.astype(np.uint8)
    top = 2**bits - 1
    levels = np.rint(np.arange(2**bits) * (255 / top)).astype(np.uint8)
    return np.asarray(levels[samples])


def read_samples(data: bytes, layout: Layout) -> np.ndarray:
    """Read the samples of a page as stored, uint8 or uint16 [H, W, samples].

    Raises:
        SampleError: truncated or corrupt.
    """
    count = 1 if layout.planar else layout.samples
    result = np.zeros((layout.height, layout.width, layout.samples), np.uint8 if layout.bits <= 8 else np.uint16)
    chunks, boxes = list(_chunks(data, layout)), list(_boxes(layout))
    for plane in range(layout.samples if layout.planar else 1):
        values = _unpack(_plain(chunks[plane * len(boxes) :][: len(boxes)], count, layout), count, layout)
        start = 0
        for top, left, rows in boxes:
            area = result[top : top + rows, left : left + values.shape[1], plane : plane + count]
            area[...] = values[start : start + len(area), : area.shape[1]]
            start += rows
    return result


def _box_size(layout: Layout) -> tuple[int, int]:
    """(rows, columns) of a strip or tile; the last strip may have fewer rows."""
    tags, height, width = layout.tags, layout.height, layout.width
    if TILES not in tags:
        rows = min(height, _number(tags, ROWS_PER_STRIP, height))
        if rows < 1:
            raise SampleError("corrupt", "the TIFF's strips have no rows")
        return rows, width
    rows, columns = _number(tags, TILE_HEIGHT, 0), _number(tags, TILE_WIDTH, 0)
    if min(rows, columns) < 1 or rows * columns > 4 * height * width + MAX_TILE_PIXELS:
        raise SampleError("corrupt", f"the TIFF's tiles have {columns} x {rows} pixels")
    return rows, columns


def _boxes(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """(top, left, rows) of the strips or tiles of one plane."""
    rows, columns = _box_size(layout)
    for top in range(0, layout.height, rows):
        for left in range(0, layout.width, columns):
            yield top, left, rows if TILES in layout.tags else min(rows, layout.height - top)


def _chunks(data: bytes, layout: Layout) -> Iterator[bytes]:
    """Bytes of the strips or tiles as stored, of all planes."""
    tags = layout.tags
    rows, columns = _box_size(layout)
    count = -(-layout.height // rows) * -(-layout.width // columns) * (layout.samples if layout.planar else 1)
    offsets = _sequence(tags.get(TILES, tags.get(STRIPS, ())))
    sizes = _sequence(tags.get(TILE_BYTES, tags.get(STRIP_BYTES, ())))
    if len(sizes) != len(offsets):
        if sizes or len(offsets) != 1:
            raise SampleError("corrupt", "the TIFF has not as many sizes as strips or tiles")
        sizes = [len(data) - offsets[0]]
    if len(offsets) < count:
        raise SampleError("truncated", f"the TIFF lists {len(offsets)} of {count} strips or tiles")
    if sum(sizes[:count]) > 2 * len(data):
        raise SampleError("corrupt", "the TIFF's strips or tiles overlap")
    for start, size in zip(offsets[:count], sizes, strict=False):
        if start + size > len(data):
            raise SampleError("truncated", "the TIFF ends inside its pixels")
        yield data[start : start + size]


def _plain(chunks: Sequence[bytes], count: int, layout: Layout) -> bytes:
    """Undo compression and fill order of the chunks of a plane with `count` samples; return their rows of whole bytes.

    libtiff reads them as the strips of a gray picture, whose pixels are these bytes.
    """
    rows, columns = _box_size(layout)
    width = (columns * count * layout.bits + 7) // 8
    total = rows * len(chunks) if TILES in layout.tags else layout.height
    fill = _number(layout.tags, FILL_ORDER, 1)
    if layout.compression == UNCOMPRESSED and fill == 1:
        lengths = [min(rows, total - rows * number) * width for number in range(len(chunks))]
        if any(len(chunk) < length for chunk, length in zip(chunks, lengths, strict=True)):
            raise SampleError("truncated", "a strip or tile of the TIFF is too short")
        return b"".join(chunk[:length] for chunk, length in zip(chunks, lengths, strict=True))
    stored = {BITS: [8], COMPRESSION: [layout.compression], FILL_ORDER: [fill]}
    tags = {PHOTOMETRIC: [BLACK_IS_ZERO], WIDTH: [width], HEIGHT: [total], ROWS_PER_STRIP: [rows], **stored}
    return _pillow(tags, chunks).tobytes()


def _unpack(data: bytes, count: int, layout: Layout) -> np.ndarray:
    """Unpack the rows of a plane to whole numbers [rows, columns, count]."""
    bits, columns = layout.bits, _box_size(layout)[1]
    rows = len(data) // ((columns * count * bits + 7) // 8)
    shape = (rows, columns, count)
    values: Any
    if bits in (8, 16):
        values = np.frombuffer(data, f"{layout.order}u{bits // 8}").reshape(shape)
    else:
        stored = np.frombuffer(data, np.uint8).reshape(rows, -1)
        weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.uint16)
        values = np.empty((rows, columns * count), np.uint16)
        for top in range(0, rows, UNPACK_ROWS):
            each = np.unpackbits(stored[top : top + UNPACK_ROWS], axis=1, count=columns * count * bits)
            values[top : top + UNPACK_ROWS] = each.reshape(len(each), -1, bits) @ weights
        values = values.reshape(shape)
    if _number(layout.tags, PREDICTOR, 1) == 2:  # differences along the row
        if bits not in (8, 16):
            raise _unsupported(f"{layout.name} as differences")
        values = np.cumsum(values, axis=1, dtype=np.uint16 if bits == 16 else np.uint8)
    elif _number(layout.tags, PREDICTOR, 1) != 1:
        raise _unsupported(f"{layout.name} with a predictor for floats")
    return values


def _picture(colors: np.ndarray, layout: Layout) -> Pillow.Image:
    """Make a Pillow picture of samples without the extra ones."""
    bits, photometric = layout.bits, layout.photometric
    if photometric == PALETTE:
        table: np.ndarray = np.array(_sequence(layout.tags[COLOR_MAP]), np.uint32).reshape(3, 1 << bits).T
        # some writers store 8 bits where the standard has 16
        table = table if table.max(initial=0) < 256 else table >> 8
        return Pillow.fromarray(table.astype(np.uint8)[colors[..., 0]])
    if photometric in (CIELAB, ICCLAB):
        return _lab_picture(colors, bits, signed=photometric == CIELAB)
    levels: np.ndarray = np.ascontiguousarray(to_eight_bits(colors, bits))
    if photometric == WHITE_IS_ZERO:
        levels = 255 - levels
    if photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
        return Pillow.fromarray(levels[..., 0])
    return Pillow.frombytes({RGB: "RGB", SEPARATED: "CMYK"}[photometric], levels.shape[1::-1], levels.tobytes())


def _lab_picture(colors: np.ndarray, bits: int, *, signed: bool) -> Pillow.Image:
    """Make a picture of mode LAB: L* as 0 .. 255, a* and b* from -128.

    CIELAB has signed a* and b*, and 100 is the largest L* (TIFF 6.0, section 23). ICCLAB adds 128 to a* and b*, and
    with 16 bits 65280 is an L* of 100 (Adobe Photoshop TIFF technical notes, 2002).
    """
    values: np.ndarray = colors.astype(np.int32)
    light: np.ndarray
    tints: np.ndarray
    if bits == 16:
        light = values[..., :1] * (255 / 65535) if signed else np.minimum(values[..., :1] / 256, 255)
        tints = (values[..., 1:] + 32768) % 65536 / 256 if signed else values[..., 1:] / 256
    elif bits == 8:
        light, tints = values[..., :1], (values[..., 1:] + 128) % 256 if signed else values[..., 1:]
    else:
        raise _unsupported(f"{bits}-bit L*a*b*")
    stored = np.rint(np.concatenate([light, tints], axis=-1)).clip(0, 255).astype(np.uint8)
    stored[..., 1:] ^= 128  # Pillow reads signed bytes
    return Pillow.frombytes("LAB", stored.shape[1::-1], stored.tobytes(), "raw", "LAB")


def _unmultiplied(colors: np.ndarray, alpha: np.ndarray, bits: int) -> np.ndarray:
    """Divide premultiplied samples by alpha."""
    top = np.uint64(2**bits - 1)
    weight = np.maximum(alpha, 1).astype(np.uint64)[..., None]
    return np.minimum((colors * top + weight // 2) // weight, top).astype(colors.dtype)


def _recompressed(data: bytes, layout: Layout) -> Pillow.Image:
    """Read uncompressed YCbCr: libtiff knows the subsampling, but Pillow lets it read compressed pixels only."""
    names = (WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLES, PLANAR, ROWS_PER_STRIP, TILE_WIDTH, TILE_HEIGHT, *YCBCR_TAGS)
    tags = {name: _sequence(layout.tags[name]) for name in names if name in layout.tags}
    chunks = [zlib.compress(chunk, 1) for chunk in _chunks(data, layout)]
    return _pillow({**tags, COMPRESSION: [DEFLATE]}, chunks)


def _pillow(tags: Mapping[int, Sequence[Any]], chunks: Sequence[bytes]) -> Pillow.Image:
    """Read a TIFF of these tags and chunks."""
    with TiffImagePlugin.TiffImageFile(io.BytesIO(_tiff(tags, chunks))) as picture:  # Pillow.open limits the pixels
        picture.load()
        return picture.copy()


def _tiff(tags: Mapping[int, Sequence[Any]], chunks: Sequence[bytes]) -> bytes:
    """Write a little-endian TIFF of one page around compressed strips, or tiles if there is a TILE_WIDTH."""
    names = (TILES, TILE_BYTES) if TILE_WIDTH in tags else (STRIPS, STRIP_BYTES)
    sizes = [len(chunk) for chunk in chunks]
    offsets = [8, *(8 + end for end in accumulate(sizes))][:-1]
    data, rows = b"".join(chunks), b""
    for name, values in sorted({**tags, names[0]: offsets, names[1]: sizes}.items()):
        if any(isinstance(value, int) for value in values):
            kind, value = 4, struct.pack(f"<{len(values)}I", *values)
        else:
            kind, value = 11, struct.pack(f"<{len(values)}f", *values)
        if len(value) > 4:
            data, value = data + value, struct.pack("<I", 8 + len(data))
        rows += struct.pack("<HHI", name, kind, len(values)) + value
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return head + data + struct.pack("<H", len(rows) // 12) + rows + bytes(4)


def _check_inks(layout: Layout) -> None:
    """Refuse separations that are not the four process inks from 0 to full."""
    if layout.photometric != SEPARATED:
        return
    tags, top = layout.tags, 2**layout.bits - 1
    if _number(tags, INK_SET, 1) != 1 or _number(tags, INKS, 4) != 4:
        raise _unsupported(f"{layout.bits}-bit inks that are not CMYK")
    dots = list(_sequence(tags.get(DOT_RANGE, (0, top))))
    if dots[:2] not in ([0, top], [0, 255]) or any(dots[at : at + 2] != dots[:2] for at in range(0, len(dots), 2)):
        raise _unsupported(f"{layout.name} with a dot range of {dots[:8]}")


def _unsupported(what: str) -> SampleError:
    return SampleError("unsupported_mode", f"the TIFF holds {what}")


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple | list) else list(value) if isinstance(value, bytes) else (value,)


def _number(tags: Mapping[int, Any], name: int, default: int) -> int:
    """A tag's first whole number; the default if it is absent or of another type."""
    values = _sequence(tags.get(name, default))
    return int(values[0]) if values and isinstance(values[0], int) else default


def _same(tags: Mapping[int, Any], name: int, count: int, default: int) -> int | None:
    """The value of a tag that has one for each sample; None if they differ."""
    values = set(_sequence(tags.get(name, (default,)))[:count])
    return int(values.pop()) if len(values) == 1 else None
