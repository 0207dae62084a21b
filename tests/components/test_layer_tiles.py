"""Layer by layer over tiles: equal to the untiled AutoencoderKL, and each part of the scheme is needed for that."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from components.priors import layer_tiles
from components.priors.autoencoder import SpaceToDepthAutoencoder, decode_latents, encode_pixels
from components.priors.layer_tiles import (
    LayerTiles,
    decode_latents_tiled,
    decode_tiled,
    encode_pixels_tiled,
    encode_tiled,
    run_decoder,
    run_encoder,
)
from components.priors.robust_encoder import RobustEncoder
from components.priors.tile_layouts import Cores, Overlapping, released_boxes
from components.randomness import generator, seeded_init
from components.types import Cancellation

FACTOR, TOLERANCE = 4, 1e-5


def normal(*shape: int, name: str = "x") -> Tensor:
    return torch.from_numpy(generator(5, name).standard_normal(shape, dtype=np.float32))


def uneven(height: int, width: int) -> Tensor:
    """Pictures [2, 3, H, W] whose mean and contrast change from tile to tile."""
    ramp = torch.linspace(-1, 1, height)[:, None] + torch.linspace(0, 2, width)
    return (normal(2, 3, height, width) * ramp.abs() + ramp).clamp(-1, 1)


def build(**changes: Any) -> AutoencoderKL:
    """Three levels and 62 thousand parameters; the norms' weights are no ones, and biases no zeros."""
    options: dict[str, Any] = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "scaling_factor": 0.5,
    }
    with seeded_init(1, "kl"):
        autoencoder = AutoencoderKL(**options | changes).eval()
        for module in autoencoder.modules():
            if isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1, 0.3)
                nn.init.normal_(module.bias, 0, 0.3)
    return autoencoder


@pytest.fixture(scope="module")
def kl() -> AutoencoderKL:
    return build()


