"""Pictures as arrays: safe decoding of untrusted bytes, resizing, cropping, and PNGs with text chunks.

Torch-free. Pictures are RGB arrays [H, W, 3], uint8 or float32 in [0, 1], in the sRGB colour space. Every bad file
raises a `SampleError` with one of these codes:

    empty               no bytes
    not_image           the bytes have no known picture format (an HTML error page, text, noise)
    unsupported_format  a picture, but not of a format on the allow-list (HEIC, PSD, SVG, ...)
    unsupported_mode    pixel values without a definite meaning or range (32-bit integers, floats, spot colours)
    unsupported_color   a declared colour space that is not converted to sRGB (HDR transfer functions)
    too_large           more bytes, pixels or metadata than allowed; checked in the header, before decoding
    too_small, aspect   the short side is too short, or the long side too long for it
    animated            several frames or pages
    truncated           the file ends early; missing pixels are never filled with gray
    corrupt             broken in another way
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import cv2
import numpy as np
from PIL import Image as Pillow
from PIL import PngImagePlugin, TiffImagePlugin

from components.color_spaces import declared_profile, srgb_and_alpha, tiff_profile, to_srgb
from components.jpegs import bare_jpeg_size, decode_turbo
from components.pngs import PNG_SIGNATURE, check_png_chunks
from components.signatures import is_avif, other_format
from components.tiffs import RGB, TiffPicture, read_layout
from components.types import Image, SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF", "GIF")
"""Formats that are decoded; GIF only with one frame."""

BACKGROUND = 255
"""Gray level of the background of transparent pictures: white."""

COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA")
"""Pillow's modes of pictures whose pixels may stay in the space of a profile for RGB."""

