"""Fingerprints: copies of every kind are found, different pictures kept, and the search equals a slow greedy one."""

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


def scaled(picture: Image, factor: float) -> Image:
    size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
    return np.asarray(Pillow.fromarray(picture).resize(size, Pillow.Resampling.LANCZOS))


def with_palette(picture: Image) -> Image:
    return np.asarray(Pillow.fromarray(picture).quantize(256).convert("RGB"))


def cut(picture: Image, left: float, right: float, top: float, bottom: float) -> Image:
    """Cut off shares of the sides, in whole pixels."""
    height, width = picture.shape[:2]
    return picture[
        round(top * height) : height - round(bottom * height), round(left * width) : width - round(right * width)
    ]


KINDS: dict[str, Callable[[Image], Image]] = {
    "quality 30": lambda picture: jpeg(picture, 30),
    "quality 60": lambda picture: jpeg(picture, 60),
    "quality 90": lambda picture: jpeg(picture, 90),
    "scale 0.4": lambda picture: scaled(picture, 0.4),
    "scale 0.5": lambda picture: scaled(picture, 0.5),
    "scale 2": lambda picture: scaled(picture, 2),
    "256 colours": with_palette,
    "half, 256 colours": lambda picture: with_palette(scaled(picture, 0.5)),
    "5 % off": lambda picture: cut(picture, 0.05, 0.05, 0.05, 0.05),
    "5 % off, quality 75": lambda picture: jpeg(cut(picture, 0.05, 0.05, 0.05, 0.05), 75),
    "5 % off, half": lambda picture: scaled(cut(picture, 0.05, 0.05, 0.05, 0.05), 0.5),
}


def prints_of(pictures: list[Image]) -> np.ndarray:
    return np.stack([fingerprint(picture) for picture in pictures])


def slow_greedy(prints: np.ndarray, earlier: int = 0) -> np.ndarray:
    """The definition: each row against every row that was kept before it."""
    of = np.full(len(prints), -1)
    kept: list[int] = []
    for row in range(len(prints)):
        if kept and row >= earlier:
            same = np.flatnonzero(alike(prints[kept], np.broadcast_to(prints[row], (len(kept), WORDS))))
            of[row] = kept[same[0]] if len(same) else -1
        if of[row] < 0:
            kept.append(row)
    return of


@pytest.fixture(scope="module")
def pictures(images_dir: Path) -> list[Image]:
    photographs = [decode((images_dir / "hq" / name).read_bytes()) for name in PHOTOGRAPHS]
    return [resize_short_side(picture, 240) for picture in photographs] + [dead_leaves(96, 5, n) for n in range(40)]


@pytest.fixture(scope="module")
def prints(pictures: list[Image]) -> np.ndarray:
    return prints_of(pictures)


def flipped(one: np.ndarray, bits: list[int]) -> np.ndarray:
    """A print with some signs of the higher frequencies changed, in both views alike; no key changes."""
    changed = one.copy()
    for bit in bits:
        changed[[0, 2]] ^= np.uint64(1) << np.uint64(bit)
    return changed


def film(start: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """Prints that drift away from the first, a sign at a time."""
    draw, rows = generator(seed, "film"), [start]
    for _ in range(frames - 1):
        rows.append(flipped(rows[-1], [int(draw.integers(42, 64))]))
    return np.stack(rows)


def test_a_fingerprint_depends_on_the_pixels_alone(pictures: list[Image]) -> None:
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
def test_pictures_of_any_shape_know_their_copy(shape: tuple[int, int]) -> None:
    picture = cv2.resize(dead_leaves(128, 0, 3), shape[::-1], interpolation=cv2.INTER_AREA)
    assert first_alike(prints_of([picture, jpeg(picture, 95)])).tolist() == [-1, 0]


@pytest.mark.parametrize(
    "picture",
    [np.zeros((7, 30, 3), np.uint8), np.zeros((30, 30), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3))],
)
def test_what_is_no_picture_of_8_pixels_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]|at least 8"):
        fingerprint(picture)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_found_whichever_came_first(kind: str, pictures: list[Image], prints: np.ndarray) -> None:
    copies, count = prints_of([KINDS[kind](picture) for picture in pictures]), len(pictures)
    for both in (np.concatenate([prints, copies]), np.concatenate([copies, prints])):
        found = first_alike(both)
        assert (found[:count] == -1).all()
        assert np.mean(found[count:] == np.arange(count)) >= 0.95
        assert set(found[count:]) <= {-1, *range(count)}
        assert (found[count:][found[count:] >= 0] == np.flatnonzero(found[count:] >= 0)).all()


