"""Fingerprints: the search finds copies of every kind, keeps different pictures, and equals a slow greedy search."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from components import fingerprints
from components.fingerprints import WORDS, alike, fingerprint, first_alike
from components.images import Limits, decode, encode_png, resize_short_side
from components.randomness import generator
from components.synthetic import dead_leaves
from components.types import Image

PHOTOGRAPHS = (
    "sunhays80-009.jpg",  # the smaller files of images/hq
    "sunhays80-016.jpg",
    "sunhays80-025.jpg",
    "sunhays80-028.jpg",
    "sunhays80-052.jpg",
    "sunhays80-080.jpg",
    "apollo-11-earth.jpg",
    "urban100-009.jpg",
    "urban100-022.jpg",
    "mr-lee.jpg",
)


def jpeg(picture: Image, quality: int) -> Image:
    data = io.BytesIO()
    Pillow.fromarray(picture).save(data, "JPEG", quality=quality)
    return decode(data.getvalue())


def rescale(picture: Image, factor: float) -> Image:
    size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
    return np.asarray(Pillow.fromarray(picture).resize(size, Pillow.Resampling.LANCZOS))


def with_palette(picture: Image) -> Image:
    return np.asarray(Pillow.fromarray(picture).quantize(256).convert("RGB"))


def crop(picture: Image, left: float, right: float, top: float, bottom: float) -> Image:
    """Crop shares of the sides, in whole pixels."""
    height, width = picture.shape[:2]
    return picture[
        round(top * height) : height - round(bottom * height), round(left * width) : width - round(right * width)
    ]


KINDS: dict[str, Callable[[Image], Image]] = {
    "quality 30": lambda picture: jpeg(picture, 30),
    "quality 60": lambda picture: jpeg(picture, 60),
    "quality 90": lambda picture: jpeg(picture, 90),
    "scale 0.4": lambda picture: rescale(picture, 0.4),
    "scale 0.5": lambda picture: rescale(picture, 0.5),
    "scale 2": lambda picture: rescale(picture, 2),
    "256 colours": with_palette,
    "half, 256 colours": lambda picture: with_palette(rescale(picture, 0.5)),
    "5 % off": lambda picture: crop(picture, 0.05, 0.05, 0.05, 0.05),
    "5 % off, quality 75": lambda picture: jpeg(crop(picture, 0.05, 0.05, 0.05, 0.05), 75),
    "5 % off, half": lambda picture: rescale(crop(picture, 0.05, 0.05, 0.05, 0.05), 0.5),
}


def prints_of(pictures: list[Image]) -> np.ndarray:
    return np.stack([fingerprint(picture) for picture in pictures])


def slow_search(prints: np.ndarray, earlier: int = 0) -> np.ndarray:
    """The definition: compare each row with all earlier originals."""
    original_of = np.full(len(prints), -1)
    originals: list[int] = []
    for row in range(len(prints)):
        if originals and row >= earlier:
            same = np.flatnonzero(alike(prints[originals], np.broadcast_to(prints[row], (len(originals), WORDS))))
            original_of[row] = originals[same[0]] if len(same) else -1
        if original_of[row] < 0:
            originals.append(row)
    return original_of


@pytest.fixture(scope="module")
def pictures(images_dir: Path) -> list[Image]:
    photographs = [decode((images_dir / "hq" / name).read_bytes()) for name in PHOTOGRAPHS]
    return [resize_short_side(picture, 240) for picture in photographs] + [dead_leaves(96, 5, n) for n in range(40)]


@pytest.fixture(scope="module")
def prints(pictures: list[Image]) -> np.ndarray:
    return prints_of(pictures)


def flip(one: np.ndarray, bits: list[int]) -> np.ndarray:
    """Change signs of the higher frequencies, equally in both views; no key changes."""
    result = one.copy()
    for bit in bits:
        result[[0, 2]] ^= np.uint64(1) << np.uint64(bit)
    return result


def film(start: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """Make prints that drift away from the first, one sign at a time."""
    draw, rows = generator(seed, "film"), [start]
    for _ in range(frames - 1):
        rows.append(flip(rows[-1], [int(draw.integers(42, 64))]))
    return np.stack(rows)


def test_a_fingerprint_depends_on_the_pixels_only(pictures: list[Image]) -> None:
    picture = pictures[0]
    data = io.BytesIO()
    Pillow.fromarray(picture).save(data, "BMP")
    one = fingerprint(picture)
    assert one.dtype == np.uint64
    assert one.shape == (WORDS,)
    assert WORDS <= 4
    for same in (picture.copy(), decode(encode_png(picture)), decode(data.getvalue()), np.asfortranarray(picture)):
        assert np.array_equal(fingerprint(same), one)


@pytest.mark.parametrize("shape", [(8, 8), (8, 150), (150, 8), (81, 79), (319, 1000), (641, 641)])
def test_pictures_of_any_shape_match_their_copy(shape: tuple[int, int]) -> None:
    picture = cv2.resize(dead_leaves(128, 0, 3), shape[::-1], interpolation=cv2.INTER_AREA)
    assert first_alike(prints_of([picture, jpeg(picture, 95)])).tolist() == [-1, 0]


@pytest.mark.parametrize(
    "picture",
    [np.zeros((7, 30, 3), np.uint8), np.zeros((30, 30), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))],
)
def test_wrong_shapes_and_types_are_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]|at least 8"):
        fingerprint(picture)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_found_in_both_orders(kind: str, pictures: list[Image], prints: np.ndarray) -> None:
    copies, count = prints_of([KINDS[kind](picture) for picture in pictures]), len(pictures)
    for both in (np.concatenate([prints, copies]), np.concatenate([copies, prints])):
        result = first_alike(both)
        assert (result[:count] == -1).all()
        assert np.mean(result[count:] == np.arange(count)) >= 0.95
        assert set(result[count:]) <= {-1, *range(count)}
        assert (result[count:][result[count:] >= 0] == np.flatnonzero(result[count:] >= 0)).all()


def test_many_copies_cropped_at_one_side_are_found(pictures: list[Image], prints: np.ndarray) -> None:
    for sides in np.eye(4) * 0.05:
        copies = prints_of([crop(picture, *sides) for picture in pictures])
        result = first_alike(np.concatenate([prints, copies]))[len(prints) :]
        assert np.mean(result == np.arange(len(prints))) >= 0.4
        assert set(result[result != np.arange(len(prints))]) <= {-1}


def test_mirrored_rotated_grey_and_recoloured_pictures_are_not_copies(
    pictures: list[Image], prints: np.ndarray
) -> None:
    turns: tuple[Callable[[Image], Image], ...] = (lambda p: p[:, ::-1], lambda p: p[::-1], np.rot90, lambda p: 255 - p)
    for turn in turns:
        changed = prints_of([np.ascontiguousarray(turn(picture)) for picture in pictures])
        assert (first_alike(np.concatenate([prints, changed])) == -1).all()
    colours = cv2.applyColorMap(pictures[0], cv2.COLORMAP_OCEAN)
    grey = cv2.cvtColor(cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    others = [np.ascontiguousarray(colours), grey, np.ascontiguousarray(colours[..., ::-1])]
    assert first_alike(prints_of(others)).tolist() == [-1, -1, -1]


def test_the_shared_duplicates(images_dir: Path) -> None:
    """Exact, recompressed, half-size with 256 colours, and cropped pictures are copies; the mirrored one is not."""
    names = sorted(path.name for path in (images_dir / "odd").glob("dup_*"))
    result = first_alike(prints_of([decode((images_dir / "odd" / name).read_bytes(), Limits()) for name in names]))
    assert result.tolist() == [-1, 0, 0, 0, 0, -1]


def layouts() -> Iterator[Image]:
    """Yield pictures that hardly differ: one colour, ramps, sky over ground, a lamp in the dark, goods on white."""
    for value in (0, 255, 128):
        yield np.full((64, 64, 3), value, np.uint8)
        yield np.full((48, 64, 3), value, np.uint8)
    ramp = np.linspace(0, 1, 96)
    for bright in (120, 160, 200):
        for tall in (ramp[:, None], ramp[None, :], ramp[:, None] * ramp[None, :]):
            yield (np.broadcast_to(tall, (96, 96))[..., None] * np.array([bright, bright, 255])).astype(np.uint8)
    for number in range(60):
        draw = generator(1, "layouts", number)
        picture = np.empty((96, 128, 3), np.float32)
        picture[:] = np.array([150, 190, 240]) + draw.normal(0, 3, 3)
        picture += np.linspace(0, 20, 96)[:, None, None]
        horizon = int(draw.integers(44, 56))
        grain = cv2.resize(draw.normal(0, 30, (12, 16)).astype(np.float32), (128, 96), interpolation=cv2.INTER_CUBIC)
        ground = np.array([90, 120, 60]) + grain[..., None] + draw.normal(0, 6, (96, 128, 1))
        picture[horizon:] = ground[horizon:]
        yield picture.clip(0, 255).astype(np.uint8)
    for number in range(60):
        draw = generator(2, "layouts", number)
        picture = draw.normal(6, 1.5, (96, 96, 3)).clip(0, 255).astype(np.uint8)
        corner = tuple(int(draw.choice([4, 91]) + draw.integers(-3, 4)) for _ in range(2))
        cv2.circle(picture, corner, int(draw.integers(4, 9)), (250, 240, 200), -1, cv2.LINE_AA)
        yield picture
    for number in range(60):
        draw = generator(3, "layouts", number)
        picture = np.full((128, 128, 3), 250, np.uint8)
        side = int(draw.integers(40, 80))
        top, left = (int((128 - side) / 2 + draw.integers(-4, 5)) for _ in range(2))
        picture[top : top + side, left : left + side] = dead_leaves(side, 3, number)
        yield picture


def test_pictures_with_equal_layout_are_not_copies() -> None:
    result = first_alike(prints_of(list(layouts())))
    assert np.flatnonzero(result >= 0).tolist() == []


def test_plain_pictures_are_never_copies() -> None:
    ramp = np.broadcast_to(np.linspace(60, 200, 80).astype(np.uint8)[:, None, None], (80, 80, 3))
    for plain in (np.full((80, 80, 3), 255, np.uint8), np.full((90, 70, 3), 17, np.uint8), np.ascontiguousarray(ramp)):
        assert first_alike(prints_of([plain, plain])).tolist() == [-1, -1]


def test_alike_is_symmetric_and_works_by_pairs(pictures: list[Image], prints: np.ndarray) -> None:
    cropped = prints_of([crop(picture, 0.05, 0.05, 0.05, 0.05) for picture in pictures])
    left, right = np.concatenate([prints, prints]), np.concatenate([cropped, np.roll(cropped, 1, axis=0)])
    truth = np.arange(len(left)) < len(prints)
    assert np.array_equal(alike(left, right), truth)
    assert np.array_equal(alike(right, left), truth)


def test_a_copy_of_a_copy_is_compared_with_originals_only() -> None:
    """A ~ B ~ C and A !~ C, because two crops of 5 % make 10 %: with A first C stays, with B first A and C go."""
    first = dead_leaves(256, 1, 2)
    second = crop(first, 0.05, 0.05, 0.05, 0.05)
    a, b, c = prints_of([first, second, crop(second, 0.05, 0.05, 0.05, 0.05)])
    assert alike(np.stack([a, b, a]), np.stack([b, c, c])).tolist() == [True, True, False]
    assert first_alike(np.stack([a, b, c])).tolist() == [-1, 0, -1]
    assert first_alike(np.stack([b, a, c])).tolist() == [-1, 0, 0]
    assert first_alike(np.stack([c, a, b])).tolist() == [-1, -1, 0]


@pytest.fixture(scope="module")
def crowd(prints: np.ndarray) -> np.ndarray:
    """Films, copies and single pictures, shuffled: 750 prints where the order matters."""
    draw = generator(0, "crowd")
    films = [film(prints[n], 60, n) for n in range(10, 18)]
    near = [flip(prints[n], draw.integers(42, 64, 3).tolist()) for n in draw.integers(20, 30, 150)]
    equal = prints[draw.integers(30, 40, 70)]
    rows = np.concatenate([*films, np.stack(near), equal, prints])
    return rows[draw.permutation(len(rows))]


def test_the_search_equals_the_slow_definition(crowd: np.ndarray) -> None:
    result = first_alike(crowd)
    assert np.array_equal(result, slow_search(crowd))
    assert 50 < (result == -1).sum() < 300


def test_a_film_equals_the_slow_definition(prints: np.ndarray) -> None:
    """Each frame is alike to the frame before it, so that most partners are copies themselves."""
    rows = film(prints[15], 200, 0)
    assert np.array_equal(first_alike(rows), slow_search(rows))


@pytest.mark.slow
def test_copies_in_a_crowd_are_alike_to_their_originals(prints: np.ndarray) -> None:
    """A crowd under one key is not compared completely, so copies may stay; but each copy is alike to its original."""
    rows = film(prints[15], 350, 0)
    result = first_alike(rows)
    copies = np.flatnonzero(result >= 0)
    assert len(copies) > 300
    assert (result[result[copies]] == -1).all()
    assert (result[copies] < copies).all()
    assert alike(rows[copies], rows[result[copies]]).all()


@pytest.mark.parametrize("earlier", [1, 300, 749, 750])
def test_rows_of_earlier_corpora_stay(crowd: np.ndarray, earlier: int) -> None:
    result = first_alike(crowd, earlier)
    assert len(crowd) == 750
    assert (result[:earlier] == -1).all()
    assert np.array_equal(result, slow_search(crowd, earlier))


def test_slices_do_not_matter(crowd: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = first_alike(crowd[:300])
    monkeypatch.setattr(fingerprints, "SLICE", 60)
    monkeypatch.setattr(fingerprints, "FEWEST_ROWS", 30)
    assert np.array_equal(first_alike(crowd[:300]), whole)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_two_parts_of_a_corpus_give_the_result_of_the_whole(crowd: np.ndarray, share: float) -> None:
    """With the first part's originals as an earlier corpus, the second part has the results of the whole."""
    whole, first = first_alike(crowd), int(share * len(crowd))
    assert np.array_equal(first_alike(crowd[:first]), whole[:first])
    originals = np.flatnonzero(whole[:first] == -1)
    names = np.concatenate([originals, np.arange(first, len(crowd))])
    later = first_alike(np.concatenate([crowd[originals], crowd[first:]]), earlier=len(originals))[len(originals) :]
    assert np.array_equal(np.where(later >= 0, names[later], -1), whole[first:])


