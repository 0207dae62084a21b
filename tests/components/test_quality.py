"""Quality scores: artificial faults in good photographs are refused with their reason; good photographs pass."""

from __future__ import annotations

import io
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import matplotlib as mpl
import numpy as np
import pytest
import skimage
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from components.corpora import Bounds
from components.images import Limits, decode, sniff
from components.quality import PRESETS, SCORES, bounds_of, judge, measure_scores
from components.quality.detail import _spectrum_layout
from components.synthetic import dead_leaves
from components.types import Image

RESTORATION = bounds_of("restoration", {}, flat_below=3.0)
SIDE = 768  # long side of the pictures
WORDS = (
    "The",
    "committee",
    "decided,",
    "every",
    "member",
    "receives",
    "12345",
    "copies",
    "of",
    "a",
    "small",
    "report.",
)
Fault = Callable[[Image, np.random.Generator], tuple[Image, bytes]]


def verdict(picture: Image, data: bytes = b"") -> str:
    """Return the reason code with the restoration preset; "" if the picture passes."""
    rejection = judge(measure_scores(picture, data, sniff(data) if data else ""), RESTORATION)
    return rejection[0] if rejection else ""


def score(name: str, picture: Image, data: bytes = b"") -> float:
    return measure_scores(picture, data, sniff(data) if data else "")[name]


