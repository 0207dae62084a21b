"""The second-order degradation: plans that replay, the recipe's ranges, and each stage against an oracle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components import images
from components.degradations import PRESETS, build_degradation, kernels, noise
from components.degradations.jpeg import jpeg
from components.degradations.real_esrgan import RealESRGAN, Stage, add_noise
from components.degradations.resize import resize
from components.randomness import generator
from components.synthetic import dead_leaves
from components.types import SampleError

MODELS = [name for name, preset in PRESETS.items() if isinstance(preset, RealESRGAN)]


def picture(height: int = 64, width: int = 64, index: int = 0) -> np.ndarray:
    return images.to_float(dead_leaves(max(height, width, 16), 0, index))[:height, :width].copy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(1e-12, np.square(a.astype(float) - b).mean())))


def plans(preset: str, count: int) -> list[dict[str, Any]]:
    degradation = build_degradation(preset)
    return [dict(degradation.draw(1, "sample", position)) for position in range(count)]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_plan_survives_json_and_replays_to_the_same_bits(preset: str) -> None:
    degradation = build_degradation(preset)
    for position in range(20):
        plan = degradation.draw(5, "a/b.jpg", position)
        assert plan == degradation.draw(5, "a/b.jpg", position)
        hq = picture(index=position)
        before = hq.copy()
        lq = degradation.apply(hq, plan)
        # nothing but the plan counts: an object with other numbers replays it
        other = build_degradation("none" if preset == "none" else "realesrgan")
        assert np.array_equal(lq, other.apply(hq, json.loads(json.dumps(plan))))
        assert np.array_equal(lq, hq) == (preset == "none" or plan.get("clean", False))
        assert lq.shape == hq.shape
        assert lq.dtype == np.float32
        assert lq.min() >= 0
        assert lq.max() <= 1
        assert np.array_equal(hq, before)
        assert len(json.dumps(plan)) < 1500


def test_a_foreign_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="real_esrgan plan"):
        build_degradation("realesrgan").apply(picture(), build_degradation("none").draw(0, "k", 0))


@pytest.mark.parametrize("preset", MODELS)
def test_seed_key_and_position_each_change_the_plan(preset: str) -> None:
    degradation = build_degradation(preset)
    drawn = [degradation.draw(*at) for at in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len({json.dumps(plan) for plan in drawn}) == 4


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MODELS), st.integers(32, 90), st.integers(32, 90), st.integers(0, 10_000))
def test_any_size_from_32_works(preset: str, height: int, width: int, position: int) -> None:
    degradation = build_degradation(preset)
    hq = np.random.default_rng(position).random((height, width, 3), dtype=np.float32)
    lq = degradation.apply(hq, degradation.draw(0, "k", position))
    assert lq.shape == hq.shape
    assert np.isfinite(lq).all()
    assert lq.min() >= 0
    assert lq.max() <= 1


def test_the_recipe_of_the_paper_is_what_is_drawn() -> None:
    """Real-ESRGAN x4plus: shares within four standard errors, ranges filled and not left."""
    drawn = plans("realesrgan", 4000)

    def share(values: list[bool], expected: float) -> None:
        assert abs(np.mean(values) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(values))

    def fills(values: list[float], low: float, high: float) -> None:
        assert low <= min(values) < low + 0.06 * (high - low)
        assert high - 0.06 * (high - low) < max(values) <= high

    first = [plan["blur1"] for plan in drawn]
    bells = [kernel for kernel in first if kernel["kind"] != "sinc"]
    share([kernel["kind"] == "sinc" for kernel in first], 0.1)
    for family, probability in zip(kernels.FAMILIES, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), strict=True):
        share([kernel["kind"] == family for kernel in bells], probability)
    assert {kernel["size"] for kernel in first} == {7, 9, 11, 13, 15, 17, 19, 21}
    fills([kernel["sigma_x"] for kernel in bells], 0.2, 3.0)
    aniso = [kernel for kernel in bells if kernel["kind"].endswith("aniso")]
    fills([kernel["sigma_y"] for kernel in aniso], 0.2, 3.0)
    fills([kernel["theta"] for kernel in aniso], -math.pi, math.pi)
    betas = [kernel["beta"] for kernel in bells if kernel["kind"].startswith("generalized")]
    share([beta < 1 for beta in betas], 0.5)
    fills(betas, 0.5, 4.0)
    share([kernel["beta"] == 1 for kernel in bells if kernel["kind"].startswith("plateau")], 0.5)
    sincs = [kernel for kernel in first if kernel["kind"] == "sinc"]
    fills([kernel["cutoff"] for kernel in sincs if kernel["size"] >= 13], math.pi / 5, math.pi)
    fills([kernel["cutoff"] for kernel in sincs if kernel["size"] < 13], math.pi / 3, math.pi)

    share([plan["blur2"] is not None for plan in drawn], 0.8)
    fills([p["blur2"]["sigma_x"] for p in drawn if p["blur2"] and p["blur2"]["kind"] != "sinc"], 0.2, 1.5)
    share([plan["final"] is not None for plan in drawn], 0.8)
    fills([plan["final"]["cutoff"] for plan in drawn if plan["final"]], math.pi / 3, math.pi)
    share([plan["jpeg_first"] for plan in drawn], 0.5)
    for number, (up, keep), (low, high), levels, scales in (
        (1, (0.2, 0.1), (0.15, 1.5), (1, 30), (0.05, 3)),
        (2, (0.3, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5)),
    ):
        factors = [plan[f"resize{number}"]["factor"] for plan in drawn]
        share([factor > 1 for factor in factors], up)
        share([factor == 1 for factor in factors], keep)
        fills(factors, low, high)
        share([plan[f"resize{number}"]["mode"] == "area" for plan in drawn], 1 / 3)
        noises = [plan[f"noise{number}"] for plan in drawn]
        share([each["kind"] == "gaussian" for each in noises], 0.5)
        share([each["gray"] for each in noises], 0.4)
        fills([each["level"] for each in noises if each["kind"] == "gaussian"], *levels)
        fills([each["level"] for each in noises if each["kind"] == "poisson"], *scales)
        fills([plan[f"jpeg{number}"] for plan in drawn], 30, 95)
    assert len({plan["noise1"]["seed"] for plan in drawn} | {plan["noise2"]["seed"] for plan in drawn}) == 8000


def test_instantir_sharpens_and_leaves_one_in_a_hundred_clean() -> None:
    drawn = plans("instantir", 3000)
    assert 0.003 < np.mean([plan["clean"] for plan in drawn]) < 0.018
    clean = next(plan for plan in drawn if plan["clean"])
    degradation, hq = PRESETS["instantir"], picture()
    assert isinstance(degradation, RealESRGAN)
    assert np.array_equal(degradation.apply(hq, clean), degradation.target(hq))
    assert np.square(np.diff(degradation.target(hq), axis=0)).mean() > 1.1 * np.square(np.diff(hq, axis=0)).mean()
    assert PRESETS["realesrgan"].target(hq) is hq


def test_nano_is_milder_than_the_paper() -> None:
    hq = [picture(128, 128, index) for index in range(8)]
    scores = {
        name: np.median([psnr(PRESETS[name].apply(x, PRESETS[name].draw(0, "k", i)), x) for i, x in enumerate(hq * 4)])
        for name in ("realesrgan", "realesrgan-nano")
    }
    assert scores["realesrgan-nano"] > scores["realesrgan"] + 1


def test_noise_seeds_matter_and_noise_alone_changes_with_them() -> None:
    degradation = build_degradation("realesrgan")
    plan = dict(degradation.draw(0, "k", 0))
    other = plan | {"noise1": plan["noise1"] | {"seed": plan["noise1"]["seed"] + 1}}
    assert not np.array_equal(degradation.apply(picture(), plan), degradation.apply(picture(), other))


@pytest.mark.parametrize(
    ("hq", "code"),
    [
        (np.zeros((64, 64), np.float32), "shape"),
        (np.zeros((64, 64, 1), np.float32), "shape"),
        (np.zeros((64, 64, 3), np.uint8), "shape"),
        (np.zeros((64, 64, 3)), "shape"),
        (np.zeros((31, 64, 3), np.float32), "too_small"),
        (np.full((64, 64, 3), np.nan, np.float32), "nan"),
        (np.full((64, 64, 3), np.inf, np.float32), "nan"),
        (np.full((64, 64, 3), 1.01, np.float32), "range"),
        (np.full((64, 64, 3), -0.01, np.float32), "range"),
    ],
)
def test_bad_pictures_are_refused_by_code(hq: np.ndarray, code: str) -> None:
    for preset in PRESETS:
        degradation = build_degradation(preset)
        with pytest.raises(SampleError) as caught:
            degradation.apply(hq, degradation.draw(0, "k", 0))
        assert caught.value.code == code


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_one_colour_pictures_pass(value: float) -> None:
    hq = np.full((48, 48, 3), value, np.float32)
    degradation = build_degradation("realesrgan")
    for position in range(30):
        assert np.isfinite(degradation.apply(hq, degradation.draw(0, "k", position))).all()


def test_typos_die_with_the_near_name() -> None:
    with pytest.raises(ValueError, match='Did you mean "realesrgan"'):
        build_degradation("realesrgna")
    with pytest.raises(ValueError, match='Did you mean "sharpen"'):
        build_degradation("realesrgan", sharpn=True)
    with pytest.raises(ValueError, match='Did you mean "gaussian"'):
        build_degradation("realesrgan", first={"gausian": (1, 2)})
    with pytest.raises(ValueError, match="no option"):
        build_degradation("none", factor=2)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_sizes": (6, 21)},
        {"factor": 0},
        {"clean_prob": 1.5},
        {"first": {"resize_probs": (0.5, 0.5, 0.5)}},
        {"first": {"families": (1.0,)}},
        {"second": {"quality": (30, 101)}},
        {"second": {"sigma": (2, 1)}},
        {"first": {"resize": (1.1, 1.5)}},
        {"first": {"gray_prob": -0.1}},
    ],
)
def test_numbers_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        build_degradation("realesrgan", **options)


def test_options_reach_the_plan() -> None:
    degradation = build_degradation("realesrgan", factor=2, sharpen=True, first={"quality": [90, 91]})
    plan = degradation.draw(0, "k", 0)
    assert plan["factor"] == 2
    assert plan["sharpen"]
    assert 90 <= plan["jpeg1"] <= 91
    assert isinstance(degradation, RealESRGAN)
    assert degradation.first.sigma == Stage().sigma


# Kernels


@pytest.mark.parametrize("kind", kernels.FAMILIES)
def test_bells_sum_to_one_and_point_where_theta_says(kind: str) -> None:
    spec = {"kind": kind, "size": 15, "sigma_x": 3.0, "sigma_y": 0.6, "theta": 0.7, "beta": 1.5}
    kernel = kernels.build(spec)
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    assert np.allclose(kernel, kernel[::-1, ::-1])
    y, x = np.mgrid[-7:8, -7:8]
    _, vectors = np.linalg.eigh(np.array([[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)]))
    long_axis = vectors[:, 1]  # of the largest spread, in (x, y)
    assert abs(long_axis @ [math.cos(0.7), math.sin(0.7)]) > 0.999


def test_sinc_passes_what_lies_below_its_cutoff() -> None:
    kernel = kernels.sinc(21, math.pi / 2)
    assert kernel.sum() == pytest.approx(1)
    assert kernel.min() < 0
    response = np.abs(np.fft.fft2(np.pad(kernel, ((0, 107), (0, 107)))))[0, :65]
    omega = np.linspace(0, math.pi, 65)
    assert (np.abs(response[omega < 1.1] - 1) < 0.15).all()
    assert (response[omega > 2.1] < 0.15).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 3.0), st.sampled_from([3, 7, 21]))
def test_two_passes_equal_the_dense_kernel(sigma: float, size: int) -> None:
    spec = {"kind": "iso", "size": size, "sigma_x": sigma, "sigma_y": sigma, "theta": 0.0, "beta": None}
    assert np.abs(kernels.blur(picture(), spec) - kernels.filter2d(picture(), kernels.build(spec))).max() < 2e-6


def test_filtering_is_correlation_with_a_mirror_border() -> None:
    """Against sums written out; the kernel has no symmetry, so a flipped one would show."""
    image, kernel = picture(34, 40), np.arange(1.0, 26).reshape(5, 5) / 325
    padded = np.pad(image.astype(float), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    expected = sum(kernel[i, j] * padded[i : i + 34, j : j + 40] for i in range(5) for j in range(5))
    assert np.abs(kernels.filter2d(image, kernel) - expected).max() < 2e-6


def test_bad_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        kernels.sinc(8, 1.0)
    with pytest.raises(ValueError, match="unknown kernel kind"):
        kernels.build({"kind": "box", "size": 7})


def test_sharpening_leaves_flat_parts_alone() -> None:
    image = np.full((64, 64, 3), 0.4, np.float32)
    assert np.abs(kernels.sharpen(image) - image).max() < 1e-6
    image[:, 32:] = 0.6
    assert kernels.sharpen(image).max() > 0.62
    assert kernels.sharpen(image).min() < 0.38


# Noise


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_level_and_colour(gray: bool) -> None:
    field = noise.gaussian_field(256, 256, 15.0, gray, generator(0, "n")) * np.ones(3)
    assert field.std() * 255 == pytest.approx(15, rel=0.02)
    assert abs(field.mean()) * 255 < 0.2
    assert np.corrcoef(field[..., 0].ravel(), field[..., 1].ravel())[0, 1] == pytest.approx(float(gray), abs=0.02)


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize(("levels", "vals"), [(1, 1), (2, 2), (5, 8), (16, 16), (200, 256)])
def test_shot_noise_has_the_variance_of_its_photon_count(levels: int, vals: int, gray: bool) -> None:
    """Variance = scale^2 * mean / vals, vals the next power of two of the distinct levels (degradation.md, trap 9)."""
    steps = np.linspace(60, 200, levels).round() if levels > 1 else np.array([128.0])
    image = np.repeat(np.resize(steps / 255, (256, 256, 1)).astype(np.float32), 3, axis=-1)
    assert noise.photon_count(np.rint(image * 255).astype(np.uint8)) == vals
    field = noise.poisson_field(image, 0.7, gray, generator(1, "n")) * np.ones(3)
    assert field.var() == pytest.approx(0.7**2 * image.mean() / vals, rel=0.04)
    assert abs(field.mean()) < 5 * field.std() / 256
    assert np.corrcoef(field[..., 0].ravel(), field[..., 2].ravel())[0, 1] == pytest.approx(float(gray), abs=0.03)


def test_shot_noise_is_drawn_exactly() -> None:
    """At a rate of one photon the normal approximation would be far off: P(0) = 1/e."""
    image = np.full((200, 200, 3), 1.0, np.float32)  # vals 1, rate 1
    field = noise.poisson_field(image, 1.0, False, generator(0, "n"))
    assert np.mean(np.rint(field + 1) == 0) == pytest.approx(math.exp(-1), abs=0.01)
    assert np.mean(np.rint(field + 1) == 3) == pytest.approx(math.exp(-1) / 6, abs=0.005)


def test_noise_is_clipped() -> None:
    spec = {"kind": "gaussian", "level": 200.0, "gray": False, "seed": 1}
    noisy = add_noise(picture(), spec)
    assert noisy.min() == 0
    assert noisy.max() == 1
    assert noisy.dtype == np.float32


# JPEG and resizing


def test_jpeg_loses_more_at_lower_quality_and_keeps_colours(images_dir: Path) -> None:
    photo = images.decode((images_dir / "hq" / "tea-gardens.jpg").read_bytes())
    hq = images.to_float(images.center_crop(images.resize_short_side(photo, 128), 90, 75))
    for faithful in (False, True):
        scores = [psnr(jpeg(hq, quality, faithful), hq) for quality in (30, 60, 95)]
        assert scores == sorted(scores)
        assert scores[0] > 20
        assert scores[2] > 30
        assert np.abs(jpeg(hq, 95, faithful).mean((0, 1)) - hq.mean((0, 1))).max() < 0.01


def test_faithful_jpeg_darkens_the_lower_right_border_and_the_default_does_not() -> None:
    flat = np.full((49, 49, 3), 0.7, np.float32)  # one column and one row into the last block
    assert np.abs(jpeg(flat, 40) - flat).max() < 0.02
    assert (flat - jpeg(flat, 40, faithful=True))[-1, :, :].max() > 0.03


def test_faithful_jpeg_is_turned() -> None:
    """On whole blocks the faithful form of a turned picture is the plain form, turned back."""
    hq = picture(64, 48)
    turned = np.ascontiguousarray(hq.swapaxes(0, 1))
    assert np.array_equal(jpeg(hq, 50, faithful=True), jpeg(turned, 50).swapaxes(0, 1))


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_resizing_stays_aligned(mode: str) -> None:
    """A ramp keeps its ends' mean: no shift to one side, up or down."""
    ramp = np.repeat(np.linspace(0, 1, 60, dtype=np.float32)[None, :, None], 60, 0).repeat(3, -1)
    for side in (13, 37, 60, 81):
        out = resize(ramp, side, side, mode)
        assert out.shape == (side, side, 3)
        assert out[:, :, 0].mean() == pytest.approx(0.5, abs=2e-3)
        assert np.allclose(out + out[:, ::-1], 1, atol=5e-3)
    with pytest.raises(ValueError, match="unknown resize mode"):
        resize(ramp, 4, 4, "nearest")
