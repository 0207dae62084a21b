"""Networks that make NaN, infinite or exploded values: every system refuses the picture and names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import Tensor, nn

from components.images import encode_png
from components.priors.tiling import paint
from components.restoring import Identity, Picture, parse_ask, restore_batch
from components.systems.instantir.fast import Speed
from components.systems.instantir.network import InstantIR
from components.systems.instantir.restorer import InstantIRRestorer
from components.systems.instarevive.network import EpsPredictor, OneStepGenerator
from components.systems.instarevive.parity import to_levels
from components.systems.instarevive.restorer import Coarse, InstaReviveRestorer
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import build_swinir
from components.systems.swinir.restorer import SwinIRRestorer
from components.tensors import check_finite, images_to_tensor, tensor_to_images
from components.types import Request, Restorer, SampleError

instantir, instarevive, swinir = (
    load_helper(f"components/test_{n}.py") for n in ("instantir", "instarevive", "swinir")
)
IDENTITY = Identity(name="broken", system="none", recipe="none", digest="0" * 64)
BROKEN = (float("nan"), float("inf"), -float("inf"), 1e30)


def photo(height: int = 32, width: int = 32, mean: int = 128) -> np.ndarray:
    return np.random.default_rng(mean).integers(mean - 20, mean + 20, (height, width, 3), dtype=np.uint8)


def code_and_key(restorer: Restorer, image: np.ndarray | None = None, **options: Any) -> tuple[str, str]:
    request = Request(key="k", image=photo() if image is None else image, seed=1, options=options)
    with pytest.raises(SampleError) as error:
        restorer.restore([request])
    return error.value.code, error.value.key


# ------------------------------------------------------------------------------------------------------ the conversion


@pytest.mark.parametrize("value", [*BROKEN, 2e4, -1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_value_is_found_before_it_is_clipped(value: float, dtype: torch.dtype) -> None:
    pictures = torch.zeros(3, 3, 4, 5, dtype=dtype)
    pictures[1, 2, 3, 4] = value
    with pytest.raises(SampleError) as error:
        tensor_to_images(pictures, ["a", "b", "c"])
    assert (error.value.code, error.value.key) == ("not_finite", "b") and "weights" in error.value.detail
    assert len(tensor_to_images(pictures[::2])) == 2
    with pytest.raises(SampleError, match="not_finite"):
        to_levels(pictures, "truncate")


def test_a_plausible_overshoot_is_clipped_as_before() -> None:
    pixels = tensor_to_images(torch.tensor([-9.0, 0.0, 50.0, *[0.0] * 9]).view(1, 3, 2, 2))[0]
    assert pixels[..., 0].tolist() == [[0, 128], [255, 128]]
    check_finite(torch.zeros(0, 3, 4, 4))


@pytest.mark.parametrize("value", [11.0, -300.0])
def test_a_picture_far_outside_its_range_is_no_picture(value: float) -> None:
    """It would be black and white only; a few such pixels are an overshoot."""
    pictures = torch.zeros(2, 3, 4, 5)
    pictures[1] = value
    for act in (lambda: tensor_to_images(pictures, ["a", "b"]), lambda: to_levels(pictures, "nearest", ["a", "b"])):
        with pytest.raises(SampleError, match="on average where 1 is white") as error:
            act()
        assert (error.value.code, error.value.key) == ("not_finite", "b")
    pictures[1, :, 0] = 0.0
    pictures[1] *= 9 / abs(value)
    assert len(tensor_to_images(pictures)) == 2
    network = build_swinir(SwinIRConfig(**swinir.TINY), seed=3)
    with torch.no_grad():
        network.conv_last.bias += abs(value) * 3
    assert code_and_key(SwinIRRestorer(network, {"min_side_px": 0})) == ("not_finite", "k")


def test_float_pictures_with_nan_are_no_input() -> None:
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        images_to_tensor([np.full((2, 2, 3), np.nan, np.float32)])


def test_tiles_name_the_picture_whose_strip_is_wrong() -> None:
    def run(top: int, bottom: int, left: int, right: int) -> Tensor:
        values = torch.zeros(2, 3, bottom - top, right - left)
        values[1] = torch.inf if top else 0.0  # only the last row of tiles of the second picture
        return values

    with pytest.raises(SampleError) as error:
        paint(2, (8, 8), 4, 0, 0, 1, run, ["a", "b"])
    assert (error.value.code, error.value.key) == ("not_finite", "b")


# --------------------------------------------------------------------------------------------------------- the systems


@contextmanager
def spoilt(weight: Tensor, value: float) -> Iterator[None]:
    """Inside the context one value of a weight is wrong."""
    before = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] = value
        yield
        weight.copy_(before)


def last_weight(module: nn.Module) -> Tensor:
    """The last weight matrix; its values reach the result without a norm behind it."""
    return [weight for weight in module.parameters() if weight.ndim > 1][-1]


def test_a_broken_instantir_names_the_picture() -> None:
    prior = instantir.build_prior(instantir.TINY, instantir.build_tokenizer_json(["red"], 6)).freeze()
    network = InstantIR(prior, instantir.RESAMPLER, instantir.LORA, aggregator=True)
    instantir.randomize_zeros(network)
    assert network.aggregator is not None
    decoder = network.prior.autoencoder.get_submodule("decode_linear")
    restorer = InstantIRRestorer(network, speed=Speed(merge_previewer="off", join=False, channels_last="off"))
    for module, value in ((network.aggregator, float("nan")), (decoder, 1e30)):
        with spoilt(last_weight(module), value):
            assert code_and_key(restorer, photo(8, 8), steps=1, cfg_scale=1.0) == ("not_finite", "k")


def decoder(latents: Tensor) -> Tensor:
    """Pictures [B, 3, 4h, 4w] of latents; NaN for a picture whose latents are bright."""
    pictures = latents[:, :3].repeat_interleave(4, -1).repeat_interleave(4, -2)
    return torch.where(latents.mean((1, 2, 3), keepdim=True) > 0, torch.nan, pictures)


def encoder(images: Tensor, noise: Tensor | None = None) -> Tensor:
    return images[:, [0, 1, 2, 2], ::4, ::4].repeat(1, 3, 1, 1)


def one_step(batch_size: int = 1, coarse: Coarse | None = None) -> InstaReviveRestorer:
    """An InstaRevive that hands its latents on; its decoder fails for bright pictures."""
    backbone = instarevive.nano_backbone()
    predictor = EpsPredictor(backbone.network, backbone.prior.schedule)
    restorer = InstaReviveRestorer(OneStepGenerator(predictor), backbone, coarse, batch_size=batch_size)
    restorer.fast.generate = lambda latents, *_: latents  # type: ignore[method-assign]
    restorer.fast.encode, restorer.fast.decode = encoder, decoder  # type: ignore[method-assign, assignment]
    return restorer


@pytest.mark.parametrize(
    "options", [{}, {"preset": "released", "min_side_px": 0}, {"preset": "released", "tiles": "auto", "min_side_px": 0}]
)
def test_a_broken_instarevive_names_the_picture(options: dict[str, Any]) -> None:
    assert code_and_key(one_step(), photo(32, 600, 200), **options) == ("not_finite", "k")


class Broken(nn.Module):
    """A coarse restorer whose values are not finite."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.value


