"""Scores against closed forms, direction, identity, reasons for missing values, and no use of the network."""

import math
import socket

import numpy as np
import pytest

from components.evaluation.metrics import IDENTITY_PSNR_DB, METRIC_INFO, NO_DOWNLOAD, OWN, Metrics, metric_info
from components.randomness import generator
from components.types import SampleError


def picture(height=176, width=200, seed=0):
    """Smooth waves plus a little noise, uint8: enough structure for every metric."""
    y, x = np.mgrid[0:height, 0:width] / 16.0
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1) * 70 + 128
    noise = generator(seed, "picture").normal(0, 4, waves.shape)
    return np.clip(np.rint(waves + noise), 0, 255).astype(np.uint8)


def noisy(image, sigma):
    return np.clip(np.rint(image + generator(1, "noise").normal(0, sigma, image.shape)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def metrics():
    return Metrics((*NO_DOWNLOAD, "psnry"))


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a metric of the default set opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_psnr_is_the_closed_form(metrics):
    hq = picture()
    restored = hq.copy()
    restored[::2] = np.where(restored[::2] > 127, restored[::2] - 5, restored[::2] + 5)
    error = np.mean((restored / 255.0 - hq / 255.0) ** 2)
    assert metrics.score(restored, hq)["psnr"] == pytest.approx(-10 * math.log10(error), abs=0.01)


def test_psnry_weighs_channels_over_the_full_range(metrics):
    hq = picture()
    restored = hq.copy()
    restored[..., 2] = np.where(hq[..., 2] > 127, hq[..., 2] - 40, hq[..., 2] + 40)  # blue alone
    error = (0.114 * 40 / 255) ** 2  # full-range Y; the studio swing of 219 levels would read 1.3 dB more
    assert metrics.score(restored, hq)["psnry"] == pytest.approx(-10 * math.log10(error), abs=0.1)


def test_identity_is_finite_and_perfect(metrics, offline):
    hq = picture()
    scores = metrics.score(hq, hq)
    assert scores["psnr"] == scores["psnry"] == IDENTITY_PSNR_DB
    assert scores["ssim"] == scores["ms_ssim"] == pytest.approx(1.0)
    assert scores["gmsd"] == pytest.approx(0.0, abs=1e-6)
    assert scores["vif"] == pytest.approx(1.0, abs=1e-4)


def test_direction_agrees_with_more_noise(metrics, offline):
    hq = picture()
    mild, strong = metrics.score(noisy(hq, 8), hq), metrics.score(noisy(hq, 40), hq)
    for name in mild.keys() - {"niqe_restoray"}:  # waves are no photograph
        assert (mild[name] > strong[name]) is METRIC_INFO[name].higher_is_better, name


def test_every_name_has_a_number_or_a_reason(metrics):
    small = metrics.measure(picture(160, 200), picture(160, 200, seed=1))
    no_input = dict.fromkeys(("consistency", "color_drift"), "no input")
    assert small.missing == {"ms_ssim": "needs 161 px a side, the picture has 160", **no_input}
    assert set(small.values) == set(metrics.names) - {"ms_ssim", "consistency", "color_drift"}
    assert "ms_ssim" in metrics.score(picture(161, 161), picture(161, 161, seed=1))
    alone = metrics.measure(picture())
    assert set(alone.values) == {"piqe", "niqe_restoray"}
    assert set(alone.missing.values()) == {"no target", "no input"}
    flat = np.full((176, 176, 3), 90, np.uint8)
    assert metrics.measure(flat, flat).missing == {"vif": "the target is one flat colour", **no_input}


@pytest.mark.parametrize("name", [name for name, info in METRIC_INFO.items() if info.min_side_px > 1])
def test_the_smallest_side_is_scored_and_one_pixel_less_is_not(name):
    side = METRIC_INFO[name].min_side_px
    scorer = Metrics((name,))
    asked = []
    scorer._networks[name] = lambda *pictures: asked.append(pictures) or pictures[0].mean()
    for shape in ((side - 1, 300), (300, side - 1)):
        assert scorer.measure(picture(*shape), picture(*shape)).missing == {
            name: f"needs {side} px a side, the picture has {side - 1}"
        }
    assert scorer.measure(picture(side, 300), picture(side, 300)).missing == {} and len(asked) == 1


def test_the_smallest_sides_are_those_of_the_networks():
    """Filters of 11 px, three and five halvings, blocks: below these sides pyiqa fails or measures its own padding."""
    own = "st_lpips 32 niqe_restoray 96 consistency 1 color_drift 1"
    sides = "psnr 1 psnry 1 ssim 11 ssimc 11 ms_ssim 161 cw_ssim 64 fsim 32 gmsd 8 nlpd 64 vif 64 vsi 32 mad 64 piqe 32"
    assert " ".join(f"{name} {info.min_side_px}" for name, info in METRIC_INFO.items()) == f"{sides} entropy 1 {own}"


def test_an_error_without_a_text_is_a_reason_too():
    def fail(*pictures):
        raise AssertionError

    scorer = Metrics(("psnr",))
    scorer._networks["psnr"] = fail
    assert scorer.measure(picture(32, 32), picture(32, 32)).missing["psnr"] == "AssertionError: "


def test_a_value_that_is_not_a_number_is_missing():
    scorer = Metrics(("psnr",))
    scorer._networks["psnr"] = lambda restored, hq: restored.sum() * math.nan
    assert scorer.measure(picture(32, 32), picture(32, 32)).missing == {"psnr": "not a number (nan)"}


def test_a_failing_metric_is_missing_with_its_error():
    scorer = Metrics(("psnr",))
    scorer._networks["psnr"] = lambda restored, hq: restored.reshape(7)
    assert scorer.measure(picture(32, 32), picture(32, 32)).missing["psnr"].startswith("RuntimeError: shape")


@pytest.mark.parametrize(
    ("restored", "hq"),
    [
        (picture(40, 40), picture(40, 41)),
        (picture(40, 40).astype(np.float32), picture(40, 40)),
        (picture(40, 40)[..., 0], picture(40, 40)),
        (np.zeros((0, 4, 3), np.uint8), None),
    ],
)
def test_bad_pictures_name_the_sample(metrics, restored, hq):
    with pytest.raises(SampleError, match="cat/7") as error:
        metrics.score(restored, hq, key="cat/7")
    assert error.value.code == "shape"
    with pytest.raises(SampleError) as error:
        metrics.measure(restored, hq)
    assert error.value.key == ""  # the caller adds it


def test_bad_pictures_are_told_with_their_shapes(metrics):
    with pytest.raises(SampleError, match=r"the restored picture must be uint8 \[H, W, 3\], got uint8 \(4, 4, 4\)"):
        metrics.score(np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(SampleError, match=r"the target must be uint8 \[H, W, 3\], got float64 \(40, 40, 3\)"):
        metrics.score(picture(40, 40), picture(40, 40).astype(np.float64))
    with pytest.raises(SampleError, match="differ in size: 40 x 41 and 42 x 43"):
        metrics.score(picture(40, 41), picture(42, 43))


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match='Did you mean "ms_ssim"'):
        Metrics(("psnr", "msssim"))
    with pytest.raises(ValueError, match="--metric psnr --metric ssim"):
        Metrics(("psnr,ssim",))
    with pytest.raises(ValueError, match='Did you mean "psnr"'):
        Metrics(("PSNR",))
    with pytest.raises(ValueError, match="The default set is psnr, ssim, "):
        Metrics(("qqqqqqqqqq",))
    with pytest.raises(ValueError, match="no metric was named"):
        Metrics(())


def test_info_of_names_outside_the_table_comes_from_pyiqa():
    lpips = metric_info("lpips")
    assert lpips.full_reference
    assert lpips.downloads
    assert not lpips.higher_is_better
    assert not metric_info("musiq").full_reference


def test_table_agrees_with_pyiqa():
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    for name, info in METRIC_INFO.items():
        if name in (*OWN, "consistency", "color_drift"):
            continue
        assert info.higher_is_better is not DEFAULT_CONFIGS[name].get("lower_better", False), name
        assert info.full_reference is (DEFAULT_CONFIGS[name]["metric_mode"] == "FR"), name


def test_the_callers_thread_count_is_restored():
    import torch

    before = torch.get_num_threads()
    thread_counts = []
    scorer = Metrics(("psnr",))
    scorer._networks["psnr"] = lambda restored, hq: thread_counts.append(torch.get_num_threads()) or restored.reshape(7)
    scorer.measure(picture(32, 32), picture(32, 32))  # also if the metric fails
    assert thread_counts == [1]
    assert torch.get_num_threads() == before


def test_no_metric_of_the_table_needs_a_download():
    assert [name for name, info in METRIC_INFO.items() if info.downloads] == []
