"""Tiles: boxes that cover the grid, weights against recorded ones, blends with a closed form, tiled autoencoders."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from components.priors.autoencoder import SpaceToDepthAutoencoder
from components.priors.sdxl import Prior
from components.priors.tiling import decode_images, encode_images
from components.randomness import generator, seeded_init
from components.samplers.ddim import sample_ddim
from components.samplers.schedules import Schedule
from components.samplers.tiles import equal_weights, gaussian_weights, tile_boxes, tiled
from components.tensors import images_to_tensor, tensor_to_images
from components.types import Box, Cancellation, Denoiser


def normal(*shape: int, name: str = "x") -> Tensor:
    return torch.from_numpy(generator(3, name).standard_normal(shape, dtype=np.float32))


# ------------------------------------------------------------------------------------------------ boxes and weights


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    tile=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9]),
    multiple=st.sampled_from([1, 2, 4]),
)
@settings(deadline=None, max_examples=200)
def test_boxes_cover_the_grid_with_the_overlap(
    size: tuple[int, int], tile: tuple[int, int], overlap: float, multiple: int
) -> None:
    height, width = (multiple * s for s in size)
    boxes = tile_boxes(height, width, (multiple * tile[0], multiple * tile[1]), overlap, multiple)
    assert len(set(boxes)) == len(boxes) and len({box[2:] for box in boxes}) == 1
    counts = np.zeros((height, width), int)
    for top, left, h, w in boxes:
        assert top % multiple == left % multiple == 0 and min(top, left) >= 0
        assert top + h <= height and left + w <= width
        counts[top : top + h, left : left + w] += 1
    assert counts.min() >= 1
    for starts, side, limit in (
        (sorted({b[0] for b in boxes}), boxes[0][2], tile[0]),
        (sorted({b[1] for b in boxes}), boxes[0][3], tile[1]),
    ):
        overlaps = [side - (b - a) for a, b in itertools.pairwise(starts)]
        # a step is a whole number of units, at least one
        assert all(s >= min(overlap * side, side - multiple) - 1e-9 for s in overlaps), (starts, side, limit)


def test_impossible_tiles_are_refused() -> None:
    for wrong in ({"overlap": 0.95}, {"multiple": 4, "tile": (6, 8)}, {"multiple": 3}, {"tile": (0, 4)}):
        with pytest.raises(ValueError, match=r"overlap must|sides must"):
            tile_boxes(**{"height": 16, "width": 16, "tile": (8, 8), **wrong})  # type: ignore[arg-type]


def test_weights_are_supirs_with_centred_rows(golden_dir: Path) -> None:
    """SUPIR centres its columns, as we do; its rows are half a row off, ours are centred."""
    golden = load_file(golden_dir / "supir_tile_weights.safetensors")
    names = [name for name in golden if name.startswith("output/weights.")]
    assert names
    for name in names:
        expected = golden[name][0, 0]
        height, width = expected.shape
        ours = gaussian_weights(height, width)
        profile = expected[height // 2] / expected[height // 2].max()
        torch.testing.assert_close(ours[height // 2] / ours[height // 2].max(), profile, atol=1e-9, rtol=0)
        assert torch.equal(ours, ours.flip(0)) and torch.equal(ours, ours.flip(1))


# --------------------------------------------------------------------------------------------------------- denoisers


class Pointwise:
    """A denoiser whose output at a pixel depends on that pixel's latent and condition only, so tiles change nothing."""

    def __init__(self, condition: Tensor, boxes: list[Box] | None = None) -> None:
        self.condition, self.boxes, self.calls = condition, boxes if boxes is not None else [], 0

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1).square()
        self.calls += 1
        return (0.25 * latents + s * self.condition) / (0.25 + s)

    def tile(self, box: Box) -> Denoiser:
        self.boxes.append(box)
        top, left, height, width = box
        return Pointwise(self.condition[..., top : top + height, left : left + width], self.boxes)


def test_tiles_of_a_pointwise_denoiser_equal_the_whole() -> None:
    whole = Pointwise(normal(2, 3, 20, 28, name="condition"))
    boxes = tile_boxes(20, 28, (8, 8), 0.25, 4)
    sigmas = Schedule().sampling_sigmas(Schedule().timesteps(5))
    start = 14 * normal(2, 3, 20, 28)
    expected = sample_ddim(whole, start, sigmas)
    result = sample_ddim(tiled(whole, 20, 28, boxes), start, sigmas)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-6)
    assert whole.boxes == boxes  # each tile was cut once, not once per step


