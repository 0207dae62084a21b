"""Degradations on the CPU: replay of plans, ranges of the recipes, unusual input, and the other models."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components import images
from components.degradations import PRESETS, build_degradation, filters, kernels, masks, noise
from components.degradations.batched import apply_plans
from components.degradations.engine import apply_plan
from components.degradations.plans import descriptors, make_plan, strength
from components.degradations.real_esrgan import RealESRGAN, Stage
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


def ops(plan: Any, name: str) -> list[dict[str, Any]]:
    return [op for op in plan["ops"] if op["op"] == name]


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_plan_survives_json_and_replays_to_the_same_bits(preset: str) -> None:
    degradation = build_degradation(preset)
    for position in range(20):
        plan = degradation.draw(5, "a/b.jpg", position)
        assert plan == degradation.draw(5, "a/b.jpg", position)
        hq = picture(index=position)
        before = hq.copy()
        lq = degradation.apply(hq, plan)
        # the plan alone decides: a degradation of another class replays it
        other = build_degradation("none")
        assert np.array_equal(lq, other.apply(hq, json.loads(json.dumps(plan))))
        assert np.array_equal(lq, hq) == (not plan["ops"])
        assert (preset == "none") <= (not plan["ops"]) <= (preset in ("none", "mixed"))
        assert lq.shape == hq.shape
        assert lq.dtype == np.float32
        assert lq.min() >= 0
        assert lq.max() <= 1
        assert np.array_equal(hq, before)
        assert len(json.dumps(plan)) < (6000 if preset == "strokes" else 2500)


def test_bits_do_not_depend_on_the_order_of_pictures() -> None:
    """The engine reuses its buffers; no value of one picture may reach the next."""
    degradation = build_degradation("realesrgan")
    sizes = [(64, 64), (90, 75), (33, 120), (200, 180)]
    jobs = [(picture(*sizes[i % 4], index=i), degradation.draw(0, "k", i)) for i in range(24)]
    once = [degradation.apply(hq, plan) for hq, plan in jobs]
    for index in np.random.default_rng(0).permutation(len(jobs)):
        assert np.array_equal(once[index], degradation.apply(*jobs[index]))


def test_threads_and_processes_give_the_same_bits() -> None:
    degradation = build_degradation("realesrgan")
    jobs = [(picture(70, 90, i), degradation.draw(0, "k", i)) for i in range(16)]
    here = [degradation.apply(*job).tobytes() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda job: degradation.apply(*job).tobytes(), jobs)) == here
    code = (
        "import hashlib\n"
        "from components.degradations import build_degradation\n"
        "from components.images import to_float\n"
        "from components.synthetic import dead_leaves\n"
        "d, digest = build_degradation('realesrgan'), hashlib.sha256()\n"
        "for i in reversed(range(16)):\n"
        "    digest.update(d.apply(to_float(dead_leaves(90, 0, i))[:70].copy(), d.draw(0, 'k', i)).tobytes())\n"
        "print(digest.hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(b"".join(reversed(here))).hexdigest()


@pytest.mark.full
def test_memory_is_flat_over_ten_thousand_pictures() -> None:
    """The sizes change with every picture, so that a pool of buffers could grow."""
    degradation, process = build_degradation("realesrgan"), psutil.Process()
    pictures = [picture(60 + 7 * i, 130 - 5 * i, i) for i in range(10)]
    levels = []
    for position in range(10_000):
        degradation.apply(pictures[position % 10], degradation.draw(0, "k", position))
        if position % 2000 == 1999:
            levels.append(process.memory_info().rss / 2**20)
    assert max(levels) - levels[0] < 8, levels


def test_results_do_not_share_memory() -> None:
    degradation, hq = build_degradation("realesrgan"), picture()
    first = degradation.apply(hq, degradation.draw(0, "k", 0))
    copy = first.copy()
    for position in range(1, 12):
        degradation.apply(hq, degradation.draw(0, "k", position))
    assert np.array_equal(first, copy)
    assert not np.shares_memory(build_degradation("none").apply(hq, make_plan([])), hq)


@pytest.mark.parametrize("plan", [{"kind": "real_esrgan", "version": 1}, {"kind": "operations", "version": 3}, {}])
def test_a_plan_of_another_kind_or_version_is_refused(plan: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a plan of kind 'operations'"):
        build_degradation("realesrgan").apply(picture(), plan)


BELL = {"kind": "iso", "size": 7, "sigma_x": 1.0, "sigma_y": 1.0, "theta": 0.0}
NOISE = {"op": "noise", "kind": "gaussian", "level": 5.0, "gray": False, "seed": 1}


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ({"op": "blurr"}, "unknown operation 'blurr'"),
        ({}, "unknown operation None"),
        ({"op": "blur"}, "'kernel' is missing"),
        ({"op": "blur", "kernel": BELL | {"kind": "box"}}, "unknown kind 'box'"),
        ({"op": "blur", "kernel": BELL | {"size": 8}}, "size must be odd"),
        ({"op": "blur", "kernel": BELL | {"size": 4001}}, "size must be a number within"),
        ({"op": "blur", "kernel": BELL | {"sigma_x": 0}}, "sigma_x must be a number within"),
        ({"op": "blur", "kernel": BELL | {"sigma_y": 2.0}}, "an iso kernel has one sigma"),
        ({"op": "blur", "kernel": {"kind": "given", "weights": [[1, 2], [3, 4]]}}, "square of odd side"),
        ({"op": "resize", "base": "hq", "mode": "nearest"}, "unknown mode 'nearest'"),
        ({"op": "resize", "base": "lq", "mode": "area"}, "unknown base 'lq'"),
        ({"op": "resize", "base": "hq", "mode": "area", "divide": 0}, "divide must be a number within"),
        ({"op": "resize", "base": "hq", "mode": "area", "scale": math.inf}, "scale must be a number within"),
        (NOISE | {"kind": "snow"}, "unknown kind 'snow'"),
        (NOISE | {"level": math.nan}, "level must be a number within"),
        (NOISE | {"seed": 1.5}, "seed must be a whole number"),
        (NOISE | {"gray": True, "mix": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}, "mix must be"),
        ({"op": "jpeg", "form": "edge", "quality": 0.4}, "quality must be a number within"),
        ({"op": "jpeg", "form": "simulator", "quality": 100}, "below 100"),
        ({"op": "salt_pepper", "amount": 2, "gray": True, "seed": 1}, "amount must be a number within"),
        ({"op": "strokes", "value": 1, "strokes": [{"width": 0.1, "start": [0, 0], "steps": [[1]]}]}, "a stroke needs"),
    ],
)
def test_both_back_ends_refuse_bad_operations(op: dict[str, Any], words: str) -> None:
    for apply in (lambda plan: apply_plan(picture(), plan), lambda plan: apply_plans(torch.zeros(1, 3, 8, 8), [plan])):
        with pytest.raises(ValueError, match=words):
            apply(make_plan([op]))


def test_pictures_and_results_have_a_largest_side() -> None:
    with pytest.raises(SampleError) as error:
        apply_plan(np.zeros((1, 70_000, 3), np.uint8), make_plan([]))
    assert error.value.code == "too_large"
    with pytest.raises(SampleError) as error:
        apply_plan(picture(), make_plan([{"op": "resize", "base": "hq", "scale": 2000, "mode": "area"}]))
    assert error.value.code == "too_large"


def test_a_plan_may_hold_a_measured_kernel() -> None:
    weights = np.arange(9.0).reshape(3, 3) / 36
    plan = make_plan([{"op": "blur", "kernel": {"kind": "given", "weights": weights.tolist()}, "exact": True}])
    expected = apply_plan(picture(), plan)
    assert np.abs(expected - filters.filter2d(picture(), weights)).max() < 1e-6
    batch = torch.from_numpy(picture()).permute(2, 0, 1)[None]
    assert np.abs(apply_plans(batch, [plan])[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("preset", MODELS)
def test_seed_key_and_position_each_change_the_plan(preset: str) -> None:
    degradation = build_degradation(preset)
    plans = [degradation.draw(*at) for at in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len({json.dumps(plan) for plan in plans}) == 4


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(list(PRESETS)), st.integers(1, 90), st.integers(1, 90), st.integers(0, 10_000))
def test_any_size_from_one_pixel_works(preset: str, height: int, width: int, position: int) -> None:
    degradation = build_degradation(preset)
    hq = np.random.default_rng(position).random((height, width, 3), dtype=np.float32)
    lq = degradation.apply(hq, degradation.draw(0, "k", position))
    assert lq.shape == hq.shape
    assert np.isfinite(lq).all()
    assert lq.min() >= 0
    assert lq.max() <= 1


@pytest.mark.parametrize("preset", ["realesrgan", "instarevive-bfr", "bsrgan"])
def test_extreme_aspects_work(preset: str) -> None:
    degradation = build_degradation(preset)
    for shape in ((1, 700), (700, 2), (3, 2000)):
        for position in range(5):
            lq = degradation.apply(np.full((*shape, 3), 0.4, np.float32), degradation.draw(0, "k", position))
            assert lq.shape == (*shape, 3)
            assert np.isfinite(lq).all()


def test_uint8_floats_and_gray_give_equal_results() -> None:
    pixels = images.to_uint8(picture(64, 48))
    gray = pixels[..., 1]
    degradation = build_degradation("realesrgan")
    for position in range(5):
        plan = degradation.draw(0, "k", position)
        colour = degradation.apply(pixels, plan)
        assert np.array_equal(colour, degradation.apply(pixels / np.float32(255), plan))
        as_colour = degradation.apply(np.repeat(gray[..., None], 3, 2), plan)
        assert as_colour.shape == (64, 48, 3)
        assert np.array_equal(as_colour, degradation.apply(gray, plan))
        assert np.array_equal(as_colour, degradation.apply(gray[..., None], plan))


def test_real_esrgan_draws_the_distribution_of_the_paper() -> None:
    """Real-ESRGAN x4plus: shares within four standard errors; the draws fill their ranges and stay inside."""
    samples = plans("realesrgan", 4000)

    def share(values: list[bool], expected: float) -> None:
        assert abs(np.mean(values) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(values))

    def fills(values: list[float], low: float, high: float) -> None:
        assert low <= min(values) < low + 0.06 * (high - low)
        assert high - 0.06 * (high - low) < max(values) <= high

    blurs = [[op["kernel"] for op in ops(plan, "blur")] for plan in samples]
    first = [kernels_of_plan[0] for kernels_of_plan in blurs]
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

    before_second = [plan["ops"][5]["op"] == "blur" for plan in samples]  # after sharpen, blur, resize, noise, JPEG
    share(before_second, 0.8)
    second = [kernels_of_plan[1] for kernels_of_plan, has in zip(blurs, before_second, strict=True) if has]
    fills([kernel["sigma_x"] for kernel in second if kernel["kind"] != "sinc"], 0.2, 1.5)
    final = [len(kernels_of_plan) > 1 + has for kernels_of_plan, has in zip(blurs, before_second, strict=True)]
    share(final, 0.8)
    fills([row[-1]["cutoff"] for row, has in zip(blurs, final, strict=True) if has], math.pi / 3, math.pi)
    op_names = [[op["op"] for op in plan["ops"]] for plan in samples]
    share([names.index("jpeg", 5) < len(names) - 1 - names[::-1].index("resize", 2) for names in op_names], 0.5)
    for number, (up, keep), (low, high), levels, scales in (
        (0, (0.2, 0.1), (0.15, 1.5), (1, 30), (0.05, 3)),
        (1, (0.3, 0.3), (0.3, 1.2), (1, 25), (0.05, 2.5)),
    ):
        sizes = [ops(plan, "resize")[number] for plan in samples]
        factors = [op["scale"] for op in sizes]
        share([factor > 1 for factor in factors], up)
        share([factor == 1 for factor in factors], keep)
        fills(factors, low, high)
        share([op["mode"] == "pool" for op in sizes], 1 / 3)
        noises = [ops(plan, "noise")[number] for plan in samples]
        share([each["kind"] == "gaussian" for each in noises], 0.5)
        share([each["gray"] for each in noises], 0.4)
        fills([each["level"] for each in noises if each["kind"] == "gaussian"], *levels)
        fills([each["level"] for each in noises if each["kind"] == "poisson"], *scales)
        fills([ops(plan, "jpeg")[number]["quality"] for plan in samples], 30, 95)
    assert len({op["seed"] for plan in samples for op in ops(plan, "noise")}) == 8000


def test_instantir_sharpens_and_leaves_one_in_a_hundred_clean() -> None:
    samples = plans("instantir", 3000)
    assert 0.003 < np.mean([len(plan["ops"]) == 1 for plan in samples]) < 0.018
    clean = next(plan for plan in samples if len(plan["ops"]) == 1)
    degradation, hq = PRESETS["instantir"], picture()
    assert isinstance(degradation, RealESRGAN)
    assert np.array_equal(degradation.apply(hq, clean), degradation.target(hq))
    assert np.square(np.diff(degradation.target(hq), axis=0)).mean() > 1.1 * np.square(np.diff(hq, axis=0)).mean()
    assert PRESETS["supir"].target(hq) is hq


def test_nano_is_milder_than_the_paper() -> None:
    hq = [picture(128, 128, index) for index in range(8)]
    scores = {
        name: np.median([psnr(PRESETS[name].apply(x, PRESETS[name].draw(0, "k", i)), x) for i, x in enumerate(hq * 4)])
        for name in ("realesrgan", "realesrgan-nano")
    }
    assert scores["realesrgan-nano"] > scores["realesrgan"] + 1


def test_another_noise_seed_gives_another_picture() -> None:
    degradation = build_degradation("realesrgan")
    plan = degradation.draw(0, "k", 0)
    other = make_plan([op | {"seed": op["seed"] + 1} if op["op"] == "noise" else op for op in plan["ops"]])
    assert not np.array_equal(degradation.apply(picture(), plan), degradation.apply(picture(), other))


@pytest.mark.parametrize(
    ("hq", "code"),
    [
        (np.zeros((64, 64, 2), np.float32), "shape"),
        (np.zeros((64, 64, 4), np.uint8), "shape"),
        (np.zeros((0, 64, 3), np.float32), "shape"),
        (np.zeros((64,), np.float32), "shape"),
        (np.zeros((64, 64, 3), np.int32), "dtype"),
        (np.zeros((64, 64, 3), np.uint16), "dtype"),
        (np.full((64, 64, 3), np.nan, np.float32), "nan"),
        (np.full((64, 64, 3), np.inf, np.float32), "nan"),
        (np.full((64, 64, 3), 1.01, np.float32), "range"),
        (np.full((64, 64, 3), -0.01), "range"),
    ],
)
def test_bad_pictures_are_refused_by_code(hq: np.ndarray, code: str) -> None:
    for preset in PRESETS:
        degradation = build_degradation(preset)
        with pytest.raises(SampleError) as error:
            degradation.apply(hq, degradation.draw(0, "k", 0))
        assert error.value.code == code
        with pytest.raises(SampleError):
            degradation.target(hq)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_one_colour_pictures_pass(value: float) -> None:
    hq = np.full((48, 48, 3), value, np.float32)
    degradation = build_degradation("realesrgan")
    for position in range(30):
        assert np.isfinite(degradation.apply(hq, degradation.draw(0, "k", position))).all()


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
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
        {"kernel_sizes": (7, 2001)},
        {"kernel_sizes": [7]},
        {"first": 5},
        {"sharpen": "no"},
        {"first": {"families": (-1, 1, 1, 0, 0, 0)}},
        {"first": {"beta_generalized": (1.5, 4)}},
        {"second": {"sigma": (0.2, float("inf"))}},
        {"faithful": True, "second": {"quality": (30, 100)}},
        {"factors": (0,)},
        {"factors": ()},
        {"clean_prob": 1.5},
        {"first": {"resize_probs": (0.5, 0.5, 0.5)}},
        {"first": {"families": (1.0,)}},
        {"second": {"quality": (30, 101)}},
        {"second": {"sigma": (2, 1)}},
        {"first": {"resize": (1.1, 1.5)}},
        {"first": {"gray_prob": -0.1}},
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|needs"):
        build_degradation("realesrgan", **options)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("instarevive-bfr", {"kernel_size": 40}),
        ("instarevive-bfr", {"quality": (0, 50)}),
        ("instarevive-bfr", {"shrink": (0.5, 2)}),
        ("instarevive-bfr", {"sigma": (1, 10_000.5)}),
        ("instarevive-bfr", {"noise": (-1, 5)}),
        ("instarevive-bfr", {"noise": (0, 20_000)}),
        ("bsrgan", {"factor": 1}),
        ("bsrgan", {"noise": (9, 2)}),
        ("x4", {"factor": 0}),
        ("x4", {"quality": 101}),
        ("x4", {"noise": float("nan")}),
        ("x4", {"factor": 2.5}),
        ("salt-pepper", {"amount": (0.1, 1.1)}),
        ("strokes", {"widths": (0.3, 0.1)}),
        ("realesrgan", {"jpeg_form": "plain"}),
    ],
)
def test_other_models_refuse_numbers_out_of_range(preset: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|unknown"):
        build_degradation(preset, **options)


def test_options_reach_the_plan() -> None:
    degradation = build_degradation("realesrgan", factors=[2], sharpen=True, first={"quality": [90, 91]})
    plan = degradation.draw(0, "k", 0)
    assert [op["divide"] for op in ops(plan, "resize") if "divide" in op] == [2, 2]
    assert plan["ops"][0] == {"op": "sharpen"}
    assert 90 <= ops(plan, "jpeg")[0]["quality"] <= 91
    assert isinstance(degradation, RealESRGAN)
    assert degradation.first.sigma == Stage().sigma


# The other models


def test_the_face_recipe_draws_its_ranges() -> None:
    samples = plans("instarevive-bfr", 2000)
    qualities = {ops(plan, "jpeg")[0]["quality"] for plan in samples}
    assert qualities == set(range(60, 100))
    kinds = [ops(plan, "blur")[0]["kernel"]["kind"] for plan in samples]
    assert 0.45 < np.mean([kind == "iso" for kind in kinds]) < 0.55
    assert all(4 <= ops(plan, "resize")[0]["divide"] <= 8 for plan in samples)
    assert max(ops(plan, "noise")[0]["level"] for plan in samples) <= 20


def test_bsrgan_shuffles_and_always_ends_with_jpeg_and_enlarging() -> None:
    samples = plans("bsrgan", 1000)
    assert len({tuple(op["op"] for op in plan["ops"]) for plan in samples}) > 100
    for plan in samples:
        assert [op["op"] for op in plan["ops"][-3:]] == ["jpeg", "resize", "clip"]
        assert len(ops(plan, "noise")) == 1
    assert 0.2 < np.mean([plan["ops"][0].get("divide") == 2 for plan in samples]) < 0.3
    noises = [ops(plan, "noise")[0] for plan in samples]
    assert 0.35 < np.mean([op["gray"] for op in noises]) < 0.45
    assert 0.16 < np.mean(["mix" in op for op in noises]) < 0.24


def test_correlated_noise_has_the_covariance_of_its_plan() -> None:
    mix = np.array([[4.0, 1.0, 0.0], [0.0, 3.0, 2.0], [1.0, 0.0, 5.0]])
    op = {"kind": "gaussian", "level": 1.0, "gray": False, "seed": 3, "mix": mix.tolist()}
    field = noise.gaussian_field(256, 256, op).reshape(-1, 3) * 255
    assert np.abs(np.cov(field.T) / (mix @ mix.T).clip(1) - (mix @ mix.T) / (mix @ mix.T).clip(1)).max() < 0.05


def test_supir_benchmark_degradations_are_fixed() -> None:
    """Two seeds differ only in the noise, and x4 keeps a smooth picture."""
    for preset in ("x4", "x8", "blur2-x4"):
        one, two = (build_degradation(preset).draw(seed, "k", 0) for seed in (0, 1))
        assert one == two
    noisy = build_degradation("x4-noise40")
    assert noisy.draw(0, "k", 0) == noisy.draw(0, "k", 0) != noisy.draw(0, "j", 0)
    ramp = np.repeat(np.linspace(0.2, 0.8, 128, dtype=np.float32)[None, :, None], 128, 0).repeat(3, -1)
    scores = {
        preset: psnr(PRESETS[preset].apply(ramp, PRESETS[preset].draw(0, "k", 0)), ramp)
        for preset in ("x4", "x8", "x4-noise40", "blur2-x4-noise20-jpeg50")
    }
    assert scores["x4"] > 45
    assert scores["x4"] >= scores["x8"] > scores["blur2-x4-noise20-jpeg50"] > scores["x4-noise40"]
    level = build_degradation("x4-noise40", resize_back=False)
    flat = np.full((256, 256, 3), 0.5, np.float32)
    assert level.apply(flat, level.draw(0, "k", 0)).std() * 255 == pytest.approx(40, rel=0.03)


def test_salt_and_pepper_changes_the_share_in_its_plan() -> None:
    degradation, hq = build_degradation("salt-pepper"), np.full((200, 200, 3), 0.5, np.float32)
    for position in range(10):
        plan = degradation.draw(0, "k", position)
        lq = degradation.apply(hq, plan)
        hit = (lq != 0.5).all(-1)
        assert 0.02 <= plan["ops"][0]["amount"] <= 0.1
        assert hit.mean() == pytest.approx(plan["ops"][0]["amount"], abs=0.008)
        assert lq[hit].mean() == pytest.approx(0.5, abs=0.06)
        assert (np.ptp(lq, axis=-1) == 0).all()


def test_strokes_cover_exactly_their_mask() -> None:
    degradation, shares = build_degradation("strokes"), []
    for position in range(40):
        hq, plan = picture(96, 128, position) * 0.9, degradation.draw(0, "k", position)
        mask = masks.mask_of(plan, 96, 128)
        assert mask is not None
        lq = degradation.apply(hq, plan)
        assert (lq[mask] == 1).all()
        assert np.array_equal(lq[~mask], hq[~mask])
        shares.append(mask.mean())
    assert 0.1 < np.mean(shares) < 0.6
    assert masks.mask_of(build_degradation("x4").draw(0, "k", 0), 96, 128) is None


def test_strength_and_descriptors_of_plans() -> None:
    steps = build_degradation("blur2-x4-noise20-jpeg50").draw(0, "k", 0)
    assert strength(steps) == {"blur_px": 2.0, "smallest": 0.25, "noise": 20.0, "quality": 50, "lost": 0.0}
    assert descriptors(steps) == ["low quality", "blurry", "low resolution", "noisy", "compressed", "jpeg artifacts"]
    assert descriptors(build_degradation("x4").draw(0, "k", 0)) == ["low quality", "low resolution"]
    assert descriptors(build_degradation("none").draw(0, "k", 0)) == []
    strong = [strength(plan) for plan in plans("realesrgan", 200)]
    mild = [strength(plan) for plan in plans("realesrgan-nano", 200)]
    for name in ("blur_px", "noise"):
        assert np.mean([each[name] for each in strong]) > np.mean([each[name] for each in mild])
