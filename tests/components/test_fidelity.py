"""PSNR, SSIM and GMSD: closed forms, slow versions written out, and pyiqa's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from components.evaluation import fidelity
from components.evaluation.metrics import METRIC_INFO, NO_DOWNLOAD, OWN, Metrics, metric_info, needs_pyiqa
from components.randomness import generator


def pair(height: int = 40, width: int = 37) -> tuple[Tensor, Tensor]:
    """A smooth picture with edges, and the same with noise: 8-bit values as float [1, 3, H, W] in [0, 1]."""
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(rows / (3 + channel) + columns / 5) for channel in range(3)]
    hq = np.stack(waves) + 40 * (columns > width // 2)
    lq = hq + generator(3, "fidelity").normal(0, 12, hq.shape)
    return tuple(torch.from_numpy(np.clip(np.rint(one), 0, 255) / 255).float()[None] for one in (lq, hq))  # type: ignore[return-value]


def rounded_luma(image: Tensor) -> np.ndarray:
    red, green, blue = image[0].double().numpy() * 255
    return np.rint(0.299 * red + 0.587 * green + 0.114 * blue)


def test_psnr_of_a_constant_difference() -> None:
    hq = torch.full((1, 3, 5, 4), 0.5)
    assert float(fidelity.psnr(hq + 0.1, hq)) == pytest.approx(20.0, abs=1e-5)  # 10 log10(1 / 0.01)
    assert float(fidelity.psnr(hq, hq)) == 80.0
    blue = hq + torch.tensor([0.0, 0.0, 0.1]).view(1, 3, 1, 1)
    assert float(fidelity.psnry(blue, hq)) == pytest.approx(-20 * math.log10(0.0114), abs=1e-3)


def test_ssim_is_the_mean_over_whole_windows() -> None:
    """A loop over windows with weighted sums, after the paper."""
    lq, hq = pair(15, 13)
    x, y = rounded_luma(lq), rounded_luma(hq)
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    scores = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            contrast = max(0.0, (2 * covariance + 58.5225) / (variance_a + variance_b + 58.5225))
            scores.append((2 * mean_a * mean_b + 6.5025) / (mean_a**2 + mean_b**2 + 6.5025) * contrast)
    assert len(scores) == 15
    assert float(fidelity.ssim(lq, hq)) == pytest.approx(np.mean(scores), abs=1e-9)


def test_ssimc_is_the_mean_of_the_channels() -> None:
    lq, hq = pair()
    gray = [fidelity.ssim(lq[:, [c]].expand(-1, 3, -1, -1), hq[:, [c]].expand(-1, 3, -1, -1)) for c in range(3)]
    assert float(fidelity.ssimc(lq, hq)) == pytest.approx(float(torch.stack(gray).mean()), abs=1e-4)


def test_ssim_of_opposite_contrast_is_not_negative() -> None:
    _, hq = pair()
    assert 0 <= float(fidelity.ssim(1 - hq, hq)) < 0.2


def test_gmsd_is_the_deviation_of_gradient_similarity() -> None:
    lq, hq = pair(12, 11)
    magnitudes = []
    for image in (lq, hq):
        plane = rounded_luma(image)[:12, :10].reshape(6, 2, 5, 2).mean(axis=(1, 3))
        framed = np.pad(plane, 1)
        across = np.array(
            [[sum(framed[i + k, j] - framed[i + k, j + 2] for k in range(3)) / 3 for j in range(5)] for i in range(6)]
        )
        down = np.array(
            [[sum(framed[i, j + k] - framed[i + 2, j + k] for k in range(3)) / 3 for j in range(5)] for i in range(6)]
        )
        magnitudes.append(np.hypot(across, down))
    a, b = magnitudes
    similarity = (2 * a * b + 170) / (a**2 + b**2 + 170)
    assert float(fidelity.gmsd(lq, hq)) == pytest.approx(similarity.std(ddof=1), abs=1e-9)
    assert float(fidelity.gmsd(hq, hq)) == 0.0


@pytest.mark.parametrize("name", ["psnr", "psnry", "ssim", "ssimc", "gmsd"])
@pytest.mark.parametrize("size", [(40, 37), (64, 128)])
def test_pyiqa_gives_the_same_number(name: str, size: tuple[int, int]) -> None:
    import pyiqa

    lq, hq = pair(*size)
    assert float(getattr(fidelity, name)(lq, hq)) == pytest.approx(
        float(pyiqa.create_metric(name, device="cpu")(lq, hq)), abs=2e-5
    )


# --- pyiqa is absent --------------------------------------------------------------------------------------------------


@pytest.fixture
def without_pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyiqa", None)  # an import raises ImportError


@pytest.mark.usefixtures("without_pyiqa")
def test_the_default_set_shrinks_to_our_own_metrics() -> None:
    from components.evaluation.metrics import has_pyiqa, left_out, usable, without_target

    assert not has_pyiqa()
    assert usable() == ("psnr", "ssim", "gmsd", "st_lpips", "niqe_restoray", "consistency", "color_drift")
    assert left_out() == ("ms_ssim", "vif", "piqe")
    assert without_target() == ("niqe_restoray", "consistency", "color_drift")
    image = (pair()[0][0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    scores = Metrics(("psnr", "ssim", "gmsd")).score(image, image)
    assert scores == {"psnr": 80.0, "ssim": pytest.approx(1.0), "gmsd": 0.0}


@pytest.mark.usefixtures("without_pyiqa")
@pytest.mark.parametrize(("name", "hint"), [("vif", ""), ("niqe", "niqe_restoray"), ("psnrr", '"psnr"')])
def test_pyiqas_metrics_are_refused_in_one_sentence(name: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        Metrics((name,))
    message = str(caught.value)
    assert message.startswith(f"metric '{name}' is ") and "pyiqa (licence: non-commercial) is not installed" in message
    assert "psnr, psnry, ssim" in message and hint in message and "\n" not in message


def test_with_pyiqa_nothing_is_left_out() -> None:
    from components.evaluation.metrics import has_pyiqa, left_out, usable

    assert has_pyiqa() and usable() == NO_DOWNLOAD and left_out() == ()
    assert {name for name in METRIC_INFO if not needs_pyiqa(name)} == {*OWN, "consistency", "color_drift"}
    assert needs_pyiqa("niqe") and metric_info("gmsd").full_reference