class Constant:
    """Returns a constant for each tile, so that the blend shows the weights."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(latents, self.value)

    def tile(self, box: Box) -> Denoiser:
        return Constant(float(box[1]))


def test_the_blend_is_the_weighted_mean() -> None:
    boxes: list[Box] = [(0, 0, 4, 8), (0, 4, 4, 8)]
    blend = tiled(Constant(), 4, 12, boxes)(torch.zeros(1, 1, 4, 12), torch.ones(1))[0, 0, 0]
    place = lambda column, left: np.exp(-(((column - left - 3.5) / 8) ** 2) / 0.02)  # noqa: E731
    for column in range(12):
        a, b = (place(column, left) if left <= column < left + 8 else 0.0 for left in (0, 4))
        assert float(blend[column]) == pytest.approx(4 * b / (a + b), abs=1e-6)


def test_equal_weights_blend_to_the_plain_mean() -> None:
    assert torch.equal(equal_weights(2, 3), torch.ones(2, 3, dtype=torch.float64))
    boxes: list[Box] = [(0, 0, 4, 8), (0, 4, 4, 8)]
    blend = tiled(Constant(), 4, 12, boxes, weigh=equal_weights)(torch.zeros(1, 1, 4, 12), torch.ones(1))[0, 0, 0]
    assert blend.tolist() == [0.0] * 4 + [2.0] * 4 + [4.0] * 4


def test_a_single_tile_is_the_denoiser_itself_and_gaps_are_refused() -> None:
    whole = Constant()
    assert tiled(whole, 8, 8, [(0, 0, 8, 8)]) is whole
    for boxes in ([(0, 0, 4, 8)], [(0, 0, 8, 4), (0, 4, 4, 4)], [(0, 0, 8, 8), (4, 0, 8, 8)]):
        with pytest.raises(ValueError, match=r"gaps|one size|outside"):
            tiled(whole, 8, 8, boxes)  # type: ignore[arg-type]


def test_cancelling_takes_effect_between_two_tiles() -> None:
    whole = Pointwise(torch.zeros(1, 1, 4, 12))
    answers = iter([False, True])
    run = tiled(whole, 4, 12, [(0, 0, 4, 8), (0, 4, 4, 8)], lambda: next(answers))
    with pytest.raises(Cancellation):
        run(torch.zeros(1, 1, 4, 12), torch.ones(1))


# ------------------------------------------------------------------------------------------------------ autoencoders


def prior_with(autoencoder: nn.Module, channels: int) -> Prior:
    unet = nn.Module()
    unet.config = {"in_channels": channels, "block_out_channels": [1, 1]}  # type: ignore[assignment]
    unet.weight = nn.Parameter(torch.zeros(1))
    return Prior(
        name="tiny",
        digest="",
        unet=unet,  # type: ignore[arg-type]
        autoencoder=autoencoder,
        text_encoders=(nn.Identity(), nn.Identity()),
        tokenizers=(),
        image_encoder=nn.Identity(),
        schedule=Schedule(),
    ).freeze()


def picture(height: int, width: int, name: str = "p") -> np.ndarray:
    return generator(0, name).integers(0, 256, (height, width, 3), dtype=np.uint8)


@torch.no_grad()
def test_a_convolutional_autoencoder_in_tiles_equals_the_whole() -> None:
    with seeded_init(0, "autoencoder"):
        autoencoder = SpaceToDepthAutoencoder(2, 5, 8, encoder_blocks=1, decoder_blocks=2, scaling_factor=0.7)
    for parameter in autoencoder.parameters():
        parameter.copy_(0.2 * normal(*parameter.shape, name=str(parameter.shape)))
    prior, images = prior_with(autoencoder, 5), [picture(54, 70, "a"), picture(54, 70, "b")]
    latents = prior.encode(images_to_tensor(images))
    pictures = tensor_to_images(prior.decode(latents))
    for tile in (10, 16, 100):
        torch.testing.assert_close(encode_images(prior, images, tile), latents, atol=1e-5, rtol=1e-5)
        for picture_in_tiles, expected in zip(decode_images(prior, latents, tile), pictures, strict=True):
            assert (
                np.abs(picture_in_tiles.astype(int) - expected).max() <= 1
            )  # float rounding may cross a rounding boundary
            assert (picture_in_tiles != expected).mean() < 1e-3


@pytest.fixture(scope="module")
def kl() -> Prior:
    with seeded_init(1, "kl"):
        autoencoder = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            layers_per_block=1,
            latent_channels=4,
            scaling_factor=0.5,
        )
    return prior_with(autoencoder, 4)


@torch.no_grad()
def test_a_group_normed_autoencoder_in_tiles_has_no_seam(kl: Prior) -> None:
    """Its tiles differ from the whole, but the borders between them are smooth.

    The latents are noise: in constant latents group norms would amplify rounding, differently in each tile.
    """
    latents = normal(1, 4, 96, 128)
    pictures = decode_images(kl, latents, 128)[0].astype(float), decode_images(kl, latents, 48)[0].astype(float)
    assert pictures[0].shape == pictures[1].shape == (192, 256, 3)
    assert np.abs(pictures[0] - pictures[1]).mean() < 3
    steps = [np.abs(np.diff(p, axis=0)).mean(axis=(1, 2)) for p in pictures]
    border = 48 * kl.factor - 1  # the border of the tiles, in the middle of the cross-fade
    near = [s[[border - 2, border + 2]].mean() for s in steps]
    assert steps[1][border] / near[1] < 1.1 * steps[0][border] / near[0]


@torch.no_grad()
def test_latents_are_the_mode_or_with_noise_a_sample(kl: Prior) -> None:
    image, noise = picture(32, 48), normal(1, 4, 16, 24, name="noise")
    distribution = kl.autoencoder.encode(images_to_tensor([image])).latent_dist  # type: ignore[operator]
    torch.testing.assert_close(encode_images(kl, [image]), 0.5 * distribution.mean)
    expected = 0.5 * (distribution.mean + distribution.std * noise)
    torch.testing.assert_close(encode_images(kl, [image], noise=noise), expected)
    with pytest.raises(ValueError, match="multiples of 2"):
        encode_images(kl, [picture(31, 48)])