def apart(value: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the peak."""
    assert value.shape == expected.shape and value.dtype == expected.dtype
    return float((value - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def moments(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    return autoencoder.encode(images).latent_dist.parameters  # type: ignore[union-attr]


@torch.no_grad()
def pictures(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    return autoencoder.decode(latents).sample  # type: ignore[union-attr]


def both_apart(autoencoder: AutoencoderKL, size: tuple[int, int], tiles: LayerTiles) -> tuple[float, float]:
    """How far the tiled encoder and decoder are from the untiled ones, for latents of this size."""
    images, latents = uneven(FACTOR * size[0], FACTOR * size[1]), normal(2, 4, *size)
    latents = latents * torch.linspace(0.2, 2, size[1])
    return (
        apart(encode_tiled(autoencoder, images, tiles), moments(autoencoder, images)),
        apart(decode_tiled(autoencoder, latents, tiles), pictures(autoencoder, latents)),
    )


# ------------------------------------------------------------------------------------------------------- the exact way


@pytest.mark.parametrize(
    ("size", "tile", "grid"),
    [
        ((7, 9), 16, (1, 1)),
        ((5, 17), 6, (1, 3)),
        ((13, 4), 5, (3, 1)),
        ((11, 13), 5, (3, 3)),
        ((3, 5), 1, (3, 5)),  # a tile of one latent pixel is smaller than some reach of the network
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_exact_tiles_equal_the_whole(
    kl: AutoencoderKL, size: tuple[int, int], tile: int, grid: tuple[int, int], offload: bool
) -> None:
    assert len(Cores.even(*size, tile).boxes()) == grid[0] * grid[1]
    tiles = LayerTiles(encoder_tile=FACTOR * tile, decoder_tile=tile, offload=offload)
    assert max(both_apart(kl, size, tiles)) < TOLERANCE


EXACT = LayerTiles(encoder_tile=20, decoder_tile=5)


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_add_attention": False},
        {"layers_per_block": 2},
        {"use_quant_conv": False, "use_post_quant_conv": False},
    ],
)
def test_other_autoencoders_of_this_kind(changes: dict[str, Any]) -> None:
    assert max(both_apart(build(**changes), (6, 11), EXACT)) < TOLERANCE


def no_neighbours(self: Cores, parts: list[Tensor], index: int, before: int, after: int) -> tuple[Tensor, list[int]]:
    return parts[index], [before, after, before, after]


def repeated_border(self: Cores, parts: list[Tensor], index: int, before: int, after: int) -> tuple[Tensor, list[int]]:
    """A picture whose border is repeated, where the network has zeros."""
    window, missing = WINDOW(self, parts, index, before, after)
    return F.pad(window, missing, mode="replicate"), [0, 0, 0, 0]


WINDOW = Cores.window


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("window", no_neighbours),
        ("window", repeated_border),
        ("merge", Overlapping.merge),
        ("middle", lambda self: self),
    ],
)
def test_each_part_of_the_exact_way_is_needed(
    kl: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[..., Any]
) -> None:
    monkeypatch.setattr(Cores, name, wrong)
    assert min(both_apart(kl, (7, 13), EXACT)) > 10 * TOLERANCE


def test_wrong_neighbours_are_noticed(kl: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A halo from the tile's other side, as wide as the right one."""

    def turned(self: Cores, parts: list[Tensor], index: int, before: int, after: int) -> tuple[Tensor, list[int]]:
        window, missing = WINDOW(self, parts, index, before, after)
        return (window if min(missing) else window.roll(1, dims=-1)), missing

    monkeypatch.setattr(Cores, "window", turned)
    assert min(both_apart(kl, (7, 13), EXACT)) > 10 * TOLERANCE


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    tile=st.integers(1, 5),
    reach=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
@settings(deadline=None, max_examples=60)
def test_a_window_is_a_part_of_the_padded_map(size: tuple[int, int], tile: int, reach: tuple[int, int]) -> None:
    layout, (before, after) = Cores.even(*size, tile), reach
    whole = torch.arange(1.0, 1 + size[0] * size[1]).view(1, 1, *size)
    parts = [whole[..., top : top + h, left : left + w] for top, left, h, w in layout.boxes()]
    padded = F.pad(whole, (before, after, before, after))
    for index, (top, left, height, width) in enumerate(layout.boxes()):
        window, missing = layout.window(parts, index, before, after)
        expected = padded[..., top : top + height + before + after, left : left + width + before + after]
        assert torch.equal(F.pad(window, missing), expected)


def test_moments_merge_as_worked_out_by_hand() -> None:
    """Tiles {0, 2} and {5, 5, 5, 9}: means 1 and 6, variances 1 and 3; together mean 13/3, variance 71/9."""
    counts = torch.tensor([2.0, 4.0], dtype=torch.float64)
    means, variances = (torch.tensor(v, dtype=torch.float64).view(2, 1, 1) for v in ([1.0, 6.0], [1.0, 3.0]))
    mean, variance = Cores((0, 1), (0, 2, 6)).merge(counts, means, variances)
    assert mean.item() == pytest.approx(13 / 3) and variance.item() == pytest.approx(71 / 9)
    mean, variance = Overlapping((), ()).merge(counts, means, variances)
    assert mean.item() == pytest.approx(13 / 3) and variance.item() == pytest.approx(7 / 3)


def test_moments_are_stable_far_from_zero() -> None:
    """A sum of squares in float32 would have no correct digit here."""
    values = normal(1, 4, 8, 24) + 3000
    parts = values.split((5, 19), dim=3)
    stacked = torch.stack([layer_tiles._moments(part, 2) for part in parts]).double()
    counts = torch.tensor([40.0, 152.0], dtype=torch.float64)
    _, variance = Cores((0, 8), (0, 5, 24)).merge(counts, *stacked.unbind(1))
    exact = values.double().unflatten(1, (2, -1)).flatten(2).var(2, correction=0)
    assert torch.allclose(variance, exact, rtol=1e-3)


def test_attention_in_chunks_of_queries(kl: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_tiles, "SCORES", 3 * 7 * 13)
    lengths = []
    original = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        lengths.append((query.shape[2], key.shape[2]))
        return original(query, key, value)

    latents = normal(1, 4, 7, 13)
    expected = pictures(kl, latents)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    assert apart(decode_tiled(kl, latents, EXACT), expected) < TOLERANCE
    assert lengths == [(3, 91)] * 30 + [(1, 91)]


def test_convolutions_work_on_one_tile(kl: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the middle block, no work tensor is larger than a tile and its border."""
    sizes = []
    original = F.conv2d

    def convolve(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        sizes.append(max(x.shape[-2:]))
        return original(x, *arguments, **options)

    monkeypatch.setattr(F, "conv2d", convolve)
    run_decoder(kl.decoder, normal(1, 4, 4, 40), LayerTiles(decoder_tile=5))
    # the middle block runs on all 40 columns: two resnets of two convolutions
    assert sizes.count(42) == 4 and max(size for size in sizes if size != 42) == 5 * FACTOR + 2


def test_a_resnet_gives_its_input_away_tile_by_tile(kl: AutoencoderKL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored activations of the decoder: 16 + 8 channels at the picture's size and one tile, not 16 + 8 + 8."""
    sizes, original = [0], layer_tiles._moments
    live = 0

    def forget(count: int) -> None:
        nonlocal live
        live -= count

    def measure(x: Tensor, groups: int) -> Tensor:
        """Sees every stored tile."""
        nonlocal live
        live += x.numel()
        weakref.finalize(x, forget, x.numel())
        sizes.append(live)
        return original(x, groups)

    monkeypatch.setattr(layer_tiles, "_moments", measure)
    run_decoder(kl.decoder, normal(1, 4, 20, 20), LayerTiles(decoder_tile=5))
    pixels = (20 * FACTOR) ** 2
    assert 24 * pixels <= max(sizes) <= (24 + 8 / 16) * pixels


def test_half_precision_stays_near(kl: AutoencoderKL) -> None:
    half, images, latents = build().to(torch.bfloat16), uneven(28, 36), normal(2, 4, 7, 9)
    tiled = encode_tiled(half, images, EXACT), decode_tiled(half, latents, EXACT)
    assert all(value.dtype == torch.bfloat16 for value in tiled)
    assert apart(tiled[0].float(), moments(kl, images)) < 0.05
    assert apart(tiled[1].float(), pictures(kl, latents)) < 0.05


# ---------------------------------------------------------------------------------------------------- the released way


def test_released_boxes_by_hand() -> None:
    # (150 - 22) / 64 = 2 tiles of 64; the side of 20 has no inner pixels and is whole
    assert released_boxes(20, 150, 64, 11) == [
        ((0, 0, 20, 86), (0, 0, 20, 75)),
        ((0, 64, 20, 86), (0, 75, 20, 75)),
    ]
    # (100 - 22) / 64 -> 2 tiles of 39, rounded up to 64; the second input ends with the grid
    assert [box for box, _ in released_boxes(100, 20, 64, 11)] == [(0, 0, 86, 20), (64, 0, 36, 20)]
    # (55 - 22) / 7 -> 5 tiles of at least 7: no power of two fits
    assert [box[0] for _, box in released_boxes(55, 20, 7, 11)] == [0, 18, 25, 32, 39]
    # at most tile + 2 pad: not tiled
    assert released_boxes(86, 86, 64, 11) == [((0, 0, 86, 86), (0, 0, 86, 86))]
    assert len(released_boxes(87, 86, 64, 11)) == 2


@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), tile=st.integers(1, 40), pad=st.integers(0, 12))
@settings(deadline=None, max_examples=100)
def test_released_results_cover_the_grid_once(size: tuple[int, int], tile: int, pad: int) -> None:
    counts = np.zeros(size, int)
    for (top, left, height, width), (row, column, rows, columns) in released_boxes(*size, tile, pad):
        counts[row : row + rows, column : column + columns] += 1
        assert top <= row and left <= column and row + rows <= top + height and column + columns <= left + width
        assert top >= 0 and left >= 0 and top + height <= size[0] and left + width <= size[1]
    assert (counts == 1).all()


