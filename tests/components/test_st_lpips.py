"""ST-LPIPS against pyiqa's class with the same weights, and consistency by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.degradations import build_degradation
from components.evaluation import IDENTITY_PSNR_DB, st_lpips
from components.evaluation.agreement import consistency_db
from components.evaluation.metrics import METRIC_INFO, Metrics
from components.evaluation.st_lpips import FILE, PACKAGE, halve, load_st_lpips
from components.images import to_float, to_uint8
from components.models import ModelError
from components.randomness import generator
from components.synthetic import dead_leaves


def weights_file() -> Path:
    package = importlib.util.find_spec(PACKAGE)
    assert package is not None and package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / FILE


@pytest.mark.parametrize("shape", [(32, 32), (64, 97), (131, 80)])
def test_it_is_pyiqas_score(shape: tuple[int, int]) -> None:
    from pyiqa.archs.stlpips_arch import STLPIPS

    theirs = STLPIPS(pretrained_model_path=str(weights_file()))
    images = torch.from_numpy(generator(3, *shape).uniform(0, 1, (2, 3, *shape)).astype(np.float32))
    targets = (images + 0.1 * torch.from_numpy(generator(4, *shape).normal(0, 1, (2, 3, *shape))).float()).clamp(0, 1)
    with torch.no_grad():
        expected = theirs(images, targets).flatten()
        ours = load_st_lpips()(images, targets)
    assert ours.shape == (2,) and float(ours.min()) > 1e-4
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_it_is_zero_for_equal_pictures_and_has_a_gradient_for_the_picture() -> None:
    network = load_st_lpips()
    images = torch.rand(1, 3, 40, 40, requires_grad=True)
    assert float(network(images, images).detach()) == 0
    network(images, torch.rand(1, 3, 40, 40)).sum().backward()
    assert images.grad is not None and float(images.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in network.parameters())


def test_halving_by_hand() -> None:
    """[1, 2, 1] / 4 along both sides, at every second place of a row with two mirrored values at each end."""
    row = torch.tensor([1.0, 5.0, 2.0, 8.0])
    mirrored = [2.0, 5.0, 1.0, 5.0, 2.0, 8.0, 2.0, 5.0]
    line = [(mirrored[i] + 2 * mirrored[i + 1] + mirrored[i + 2]) / 4 for i in (0, 2, 4)]
    result = halve(row.expand(1, 2, 4, 4))
    assert result.shape == (1, 2, 3, 3)
    assert result[0, 1, 1].tolist() == pytest.approx(line)
    assert halve(row[:, None].expand(1, 1, 4, 4))[0, 0, :, 1].tolist() == pytest.approx(line)


def test_it_is_a_metric_of_the_default_set() -> None:
    info, hq = METRIC_INFO["st_lpips"], dead_leaves(64, 0, 0)
    noise = generator(2, "n").normal(0, 20, hq.shape)
    noisy = np.clip(hq + noise, 0, 255).astype(np.uint8)
    assert not info.higher_is_better and info.full_reference and not info.downloads
    scores = Metrics(("st_lpips",)).score(noisy, hq)
    assert scores["st_lpips"] > 0.01 and Metrics(("st_lpips",)).score(hq, hq) == {"st_lpips": 0.0}


def test_missing_and_damaged_weights_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(path: Path) -> dict[str, Any]:
        return {"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}

    with monkeypatch.context() as patch:
        patch.setattr(st_lpips, "read_tensors", cut)
        with pytest.raises(ModelError, match="missing"):
            load_st_lpips()
    monkeypatch.setattr(st_lpips, "FILE", "weights/no.pth")
    with pytest.raises(FileNotFoundError, match="stlpips-pytorch is not installed"):
        load_st_lpips()


# --------------------------------------------------------------------------------------------------------- consistency


@pytest.mark.parametrize("preset", ["x4-noise40", "blur2-x4-noise20-jpeg50", "realesrgan"])
def test_the_true_picture_is_exact_and_others_are_not(preset: str) -> None:
    """The plan's noise is the same again, so the true picture gives the input's bits."""
    options = {"sharpen_target": False} if preset == "realesrgan" else {}
    degradation, hq = build_degradation(preset, **options), dead_leaves(96, 1, 0)
    plan = degradation.draw(5, "k", 0)
    lq = to_uint8(degradation.apply(to_float(hq), plan))
    assert consistency_db(hq, lq, plan) == IDENTITY_PSNR_DB
    assert 5 < consistency_db(dead_leaves(96, 1, 1), lq, plan) < 25
    shifted = np.clip(hq.astype(int) + 10, 0, 255).astype(np.uint8)
    assert consistency_db(shifted, lq, plan) < 35


def test_consistency_by_hand() -> None:
    """Without operations it is the PSNR between result and input."""
    degradation = build_degradation("none")
    lq = dead_leaves(32, 0, 0) // 2
    assert consistency_db(lq + 10, lq, degradation.draw(0, "k", 0)) == pytest.approx(
        -10 * np.log10((10 / 255) ** 2), rel=1e-9
    )
    with pytest.raises(ValueError, match=r"\(16, 32\) of the result, the input has \(32, 32\)"):
        consistency_db(lq[:16], lq, degradation.draw(0, "k", 0))
