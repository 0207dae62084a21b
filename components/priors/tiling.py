"""Autoencoders on pictures of any size: strips of tiles, from 8-bit pictures to latents and back.

The whole picture never exists as floats, nor do its activations. Memory is that of a tile, the latents and the 8-bit
picture.

    SpaceToDepthAutoencoder   a tile's halo is as wide as the convolutions reach: equal to the whole up to rounding
    AutoencoderKL             its group norms and its middle attention depend on the whole picture, so tiles are not
                              exact: they overlap by twice the halo and are cross-faded. layer_tiles.py is exact, but
                              keeps the activations of a whole layer
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from components.priors.autoencoder import SpaceToDepthAutoencoder
from components.samplers.tiles import tile_boxes
from components.tensors import images_to_tensor, tensor_to_images
from components.types import Box, Cancellation, Cancelled, Image

TILE = 128
"""Side of a tile in latent pixels without its halo, ours; a smaller picture is one tile. SDXL: 1024 px."""

FADE = 16
"""AutoencoderKL: latent pixels of the cross-fade on each side of a border, and of the halo beyond it; ours."""


class LatentPrior(Protocol):
    """The part of a prior that tiling uses; `encode` and `decode` as in Prior."""

    @property
    def autoencoder(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def factor(self) -> int: ...

    @property
    def latent_channels(self) -> int: ...

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class SteppedPrior(Protocol):
    """The part of a prior that the tiles of its steps depend on."""

    @property
    def factor(self) -> int: ...

    @property
    def multiple_px(self) -> int: ...

    @property
    def largest_side(self) -> int | None:
        """The longest side of latents that the denoiser takes; None for any."""


def halo_of(prior: LatentPrior, part: str) -> int:
    """Width in latent pixels of a tile's halo; `part` is "encoder" or "decoder"."""
    autoencoder = prior.autoencoder
    if isinstance(autoencoder, SpaceToDepthAutoencoder):
        residual = autoencoder.encode_residual if part == "encoder" else autoencoder.decode_residual
        return 2 + 2 * len(residual.blocks)  # one 3x3 convolution at each end, two in each block
    return 2 * FADE