def released(tile: int, pad: int) -> LayerTiles:
    return LayerTiles(
        "released", encoder_tile=FACTOR * tile, decoder_tile=tile, encoder_pad=FACTOR * pad, decoder_pad=pad
    )


def test_a_released_tile_alone_is_the_whole(kl: AutoencoderKL) -> None:
    assert max(both_apart(kl, (7, 9), released(5, 2))) < TOLERANCE


def test_released_tiles_are_not_exact(kl: AutoencoderKL) -> None:
    assert min(both_apart(kl, (7, 21), released(5, 2))) > 100 * TOLERANCE


def test_a_picture_in_a_released_batch_does_not_depend_on_others(kl: AutoencoderKL) -> None:
    latents = normal(2, 4, 7, 21)
    together = decode_tiled(kl, latents, released(5, 2))
    alone = torch.cat([decode_tiled(kl, row, released(5, 2)) for row in latents.split(1)])
    assert apart(together, alone) < TOLERANCE


# --------------------------------------------------------------------------------------- scaled latents, other encoders


@torch.no_grad()
def test_scaled_latents_and_their_pictures(kl: AutoencoderKL) -> None:
    images, noise = uneven(28, 52), normal(2, 4, 7, 13, name="noise")
    latents = encode_pixels(kl, images)
    assert apart(encode_pixels_tiled(kl, images, EXACT), latents) < TOLERANCE
    assert apart(encode_pixels_tiled(kl, images, EXACT, noise), encode_pixels(kl, images, noise)) < TOLERANCE
    assert apart(decode_latents_tiled(kl, latents, EXACT), decode_latents(kl, latents)) < TOLERANCE


