"""Colour transfer against every recorded *_colorfix file, and its strips against the whole picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from components.color import adain, transfer_colors, wavelet, wavelet_blur, wavelet_split
from components.randomness import generator
from components.tensors import images_to_tensor, tensor_to_images
from tests.conftest import golden_names


def assert_as_recorded(value: Tensor, expected: Tensor, tolerance: dict[str, object]) -> None:
    if "tol" in tolerance:
        assert "max|golden output|" in str(tolerance["rule"])
        atol, rtol = float(str(tolerance["tol"])) * float(expected.abs().max()), 0.0
    else:
        atol, rtol = float(str(tolerance["atol"])), float(str(tolerance["rtol"]))
    torch.testing.assert_close(value, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("name", golden_names("*_colorfix"))
def test_recorded_colour_fixes(name: str, golden_dir: Path) -> None:
    description = json.loads((golden_dir / f"{name}.json").read_text(encoding="utf-8"))
    tensors = load_file(golden_dir / f"{name}.safetensors")
    content, style = tensors["input/content"], tensors["input/style"]
    config = description.get("config", {"levels": 5, "adain_eps": 1e-5})  # InstaRevive: in `call`
    outputs = [key for key in tensors if key.startswith("output/")]
    assert {"output/wavelet", "output/adain"} <= set(outputs)
    for key in outputs:
        kind = key.removeprefix("output/")
        if kind == "wavelet":
            value = wavelet(content, style, config["levels"])
        elif kind == "adain":
            value = adain(content, style, config["adain_eps"])
        elif kind in ("content_high", "content_low"):
            value = wavelet_split(content, config["levels"])[kind == "content_low"]
        else:
            assert kind.startswith("blur_r"), f"no counterpart of {key}"
            value = wavelet_blur(style, int(kind.removeprefix("blur_r")))
        assert_as_recorded(value, tensors[key], description["tolerance"])


def picture(name: str, height: int = 90, width: int = 70) -> np.ndarray:
    return generator(0, name).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_level_is_the_dilated_binomial_kernel() -> None:
    """Compare with torch's dilated convolution on a padded picture."""
    x = images_to_tensor([picture("a")])
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    for radius in (1, 4, 16):
        padded = F.pad(x, (radius,) * 4, mode="replicate")
        expected = F.conv2d(padded, kernel.repeat(3, 1, 1, 1), dilation=radius, groups=3)
        torch.testing.assert_close(wavelet_blur(x, radius), expected, atol=1e-6, rtol=0)
    assert wavelet_blur(x[..., :3, :2], 16).shape == (1, 3, 3, 2)


@pytest.mark.parametrize("kind", ["adain", "wavelet"])
def test_strips_equal_the_whole_picture(kind: str) -> None:
    restored, lq = picture("a"), (picture("b") // 3 + 40).astype(np.uint8)
    function = {"adain": adain, "wavelet": wavelet}[kind]
    whole = tensor_to_images(function(images_to_tensor([restored]), images_to_tensor([lq])))[0]
    for strip in (7, 64, 1000):
        result = transfer_colors(restored, lq, kind, strip)  # type: ignore[arg-type]
        assert np.abs(result.astype(int) - whole).max() <= 1  # float rounding may cross a half
        assert (result != whole).mean() < 1e-3


def test_a_transfer_restores_the_colours() -> None:
    lq = picture("a")
    restored = (lq * np.array([0.5, 0.9, 0.7]) + 20).astype(np.uint8)
    means = [m.reshape(-1, 3).mean(0) for m in (lq, transfer_colors(restored, lq, "adain"))]
    assert np.abs(means[0] - means[1]).max() < 1
    assert transfer_colors(restored, lq, "none") is restored
    flat = np.full((1, 1, 3), 9, np.uint8)
    assert transfer_colors(flat, flat, "adain").shape == (1, 1, 3)


def test_wrong_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        transfer_colors(picture("a"), picture("a", 5), "adain")
    with pytest.raises(ValueError, match="must be none, adain or wavelet"):
        transfer_colors(picture("a"), picture("a"), "lut")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no variance"):
        adain(torch.zeros(1, 3, 1, 1), torch.zeros(1, 3, 4, 4))
