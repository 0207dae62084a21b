"""niqe_restoray: its statistics by hand, its direction on photographs, and its shipped Gaussian."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.stats import gennorm

from components.evaluation.metrics import Metrics
from components.evaluation.niqe_restoray import (
    FEATURES,
    FILE,
    MIN_SIDE_PX,
    asymmetric_gaussian,
    feature_names,
    fit,
    generalised_gaussian,
    means_of_patches,
    naturalness,
    normalise,
    patch_features,
    save,
    shipped_gaussian,
)
from components.images import ANY_SHAPE, Image, center_crop, decode, resize_short_side
from components.randomness import generator

PHOTOGRAPHS = Path(__file__).parents[2] / "pipelines" / "demo_corpus"
HELD_OUT = ("casa-mila", "oakland-zoo-otters", "perched-osprey", "roman-colosseum", "blue-periwinkle")


def photographs() -> list[Image]:
    """Held-out photographs of the demo, which no shipped Gaussian has seen."""
    images = [decode((PHOTOGRAPHS / f"{name}.jpg").read_bytes(), ANY_SHAPE, name) for name in HELD_OUT]
    return [center_crop(resize_short_side(image, 256), 256, 256) for image in images]


def test_worse_photographs_score_worse() -> None:
    images = photographs()

    def mean(change: object) -> float:
        return float(np.mean([naturalness(change(image)) for image in images]))  # type: ignore[operator]

    clean = mean(lambda image: image)
    blurs = [mean(lambda image, s=s: cv2.GaussianBlur(image, (0, 0), s)) for s in (0.6, 1.0, 2.0)]
    noises = [
        mean(lambda x, s=s: np.clip(x + generator(1, "n").normal(0, s, x.shape), 0, 255).astype(np.uint8))
        for s in (5.0, 12.0, 30.0)
    ]
    assert clean < blurs[0] < blurs[1] < blurs[2] and clean < noises[0] < noises[1] < noises[2]
    assert clean < 6 < blurs[2]


def test_the_metric_is_the_naturalness_of_the_picture() -> None:
    picture = photographs()[0]
    scores = Metrics(("niqe_restoray",)).score(picture, picture)
    assert scores["niqe_restoray"] == pytest.approx(naturalness(picture), rel=1e-9)


def test_the_score_is_the_distance_of_two_gaussians_by_hand() -> None:
    image, mean, covariance = photographs()[0], np.full(FEATURES, 0.3), np.diag(np.linspace(1, 2, FEATURES))
    features, _ = patch_features(image)
    centre = features.mean(0)
    spread = (features - centre).T @ (features - centre) / (len(features) - 1)
    difference = centre - mean
    expected = np.sqrt(difference @ np.linalg.inv((spread + covariance) / 2) @ difference)
    assert naturalness(image, (mean, covariance)) == pytest.approx(expected, rel=1e-6)


def test_patches_and_names_have_their_numbers() -> None:
    features, contrast = patch_features(photographs()[0])
    assert features.shape == (49, FEATURES) and contrast.shape == (49,) and len(feature_names()) == FEATURES
    odd, _ = patch_features(photographs()[0][:131, :99])
    assert odd.shape == (3 * 2, FEATURES)
    with pytest.raises(ValueError, match="needs sides of 96 px, the picture has 95"):
        patch_features(np.zeros((MIN_SIDE_PX - 1, 200, 3), np.uint8))
    assert naturalness(np.full((96, 96, 3), 90, np.uint8)) > 6  # a flat picture has statistics too


def test_the_means_of_patches_by_hand() -> None:
    values = generator(2, "v").random((10, 13))
    means = means_of_patches(values, 4, 3)
    assert means.shape == (3, 4)
    assert means[1, 2] == pytest.approx(values[3:7, 6:10].mean())


def test_normalised_brightness_by_hand() -> None:
    """(I - mean) / (deviation + 1) with a 7 x 7 Gaussian of 7/6."""
    values = generator(2, "v").uniform(0, 255, (9, 9)).astype(np.float32)
    line = np.exp(-(np.arange(-3, 4) ** 2) / (2 * (7 / 6) ** 2))
    window = np.outer(line, line) / line.sum() ** 2
    part = values[1:8, 1:8].astype(np.float64)
    mean = (window * part).sum()
    deviation = np.sqrt((window * part**2).sum() - mean**2)
    normalised, deviations = normalise(values)
    assert deviations[4, 4] == pytest.approx(deviation, rel=1e-3)
    assert normalised[4, 4] == pytest.approx((values[4, 4] - mean) / (deviation + 1), rel=1e-3)


@pytest.mark.parametrize("shape", [0.7, 1.0, 2.0, 4.0])
def test_the_shape_of_a_generalised_gaussian_is_found(shape: float) -> None:
    values = gennorm.rvs(shape, scale=1.7, size=400_000, random_state=1)
    estimate, variance = generalised_gaussian(np.array([np.abs(values).mean()]), np.array([(values**2).mean()]))
    assert estimate[0] == pytest.approx(shape, rel=0.03) and variance[0] == pytest.approx(values.var(), rel=0.01)


def test_the_sides_of_an_asymmetric_gaussian_are_found() -> None:
    """Half-normal sides of deviation 1 (left) and 3 (right), each as often as it is wide."""
    draw = generator(3, "a")
    right = draw.random(400_000) < 3 / 4
    values = np.where(right, np.abs(draw.normal(0, 3, 400_000)), -np.abs(draw.normal(0, 1, 400_000)))
    left = values < 0
    moments = [left.mean(), (values**2 * left).mean(), (values**2 * ~left).mean(), np.abs(values).mean()]
    parts = asymmetric_gaussian(*(np.array([m]) for m in (*moments, (values**2).mean())))
    shape, mean, low, high = (float(part[0]) for part in parts)
    assert (shape, low, high) == (pytest.approx(2, rel=0.03), pytest.approx(1, rel=0.01), pytest.approx(3, rel=0.01))
    assert mean == pytest.approx(float(values.mean()), rel=0.02)


def test_a_gaussian_is_fitted_on_sharp_patches_and_read_back(tmp_path: Path) -> None:
    images = photographs()
    mean, covariance = fit(images)
    rows = []
    for image in images:
        features, contrast = patch_features(image)
        rows += [row for row, own in zip(features, contrast, strict=True) if own >= 0.75 * contrast.max()]
    np.testing.assert_allclose(mean, np.mean(rows, axis=0))
    np.testing.assert_allclose(covariance, np.cov(np.array(rows).T), atol=1e-12)
    save((mean, covariance), tmp_path / "new" / "g.safetensors")
    assert (tmp_path / "new" / "g.safetensors").stat().st_size == FILE.stat().st_size


def test_the_shipped_gaussian_is_whole() -> None:
    mean, covariance = shipped_gaussian()
    assert mean.shape == (FEATURES,) and covariance.shape == (FEATURES, FEATURES)
    assert np.allclose(covariance, covariance.T) and np.linalg.eigvalsh(covariance).min() > -1e-9
