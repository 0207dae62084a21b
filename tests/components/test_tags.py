"""Captions of measured facts: correct by construction, with a closed vocabulary."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components import images
from components.captions.tags import BRIGHTNESS, COLOURS, TEXTURE, VOCABULARY, Tags, describe, hue_share
from components.synthetic import dead_leaves

RGB = {  # RGB values with undisputed names
    "red": (220, 20, 20),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 30),
    "green": (30, 160, 40),
    "cyan": (0, 200, 210),
    "blue": (40, 70, 220),
    "purple": (130, 40, 190),
    "pink": (255, 120, 190),
    "gray": (120, 122, 119),
    "white": (245, 246, 244),
    "black": (10, 12, 9),
    "brown": (110, 65, 25),
}


def flat(*colours: tuple[int, int, int]) -> np.ndarray:
    """Make equal vertical bands of the colours, uint8 [48, 48, 3]."""
    return np.repeat(np.array([colours], np.uint8), 48 // len(colours), axis=1).repeat(48, axis=0)


@pytest.mark.parametrize("word", COLOURS)
def test_each_colour_has_its_word(word: str) -> None:
    picture = flat(RGB[word])
    assert describe(picture).startswith(f"{word}, ")
    assert hue_share(picture, word) == 1
    assert all(hue_share(picture, other) == 0 for other in COLOURS if other != word)


def test_light_red_is_pink() -> None:
    assert describe(flat((255, 170, 170))).startswith("pink, ")


def test_two_colours_are_named_by_share_and_a_small_second_is_not() -> None:
    blue, white, red = RGB["blue"], RGB["white"], RGB["red"]
    assert describe(flat(white, blue, blue)).startswith("blue and white, ")
    assert describe(flat(*[white] * 7, red)).startswith("white, ")
    assert hue_share(flat(white, blue, blue), "blue") == pytest.approx(2 / 3)


def test_brightness_contrast_and_texture_follow_the_pixels() -> None:
    levels = [flat((value, value, value)) for value in (20, 80, 130, 240)]
    for picture, (_, word) in zip(levels, BRIGHTNESS, strict=True):
        assert describe(picture).split(", ")[1:] == [word, "low contrast", "smooth"]
    assert ", high contrast, " in describe(flat((0, 0, 0), (255, 255, 255)))
    noise = np.random.default_rng(0).normal(0, 1, (64, 64, 1))
    for strength, (_, word) in zip((0.0, 0.035, 0.1), TEXTURE, strict=True):
        picture = np.repeat((0.5 + strength * noise).clip(0, 1).astype(np.float32), 3, -1)
        assert describe(picture).endswith(f", {word}")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_captions_stay_inside_the_vocabulary(index: int) -> None:
    words = re.split(r",? ", describe(dead_leaves(16, 0, index)))
    assert set(words) <= set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_float_and_uint8_and_batches_agree() -> None:
    pictures = [dead_leaves(64, 2, index) for index in range(4)]
    assert Tags().caption(pictures) == [describe(images.to_float(picture)) for picture in pictures]


def test_photographs_are_described_correctly(images_dir: Path) -> None:
    """By eye: a blue sea and sky under a palm, a green tea plantation, a dark sky above the moon."""
    for name, start in (
        ("ibm-palm-tree.webp", "blue"),
        ("tea-gardens.jpg", "green, "),
        ("apollo-11-earth.jpg", "black and gray, dark"),
    ):
        picture = images.decode((images_dir / "hq" / name).read_bytes())
        assert describe(picture).startswith(start), name


def test_the_error_for_an_unknown_hue_suggests_one() -> None:
    with pytest.raises(ValueError, match='Did you mean "green"'):
        hue_share(flat(RGB["red"]), "grean")
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        describe(np.zeros((8, 8), np.uint8))