ORIENTATION_TAG = 0x0112  # EXIF 2.32, table 4
XMP_TAG = 700  # of a TIFF
AVIF_HEAD_BYTES = 4096  # ours: where the bits of an AVIF are looked for
BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)  # the signature has two letters only, so this field is checked too
MAX_STRETCH = 20  # ours: aspect above which a strip is enlarged less
HARMLESS_PIXELS = 1 << 22  # ours: 12 MiB of RGB are harmless at any compression ratio
CORPUS_PNG_LEVEL = 6  # of every PNG in a corpus; another level would change the bytes of finished corpora
PNG_LEVEL = 1  # of results: a fifth of level 6's time, and files 4 % larger (docs/benchmarks.md)
RUN_LENGTHS = 3  # zlib's Z_RLE: on filtered photographs faster and smaller than its levels 1 to 3
TEXT_LIMIT_BYTES = 1 << 20  # ours: longest value that encode_png writes


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a picture file. All numbers are ours.

    Attributes:
        max_pixels: width times height, from the header.
        max_bytes: size of the file.
        min_side_px: least length of the short side.
        max_aspect: largest ratio of the long to the short side.
        max_expansion: most decoded RGB bytes per file byte, for pictures above 4 million pixels. It stops compression
            bombs: deflate reaches 1,030, and photographs stay below 250 even as JPEG of quality 5.
        pixels_option, bytes_option: what sets max_pixels and max_bytes, for the errors.
    """

    max_pixels: int = 50_000_000
    max_bytes: int = 64 << 20
    min_side_px: int = 8
    max_aspect: float = 20.0
    max_expansion: float = 500.0
    pixels_option: str = "--max-megapixels"
    bytes_option: str = "--max-megabytes"

    def check_bytes(self, count: int) -> None:
        """Check the size of a file; raise SampleError too_large."""
        if count > self.max_bytes:
            detail = f"{count} bytes exceed the limit of {self.max_bytes} bytes ({self.bytes_option})"
            raise SampleError("too_large", detail)


def limits_for_any_shape(max_pixels: int = 50_000_000, max_bytes: int | None = None) -> Limits:
    """Return limits without a least side and without an aspect, for pictures to restore (decision 0009).

    Args:
        max_pixels: width times height.
        max_bytes: size of the file; None takes 8 for each pixel, which are 16 bits with alpha, and at least 64 MiB.
    """
    max_bytes = max(64 << 20, 8 * max_pixels) if max_bytes is None else max_bytes
    return Limits(max_pixels=max_pixels, max_bytes=max_bytes, min_side_px=1, max_aspect=math.inf)


ANY_SHAPE = limits_for_any_shape()
"""Limits of the commands that restore, degrade and measure pictures."""


@dataclass(frozen=True, kw_only=True)
class Info:
    """Values of a header: format as in FORMATS, and width and height in pixels of the upright picture."""

    format: str
    width: int
    height: int


def sniff(data: bytes) -> str:
    """Return the format of the bytes by their signature, independent of the file name.

    Raises:
        SampleError: empty, not_image, or unsupported_format.
    """
    if not data:
        raise SampleError("empty", "the file holds no bytes")
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == PNG_SIGNATURE:
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[:4] in (b"II*\x00", b"MM\x00*"):
        return "TIFF"
    if is_avif(data):
        return "AVIF"
    if data[:2] == b"BM" and len(data) >= 26 and int.from_bytes(data[14:18], "little") in BMP_HEADER_SIZES:
        return "BMP"
    if name := other_format(data):
        raise SampleError("unsupported_format", f"{name} is not among {', '.join(FORMATS)}")
    raise SampleError("not_image", f"the first bytes ({data[:8]!r}) are of no known picture format")


def probe(data: bytes, limits: Limits = Limits(), key: str = "", opener: Opener | None = None) -> Info:
    """Read the header only, and check it against the limits; `opener` as in decode_file.

    Raises:
        SampleError: like `decode`, except for faults in the pixels.
    """
    with _as_sample_errors(key), _open(data, limits, opener) as (picture, kind, _):
        width, height = picture.size
        # the size of a TIFF is the upright one, and openers give upright pictures
        as_stored = not isinstance(picture, TiffPicture) and kind != "TIFF" and opener is None
        swaps_sides = as_stored and _orientation(picture) >= 5  # type: ignore[arg-type]
        return Info(format=kind, width=height if swaps_sides else width, height=width if swaps_sides else height)


def decode(data: bytes, limits: Limits = Limits(), key: str = "") -> Image:
    """Decode untrusted bytes into an upright sRGB picture.

    The content decides the format, not the file name. EXIF orientation is applied. A declared colour space is converted
    to sRGB (components.color_spaces); a broken profile is ignored. 16-bit values are scaled. Transparent pictures are
    shown on white. An MPO gives its first picture, as in other readers.

    Args:
        data: bytes of the file.
        limits: limits; sizes are checked before the pixels are decoded.
        key: the sample's name for the error.

    Returns:
        uint8 [H, W, 3], contiguous and writable.

    Raises:
        SampleError: with a code from the top of this file; no other exception is raised.
    """
    return _decode(data, limits, key, BACKGROUND).parts.image


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """A picture with its transparency.

    Attributes:
        image: uint8 [H, W, 3], contiguous. If alpha is not None, these are the colours without a background; invisible
            pixels are filled from the visible ones around them.
        alpha: uint8 [H, W], 255 = opaque; None if every pixel is opaque.
        gray: whether the picture has no colours: a gray mode, or three equal channels everywhere.
    """

    image: Image
    alpha: np.ndarray | None
    gray: bool


def decode_parts(data: bytes, limits: Limits = Limits(), key: str = "") -> Decoded:
    """Decode like `decode`, but return transparency separately, and whether the picture is gray.

    Raises:
        SampleError: like decode.
    """
    return decode_file(data, limits, key).parts


@dataclass(frozen=True, kw_only=True)
class FileParts:
    """All that one pass over a picture's file gives.

    Attributes:
        parts: the upright pixels.
        format: as in FORMATS, or of an opener.
        profile: the ICC profile of the pixels, which were kept in the file's colour space; b"" for sRGB.
        bits: of a channel in the file; more than 8 were reduced to 8.
        orientation: EXIF orientation that was applied, 1..8.
        exif, xmp: as the file holds them, untrusted; b"" for none.
    """

    parts: Decoded
    format: str
    profile: bytes = b""
    bits: int = 8
    orientation: int = 1
    exif: bytes = b""
    xmp: bytes = b""


Opener = Callable[[bytes, Limits], tuple[Pillow.Image, str, int]]
"""(bytes, limits) -> a picture opened by another decoder, its format and its bits; it has checked the limits."""


def decode_file(
    data: bytes, limits: Limits = Limits(), key: str = "", keep_profile: bool = False, opener: Opener | None = None
) -> FileParts:
    """Decode like `decode_parts`, with what the file says besides pixels.

    Args:
        keep_profile: leave pixels with a profile for RGB in its space instead of converting them.
        opener: of a format that is not in FORMATS.

    Raises:
        SampleError: like decode.
    """
    file = _decode(data, limits, key, None, keep_profile, opener)
    decoded = file.parts
    image = decoded.image if decoded.alpha is None else spread_colors(decoded.image, decoded.alpha)
    channels = [image[..., c] for c in range(3)]
    gray = bool((channels[0] == channels[1]).all() and (channels[1] == channels[2]).all())
    return replace(file, parts=Decoded(image=image, alpha=decoded.alpha, gray=gray))


def _decode(
    data: bytes,
    limits: Limits,
    key: str,
    background: int | None,
    keep_profile: bool = False,
    opener: Opener | None = None,
) -> FileParts:
    """Decode the upright picture on a background; with None, return alpha separately."""
    with _as_sample_errors(key):
        rgb = _bare_jpeg(data, limits) if opener is None else None
        if rgb is not None:
            return FileParts(parts=Decoded(image=rgb, alpha=None, gray=False), format="JPEG")
        with _open(data, limits, opener) as (picture, kind, bits):
            if isinstance(picture, TiffPicture):
                tags = picture.layout.tags
                profile = tiff_profile(tags, data)
                kept = profile if keep_profile and profile and picture.layout.photometric == RGB else None
                rgb, alpha = _tiff_parts(picture, None if kept else profile)
                orientation, exif, xmp = picture.layout.orientation, data, tags.get(XMP_TAG, b"")
            else:
                turbo = picture.format == "JPEG" and picture.mode == "RGB"
                rgb, alpha = decode_turbo(data, picture.size[::-1]) if turbo else None, None
                if rgb is None:
                    picture.load()
                profile = declared_profile(picture, kind, data)
                kept = profile if keep_profile and profile and picture.mode in COLOUR_MODES else None
                if rgb is None:
                    rgb, alpha = srgb_and_alpha(picture, None if kept else profile)
                elif profile and not kept:
                    srgb = to_srgb(Pillow.fromarray(rgb), profile)
                    rgb = rgb if srgb is None else np.array(srgb)
                # after load, because Pillow rotates a TIFF and drops the tag; openers give upright pictures
                orientation = _orientation(picture) if opener is None else 1
                exif, xmp = (picture.info.get(name) or b"" for name in ("exif", "xmp"))
                exif = data if kind == "TIFF" else exif
            if alpha is not None and background is not None:
                rgb = _on_background(rgb, alpha, background)
            upright = np.ascontiguousarray(_upright(rgb, orientation))
            if alpha is not None:
                alpha = np.ascontiguousarray(_upright(alpha, orientation))
            return FileParts(
                parts=Decoded(image=upright, alpha=alpha, gray=False),
                format=kind,
                profile=kept or b"",
                bits=bits,
                orientation=orientation,
                exif=_as_bytes(exif),
                xmp=_as_bytes(xmp),
            )


def _as_bytes(value: object) -> bytes:
    """Metadata as bytes; b"" for a value of another type."""
    return value.encode(errors="replace") if isinstance(value, str) else value if isinstance(value, bytes) else b""


def flatten(parts: Decoded) -> Image:
    """Put a picture on white, as `decode` does."""
    return parts.image if parts.alpha is None else _on_background(parts.image, parts.alpha, BACKGROUND)


def _on_background(rgb: Image, alpha: np.ndarray, background: int) -> Image:
    weight = alpha[..., None].astype(np.uint32)
    return ((rgb * weight + background * (255 - weight) + 127) // 255).astype(np.uint8)


def spread_colors(image: Image, alpha: np.ndarray) -> Image:
    """Fill invisible pixels with the colours of near visible ones, so that hidden colours do not bleed into a result.

    Visible pixels (alpha above 0) keep their values. The fill is a weighted mean over squares of increasing size.

    Args:
        image: uint8 [H, W, 3].
        alpha: uint8 [H, W].
    """
    invisible = alpha == 0
    if not invisible.any():
        return image
    if invisible.all():
        return np.full_like(image, BACKGROUND)
    weight = np.where(invisible, 0.0, 1.0).astype(np.float32)
    colors, result, width = image.astype(np.float32) * weight[..., None], image.copy(), 3
    while invisible.any():
        near = cv2.blur(weight, (width, width), borderType=cv2.BORDER_REPLICATE)
        fillable = invisible & (near > 0.5 / width**2)
        mean = cv2.blur(colors, (width, width), borderType=cv2.BORDER_REPLICATE)[fillable] / near[fillable][:, None]
        result[fillable] = np.clip(np.rint(mean), 0, 255).astype(np.uint8)
        invisible &= ~fillable
        width = 2 * width + 1
    return result


def resize_short_side(image: Image, px: int) -> Image:
    """Resize the short side to `px` pixels: area average to shrink, bicubic to enlarge."""
    if px < 1:
        raise ValueError(f"the short side must be at least 1 pixel, got {px}")
    height, width = image.shape[:2]
    factor = px / min(height, width)
    size = (max(px, round(width * factor)), max(px, round(height * factor)))
    if size == (width, height):
        return image
    result = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    return result if image.dtype == np.uint8 else result.clip(0.0, 1.0)  # cubic overshoots; uint8 is already clipped


def crop(image: Image, top: int, left: int, height: int, width: int) -> Image:
    """Return the part of `image` at (top, left), [height, width, 3], as a contiguous copy.

    Raises:
        ValueError: the box reaches outside the picture.
    """
    if top < 0 or left < 0 or height < 1 or width < 1 or top + height > image.shape[0] or left + width > image.shape[1]:
        raise ValueError(f"crop {(top, left, height, width)} reaches outside a picture of {image.shape[:2]}")
    return image[top : top + height, left : left + width].copy()


def center_crop(image: Image, height: int, width: int) -> Image:
    """Return the middle [height, width, 3] of `image`; raise ValueError if the image is smaller."""
    return crop(image, (image.shape[0] - height) // 2, (image.shape[1] - width) // 2, height, width)


def pad_to_multiple(image: Image, multiple: int) -> Image:
    """Pad a picture [H, W, 3] below and to the right with mirrored rows and columns, to multiples of `multiple`."""
    height, width = image.shape[:2]
    below, right = -height % multiple, -width % multiple
    if not below and not right:
        return image
    # "reflect" needs at least two rows and columns; "symmetric" does not
    return np.pad(image, ((0, below), (0, right), (0, 0)), mode="reflect" if min(height, width) > 1 else "symmetric")


def working_size(size: tuple[int, int], min_side_px: int) -> tuple[int, int]:
    """Return (height, width) at which networks run: a shorter short side is enlarged to min_side_px.

    In a strip of more than MAX_STRETCH to 1, the long side limits the enlargement: else 1 x 3000 pixels would grow to
    a billion.

    Args:
        size: (height, width) of the result in pixels.
        min_side_px: 0 for no enlargement.
    """
    ratio = max(1.0, min(min_side_px / min(size), MAX_STRETCH * min_side_px / max(size)))
    return round(size[0] * ratio), round(size[1] * ratio)


def to_float(image: Image) -> Image:
    """Convert uint8 0..255 to float32 0..1; float32 passes through."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) * np.float32(1 / 255)
    if image.dtype != np.float32:
        raise ValueError(f"expected uint8 or float32, got {image.dtype}")
    return image


