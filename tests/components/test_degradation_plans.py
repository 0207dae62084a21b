"""Plans in numbers: the draws of every preset stay as they are, sides, strengths, and the limits of operations."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest

from components.degradations import PRESETS, build_degradation
from components.degradations.engine import apply_plan
from components.degradations.plans import descriptors, make_plan, operations, out_sides, strength
from components.synthetic import dead_leaves
from components.types import SampleError


def rounded(value: Any) -> Any:
    """The same value with floats of nine digits, so that a library's last bit does not count."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        fields = {key: rounded(each) for key, each in value.items() if key != "mix"}
        # a mix is fixed up to the signs of its columns, which libraries choose: its covariance has none
        mix = np.array(value.get("mix") or [])
        return fields | {"mix": [[f"{v:.6g}" for v in row] for row in (mix @ mix.T).tolist()]} if mix.size else fields
    return [rounded(each) for each in value] if isinstance(value, list) else value


RECORDED = {
    "blur2-x4": "e9e2a96b9909242d",
    "blur2-x4-noise20-jpeg50": "7e53a2e337606abf",
    "bsrgan": "da94b57058b3182a",
    "dra": "1155c5c0d7d05034",
    "instantir": "b9915ca0ac94eebf",
    "instarevive-bfr": "f8ca186ccb47e75b",
    "instarevive-bsr": "561dc890b8220ab9",
    "mixed": "d2c8545a4e903057",
    "none": "66b419e28fac3288",
    "realesrgan": "89fc9e67582c8e93",
    "realesrgan-nano": "d4c6762bb8b586be",
    "salt-pepper": "2cefbd0c792d9c51",
    "strokes": "1e86f8d844eee614",
    "supir": "9bccd70defcbfbb8",
    "x4": "4948fdc81f51c5dc",
    "x4-noise40": "fed3c79a63bdecad",
    "x8": "d1b55627fd1e451a",
}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_draws_of_a_preset_stay_as_they_are(preset: str) -> None:
    """A resumed run draws its first plans again. Recorded with version 2 of plans; other digests need a new version."""
    degradation = build_degradation(preset)
    plans = [rounded(dict(degradation.draw(7, f"a/{n}.jpg", 1000 * n))) for n in range(150)]
    assert hashlib.sha256(json.dumps(plans).encode()).hexdigest()[:16] == RECORDED[preset]
    target = degradation.target_plan()
    assert (target is None) == (preset not in {"realesrgan", "instantir"})


# -- sides ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sides"),
    [
        ({"base": "hq"}, (40, 31)),
        ({"base": "current"}, (20, 17)),
        ({"base": "hq", "divide": 4}, (10, 7)),  # 31 / 4 is 7.75
        ({"base": "hq", "divide": 4, "scale": 0.9}, (9, 6)),  # 9.0 and 6.975
        ({"base": "hq", "divide": 4, "scale": 0.9, "whole": True}, (9, 6)),  # 10 x 0.9 and 7 x 0.9 = 6.3
        ({"base": "hq", "divide": 4, "scale": 1.2}, (12, 9)),  # 9.3
        ({"base": "hq", "divide": 4, "scale": 1.2, "whole": True}, (12, 8)),  # 7 x 1.2 = 8.4
        ({"base": "current", "scale": 0.01}, (1, 1)),
        ({"base": "current", "scale": 2}, (40, 34)),
    ],
)
def test_sides_by_hand(fields: dict[str, Any], sides: tuple[int, int]) -> None:
    assert out_sides({"op": "resize", "mode": "area", **fields}, (20, 17), (40, 31)) == sides


