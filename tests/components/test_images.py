"""Decoding: the battery of bad inputs (platform.md 3.4, cases 1 to 24), and the small array helpers."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageCms

from components import images
from components.images import Limits, decode, probe
from components.types import SampleError

# Error code of each file in the odd folder that is refused; the others must decode.
CODES = {
    "animated_10_frames.gif": "animated",
    "animated_10_frames.webp": "animated",
    "animated_97_frames_13x169.webp": "animated",
    "animated_apng.png": "animated",
    "multipage.tiff": "animated",
    "bad_crc.png": "corrupt",
    "jpeg_signature_then_noise.jpg": "corrupt",
    "corrupt_header.jpg": "truncated",
    "missing_eoi.jpg": "truncated",
    "truncated.jpg": "truncated",
    "truncated.png": "truncated",
    "float32_gray.tiff": "unsupported_mode",
    "heic_bytes_named.jpg": "unsupported_format",
    "html_error_page_named.jpg": "not_image",
    "text_named.jpg": "not_image",
    "random_bytes_named.png": "not_image",
    "header_claims_65500x65500.jpg": "too_large",
    "png_65536x65536_header.png": "too_large",
    "png_bomb_20000x20000_rgb.png": "too_large",
    "png_text_chunk_bomb.png": "too_large",
    "one_by_one.png": "too_small",
    "strip_17x2000.png": "aspect",
    "strip_4000x60.jpg": "aspect",
    "zero_bytes.jpg": "empty",
}
# Variants of one photograph, which must decode like their plain sibling: (file, sibling, least PSNR).
SAME_PICTURE = [
    *((f"exif_orientation_{n}.jpg", "exif_orientation_1.jpg", 34.0) for n in ("0_invalid", 2, 3, 4, 5, 6, 7, 8)),
    ("cmyk_adobe_inverted.jpg", "exif_orientation_1.jpg", 30.0),
    ("mpo_two_frames.jpg", "exif_orientation_1.jpg", 30.0),
    ("trailing_garbage.jpg", "exif_orientation_1.jpg", 30.0),
    ("png16_rgb.png", "-leading-dash.jpg", 25.0),
    ("palette_256.png", "-leading-dash.jpg", 25.0),
    ("webp_bytes_named.jpg", "-leading-dash.jpg", 25.0),
    ("avif_bytes_named.png", "-leading-dash.jpg", 25.0),
    ("corrupt_icc.jpg", "-leading-dash.jpg", 25.0),
]


def photo(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth uint8 RGB picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    rgb = np.stack([x * 255 / (width - 1), y * 255 / (height - 1), 127 + 100 * np.sin(x / 7 + y / 11)], -1)
    return np.rint(rgb).clip(0, 255).astype(np.uint8)


def encode(image: np.ndarray | Pillow.Image, kind: str, **options: object) -> bytes:
    target = io.BytesIO()
    picture = image if isinstance(image, Pillow.Image) else Pillow.fromarray(image)
    picture.save(target, kind, **options)
    return target.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def refusal(action: Callable[[], object]) -> SampleError:
    with pytest.raises(SampleError) as error:
        action()
    return error.value


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b).mean())))


def test_every_odd_file_decodes_or_is_refused_by_its_code(images_dir: Path) -> None:
    files = sorted(path for path in (images_dir / "odd").iterdir() if path.suffix != ".csv")
    assert set(CODES) <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        if path.name in CODES:
            error = refusal(lambda data=data, path=path: decode(data, key=path.name))  # type: ignore[misc]
            assert (error.code, error.key) == (CODES[path.name], path.name), str(error)
        else:
            image, info = decode(data, key=path.name), probe(data)
            assert image.dtype == np.uint8
            assert image.flags.c_contiguous
            assert image.flags.writeable
            assert image.shape == (info.height, info.width, 3), path.name


@pytest.mark.parametrize(("name", "sibling", "least"), SAME_PICTURE)
def test_variants_of_one_photograph_look_alike(images_dir: Path, name: str, sibling: str, least: float) -> None:
    a, b = (decode((images_dir / "odd" / each).read_bytes()) for each in (name, sibling))
    assert psnr(a, b) >= least


def test_bombs_are_refused_in_little_memory(images_dir: Path) -> None:
    """A process decodes the 1.2 GB bomb and similar files; its peak may exceed that of its imports by 200 MB.

    The test reads the kernel's VmHWM, because ru_maxrss starts at the parent's size.
    """
    names = [name for name, code in CODES.items() if code == "too_large"]
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom components import images\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "for name in sys.argv[2:]:\n"
        "    try: images.decode((Path(sys.argv[1]) / name).read_bytes())\n"
        "    except images.SampleError: pass\n"
        "print(peak() - before)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(images_dir / "odd"), *names], capture_output=True, text=True, check=True
    )
    assert int(process.stdout) * 1024 < 200e6


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    image = photo() if kind != "GIF" else np.repeat(photo()[..., :1], 3, axis=-1)
    data = encode(Pillow.fromarray(image[..., 0]) if kind == "GIF" else image, kind)
    assert np.array_equal(decode(data), image)
    assert probe(data) == images.Info(format=kind, width=64, height=48)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_gives_the_upright_picture(kind: str, orientation: int) -> None:
    upright = photo()
    pixels = upright[::-1] if orientation in (3, 4, 7, 8) else upright
    pixels = pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels
    pixels = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    exif = Pillow.Exif()
    exif[images.ORIENTATION_TAG] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}
    data = encode(np.ascontiguousarray(pixels), kind, exif=exif, **options)
    assert decode(data).shape == upright.shape == (probe(data).height, probe(data).width, 3)
    assert psnr(decode(data), upright) > 30


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    gray = np.tile(np.array([0, 128, 129, 32768, 65535, 300, 25700, 40000], np.uint16), (8, 1))
    expected = np.rint(gray / 257).astype(np.uint8)
    for data in (encode(gray, "PNG"), encode(gray, "TIFF")):
        assert np.array_equal(decode(data), np.repeat(expected[..., None], 3, -1))
    _, rgb = cv2.imencode(".png", np.stack([gray] * 3, -1))
    assert np.abs(decode(rgb.tobytes()).astype(int) - expected[..., None]).max() <= 1


def test_float_and_wide_integer_pixels_are_refused() -> None:
    for values in (np.ones((16, 16), np.float32), np.ones((16, 16), np.int32)):
        data = encode(values, "TIFF")
        assert refusal(lambda data=data: decode(data)).code == "unsupported_mode"  # type: ignore[misc]


def test_transparency_is_shown_on_white() -> None:
    rgb, alpha = photo(), np.zeros((48, 64), np.uint8)
    alpha[:, 32:], alpha[:, 40:] = 128, 255
    image = decode(encode(np.dstack([rgb, alpha]), "PNG"))
    assert (image[:, :32] == 255).all()
    assert np.array_equal(image[:, 40:], rgb[:, 40:])
    half = rgb[:, 32:40] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(image[:, 32:40] - half).max() <= 0.51
    gray = decode(encode(Pillow.fromarray(np.dstack([rgb[..., 0], alpha]), "LA"), "PNG"))
    assert (gray[:, :32] == 255).all()
    assert np.array_equal(gray[:, 40:, 1], rgb[:, 40:, 0])


def test_palette_bilevel_and_named_transparent_colours() -> None:
    stripes = np.tile(np.array([0, 1], np.uint8), (16, 8))
    palette = Pillow.fromarray(stripes, "P")
    palette.putpalette([200, 10, 20, 30, 40, 50])
    assert (decode(encode(palette, "PNG"))[0, :2] == [[200, 10, 20], [30, 40, 50]]).all()
    assert (decode(encode(palette, "PNG", transparency=0))[0, :2] == [[255, 255, 255], [30, 40, 50]]).all()
    bilevel = Pillow.fromarray(stripes * 255).convert("1")
    assert (decode(encode(bilevel, "PNG"))[0, :2] == [[0, 0, 0], [255, 255, 255]]).all()
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[:, 8:] = (9, 8, 7)
    decoded = decode(encode(colours, "PNG", transparency=(9, 8, 7)))
    assert (decoded[:, :8] == 0).all()
    assert (decoded[:, 8:] == 255).all()


def test_cmyk_without_profile() -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:8, :, 0] = 255  # pure cyan at the top, no ink at the bottom
    image = decode(encode(Pillow.fromarray(inks, "CMYK"), "JPEG", quality=95)).astype(int)
    assert np.abs(image[:6] - [0, 255, 255]).max() < 12
    assert np.abs(image[10:] - 255).max() < 12


def test_a_wide_gamut_profile_is_converted(images_dir: Path) -> None:
    """Against the definition: decode gamma 2.2, convert P3 (D65) to sRGB primaries, encode sRGB (IEC 61966-2-1)."""
    data = (images_dir / "odd" / "progressive_wide_gamut_icc.jpg").read_bytes()
    with Pillow.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture) / 255
    p3_to_srgb = np.array([[1.2249, -0.2249, 0.0], [-0.0421, 1.0421, 0.0], [-0.0196, -0.0786, 1.0983]])
    linear = (pixels**2.2 @ p3_to_srgb.T).clip(0, 1)
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert psnr(decode(data), pixels * 255) < 36
    assert psnr(decode(data), expected) > 45


def test_a_useless_profile_is_ignored() -> None:
    image = photo()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # a profile of another kind of picture
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (b"\x00" * 300, b"junk", lab, srgb):
        assert np.array_equal(decode(encode(image, "PNG", icc_profile=profile)), image)


def test_several_frames_are_refused_and_one_frame_is_not() -> None:
    frames = [Pillow.fromarray(photo()), Pillow.fromarray(photo()[::-1].copy())]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert refusal(lambda data=data: decode(data)).code == "animated", kind  # type: ignore[misc]
    assert decode(encode(frames[0], "GIF")).shape == (48, 64, 3)


def test_other_formats_never_reach_a_decoder() -> None:
    for data in (
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"8BPS\x00\x01" + bytes(40),
        b"<svg xmlns=''/>",
        encode(photo(), "ICO"),
    ):
        assert refusal(lambda data=data: decode(data)).code == "unsupported_format"  # type: ignore[misc]
    assert refusal(lambda: decode(encode(photo(), "PPM"))).code == "not_image"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF", "GIF"])
def test_a_file_cut_anywhere_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = encode(noise, kind)
    for share in (0.02, 0.2, 0.5, 0.8, 0.95):
        error = refusal(lambda share=share: decode(data[: int(len(data) * share)]))  # type: ignore[misc]
        assert error.code in ("truncated", "corrupt", "not_image"), f"{kind} {share}: {error}"


def test_limits_are_checked_and_named() -> None:
    data = encode(photo(40, 100), "PNG")
    for limits, code in (
        (Limits(max_pixels=3999), "too_large"),
        (Limits(max_bytes=100), "too_large"),
        (Limits(min_side_px=41), "too_small"),
        (Limits(max_aspect=2.4), "aspect"),
    ):
        for function in (decode, probe):
            error = refusal(lambda function=function, limits=limits: function(data, limits, "k"))  # type: ignore[misc, operator]
            assert (error.code, error.key) == (code, "k")
    assert decode(data, Limits(max_pixels=4000, min_side_px=40, max_aspect=2.5)).shape == (40, 100, 3)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 15_000])  # Pillow warns above 89 million pixels and refuses above 179
def test_limits_above_pillows_own_hold(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 89_478_485)
    header = 2 * side.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    data = images.PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    assert probe(data, Limits(max_pixels=300_000_000, max_expansion=math.inf)).width == side
    error = refusal(lambda: probe(data, Limits(max_pixels=80_000_000)))
    assert error.code == "too_large" and "--max-megapixels" in error.detail


def test_a_compression_bomb_below_the_pixel_limit_is_refused() -> None:
    data = encode(Pillow.new("1", (6000, 6000)), "PNG")
    assert refusal(lambda: decode(data)).code == "too_large"


def test_a_png_of_zero_width_is_too_small() -> None:
    header = (0).to_bytes(4, "big") + (5).to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    data = images.PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IEND", b"")
    assert refusal(lambda: decode(data)).code == "too_small"


def test_a_picture_with_hostile_exif_decodes() -> None:
    looping = (
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x69\x87\x04\x00\x01\x00\x00\x00\x08\x00\x00\x00\x08\x00\x00\x00"
    )
    for exif in (looping, b"Exif\x00\x00" + b"\xff" * 5000, b"Exif\x00\x00II*\x00\xff\xff\xff\xff"):
        assert psnr(decode(encode(photo(), "JPEG", quality=95, exif=exif)), photo()) > 30


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF", "GIF"]),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_give_a_picture_or_a_sample_error(kind: str, edits: list[tuple[float, int]]) -> None:
    data = bytearray(encode(photo(24, 32), kind))
    for place, value in edits:
        data[int(place * len(data))] = value
    try:
        image = decode(bytes(data), Limits(max_pixels=1_000_000))
    except SampleError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2] == 3


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff\xe0", images.PNG_SIGNATURE, b"II*\x00", b"GIF89a"])
)
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_are_refused(tail: bytes, head: bytes) -> None:
    refusal(lambda: decode(head + tail))


def test_png_text_round_trips_and_bytes_are_reproducible() -> None:
    text = {"restoray:recipe": "instantir-dcp", "a": "déjà vu 写真 <b>\n", "seed": "7"}
    data = images.encode_png(photo(), text)
    assert images.read_png_text(data) == text
    assert np.array_equal(decode(data), photo())
    assert data == images.encode_png(photo().copy(), dict(reversed(text.items())))
    assert images.read_png_text(images.encode_png(photo())) == {}


def test_png_text_refuses_what_png_cannot_hold() -> None:
    for text in ({"": "x"}, {"k" * 80: "x"}, {"写": "x"}, {"k": "a\x00b"}, {"k": "x" * (images.TEXT_LIMIT_BYTES + 1)}):
        with pytest.raises(ValueError, match=r"keyword|zero byte"):
            images.encode_png(photo(), text)
    with pytest.raises(ValueError, match="uint8"):
        images.encode_png(photo().astype(np.float32))
    assert refusal(lambda: images.read_png_text(encode(photo(), "JPEG"))).code == "unsupported_format"


@pytest.mark.parametrize(("height", "width", "px"), [(40, 100, 20), (100, 40, 20), (40, 41, 80), (33, 33, 33)])
def test_resize_short_side(height: int, width: int, px: int) -> None:
    image = photo(height, width)
    out = images.resize_short_side(image, px)
    assert min(out.shape[:2]) == px
    assert out.dtype == np.uint8
    assert abs(out.shape[1] / out.shape[0] - width / height) < 0.02 * width / height
    assert np.abs(out.astype(float).mean((0, 1)) - image.mean((0, 1))).max() < 2
    stripes = np.tile(np.array([[[0.0] * 3, [1.0] * 3]], np.float32), (20, 10, 1))
    overshoot = images.resize_short_side(stripes, 50)
    assert overshoot.dtype == np.float32
    assert overshoot.min() >= 0
    assert overshoot.max() <= 1


def test_shrinking_averages_every_pixel() -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * np.uint8(254)
    assert (images.resize_short_side(np.repeat(checks[..., None].astype(np.uint8), 3, -1), 32) == 127).all()


def test_crops() -> None:
    image = photo(20, 30)
    assert np.array_equal(images.crop(image, 2, 3, 4, 5), image[2:6, 3:8])
    assert np.array_equal(images.center_crop(image, 10, 10), image[5:15, 10:20])
    for box in ((-1, 0, 4, 4), (0, 0, 21, 4), (0, 28, 4, 4), (0, 0, 0, 4)):
        with pytest.raises(ValueError, match="outside"):
            images.crop(image, *box)


def test_float_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, -1)
    assert np.array_equal(images.to_uint8(images.to_float(levels)), levels)
    assert images.to_float(levels).dtype == np.float32
    assert images.to_float(levels).max() == 1
    wild = np.array([[[-0.2, 1.2, 0.5 / 255]]], np.float32)
    assert images.to_uint8(wild).ravel().tolist() == [0, 255, 0]
    with pytest.raises(ValueError, match="float64"):
        images.to_float(np.zeros((2, 2, 3)))


def test_the_image_path_imports_without_torch_and_leaves_pillow_alone() -> None:
    code = (
        "import sys\nfrom PIL import Image, ImageFile\n"
        "before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES\n"
        "import components.images, components.synthetic, components.captions.tags, components.degradations\n"
        "assert not {'torch', 'ray', 'mlflow', 'pipelines'} & set(sys.modules)\n"
        "assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_level_of_a_png_changes_its_size_only() -> None:
    text = {"key": "a"}
    files = [images.encode_png(photo(200, 200), text, level) for level in range(10)]
    assert all(np.array_equal(decode(data), photo(200, 200)) and images.read_png_text(data) == text for data in files)
    assert len(files[0]) > 3 * 200 * 200 > len(files[images.PNG_LEVEL]) > len(files[9])
    assert images.encode_png(photo(), text) == images.encode_png(photo(), text, images.CORPUS_PNG_LEVEL)
    for wrong in (-1, 10, 2.0, True, "6", None):
        with pytest.raises(ValueError, match="png_level must be a whole number from 0 to 9"):
            images.check_png_level(wrong)