def to_uint8(image: Image) -> Image:
    """Convert float32 0..1 to uint8, clipped and rounded half to even; uint8 passes through."""
    if image.dtype == np.uint8:
        return image
    contiguous = np.ascontiguousarray(image)
    return cv2.addWeighted(contiguous, 255.0, contiguous, 0.0, 0.0, dtype=cv2.CV_8U).reshape(image.shape)  # in one pass


def encode_png(image: Image, text: Mapping[str, str] | None = None, level: int = CORPUS_PNG_LEVEL) -> bytes:
    """Encode a uint8 picture as PNG; equal input gives equal bytes.

    Args:
        image: uint8 [H, W, 3], with alpha [H, W, 4], gray [H, W], or gray with alpha [H, W, 2].
        text: text chunks by keyword (1 to 79 Latin-1 characters); they are sorted by keyword.
        level: of deflate, 0 (none) to 9; 1 looks for runs of equal bytes only. Pixels do not depend on it.

    Raises:
        ValueError: wrong shape or type of the picture, or a keyword or value that PNG cannot hold.
    """
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (2, 3, 4))):
        raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {image.shape}")
    chunks = PngImagePlugin.PngInfo()
    for keyword, value in sorted((text or {}).items()):
        if not 1 <= len(keyword) <= 79 or not keyword.isprintable() or any(ord(letter) > 255 for letter in keyword):
            raise ValueError(f"PNG keyword must be 1 to 79 printable Latin-1 characters, got {keyword!r}")
        if "\x00" in value or len(value) > TEXT_LIMIT_BYTES:
            raise ValueError(f"text of {keyword!r} holds a zero byte or exceeds {TEXT_LIMIT_BYTES} characters")
        chunks.add_text(keyword, value)
    target = io.BytesIO()
    strategy = {"compress_type": RUN_LENGTHS} if level == 1 else {}
    Pillow.fromarray(image).save(target, "PNG", pnginfo=chunks, compress_level=level, **strategy)
    return target.getvalue()