def test_the_largest_sides() -> None:
    """libjpeg's side of 65,500 and 2^28 pixels are allowed, one more is not."""
    whole = {"op": "resize", "mode": "area", "base": "hq"}
    assert out_sides(whole, (1, 1), (65_500, 4000)) == (65_500, 4000)
    assert out_sides(whole, (1, 1), (4000, 65_500)) == (4000, 65_500)
    assert out_sides(whole, (1, 1), (16_384, 16_384)) == (16_384, 16_384)
    for height, width in ((65_501, 1), (1, 65_501), (16_385, 16_384), (65_500, 5000)):
        with pytest.raises(SampleError, match=f"{width} x {height} pixels") as error:
            out_sides(whole, (1, 1), (height, width))
        assert error.value.code == "too_large"


# -- strengths --------------------------------------------------------------------------------------------------------


def bell(sigma_x: float, sigma_y: float) -> dict[str, Any]:
    """A blur with two sigmas."""
    kernel = {"kind": "aniso", "size": 21, "sigma_x": sigma_x, "sigma_y": sigma_y, "theta": 0.0, "beta": None}
    return {"op": "blur", "kernel": kernel}


def resize(base: str, **fields: Any) -> dict[str, Any]:
    """A resize in the area mode."""
    return {"op": "resize", "base": base, "mode": "area", **fields}


def noise(kind: str, level: float) -> dict[str, Any]:
    """Gray noise."""
    return {"op": "noise", "kind": kind, "level": level, "gray": True, "seed": 1}


def jpeg(quality: float) -> dict[str, Any]:
    """A plain JPEG."""
    return {"op": "jpeg", "quality": quality, "form": "edge"}


def test_strengths_by_hand() -> None:
    """A blur counts in pixels of HQ: at half the size a sigma of 3 counts as 6. Variances add up."""
    plan = make_plan(
        [
            bell(2.0, 0.5),  # 1 px^2
            resize("current", scale=0.5),
            bell(3.0, 3.0),  # 9 / 0.25 = 36 px^2
            {"op": "blur", "kernel": {"kind": "sinc", "size": 7, "cutoff": 2.0}},
            resize("current", divide=2, scale=0.8),  # 0.5 / 2 * 0.8 = 0.2
            noise("gaussian", 3.0),  # 9
            noise("poisson", 0.5),  # (0.5 * 255)^2 * 0.5 / 256 = 31.75048828125
            jpeg(60),
            {"op": "salt_pepper", "amount": 0.2, "gray": True, "seed": 1},
            resize("hq", scale=1.5),
            jpeg(40),
            jpeg(50),
            {"op": "salt_pepper", "amount": 0.5, "gray": True, "seed": 1},
            resize("hq", divide=4),
        ]
    )
    numbers = strength(plan)
    assert numbers["blur_px"] == pytest.approx(math.sqrt(37), rel=1e-12)
    assert numbers["smallest"] == pytest.approx(0.2, rel=1e-12)
    assert numbers["noise"] == pytest.approx(math.sqrt(9 + 31.75048828125), rel=1e-12)
    assert numbers["quality"] == 40
    assert numbers["lost"] == pytest.approx(0.6, rel=1e-12)  # 1 - 0.8 * 0.5
    assert strength(make_plan([])) == {"blur_px": 0, "smallest": 1, "noise": 0, "quality": 100, "lost": 0}
    assert strength(make_plan([resize("hq", divide=2), resize("current", scale=3)]))["smallest"] == 0.5


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (bell(1.0, 1.0), ["blurry"]),
        (bell(0.99, 1.0), []),
        (resize("hq", scale=0.5), ["low resolution"]),
        (resize("hq", scale=0.51), []),
        (noise("gaussian", 5.0), ["noisy"]),
        (noise("gaussian", 4.99), []),
        ({"op": "salt_pepper", "amount": 0.001, "gray": True, "seed": 1}, ["noisy"]),
        ({"op": "salt_pepper", "amount": 0, "gray": True, "seed": 1}, []),
        (jpeg(90), []),
        (jpeg(89), ["compressed"]),
        (jpeg(70), ["compressed"]),
        (jpeg(69), ["compressed", "jpeg artifacts"]),
    ],
)
def test_words_begin_at_their_thresholds(op: dict[str, Any], words: list[str]) -> None:
    assert descriptors(make_plan([op])) == (["low quality", *words] if words else [])