@pytest.mark.parametrize("value", BROKEN)
def test_a_broken_coarse_stage_names_the_picture(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.systems.instarevive import views

    restorer = one_step(coarse=Coarse(Broken(value), 32))
    assert code_and_key(restorer, photo(mean=40)) == ("not_finite", "k")
    with pytest.raises(SampleError) as error:
        restorer.preview(Request(key="k", image=photo(mean=40), seed=1))
    assert (error.value.code, error.value.key) == ("not_finite", "k")
    monkeypatch.setattr(views, "_open", lambda model: restorer.coarse)
    with pytest.raises(SampleError, match="not_finite"):
        views.CoarseView(model="m")(None, photo(), None)


@pytest.mark.parametrize("side", [32, 64])  # one tile, and several
def test_a_broken_swinir_names_the_picture(side: int) -> None:
    network = build_swinir(SwinIRConfig(**swinir.TINY), seed=3)
    restorer = SwinIRRestorer(network, {"min_side_px": 0, "tile_px": 32})
    for value in BROKEN:
        with spoilt(network.conv_last.weight, value):
            assert code_and_key(restorer, photo(side, side)) == ("not_finite", "k")


def test_one_broken_picture_does_not_spoil_its_batch() -> None:
    """All three go through the networks together; the results of the others are those of a batch without it."""
    restorer, ask = one_step(batch_size=3), parse_ask({})
    pictures = [Picture(key=f"p{m}", data=encode_png(photo(mean=m)), seed=1) for m in (40, 200, 60)]
    first, broken, last = restore_batch(restorer, IDENTITY, pictures, ask)
    assert isinstance(broken, SampleError) and (broken.code, broken.key) == ("not_finite", "p200")
    assert [first, last] == restore_batch(restorer, IDENTITY, pictures[::2], ask)
    assert isinstance(first, bytes)


def test_negatives_of_a_broken_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    from components import negatives

    result = torch.zeros(1, 3, 32, 32)
    monkeypatch.setattr(negatives, "image_to_image", lambda *_: result)
    change = negatives.build_image_to_image("nano", negatives.ImageToImageSettings(resolution=32, steps=2))
    assert change(photo(), "a", 0, 0).shape == (32, 32, 3)
    for value in BROKEN:
        result[..., 0, 0] = value
        with pytest.raises(SampleError, match="not_finite"):
            change(photo(), "a", 0, 0)
