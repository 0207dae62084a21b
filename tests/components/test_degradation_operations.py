"""The operations of plans, each against an independent reference: kernels, filters, noise, JPEG, resizing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components import images
from components.degradations import build_degradation, filters, kernels, noise
from components.degradations.engine import apply_plan
from components.degradations.jpeg import jpeg
from components.degradations.plans import make_plan
from components.degradations.resize import MODES, resample, resize
from components.synthetic import dead_leaves


def picture(height: int = 64, width: int = 64, index: int = 0) -> np.ndarray:
    return images.to_float(dead_leaves(max(height, width, 16), 0, index))[:height, :width].copy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(1e-12, np.square(a.astype(float) - b).mean())))


# Kernels


@pytest.mark.parametrize("kind", kernels.FAMILIES)
def test_bells_sum_to_one_and_point_along_theta(kind: str) -> None:
    spec = {"kind": kind, "size": 15, "sigma_x": 3.0, "sigma_y": 0.6, "theta": 0.7, "beta": 1.5}
    kernel = kernels.build(spec)
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    assert np.allclose(kernel, kernel[::-1, ::-1])
    y, x = np.mgrid[-7:8, -7:8]
    _, vectors = np.linalg.eigh(np.array([[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)]))
    long_axis = vectors[:, 1]  # of the largest spread, in (x, y)
    assert abs(long_axis @ [math.cos(0.7), math.sin(0.7)]) > 0.999


def test_sinc_passes_frequencies_below_its_cutoff() -> None:
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
    assert (
        np.abs(filters.blur(picture(), spec, exact=True) - filters.filter2d(picture(), kernels.build(spec))).max()
        < 2e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["supir", "dra", "bsrgan", "instarevive-bfr"]), st.integers(0, 10_000), st.sampled_from([60, 200])
)
def test_the_quick_blur_stays_within_its_tolerance(preset: str, position: int, side: int) -> None:
    """Trimming, passes and the Fourier transform stay within TOLERANCE of the exact blur."""
    hq = np.random.default_rng(position).random((side, side + 3, 3), dtype=np.float32)
    blurs = [op for op in build_degradation(preset).draw(0, "k", position)["ops"] if op["op"] == "blur"]
    for op in blurs:
        exact = filters.blur(hq, op["kernel"], exact=True)
        assert np.abs(filters.blur(hq, op["kernel"]) - exact).max() <= filters.TOLERANCE


def test_filtering_is_correlation_with_a_mirror_border() -> None:
    """Against explicit sums; the kernel has no symmetry, so a flipped kernel fails."""
    image, kernel = picture(34, 40), np.arange(1.0, 26).reshape(5, 5) / 325
    padded = np.pad(image.astype(float), ((2, 2), (2, 2), (0, 0)), mode="reflect")
    expected = sum(kernel[i, j] * padded[i : i + 34, j : j + 40] for i in range(5) for j in range(5))
    assert np.abs(filters.filter2d(image, kernel) - expected).max() < 2e-6


def test_bad_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        kernels.sinc(8, 1.0)
    with pytest.raises(ValueError, match="unknown kernel kind"):
        kernels.build({"kind": "box", "size": 7})


def test_sharpening_leaves_flat_parts_alone() -> None:
    image = np.full((64, 64, 3), 0.4, np.float32)
    assert np.abs(filters.sharpen(image) - image).max() < 1e-6
    image[:, 32:] = 0.6
    assert filters.sharpen(image).max() > 0.62
    assert filters.sharpen(image).min() < 0.38


def test_quick_sharpening_stays_within_its_stated_error(images_dir: Path) -> None:
    worst, mean = [], []
    for name in ("tea-gardens", "roman-colosseum", "budgie-branch", "singaporean-cityscape"):
        photo = images.decode((images_dir / "hq" / f"{name}.jpg").read_bytes())
        hq = images.to_float(images.center_crop(photo, 256, 256))
        off = np.abs(filters.sharpen(hq, quick=True) - filters.sharpen(hq)) * 255
        worst.append(off.max())
        mean.append(off.mean())
    assert max(worst) <= 8
    assert max(mean) <= 0.25


# Noise


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_has_its_level_and_colour(gray: bool) -> None:
    field = noise.gaussian_field(256, 256, {"level": 15.0, "gray": gray, "seed": 4}) * np.ones(3)
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
    field = noise.shot_field(image, {"level": 0.7, "gray": gray, "seed": 9}) * np.ones(3)
    assert field.var() == pytest.approx(0.7**2 * image.mean() / vals, rel=0.04)
    assert abs(field.mean()) < 5 * field.std() / 256
    assert np.corrcoef(field[..., 0].ravel(), field[..., 2].ravel())[0, 1] == pytest.approx(float(gray), abs=0.03)


def test_shot_noise_has_the_skew_of_a_count_and_spares_black() -> None:
    """A count of rate r has skew 1 / sqrt(r); so must the fields at the usual 256 levels."""
    image = np.zeros((512, 512, 3), np.float32)
    image[:256] = (np.arange(512 * 256) % 256 / 255).reshape(256, 512, 1)  # 256 levels: as many photons
    image[256:] = 20 / 255
    op = {"level": 1.0, "gray": False, "seed": 2}
    field = noise.shot_field(image, op)[256:].ravel() * 256
    rate = 20 * 256 / 255
    assert field.var() == pytest.approx(rate, rel=0.02)
    assert ((field / field.std()) ** 3).mean() == pytest.approx(1 / math.sqrt(rate), rel=0.15)
    assert not noise.shot_field(np.zeros((32, 32, 3), np.float32), op).any()


def test_negative_values_are_black_and_add_no_level() -> None:
    """Low-passes and bicubic resizes give values below 0; the original clamps them before it counts levels."""
    image = np.full((64, 64, 3), 0.5, np.float32)
    image[:32] = -0.15
    op = {"level": 1.0, "gray": False, "seed": 2}
    field = noise.shot_field(image, op)
    assert not field[:32].any()
    assert np.array_equal(field, noise.shot_field(image.clip(0, 1), op))
    compressed = jpeg(image, 90, "edge")
    assert np.array_equal(compressed, jpeg(image.clip(0, 1), 90, "edge"))


def test_words_depend_on_seed_and_index_only() -> None:
    whole = noise.words(7, 1000)
    assert np.array_equal(whole[:37], noise.words(7, 37))
    assert not np.array_equal(whole, noise.words(8, 1000))
    assert abs(whole.astype(float).mean() / 65535 - 0.5) < 0.03


def test_noise_is_clipped() -> None:
    op = {"op": "noise", "kind": "gaussian", "level": 200.0, "gray": False, "seed": 1}
    noisy = apply_plan(picture(), make_plan([op]))
    assert noisy.min() == 0
    assert noisy.max() == 1
    assert noisy.dtype == np.float32


# JPEG and resizing


def test_jpeg_loses_more_at_lower_quality_and_keeps_colours(images_dir: Path) -> None:
    photo = images.decode((images_dir / "hq" / "tea-gardens.jpg").read_bytes())
    hq = images.to_float(images.center_crop(images.resize_short_side(photo, 128), 90, 75))
    for form in ("edge", "matched", "simulator"):
        scores = [psnr(jpeg(hq, quality, form), hq) for quality in (30, 60, 95)]
        assert scores == sorted(scores)
        assert scores[0] > 20
        assert scores[2] > 30
        assert np.abs(jpeg(hq, 95, form).mean((0, 1)) - hq.mean((0, 1))).max() < 0.01


@pytest.mark.parametrize("form", ["matched", "simulator"])
def test_the_original_darkens_the_lower_right_border_and_plain_jpeg_does_not(form: str) -> None:
    flat = np.full((49, 49, 3), 0.7, np.float32)  # one column and one row into the last block
    assert np.abs(jpeg(flat, 40) - flat).max() < 0.02
    assert (flat - jpeg(flat, 40, form))[-1, :, :].max() > 0.03


def test_the_simulator_refuses_quality_100() -> None:
    with pytest.raises(ValueError, match="below 100"):
        jpeg(picture(), 100, "simulator")
    with pytest.raises(ValueError, match="unknown JPEG form"):
        jpeg(picture(), 50, "jpg")


@pytest.mark.parametrize("mode", MODES)
def test_resizing_stays_aligned(mode: str) -> None:
    """A ramp keeps the mean of its ends, so nothing shifts to one side."""
    ramp = np.repeat(np.linspace(0, 1, 60, dtype=np.float32)[None, :, None], 60, 0).repeat(3, -1)
    for side in (13, 37, 60, 81):
        out = resize(ramp, side, side, mode)
        assert out.shape == (side, side, 3)
        assert out[:, :, 0].mean() == pytest.approx(0.5, abs=2e-3)
        assert np.allclose(out + out[:, ::-1], 1, atol=5e-3)
    with pytest.raises(ValueError, match="unknown resize mode"):
        resize(ramp, 4, 4, "nearest")


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("side", [(13, 17), (30, 61), (81, 77), (120, 65)])
def test_matrices_and_opencv_agree(mode: str, side: tuple[int, int]) -> None:
    """The torch back end uses the matrices, the CPU OpenCV: enlarging and shrinking must agree."""
    image = np.random.default_rng(1).random((60, 64, 3), dtype=np.float32)
    resized = resample(image, *side, mode, 60 / side[0], 64 / side[1])
    assert np.abs(resized - resize(image, *side, mode)).max() < 2e-5