def smaller(picture: Image, side: int = SIDE) -> Image:
    """Shrink the long side to `side` by area averages."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    return cv2.resize(picture, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_AREA)


def jpeg(picture: Image, quality: int) -> tuple[Image, bytes]:
    stream = io.BytesIO()
    Pillow.fromarray(picture).save(stream, "JPEG", quality=quality)
    return np.asarray(Pillow.open(stream).convert("RGB")), stream.getvalue()


def rng(*name: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(name).encode()))


@cache
def photographs() -> tuple[Image, ...]:
    """Return a dozen shipped photographs of different kinds, as large as the odd files."""
    names = (
        "beacon-street-sunset casa-mila dragonfly-on-lavender high-trestle-trail jay-ruzesky lake-sherburne "
        "oakland-zoo-otters perched-osprey roman-colosseum solaris-grapes tea-gardens the-spices-of-life"
    )
    folder = Path(__file__).resolve().parents[2] / "pipelines" / "demo_corpus"
    return tuple(smaller(decode((folder / f"{name}.jpg").read_bytes())) for name in names.split())


# --- faults -----------------------------------------------------------------------------------------------------------


def enlarge(picture: Image, factor: int, how: int, blur: float = 0.0) -> Image:
    """Shrink and enlarge by `factor`: the same size with less detail."""
    height, width = picture.shape[:2]
    small = cv2.resize(picture, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
    large = cv2.resize(small, (width, height), interpolation=how)
    return cv2.GaussianBlur(large, (0, 0), blur) if blur else large


def add_noise(picture: Image, sigma: float, generator: np.random.Generator) -> Image:
    return np.clip(picture + sigma * generator.standard_normal(picture.shape), 0, 255).round().astype(np.uint8)


def add_bars(picture: Image, rows: int, columns: int, level: int) -> Image:
    """Add bars of one level: `rows` above and below, `columns` left and right."""
    return cv2.copyMakeBorder(picture, rows, rows, columns, columns, cv2.BORDER_CONSTANT, value=(level,) * 3)


def crop(picture: Image, top: int, left: int) -> Image:
    return np.ascontiguousarray(picture[top:, left:])


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def add_watermark(
    picture: Image, generator: np.random.Generator, layout: str, angle: int, opacity: float, size: int
) -> Image:
    """Add a white watermark in three lines, or tiled over the whole picture."""
    height, width = picture.shape[:2]
    side = int(np.hypot(height, width)) if angle else 0
    mask = Pillow.new("L", (side or width, side or height))
    draw, face = ImageDraw.Draw(mask), font("DejaVuSans", size)
    long = int(draw.textlength("SAMPLE PREVIEW", font=face))
    if layout == "lines":
        for line in range(3):
            left = int(generator.integers(0, mask.width - long))
            draw.text((left, (line + 0.5) * mask.height / 3 - size / 2), "SAMPLE PREVIEW", font=face, fill=255)
    else:
        for top in range(0, mask.height, 3 * size):
            for left in range(-long, mask.width, long + size):
                draw.text((left, top), "SAMPLE PREVIEW", font=face, fill=255)
    rotated = mask.rotate(angle, resample=Pillow.Resampling.BICUBIC)
    left, top = (mask.width - width) // 2, (mask.height - height) // 2
    share = np.asarray(rotated.crop((left, top, left + width, top + height)), np.float32)[..., None] / 255 * opacity
    return (picture * (1 - share) + 255 * share).round().astype(np.uint8)


def page(face: str, size: int, columns: int, paper: tuple[int, ...], ink: tuple[int, ...]) -> Image:
    """Draw a page of text, 700 x 900 pixels."""
    sheet = Pillow.new("RGB", (700, 900), paper)
    draw, letters, generator = ImageDraw.Draw(sheet), font(face, size), rng(face, size, columns)
    wide = (700 - 80 - 30 * (columns - 1)) // columns
    for column in range(columns):
        for top in range(40, 860 - size, int(1.4 * size)):
            line = ""
            while draw.textlength(line, font=letters) < wide - 4 * size:
                line += WORDS[int(generator.integers(len(WORDS)))] + " "
            draw.text((40 + column * (wide + 30), top), line, font=letters, fill=ink)
    return np.asarray(sheet)


def ramp(kind: str, first: tuple[int, ...], last: tuple[int, ...]) -> Image:
    """Make a smooth transition between two colours, 600 x 800."""
    y, x = np.mgrid[0:600, 0:800].astype(np.float64)
    place = {"horizontal": x, "diagonal": x + y, "radial": np.hypot(x - 300, y - 200)}[kind]
    place = (place - place.min()) / np.ptp(place)
    return (np.array(first) * (1 - place[..., None]) + np.array(last) * place[..., None]).round().astype(np.uint8)


FAULTS: dict[str, tuple[str, float, Fault]] = {  # reasons, least share of the dozen that is refused for them, fault
    "x8, blurred": ("upscaled blurred", 1.0, lambda p, _: jpeg(enlarge(p, 8, cv2.INTER_CUBIC, 1.5), 95)),
    "x8, cubic": ("upscaled blurred", 1.0, lambda p, _: jpeg(enlarge(p, 8, cv2.INTER_CUBIC), 85)),
    "x4, cubic": ("upscaled blurred", 1.0, lambda p, _: jpeg(enlarge(p, 4, cv2.INTER_CUBIC), 90)),
    "x4, linear": ("upscaled blurred", 1.0, lambda p, _: (enlarge(p, 4, cv2.INTER_LINEAR), b"")),
    "x4, pixels repeated": ("blocky", 0.8, lambda p, _: (enlarge(p, 4, cv2.INTER_NEAREST), b"")),
    "out of focus": ("upscaled blurred", 1.0, lambda p, _: jpeg(cv2.GaussianBlur(p, (0, 0), 2.5), 92)),
    "quality 3": ("blocky", 1.0, lambda p, _: jpeg(p, 3)),
    "quality 10": ("blocky", 1.0, lambda p, _: jpeg(p, 10)),
    "quality 5 as PNG": ("blocky", 1.0, lambda p, _: (jpeg(p, 5)[0], b"")),
    "quality 5, cut, 95": ("blocky", 1.0, lambda p, _: jpeg(crop(jpeg(p, 5)[0], 3, 5), 95)),
    "quality 10, cut, 95": ("blocky", 0.9, lambda p, _: jpeg(crop(jpeg(p, 10)[0], 6, 1), 95)),
    "noise 25": ("noisy", 1.0, lambda p, g: jpeg(add_noise(p, 25, g), 90)),
    "noise 40, small": ("noisy", 1.0, lambda p, g: jpeg(add_noise(smaller(p, 384), 40, g), 88)),
    "noise 60": ("noisy", 1.0, lambda p, g: (add_noise(p, 60, g), b"")),
    "bars above and below": ("letterbox", 1.0, lambda p, _: jpeg(add_bars(p, 50, 0, 0), 88)),
    "bars at the sides": ("letterbox", 1.0, lambda p, _: (add_bars(p, 0, 40, 255), b"")),
    "bars all around": ("letterbox", 1.0, lambda p, _: jpeg(add_bars(smaller(p, 300), 20, 20, 90), 75)),
    "watermark, 3 lines": ("watermark", 0.8, lambda p, g: jpeg(add_watermark(p, g, "lines", 0, 1.0, 52), 88)),
    "watermark, tiled": ("watermark", 0.8, lambda p, g: jpeg(add_watermark(p, g, "tiles", 30, 0.4, 28), 90)),
    "watermark, faint": ("watermark", 0.6, lambda p, g: jpeg(add_watermark(p, g, "tiles", -45, 0.25, 24), 90)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_refused_for_their_reason(name: str) -> None:
    reasons, share, fault = FAULTS[name]
    counts = Counter(verdict(*fault(picture, rng(name, number))) for number, picture in enumerate(photographs()))
    assert sum(counts[reason] for reason in reasons.split()) >= share * len(photographs()), counts


@pytest.mark.parametrize("quality", [75, 92])
def test_the_photographs_themselves_pass(quality: int) -> None:
    assert [verdict(*jpeg(picture, quality)) for picture in photographs()] == [""] * len(photographs())


def test_slight_noise_a_thin_frame_and_a_mirror_pass() -> None:
    pictures = [
        change
        for number, picture in enumerate(photographs())
        for change in (add_noise(picture, 4, rng(number)), add_bars(picture, 2, 2, 0), picture[:, ::-1])
    ]
    assert [verdict(picture) for picture in pictures] == [""] * len(pictures)


PAPER, INK = (255, 255, 255), (20, 20, 20)


@pytest.mark.parametrize(
    ("face", "size", "columns", "paper", "ink"),
    [
        ("DejaVuSans", 14, 1, PAPER, INK),
        ("DejaVuSans", 34, 1, PAPER, INK),
        ("DejaVuSerif", 18, 2, PAPER, INK),
        ("DejaVuSansMono", 12, 2, (230, 215, 180), (60, 30, 10)),
        ("STIXGeneral", 22, 1, (190, 215, 240), (0, 0, 90)),
        ("cmr10", 26, 1, (25, 30, 40), (220, 220, 210)),
    ],
)
def test_pages_of_text_are_refused(
    face: str, size: int, columns: int, paper: tuple[int, ...], ink: tuple[int, ...]
) -> None:
    sheet = page(face, size, columns, paper, ink)
    assert verdict(sheet) == "text_page"
    assert verdict(*jpeg(sheet, 85)) == "text_page"


@pytest.mark.parametrize("kind", ["horizontal", "diagonal", "radial"])
@pytest.mark.parametrize(("first", "last"), [((0, 0, 0), (255, 255, 255)), ((200, 40, 90), (30, 120, 60))])
def test_ramps_are_refused(kind: str, first: tuple[int, ...], last: tuple[int, ...]) -> None:
    assert verdict(ramp(kind, first, last)) in ("flat", "smooth")
    assert verdict(*jpeg(ramp(kind, first, last), 90)) in ("flat", "smooth")


# --- shared and shipped pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("all_black.png", "flat"),
        ("gradient.png", "flat smooth"),
        ("jpeg_q5.jpg", "blocky"),
        ("letterbox.jpg", "letterbox"),
        ("noise_sigma40.jpg", "noisy"),
        ("pure_noise.png", "noisy"),
        ("text_page.png", "text_page"),
        ("upscaled_x8_blur.jpg", "upscaled blurred"),
        ("watermark.jpg", "watermark"),
    ],
)
def test_decoys_are_refused_for_their_reason(images_dir: Path, name: str, reasons: str) -> None:
    data = (images_dir / "odd" / f"decoy_{name}").read_bytes()
    assert verdict(decode(data, Limits(min_side_px=128, max_aspect=4.0)), data) in reasons.split()


def refusals(paths: list[Path]) -> dict[str, str]:
    """Return the reasons of refused files by file name."""
    assert paths
    reasons = {path.name: verdict(decode(data := path.read_bytes()), data) for path in paths}
    return {name: reason for name, reason in reasons.items() if reason}


def test_odd_files_of_good_photographs_pass(images_dir: Path) -> None:
    names = "dup_[acdef]_*", "exif_*", "gray*", "cmyk_*", "palette_256*", "png16_rgb.*"
    assert refusals([path for name in names for path in sorted((images_dir / "odd").glob(name))]) == {}


def test_the_demo_corpus_passes(repository: Path) -> None:
    inside = Path(skimage.__file__).parent / "data"
    names = "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg"
    paths = sorted((repository / "pipelines" / "demo_corpus").glob("*.jpg")) + [inside / name for name in names]
    assert len(paths) == 40
    assert refusals(paths) == {}


def test_some_shared_photographs_pass(images_dir: Path) -> None:
    assert refusals(sorted((images_dir / "train").glob("*.jpg"))[::4]) == {}


@pytest.mark.slow
def test_all_shared_photographs_pass(images_dir: Path) -> None:
    paths = [path for folder in ("hq", "train") for path in sorted((images_dir / folder).glob("*.[jw]*"))]
    assert len(paths) >= 100
    assert refusals(paths) == {}


# --- single scores ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", [1, 5, 20, 40, 50, 62, 75, 90, 95, 100])
def test_jpeg_quality_equals_the_encoders_setting(quality: int) -> None:
    picture, data = jpeg(photographs()[0], quality)
    assert score("jpeg_quality", picture, data) == pytest.approx(quality, abs=0.6)


def test_jpeg_quality_of_other_files_is_100() -> None:
    picture, data = jpeg(photographs()[0], 20)
    assert measure_scores(picture)["jpeg_quality"] == 100
    assert measure_scores(picture, data, "PNG")["jpeg_quality"] == 100
    assert measure_scores(picture, data[:100], "JPEG")["jpeg_quality"] == 100


@pytest.mark.parametrize("sigma", [2.0, 5.0, 12.0, 25.0])
def test_the_noise_score_equals_the_sigma_of_added_noise(sigma: float) -> None:
    gray = rng(sigma).standard_normal((512, 512, 1)) * sigma + np.linspace(100, 150, 512)[:, None, None]
    picture = np.clip(gray, 0, 255).round().astype(np.uint8).repeat(3, axis=2)
    assert 0.85 * sigma < score("noise", picture) < 1.02 * sigma


def test_a_ramp_has_no_noise_and_no_texture() -> None:
    scores = measure_scores(ramp("diagonal", (0, 0, 0), (255, 255, 255)))
    assert scores["noise"] < 0.5 and scores["texture"] < 0.5 and scores["flat_share"] == 1 and scores["luma_std"] > 40


def test_luma_std_uses_bt601_luma() -> None:
    picture = photographs()[1]
    assert score("luma_std", picture) == pytest.approx((picture @ np.array([0.299, 0.587, 0.114])).std(), abs=0.05)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_resolution_is_little_more_than_one_over_the_enlargement(factor: int) -> None:
    """Enlarged sharp leaves have detail beyond the small grid's limit only from the interpolation."""
    small = dead_leaves(1024 // factor, 5, 0)
    assert score("resolution", small) > 0.9
    large = cv2.resize(small, (1024, 1024), interpolation=cv2.INTER_CUBIC)
    assert 1 / factor < score("resolution", large) < 1.6 / factor


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9), (64, 64), (5, 64), (6, 15)])
def test_the_packed_spectrum_equals_the_full_one(height: int, width: int) -> None:
    """Power by frequency from OpenCV's packed half equals that of numpy's full transform."""
    patch = rng(height, width).standard_normal((height, width)).astype(np.float32)
    frequency, multiplicity = _spectrum_layout(height, width)
    half = multiplicity * cv2.dft(patch).ravel().astype(np.float64) ** 2
    whole = np.abs(np.fft.fft2(patch.astype(np.float64))).ravel() ** 2
    places = np.hypot(*np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")).ravel()
    for limit in (0.0, 0.1, 0.25, 0.4, 0.71):
        half_power, whole_power = half[frequency <= limit + 1e-9].sum(), whole[places <= limit + 1e-9].sum()
        assert half_power == pytest.approx(whole_power, rel=1e-4)


def test_blockiness_does_not_depend_on_the_grids_position() -> None:
    blocks = jpeg(photographs()[4], 8)[0]
    scores = [score("blockiness", crop(blocks, top, left)) for top, left in ((0, 0), (1, 0), (3, 5), (7, 7), (4, 2))]
    assert min(scores) > 0.5 and max(scores) - min(scores) < 0.1


def test_blocks_are_a_grid_but_a_fence_of_8_pixels_is_not() -> None:
    fence = np.zeros((512, 512, 3), np.uint8)
    fence[:, ::8] = 200
    assert score("blockiness", fence) < 0.1
    blocks = rng(0).integers(0, 256, (64, 64, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    assert score("blockiness", blocks) > 0.9


@pytest.mark.parametrize(("rows", "columns"), [(60, 0), (0, 90), (40, 40), (0, 0)])
@pytest.mark.parametrize("level", [0, 255])
def test_letterbox_is_the_share_of_the_bars(rows: int, columns: int, level: int) -> None:
    picture = photographs()[11]
    height, width = picture.shape[:2]
    share = 1 - height * width / ((height + 2 * rows) * (width + 2 * columns))
    assert score("letterbox", add_bars(picture, rows, columns, level)) == pytest.approx(share, abs=0.01)


def test_a_dark_sky_is_not_a_bar() -> None:
    """A bright disc on black: the first line that is not black is nearly all black."""
    night = np.zeros((512, 512, 3), np.uint8)
    cv2.circle(night, (256, 256), 90, (230, 220, 200), -1)
    assert score("letterbox", night) == 0


def test_a_facade_of_equal_windows_is_not_a_watermark() -> None:
    wall = np.full((768, 768, 3), 180, np.uint8)
    for top in range(20, 768, 64):
        for left in range(16, 768, 48):
            cv2.rectangle(wall, (left, top), (left + 24, top + 40), (60, 70, 80), -1)
            cv2.line(wall, (left + 12, top), (left + 12, top + 40), (220, 220, 220), 2)
    assert score("watermark", add_noise(wall, 3, rng("wall"))) < PRESETS["restoration"]["watermark"].max


# --- any picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(8, 8), (9, 17), (8, 500), (500, 8), (63, 65), (64, 64), (130, 129), (1, 1), (2, 700), (1500, 41)]
)
@pytest.mark.parametrize("kind", ["noise", "black", "leaves"])
def test_scores_of_any_size_are_finite_named_and_repeatable(size: tuple[int, int], kind: str) -> None:
    picture = {
        "noise": rng(size).integers(0, 256, (*size, 3), np.uint8),
        "black": np.zeros((*size, 3), np.uint8),
        "leaves": cv2.resize(dead_leaves(64, 1, 2), size[::-1]),
    }[kind]
    scores = measure_scores(picture)
    assert list(scores) == list(SCORES)
    assert all(type(value) is float and np.isfinite(value) for value in scores.values())
    assert measure_scores(picture) == scores
    assert measure_scores(np.asfortranarray(picture)) == scores


def test_scores_do_not_change_the_picture() -> None:
    picture = photographs()[2].copy()
    before = picture.copy()
    measure_scores(picture)
    assert np.array_equal(picture, before)


# --- bounds -----------------------------------------------------------------------------------------------------------


def test_presets_and_changes_name_known_scores() -> None:
    assert set(PRESETS) == {"none", "restoration"}
    assert all(set(bounds) <= set(SCORES) for bounds in PRESETS.values())
    assert bounds_of("none", {}, 2.5) == {"luma_std": Bounds(min=2.5)}


def test_a_change_replaces_both_bounds_of_a_score() -> None:
    before = bounds_of("restoration", {}, 3.0)
    after = bounds_of("restoration", {"noise": Bounds(min=1.0), "flat_share": Bounds(max=0.5)}, 3.0)
    assert after["noise"] == Bounds(min=1.0)
    assert after["flat_share"] == Bounds(max=0.5)
    assert {k: v for k, v in after.items() if k not in ("noise", "flat_share")} == {
        k: v for k, v in before.items() if k not in ("noise", "flat_share")
    }
    after["resolution"].min = 0.0
    assert bounds_of("restoration", {}, 3.0) == before


def test_flatness_is_always_bounded() -> None:
    assert bounds_of("none", {"luma_std": Bounds(max=90.0)}, 3.0)["luma_std"] == Bounds(min=3.0, max=90.0)
    assert bounds_of("none", {"luma_std": Bounds(min=8.0)}, 3.0)["luma_std"] == Bounds(min=8.0)
    assert bounds_of("none", {"luma_std": Bounds(min=1.0)}, 3.0)["luma_std"] == Bounds(min=3.0)


def test_errors_for_wrong_names_suggest_one() -> None:
    with pytest.raises(ValueError, match='Did you mean "restoration"'):
        bounds_of("restauration", {}, 3.0)
    with pytest.raises(ValueError, match='Did you mean "blockiness"'):
        bounds_of("none", {"blockyness": Bounds(max=1)}, 3.0)


def test_the_first_score_out_of_bounds_is_named_with_its_bound() -> None:
    good = dict.fromkeys(SCORES, 0.5)
    bounds = {"sharpness": Bounds(min=1.0), "noise": Bounds(max=0.25), "texture": Bounds(min=0.1, max=0.9)}
    assert judge(good, {"texture": Bounds(min=0.5, max=0.5)}) is None
    assert judge(good, {}) is None
    rejection = judge(good, bounds)
    assert rejection is not None
    assert rejection[0] == "noisy"
    assert "noise" in rejection[1] and "0.5" in rejection[1] and "0.25" in rejection[1]
    assert judge(good | {"noise": 0.2}, bounds) == ("blurred", "sharpness is 0.5, below 1")
    assert judge(good | {"noise": float("nan")}, bounds) == ("noisy", "noise is not a number")