@torch.no_grad()
def test_a_robust_encoder_replaces_the_own_one(kl: AutoencoderKL) -> None:
    robust, images = RobustEncoder(kl), uneven(28, 52)
    for parameter in robust.encoder.parameters():
        parameter.mul_(1.1)
    tiled = encode_tiled(kl, images, EXACT, robust.encoder)
    assert apart(tiled, robust.moments(images)) < TOLERANCE
    assert apart(tiled, moments(kl, images)) > 100 * TOLERANCE
    assert apart(encode_pixels_tiled(kl, images, EXACT, encoder=robust.encoder), robust(images)) < TOLERANCE


@pytest.mark.parametrize("tiles", [EXACT, released(5, 2)])
def test_a_run_stops_between_two_tiles(kl: AutoencoderKL, tiles: LayerTiles) -> None:
    calls = itertools.count()
    decode_tiled(kl, normal(1, 4, 7, 21), tiles, lambda: next(calls) < 0)
    total = next(calls)
    for last in (0, total // 2, total - 1):
        calls = itertools.count()
        with pytest.raises(Cancellation):
            decode_tiled(kl, normal(1, 4, 7, 21), tiles, lambda calls=calls, last=last: next(calls) == last)
        assert next(calls) == last + 1


# -------------------------------------------------------------------------------------------------------------- errors


def test_wrong_sizes_are_refused(kl: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match="multiples of 4, got 30 x 28"):
        encode_tiled(kl, uneven(30, 28), EXACT)
    with pytest.raises(ValueError, match="positive multiples of 1, got 0 x 5"):
        decode_tiled(kl, normal(1, 4, 0, 5), EXACT)
    with pytest.raises(ValueError, match="tile and halo must be multiples of 4, got 18"):
        encode_tiled(kl, uneven(28, 28), LayerTiles(encoder_tile=18))
    with pytest.raises(ValueError, match="multiples of 4, got 16 and 6"):
        encode_tiled(kl, uneven(28, 28), LayerTiles("released", encoder_tile=16, encoder_pad=6))
    with pytest.raises(ValueError, match="must be positive"):
        LayerTiles(decoder_tile=0)
    with pytest.raises(ValueError, match='got "blended"'):
        LayerTiles(how="blended")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "relu"}, "another activation than SiLU"),
        ({"down_block_types": ("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",)}, "AttnDownEncoderBlock2D"),
        ({"up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2}, "AttnUpDecoderBlock2D"),
    ],
)
def test_other_networks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_tiled(build(**changes), normal(1, 4, 5, 5), EXACT)


def test_other_modules_are_refused(kl: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match="only an AutoencoderKL"):
        encode_tiled(SpaceToDepthAutoencoder(width=8), uneven(8, 8), EXACT)
    with pytest.raises(ValueError, match="not an AutoencoderKL's encoder: Decoder"):
        encode_tiled(kl, uneven(8, 8), EXACT, encoder=kl.decoder)
    with pytest.raises(ValueError, match="not an AutoencoderKL's decoder: Encoder"):
        run_decoder(kl.encoder, normal(1, 4, 5, 5), EXACT)


@pytest.mark.parametrize(
    ("place", "name", "value", "message"),
    [
        ("down_blocks.0.resnets.0", "output_scale_factor", 2.0, "scales its output"),
        ("down_blocks.0.resnets.0.dropout", "p", 0.1, "dropout"),
        ("down_blocks.1.resnets.0.norm1", "num_groups", 8, "other groups"),
        ("down_blocks.0.downsamplers.0", "padding", 1, "padded below and right"),
        ("mid_block.attentions.0", "residual_connection", False, "plain residual"),
        ("mid_block.attentions.0", "rescale_output_factor", 2.0, "plain residual"),
        ("conv_in", "dilation", (2, 2), "another convolution"),
    ],
)
def test_each_other_option_of_a_module_is_refused(place: str, name: str, value: Any, message: str) -> None:
    encoder = build().encoder
    setattr(encoder.get_submodule(place), name, value)
    with pytest.raises(ValueError, match=f"encoder, {place}.*{message}" if "dropout" not in message else message):
        run_encoder(encoder, uneven(28, 28), EXACT)