# -- limits of operations ---------------------------------------------------------------------------------------------

KERNEL = {"kind": "aniso", "size": 7, "sigma_x": 1.0, "sigma_y": 2.0, "theta": 0.0}
SINC = {"kind": "sinc", "size": 7, "cutoff": 1.0}
COLOUR = {"op": "noise", "kind": "gaussian", "level": 1, "gray": False, "seed": 1}
UNIT = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
STROKE = {"width": 0.1, "start": [0, 0], "steps": [[1, 1]]}


def blur(**fields: Any) -> dict[str, Any]:
    """A blur with a kernel of these fields."""
    return {"op": "blur", "kernel": KERNEL | fields}


def given_kernel(side: int) -> dict[str, Any]:
    """A blur with a measured kernel."""
    return {"op": "blur", "kernel": {"kind": "given", "weights": [[0.5] * side] * side}}


def strokes(**fields: Any) -> dict[str, Any]:
    """One stroke."""
    return {"op": "strokes", "value": 1, "strokes": [STROKE | fields]}


ALLOWED = [
    blur(size=1),
    blur(size=255),
    blur(sigma_x=1e-3, sigma_y=1e4),
    blur(theta=1e4),
    blur(theta=-1e4),
    blur(kind="iso", sigma_y=1.0),
    blur(kind="plateau_aniso", beta=1e-3),
    blur(kind="generalized_iso", beta=1e3),
    {"op": "blur", "kernel": SINC | {"cutoff": 1e-6}},
    {"op": "blur", "kernel": SINC | {"cutoff": math.pi}},
    given_kernel(1),
    given_kernel(255),
    resize("hq", divide=1e-6, scale=1e6),
    resize("hq", divide=1e6, scale=1e-6),
    resize("hq", sampling=None),
    resize("hq", sampling="size", scale=1),
    resize("hq", sampling="factor", scale=1),
    noise("gaussian", 0),
    noise("poisson", 1e4),
    noise("gaussian", 1) | {"seed": 0},
    noise("gaussian", 1) | {"seed": 2**63 - 1},
    COLOUR | {"mix": UNIT},
    {"op": "salt_pepper", "amount": 1, "gray": True, "seed": 1},
    jpeg(1),
    jpeg(100),
    {"op": "jpeg", "quality": 99.5, "form": "simulator"},
    strokes(width=0),
    strokes(width=1),
    strokes(start=[1e3, -1e3]),
    strokes(steps=[]),
    {"op": "strokes", "value": 0, "strokes": []},
]

