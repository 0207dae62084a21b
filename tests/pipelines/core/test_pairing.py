"""Pairs by names: equal paths, one affix for the whole set, and never the place in a list."""

from __future__ import annotations

import pytest

from pipelines.core.pairing import NoPairs, pair_names

NUMBERS = sorted(map(str, range(1, 13)))


def pairs(targets: list[str], inputs: list[str], *names: str) -> dict[str, str | None]:
    numbers = pair_names(targets, inputs, *names)
    return {targets[n]: None if number is None else inputs[number] for n, number in enumerate(numbers)}


@pytest.mark.parametrize(
    ("target", "other"),
    [
        ("{}.png", "{}x2.png"),
        ("{}.png", "{}_lq.jpg"),
        ("{}.png", "LR-{}-x4.png"),
        ("hq_{}.png", "{}.jpg"),
        ("hq_{}.png", "lq_{}.png"),
        ("norain-{}.png", "rain-{}.png"),
        ("Canon_{}_HR.png", "Canon_{}_LR4.png"),
        ("{}gt.png", "{}lq.png"),
        ("a/{}.png", "a/{}x4.png"),
        ("HR/{}.png", "X2/{}x2.png"),
        ("caf\u00e9{}.png", "cafe\u0301{}.png"),
    ],
)
def test_one_affix_pairs_every_input(target: str, other: str) -> None:
    targets, inputs = ([name.format(number) for number in NUMBERS] for name in (target, other))
    shuffled = sorted(inputs, reverse=True)
    expected = dict(zip(targets, inputs, strict=True))
    assert pairs(targets, shuffled) == expected
    one_missing = {**expected, targets[4]: None}
    assert pairs(targets, [name for name in shuffled if name != inputs[4]]) == one_missing


def test_equal_names_come_first() -> None:
    assert pairs(["a/1.png", "b/1.png"], ["b/1.jpg", "a/1.jpg"]) == {"a/1.png": "a/1.jpg", "b/1.png": "b/1.jpg"}
    assert pairs(["a.png", "a.jpg"], ["a.jpg", "a.png"]) == {"a.png": "a.png", "a.jpg": "a.jpg"}
    assert pairs(["a.png", "a_x.png"], ["a_x.png", "a_x_x.png"]) == {"a.png": "a_x.png", "a_x.png": "a_x_x.png"}
    assert pairs(["p1.png", "p2.png"], ["p2.png", "p3.png"]) == {"p1.png": None, "p2.png": "p2.png"}
    assert pairs(["a.png", "a.jpg", "b.png"], ["a.webp", "b.png"]) == {"a.png": None, "a.jpg": None, "b.png": "b.png"}


@pytest.mark.parametrize(
    ("targets", "inputs"),
    [
        (["1.png", "2.png"], ["a.png", "b.png"]),
        (["cat.png"], ["dog.png"]),
        (["cat.png"], ["bat.png"]),  # "at" is no name
        ([f"{n}.png" for n in NUMBERS], [f"{int(n):04}.png" for n in NUMBERS]),
        (["1.png", "2.png", "3.png"], ["1x2.png", "2x3.png", "3x2.png"]),
        (["1.png", "2.png", "3.png"], ["1x2.png", "2x2.png", "3x2.png", "sheet.png"]),
        (["a/1.png", "b/1.png"], ["1x4.png"]),
        (["1.png"], ["1_1.png", "1_2.png"]),
    ],
)
def test_other_names_are_refused_with_the_pairs_of_their_places(targets: list[str], inputs: list[str]) -> None:
    with pytest.raises(NoPairs) as error:
        pair_names(targets, inputs)
    assert f"{len(inputs)} inputs have no target" in str(error.value)
    assert f"{sorted(targets)[0]} with {sorted(inputs)[0]}" in str(error.value)


def test_names_that_fit_in_two_ways_are_refused() -> None:
    with pytest.raises(NoPairs, match="fit in several ways"):
        pair_names(["x1.png", "1x.png"], ["x1x.png"])
    assert pairs(["x1.png", "1x.png"], ["x1x.png"], "", "x{}") == {"x1.png": None, "1x.png": "x1x.png"}
    with pytest.raises(NoPairs, match=r'"1{}" would pair them all'):  # 11 may belong to 11 or to 1
        pair_names(["1.png", "2.png", "11.png"], ["11.png", "12.png"])
    whole = {f"{n}.png": f"1{n}.png" for n in NUMBERS}  # every target has an input, which equal names cannot give
    assert pairs(list(whole), list(whole.values())) == whole


def test_an_explicit_name_decides() -> None:
    targets, inputs = ["1_gt.png", "2_gt.png"], ["2-lq.png", "1-lq.png"]
    assert pairs(targets, inputs, "{}_gt", "{}-lq") == {"1_gt.png": "1-lq.png", "2_gt.png": "2-lq.png"}
    with pytest.raises(NoPairs, match=r'1 of 2 inputs have no target .* named "{}" and "{}x2"'):
        pair_names(["1.png", "2.png"], ["1x2.png", "2x3.png"], "", "{}x2")
    with pytest.raises(ValueError, match="needs one"):
        pair_names(targets, inputs, "gt", "")


@pytest.mark.parametrize(
    ("targets", "inputs"),
    [
        (["1", "2", "3"], ["11", "12", "13"]),
        (["f1", "f2", "f3"], ["f10", "f20", "f30"]),
        (["101", "102"], ["1", "2"]),
        (["IMG_0001"], ["IMG_0002"]),
        (["a1"], ["b11"]),
    ],
)
def test_another_numbering_is_no_affix(targets: list[str], inputs: list[str]) -> None:
    with pytest.raises(NoPairs, match="may as well be other numbers"):
        pair_names([f"{name}.png" for name in targets], [f"{name}.png" for name in inputs])


def test_zeros_before_a_number_and_sizes_after_a_name_are_affixes() -> None:
    assert pairs(["0001.png", "0002.png"], ["1.png", "2.png"]) == {"0001.png": "1.png", "0002.png": "2.png"}
    assert pairs(["1.png"], ["1x2.png"]) == {"1.png": "1x2.png"}
    assert pairs(["1.png", "2.png"], ["21.png", "22.png"], "", "2{}") == {"1.png": "21.png", "2.png": "22.png"}