def check_png_level(level: object) -> int:
    """Return a level of deflate unchanged; raise ValueError unless it is a whole number from 0 to 9."""
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= 9:
        raise ValueError(f"png_level must be a whole number from 0 to 9, got {level!r:.80}")
    return level


def read_png_text(data: bytes) -> dict[str, str]:
    """Read the text chunks of a PNG by keyword; raise SampleError if it is not a readable PNG."""
    with _as_sample_errors(""):
        if sniff(data) != "PNG":
            raise SampleError("unsupported_format", "only PNG files carry text chunks")
        check_png_chunks(data)
        with Pillow.open(io.BytesIO(data), formats=("PNG",)) as picture:
            assert isinstance(picture, PngImagePlugin.PngImageFile)
            return {str(keyword): str(value) for keyword, value in picture.text.items()}


@contextmanager
def _as_sample_errors(key: str) -> Iterator[None]:
    """Turn any exception of a decoder into a SampleError that names the sample."""
    try:
        yield
    except SampleError as error:
        raise SampleError(error.code, error.detail, error.key or key) from error.__cause__
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        raise SampleError("too_large", str(error), key) from error
    except Pillow.UnidentifiedImageError as error:
        raise SampleError("corrupt", "the signature is of a picture, but the header cannot be read", key) from error
    except MemoryError as error:
        raise SampleError("too_large", "not enough memory to decode the picture", key) from error
    except Exception as error:  # decoders raise many kinds on bad bytes: struct.error, KeyError, ...
        detail = f"{type(error).__name__}: {error}"
        message = detail.lower()
        if "truncated" in message or "unexpected end" in message or isinstance(error, EOFError):
            raise SampleError("truncated", detail, key) from error
        if "too large" in message or "too much memory" in message:  # Pillow's limit on compressed text chunks
            raise SampleError("too_large", detail, key) from error
        raise SampleError("corrupt", detail, key) from error