REFUSED = [
    (blur(size=0), "size must be a number within 1..255, got 0"),
    (blur(size=257), "size must be a number within 1..255, got 257"),
    (blur(size=6), "size must be odd, got 6"),
    (blur(sigma_x=0.9e-3), "sigma_x must be a number within 0.001..10000"),
    (blur(sigma_y=1.1e4), "sigma_y must be a number within"),
    (blur(theta=1.1e4), "theta must be a number within"),
    (blur(theta=-1.1e4), "theta must be a number within"),
    (blur(kind="plateau_aniso"), "'beta' is missing"),
    (blur(kind="generalized_iso", beta=1.1e3), "beta must be a number within"),
    (blur(kind="plateau_iso", beta=0), "beta must be a number within"),
    (blur(sigma_x=True), "sigma_x must be a number within"),
    (blur(sigma_x="1"), "sigma_x must be a number within"),
    ({"op": "blur", "kernel": SINC | {"cutoff": 0}}, "cutoff must be a number within"),
    ({"op": "blur", "kernel": SINC | {"cutoff": 3.1416}}, "cutoff must be a number within"),
    (given_kernel(257), "a square of odd side up to 255"),
    ({"op": "blur", "kernel": {"kind": "given", "weights": [[1.0, 1.0, 1.0]]}}, "a square of odd side"),
    ({"op": "blur", "kernel": {"kind": "given", "weights": [[math.inf]]}}, "weights must be finite"),
    (resize("hq", scale=0.9e-6), "scale must be a number within"),
    (resize("hq", divide=1.1e6), "divide must be a number within"),
    (resize("hq", sampling="size"), "'scale' is missing"),
    (resize("hq", sampling="centre", scale=1), "unknown sampling 'centre'"),
    (noise("gaussian", -0.1), "level must be a number within"),
    (noise("poisson", 1.1e4), "level must be a number within"),
    (noise("gaussian", 1) | {"seed": -1}, "seed must be a whole number of 63 bits"),
    (noise("gaussian", 1) | {"seed": 2**63}, "seed must be a whole number of 63 bits"),
    (noise("gaussian", 1) | {"gray": 1}, "gray must be true or false"),
    (COLOUR | {"mix": UNIT[:2]}, "mix must be a finite 3 x 3 matrix"),
    (COLOUR | {"mix": [[1, 0], [0, 1], [0, 0]]}, "mix must be a finite 3 x 3 matrix"),
    (COLOUR | {"mix": [[math.nan, 0, 0], *UNIT[1:]]}, "mix must be a finite 3 x 3 matrix"),
    (COLOUR | {"kind": "poisson", "mix": UNIT}, "mix must be a finite 3 x 3 matrix"),
    (COLOUR | {"gray": True, "mix": UNIT}, "mix must be a finite 3 x 3 matrix"),
    ({"op": "salt_pepper", "amount": -0.1, "gray": True, "seed": 1}, "amount must be a number within"),
    (jpeg(0.9), "quality must be a number within"),
    (jpeg(101), "quality must be a number within"),
    ({"op": "jpeg", "quality": 100, "form": "simulator"}, "a quality below 100"),
    (strokes(width=1.1), "width must be a number within"),
    (strokes(width=-0.1), "width must be a number within"),
    (strokes(start=[0, 1001]), "a stroke needs start"),
    (strokes(start=[0]), "a stroke needs start"),
    (strokes(steps=[[1, 2, 3]]), "a stroke needs start"),
    ({"op": "strokes", "value": 1.5, "strokes": []}, "value must be a number within"),
    ({"op": "strokes", "value": -0.5, "strokes": []}, "value must be a number within"),
]


@pytest.mark.parametrize("op", ALLOWED, ids=range(len(ALLOWED)))
def test_limits_are_inside(op: dict[str, Any]) -> None:
    assert operations(make_plan([op]))[0] == op


@pytest.mark.parametrize(("op", "message"), REFUSED, ids=range(len(REFUSED)))
def test_beyond_the_limits_is_refused_with_place_and_value(op: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="operation 2 of the plan") as error:
        operations(make_plan([{"op": "clip"}, op]))
    assert message in str(error.value)


@pytest.mark.parametrize("ops", ["clip", 5, None, {"op": "clip"}])
def test_a_plan_needs_a_list(ops: Any) -> None:
    with pytest.raises(ValueError, match="the plan needs a list under ops"):
        operations({"kind": "operations", "version": 2, "ops": ops})


def test_a_plan_is_a_mapping() -> None:
    with pytest.raises(ValueError, match="expected a plan, got list"):
        operations([])  # type: ignore[arg-type]
    assert make_plan([{"op": "clip"}]) == {"kind": "operations", "version": 2, "ops": [{"op": "clip"}]}


def test_the_same_picture_comes_back_unchanged() -> None:
    """A resize to the size that a picture has does nothing, with either sampling."""
    hq = dead_leaves(16, 0, 0)
    whole = apply_plan(hq, make_plan([]))
    for fields in ({}, {"sampling": "factor", "scale": 1}, {"sampling": "size", "scale": 1}):
        assert (
            apply_plan(hq, make_plan([{"op": "resize", "base": "current", "mode": "bicubic", **fields}])) == whole
        ).all()