def test_thousands_of_equal_prints(prints: np.ndarray) -> None:
    rows = np.concatenate([np.repeat(prints[:1], 30_000, axis=0), prints[1:], np.repeat(prints[1:2], 30_000, axis=0)])
    result = first_alike(rows)
    assert (result[1:30_000] == 0).all()
    assert (result[30_000:-30_000] == -1).all()
    assert result[0] == -1
    assert (result[-30_000:] == 30_000).all()


def test_thousands_of_different_prints_with_one_key(prints: np.ndarray) -> None:
    """More signs split crowds under a key; the search still assigns copies in them to their originals."""
    draw = generator(0, "key")
    rows = draw.integers(0, 2**64, (3000, WORDS), dtype=np.uint64)
    low = np.uint64((1 << 24) - 1)
    rows[:, [0, 2]] = rows[:, [0, 2]] & ~low | prints[15, [0, 2]] & low
    rows[:, 1] = ~np.uint64(0)
    rows[:, 3] |= np.uint64(3 << 61)  # rich in detail
    copies = np.stack([flip(row, [50, 60]) for row in rows[:1000]])
    result = first_alike(np.concatenate([rows, copies]))
    assert (result[:3000] == -1).all()
    assert np.array_equal(result[3000:], np.arange(1000))


def test_unrelated_prints_are_originals_and_progress_grows_to_one() -> None:
    rows = generator(0, "unrelated").integers(0, 2**64, (20_000, WORDS), dtype=np.uint64)
    shares: list[float] = []
    assert (first_alike(rows, progress=shares.append) == -1).all()
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.1 and shares[-1] == 1