@contextmanager
def _open(
    data: bytes, limits: Limits, opener: Opener | None = None
) -> Iterator[tuple[Pillow.Image | TiffPicture, str, int]]:
    """Open the header with the decoder of the signature's format, and check the limits; the third value is the bits."""
    if opener is not None:
        limits.check_bytes(len(data))
        opened, kind, bits = opener(data, limits)
        with opened as picture:
            check_size(*picture.size, len(data), limits)
            yield picture, kind, bits
        return
    kind, bits = sniff(data), 8
    limits.check_bytes(len(data))
    if kind == "PNG":
        _check_png_size(data, limits)
        check_png_chunks(data)
        bits = data[24]
    if kind == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise SampleError("truncated", f"the WebP header promises more than the {len(data)} bytes present")
    if kind == "AVIF" and (at := data.find(b"pixi", 0, AVIF_HEAD_BYTES)) >= 0:  # version, flags, channels, bits of each
        bits = int.from_bytes(data[at + 9 : at + 10], "big")
    if kind == "TIFF":
        layout = read_layout(data)
        check_size(*layout.size, len(data), limits)
        if layout.compression not in TiffImagePlugin.COMPRESSION_INFO:
            raise SampleError("unsupported_mode", f"the TIFF's compression {layout.compression} is not supported")
        bits = layout.bits
        if not layout.read_by_pillow:
            if layout.pages > 1:
                raise SampleError("animated", "the TIFF holds several frames or pages")
            yield TiffPicture(data=data, layout=layout), kind, bits
            return
    _raise_pillow_limit(limits.max_pixels)
    with Pillow.open(io.BytesIO(data), formats=(kind,)) as picture:
        check_size(*picture.size, len(data), limits)
        if picture.format != "MPO" and getattr(picture, "is_animated", False):
            raise SampleError("animated", f"the {kind} holds several frames or pages")
        yield picture, kind, bits