def test_most_copies_cut_at_one_side_are_found(pictures: list[Image], prints: np.ndarray) -> None:
    for sides in np.eye(4) * 0.05:
        copies = prints_of([cut(picture, *sides) for picture in pictures])
        found = first_alike(np.concatenate([prints, copies]))[len(prints) :]
        assert np.mean(found == np.arange(len(prints))) >= 0.4
        assert set(found[found != np.arange(len(prints))]) <= {-1}


def test_mirrored_turned_grey_and_recoloured_pictures_are_others(pictures: list[Image], prints: np.ndarray) -> None:
    turns: tuple[Callable[[Image], Image], ...] = (lambda p: p[:, ::-1], lambda p: p[::-1], np.rot90, lambda p: 255 - p)
    for turn in turns:
        changed = prints_of([np.ascontiguousarray(turn(picture)) for picture in pictures])
        assert (first_alike(np.concatenate([prints, changed])) == -1).all()
    coloured = cv2.applyColorMap(pictures[0], cv2.COLORMAP_OCEAN)
    grey = cv2.cvtColor(cv2.cvtColor(coloured, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    others = [np.ascontiguousarray(coloured), grey, np.ascontiguousarray(coloured[..., ::-1])]
    assert first_alike(prints_of(others)).tolist() == [-1, -1, -1]


def test_the_shared_duplicates(images_dir: Path) -> None:
    """Reference, exact, recompressed, half size with 256 colours, cropped; the mirrored one is another picture."""
    names = sorted(path.name for path in (images_dir / "odd").glob("dup_*"))
    found = first_alike(prints_of([decode((images_dir / "odd" / name).read_bytes(), Limits()) for name in names]))
    assert found.tolist() == [-1, 0, 0, 0, 0, -1]


def layouts() -> Iterator[Image]:
    """Pictures that differ in little: one colour, ramps, sky over ground, a lamp in the dark, goods on white."""
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


def test_pictures_alike_in_layout_only_are_kept() -> None:
    found = first_alike(prints_of(list(layouts())))
    assert np.flatnonzero(found >= 0).tolist() == []


def test_a_plain_picture_has_nothing_to_be_known_by() -> None:
    ramp = np.broadcast_to(np.linspace(60, 200, 80).astype(np.uint8)[:, None, None], (80, 80, 3))
    for plain in (np.full((80, 80, 3), 255, np.uint8), np.full((90, 70, 3), 17, np.uint8), np.ascontiguousarray(ramp)):
        assert first_alike(prints_of([plain, plain])).tolist() == [-1, -1]


def test_likeness_has_no_direction_and_looks_at_each_pair(pictures: list[Image], prints: np.ndarray) -> None:
    cropped = prints_of([cut(picture, 0.05, 0.05, 0.05, 0.05) for picture in pictures])
    left, right = np.concatenate([prints, prints]), np.concatenate([cropped, np.roll(cropped, 1, axis=0)])
    truth = np.arange(len(left)) < len(prints)
    assert np.array_equal(alike(left, right), truth)
    assert np.array_equal(alike(right, left), truth)


def test_a_copy_of_a_copy_is_judged_by_what_was_kept() -> None:
    """A ~ B ~ C and A !~ C, as 5 % cut twice are 10 %: with A first C stays, with B first both others go."""
    first = dead_leaves(256, 1, 2)
    second = cut(first, 0.05, 0.05, 0.05, 0.05)
    a, b, c = prints_of([first, second, cut(second, 0.05, 0.05, 0.05, 0.05)])
    assert alike(np.stack([a, b, a]), np.stack([b, c, c])).tolist() == [True, True, False]
    assert first_alike(np.stack([a, b, c])).tolist() == [-1, 0, -1]
    assert first_alike(np.stack([b, a, c])).tolist() == [-1, 0, 0]
    assert first_alike(np.stack([c, a, b])).tolist() == [-1, -1, 0]


@pytest.fixture(scope="module")
def crowd(prints: np.ndarray) -> np.ndarray:
    """Films, copies and single pictures, shuffled: 750 prints with many ways to be greedy."""
    draw = generator(0, "crowd")
    films = [film(prints[n], 60, n) for n in range(10, 18)]
    near = [flipped(prints[n], draw.integers(42, 64, 3).tolist()) for n in draw.integers(20, 30, 150)]
    equal = prints[draw.integers(30, 40, 70)]
    rows = np.concatenate([*films, np.stack(near), equal, prints])
    return rows[draw.permutation(len(rows))]


def test_the_search_equals_the_slow_definition(crowd: np.ndarray) -> None:
    found = first_alike(crowd)
    assert np.array_equal(found, slow_greedy(crowd))
    assert 50 < (found == -1).sum() < 300


def test_a_film_equals_the_slow_definition(prints: np.ndarray) -> None:
    """Each frame repeats the one before, so that most partners are no longer there when their turn has come."""
    rows = film(prints[15], 200, 0)
    assert np.array_equal(first_alike(rows), slow_greedy(rows))


@pytest.mark.slow
def test_whatever_is_crowded_what_goes_repeats_what_stays(prints: np.ndarray) -> None:
    """A crowd under one key is not compared in full, so some copies may stay; but none goes without its reason."""
    rows = film(prints[15], 350, 0)
    found = first_alike(rows)
    gone = np.flatnonzero(found >= 0)
    assert len(gone) > 300
    assert (found[found[gone]] == -1).all()
    assert (found[gone] < gone).all()
    assert alike(rows[gone], rows[found[gone]]).all()


@pytest.mark.parametrize("earlier", [1, 300, 749, 750])
def test_rows_of_earlier_corpora_stay(crowd: np.ndarray, earlier: int) -> None:
    found = first_alike(crowd, earlier)
    assert len(crowd) == 750
    assert (found[:earlier] == -1).all()
    assert np.array_equal(found, slow_greedy(crowd, earlier))


def test_slices_do_not_matter(crowd: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = first_alike(crowd[:300])
    monkeypatch.setattr(fingerprints, "SLICE", 60)
    monkeypatch.setattr(fingerprints, "FEWEST_ROWS", 30)
    assert np.array_equal(first_alike(crowd[:300]), whole)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_corpus_may_come_in_two_parts(crowd: np.ndarray, share: float) -> None:
    """What the first part kept, taken as an earlier corpus, decides the second part as if they were one."""
    whole, first = first_alike(crowd), int(share * len(crowd))
    assert np.array_equal(first_alike(crowd[:first]), whole[:first])
    kept = np.flatnonzero(whole[:first] == -1)
    names = np.concatenate([kept, np.arange(first, len(crowd))])
    later = first_alike(np.concatenate([crowd[kept], crowd[first:]]), earlier=len(kept))[len(kept) :]
    assert np.array_equal(np.where(later >= 0, names[later], -1), whole[first:])


def test_equal_prints_by_the_thousand(prints: np.ndarray) -> None:
    rows = np.concatenate([np.repeat(prints[:1], 30_000, axis=0), prints[1:], np.repeat(prints[1:2], 30_000, axis=0)])
    found = first_alike(rows)
    assert (found[1:30_000] == 0).all()
    assert (found[30_000:-30_000] == -1).all()
    assert found[0] == -1
    assert (found[-30_000:] == 30_000).all()


def test_different_prints_with_one_key_by_the_thousand(prints: np.ndarray) -> None:
    """Crowds under a key are parted by more signs; copies among them are still found, each that of its own original."""
    draw = generator(0, "key")
    rows = draw.integers(0, 2**64, (3000, WORDS), dtype=np.uint64)
    low = np.uint64((1 << 24) - 1)
    rows[:, [0, 2]] = rows[:, [0, 2]] & ~low | prints[15, [0, 2]] & low
    rows[:, 1] = ~np.uint64(0)
    rows[:, 3] |= np.uint64(3 << 61)  # rich in detail
    copies = np.stack([flipped(row, [50, 60]) for row in rows[:1000]])
    found = first_alike(np.concatenate([rows, copies]))
    assert (found[:3000] == -1).all()
    assert np.array_equal(found[3000:], np.arange(1000))


def test_unrelated_prints_are_kept_and_the_share_of_work_grows_to_one() -> None:
    rows = generator(0, "unrelated").integers(0, 2**64, (20_000, WORDS), dtype=np.uint64)
    told: list[float] = []
    assert (first_alike(rows, progress=told.append) == -1).all()
    assert told == sorted(told)
    assert 0 < told[0] < 0.1 and told[-1] == 1


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
    """Squares of 96 to 160 pixels that do not overlap, about 80 of each photograph."""
    found = []
    for path in paths:
        photograph = decode(path.read_bytes())
        side = int(generator(0, path.name).choice([96, 128, 160]))
        shrink = max(1.0, (photograph.shape[0] * photograph.shape[1] / (130 * side * side)) ** 0.5)
        size = (int(photograph.shape[1] / shrink), int(photograph.shape[0] / shrink))
        photograph = cv2.resize(photograph, size, interpolation=cv2.INTER_AREA)
        for top in range(0, size[1] - side + 1, side):
            for left in range(0, size[0] - side + 1, side):
                found.append(photograph[top : top + side, left : left + side].copy())
    return found


@pytest.mark.full
def test_recall_and_precision_among_ten_thousand_pictures(images_dir: Path) -> None:
    """All kinds of copies of 700 pictures among more than 10,000: found, and of those reported hardly any is false.

    Copied are all whole photographs, dead leaves, and parts of photographs whose luma deviates by 20 or more; the other
    parts (sky, night, plain walls, next to each other on one facade) are there to be mistaken.
    """
    paths = [*images_dir.glob("hq/*"), *images_dir.glob("train/*")]
    paths = sorted(path for path in paths if path.suffix in (".jpg", ".png", ".webp"))
    whole = [resize_short_side(decode(path.read_bytes()), 384) for path in paths]
    parts = parts_of_photographs(paths)
    distinct = [*whole, *parts, *(dead_leaves(64, 7, number) for number in range(1500))]
    assert len(distinct) > 10_000
    known = prints_of(distinct)
    lost = first_alike(known) >= 0
    assert lost.mean() < 0.001
    deviating = [n for n, part in enumerate(parts) if cv2.cvtColor(part, cv2.COLOR_RGB2GRAY).std() >= 20]
    some = len(whole) + np.array(deviating)[generator(0, "chosen").permutation(len(deviating))[:300]]
    chosen = np.concatenate([np.arange(len(whole)), some, np.arange(len(distinct) - 300, len(distinct))])
    copies = [prints_of([copy(distinct[n]) for n in chosen]) for copy in KINDS.values()]
    found = first_alike(np.concatenate([known, *copies]))
    first = np.where(lost, found[: len(known)], np.arange(len(known)))  # a copy of a lost picture is its twin's copy
    right = found[len(known) :].reshape(len(KINDS), -1) == first[chosen]
    recall = dict(zip(KINDS, right.mean(axis=1).round(4).tolist(), strict=True))
    precision = right.sum() / (found >= 0).sum()
    print(f"recall {recall}, precision {precision:.4f}, {lost.sum()} of {len(known)} lost")
    assert min(recall.values()) >= 0.95
    assert precision >= 0.99