def test_no_and_one_print(prints: np.ndarray) -> None:
    assert first_alike(prints[:0]).tolist() == []
    assert first_alike(prints[:1]).tolist() == [-1]
    assert first_alike(prints[:1], earlier=1).dtype == np.int64


@pytest.mark.parametrize(
    ("prints", "earlier"),
    [
        (np.zeros((3, WORDS), np.int64), 0),
        (np.zeros((3, WORDS + 1), np.uint64), 0),
        (np.zeros(WORDS, np.uint64), 0),
        (np.zeros((3, WORDS), np.uint64), 4),
        (np.zeros((3, WORDS), np.uint64), -1),
    ],
)
def test_wrong_arguments_are_refused(prints: np.ndarray, earlier: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        first_alike(prints, earlier)


def parts_of_photographs(paths: list[Path]) -> list[Image]:
    """Cut disjoint squares of 96 to 160 pixels, about 80 from each photograph."""
    parts = []
    for path in paths:
        photograph = decode(path.read_bytes())
        side = int(generator(0, path.name).choice([96, 128, 160]))
        shrink = max(1.0, (photograph.shape[0] * photograph.shape[1] / (130 * side * side)) ** 0.5)
        size = (int(photograph.shape[1] / shrink), int(photograph.shape[0] / shrink))
        photograph = cv2.resize(photograph, size, interpolation=cv2.INTER_AREA)
        for top in range(0, size[1] - side + 1, side):
            for left in range(0, size[0] - side + 1, side):
                parts.append(photograph[top : top + side, left : left + side].copy())
    return parts


@pytest.mark.full
def test_recall_and_precision_among_ten_thousand_pictures(images_dir: Path) -> None:
    """The search finds all kinds of copies of 700 pictures among more than 10,000, with hardly any false match.

    The test copies all whole photographs, dead leaves, and parts of photographs with a luma deviation of at least 20.
    The other parts (sky, night, plain walls, neighbours on one facade) can cause false matches.
    """
    paths = [*images_dir.glob("hq/*"), *images_dir.glob("train/*")]
    paths = sorted(path for path in paths if path.suffix in (".jpg", ".png", ".webp"))
    whole = [resize_short_side(decode(path.read_bytes()), 384) for path in paths]
    parts = parts_of_photographs(paths)
    distinct = [*whole, *parts, *(dead_leaves(64, 7, number) for number in range(1500))]
    assert len(distinct) > 10_000
    prints = prints_of(distinct)
    is_copy = first_alike(prints) >= 0
    assert is_copy.mean() < 0.001
    candidates = [n for n, part in enumerate(parts) if cv2.cvtColor(part, cv2.COLOR_RGB2GRAY).std() >= 20]
    some = len(whole) + np.array(candidates)[generator(0, "chosen").permutation(len(candidates))[:300]]
    samples = np.concatenate([np.arange(len(whole)), some, np.arange(len(distinct) - 300, len(distinct))])
    copies = [prints_of([copy(distinct[n]) for n in samples]) for copy in KINDS.values()]
    result = first_alike(np.concatenate([prints, *copies]))
    first = np.where(
        is_copy, result[: len(prints)], np.arange(len(prints))
    )  # a copy of a false match counts for its twin
    right = result[len(prints) :].reshape(len(KINDS), -1) == first[samples]
    recall = dict(zip(KINDS, right.mean(axis=1).round(4).tolist(), strict=True))
    precision = right.sum() / (result >= 0).sum()
    print(f"recall {recall}, precision {precision:.4f}, {is_copy.sum()} of {len(prints)} lost")
    assert min(recall.values()) >= 0.95
    assert precision >= 0.99