def _raise_pillow_limit(max_pixels: int) -> None:
    """Let Pillow open what `limits` allow: by itself it warns above 89 million pixels and refuses above 179.

    The number is Pillow's, for the whole process. It only grows, so that threads with different limits agree.
    """
    if Pillow.MAX_IMAGE_PIXELS is not None and max_pixels > Pillow.MAX_IMAGE_PIXELS:
        Pillow.MAX_IMAGE_PIXELS = max_pixels


def check_size(width: int, height: int, n_bytes: int, limits: Limits) -> None:
    """Check the header's width and height against the limits."""
    if width * height > limits.max_pixels:
        detail = f"{width} x {height} pixels exceed the limit of {limits.max_pixels} ({limits.pixels_option})"
        raise SampleError("too_large", detail)
    if min(width, height) < limits.min_side_px:
        raise SampleError("too_small", f"{width} x {height}: the short side is below {limits.min_side_px} pixels")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise SampleError("aspect", f"{width} x {height} is longer than {limits.max_aspect:g} to 1")
    if width * height > HARMLESS_PIXELS and 3 * width * height > limits.max_expansion * n_bytes:
        raise SampleError("too_large", f"{n_bytes} bytes would expand more than {limits.max_expansion:g} times")


def _check_png_size(data: bytes, limits: Limits) -> None:
    """Check the size in IHDR, so that a giant picture is refused before its checksums are computed."""
    if len(data) < 24:
        raise SampleError("truncated", "the PNG ends inside its header")
    width, height = struct.unpack(">II", data[16:24])
    check_size(width, height, len(data), limits)


def _orientation(picture: Pillow.Image) -> int:
    """Return the EXIF orientation 1..8; 1 if it is absent, invalid or unreadable."""
    try:
        value = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - metadata may be hostile too (loops, wrong types); the picture is still used
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image, orientation: int) -> Image:
    """Undo the EXIF orientation of [H, W, ...]."""
    if orientation >= 5:  # 5..8 store rows and columns swapped
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image


def _bare_jpeg(data: bytes, limits: Limits) -> Image | None:
    """Decode a JPEG that has only pixels and tables; None for others and for faulty ones.

    Raises:
        SampleError: too_large, too_small, aspect.
    """
    size = bare_jpeg_size(data)
    if size is None:
        return None
    limits.check_bytes(len(data))
    check_size(size[1], size[0], len(data), limits)
    return decode_turbo(data, size)


def _tiff_parts(picture: TiffPicture, profile: bytes | None) -> tuple[Image, np.ndarray | None]:
    """Decode a TIFF without Pillow, to the same parts as srgb_and_alpha."""
    loaded, alpha = picture.load()
    srgb = to_srgb(loaded, profile) if profile else None
    rgb = np.array((srgb if srgb is not None else loaded).convert("RGB"))
    return rgb, alpha if alpha is not None and alpha.min() < 255 else None