def encode_images(
    prior: LatentPrior,
    images: Sequence[Image],
    tile: int = TILE,
    noise: Tensor | None = None,
    cancelled: Cancelled | None = None,
) -> Tensor:
    """Pictures of one size, uint8 [H, W, 3] -> scaled latents [B, C, H/factor, W/factor].

    Args:
        tile: side of a tile in latent pixels.
        noise: standard normal noise of the result's shape, for a sample of the distribution; None takes the mode. An
            autoencoder without a distribution ignores it.
        cancelled: called before each tile.

    Raises:
        ValueError: a side is not a multiple of the prior's factor.
        Cancellation: `cancelled()` returned true.
    """
    # the autoencoder's own device: the rest of a prior may wait elsewhere
    factor, device = prior.factor, next(prior.autoencoder.parameters()).device
    height, width = images[0].shape[:2]
    if height % factor or width % factor:
        raise ValueError(f"sides must be multiples of {factor}, got {height} x {width}")

    def encode(top: int, bottom: int, left: int, right: int) -> Tensor:
        _check(cancelled)
        rows, columns = slice(top * factor, bottom * factor), slice(left * factor, right * factor)
        pixels = images_to_tensor([image[rows, columns] for image in images]).to(device)
        return prior.encode(pixels, None if noise is None else noise[..., top:bottom, left:right])

    size = (height // factor, width // factor)
    if max(size) <= tile:
        return encode(0, size[0], 0, size[1])
    result = torch.zeros(len(images), prior.latent_channels, *size, device=device)

    def add_tile(top: int, left: int, value: Tensor) -> None:
        result[..., top : top + value.shape[-2], left : left + value.shape[-1]].add_(value)

    _over_tiles(size, tile, halo_of(prior, "encoder"), _fade(prior), 1, encode, add_tile)
    return result


def decode_images(
    prior: LatentPrior,
    latents: Tensor,
    tile: int = TILE,
    keys: Sequence[str] = (),
    cancelled: Cancelled | None = None,
) -> list[Image]:
    """Scaled latents [B, C, h, w] -> pictures uint8 [h factor, w factor, 3], clipped.

    Args:
        tile: side of a tile in latent pixels.
        keys: names of the pictures, for errors.

    Raises:
        SampleError: "not_finite", see tensors.check_pictures.
    """
    size = (latents.shape[-2], latents.shape[-1])
    if max(size) <= tile:
        return tensor_to_images(prior.decode(latents), keys)

    def decode_part(top: int, bottom: int, left: int, right: int) -> Tensor:
        _check(cancelled)
        return prior.decode(latents[..., top:bottom, left:right])

    return paint(len(latents), size, tile, halo_of(prior, "decoder"), _fade(prior), prior.factor, decode_part, keys)


def paint(
    batch: int,
    size: tuple[int, int],
    tile: int,
    halo: int,
    fade: int,
    scale: int,
    run: Callable[[int, int, int, int], Tensor],
    keys: Sequence[str] = (),
) -> list[Image]:
    """Joins tiles to pictures uint8 [H, W, 3]; only one row of tiles exists as floats at a time.

    Args:
        batch: number of pictures.
        size, tile, halo, fade, scale, run: see _over_tiles; `run` returns [B, 3, rows, columns] in [-1, 1].
        keys: names of the pictures, for errors.

    Raises:
        SampleError: "not_finite", see tensors.check_pictures.
    """
    pictures = np.zeros((batch, size[0] * scale, size[1] * scale, 3), dtype=np.uint8)
    # the sum of cross-faded tiles must be rounded only once, so a row of tiles is summed as float first
    strip = np.zeros((batch, 0, size[1] * scale, 3), dtype=np.float32)
    strip_top = 0

    def add_tile(top: int, left: int, value: Tensor) -> None:
        nonlocal strip, strip_top
        pixels = value.detach().to(torch.float32).permute(0, 2, 3, 1).cpu().numpy()
        if top > strip_top:  # a new row of tiles: the rows above it are complete
            _settle(pictures, strip[:, : top - strip_top], strip_top, keys)
            strip, strip_top = strip[:, top - strip_top :], top
        missing = pixels.shape[1] - strip.shape[1]
        if missing > 0:
            strip = np.concatenate([strip, np.zeros((batch, missing, *strip.shape[2:]), np.float32)], axis=1)
        strip[:, : pixels.shape[1], left : left + pixels.shape[2]] += pixels

    _over_tiles(size, tile, halo, fade, scale, run, add_tile)
    _settle(pictures, strip, strip_top, keys)
    return list(pictures)


def _settle(pictures: np.ndarray, strip: np.ndarray, top: int, keys: Sequence[str]) -> None:
    """Rounds finished rows [B, rows, W, 3] in [-1, 1] into the 8-bit pictures, as tensor_to_images does."""
    for index, (picture, rows) in enumerate(zip(pictures, strip, strict=True)):
        tensor = torch.from_numpy(rows).permute(2, 0, 1)[None]
        picture[top : top + len(rows)] = tensor_to_images(tensor, keys[index : index + 1])[0]


def _check(cancelled: Cancelled | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancellation("cancelled between two tiles")


def _fade(prior: LatentPrior) -> int:
    return 0 if isinstance(prior.autoencoder, SpaceToDepthAutoencoder) else FADE


def _over_tiles(
    size: tuple[int, int],
    tile: int,
    halo: int,
    fade: int,
    scale: int,
    run: Callable[[int, int, int, int], Tensor],
    put: Callable[[int, int, Tensor], None],
) -> None:
    """Runs every tile with its halo, cuts the halo off, weighs the cross-fade, and puts the result in its place.

    Args:
        size: (height, width) of the grid; size, tile, halo and fade are in latent pixels.
        scale: pixels of the result per latent pixel.
        run: (top, bottom, left, right) -> [B, C, rows, columns] times scale.
        put: (top, left, values) in pixels of the result; it adds the values, so that those of neighbours sum.
    """
    rows, columns = (_spans(length, tile) for length in size)
    for top, bottom in rows:
        for left, right in columns:
            outer = (max(0, top - halo), min(size[0], bottom + halo), max(0, left - halo), min(size[1], right + halo))
            inner = (max(0, top - fade), min(size[0], bottom + fade), max(0, left - fade), min(size[1], right + fade))
            value = run(*outer)
            value = value[
                ...,
                (inner[0] - outer[0]) * scale : (inner[1] - outer[0]) * scale,
                (inner[2] - outer[2]) * scale : (inner[3] - outer[2]) * scale,
            ]
            if fade:
                down = _ramp(inner[0], inner[1], top, bottom, size[0], fade, scale)
                across = _ramp(inner[2], inner[3], left, right, size[1], fade, scale)
                value = value * (down[:, None] * across[None]).to(value)
            put(inner[0] * scale, inner[2] * scale, value)


def _spans(length: int, tile: int) -> list[tuple[int, int]]:
    """[start, end) of equal parts, none longer than `tile`."""
    count = -(-length // tile)
    edges = [i * length // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def _ramp(first: int, last: int, start: int, end: int, length: int, fade: int, scale: int) -> Tensor:
    """Weights of a tile along one axis: a rise over 2 fade around its start, a fall around its end; 1 at the border."""
    place = (torch.arange((last - first) * scale, dtype=torch.float32) + 0.5) / scale + first
    share = torch.ones_like(place)
    if start > 0:
        share = share * ((place - (start - fade)) / (2 * fade)).clamp(0, 1)
    if end < length:
        share = share * (((end + fade) - place) / (2 * fade)).clamp(0, 1)
    return share


def step_tile_side(prior: SteppedPrior, tile_px: int) -> int:
    """Side of a sampler's tile in latent pixels, such that the network halves evenly; 0 takes TILE.

    It is at most the prior's largest_side.
    """
    multiple = prior.multiple_px // prior.factor
    side = tile_px // prior.factor if tile_px else TILE
    side = min(side, prior.largest_side or side)
    return max(multiple, side // multiple * multiple)


def step_boxes(prior: SteppedPrior, height: int, width: int, tile_px: int, overlap: float) -> list[Box]:
    """The tiles of a sampler's latents [.., height, width]; latents that fit in one tile have one.

    Args:
        tile_px: side of a tile in pixels, see step_tile_side.
        overlap: smallest share of a tile that neighbours share.
    """
    side = step_tile_side(prior, tile_px)
    return tile_boxes(height, width, (side, side), overlap, prior.multiple_px // prior.factor)
