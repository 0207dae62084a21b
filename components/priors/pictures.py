"""Pictures to latents and back at any size, with a robust encoder if any, the original one and the decoder.

A picture of one tile runs whole. A larger one runs in tiles: an AutoencoderKL layer by layer, equal to the whole (or as
released), while its stored activations fit (see layer_tiles.py), and else in cross-faded tiles of bounded memory
(tiling.py). The small autoencoder's tiles are always exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from components.priors.fast_unet import FastAutoencoder
from components.priors.layer_tiles import LayerTiles, decode_latents_tiled, encode_pixels_tiled
from components.priors.robust_encoder import RobustLatents
from components.priors.tiling import TILE, decode_images, encode_images
from components.tensors import images_to_tensor, tensor_to_images
from components.types import Cancelled, Image

Tiles = Literal["auto", "exact", "released", "faded"]

EXACT_PX = 2048 * 2048
"""Most pixels of a batch that "auto" decodes exactly: SDXL's decoder then stores 6.4 GB in float32."""


@dataclass(frozen=True)
class Decoded:
    """Decoded pictures: uint8 [H, W, 3] each, and the decoder's own floats [B, 3, H, W] if they exist as a whole."""

    images: list[Image]
    floats: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Encoders and decoder of one run.

    Attributes:
        prior: the prior's autoencoder, compiled if the settings of the fast path say so.
        robust: the robust encoder, with the same decoder; None encodes LQ with the prior's own encoder.
        tiles: how a large picture is cut, see the module's docstring; "auto" chooses exact or faded by its size.
        cancelled: called before each tile of each layer.
    """

    prior: FastAutoencoder
    robust: RobustLatents | None = None
    tiles: Tiles = "auto"
    cancelled: Cancelled | None = None

    def lq_latents(self, images: Sequence[Image]) -> Tensor:
        """Scaled latents of LQ pictures of one size, uint8 [H, W, 3], by the robust encoder if any: [B, C, h, w]."""
        layers = self._layers(len(images), *images[0].shape[:2])
        if layers is None:
            return encode_images(self.robust or self.prior, images, cancelled=self.cancelled)
        own = None if self.robust is None else self.robust.encoder.encoder
        return encode_pixels_tiled(
            self.prior.autoencoder, images_to_tensor(images), layers, encoder=own, cancelled=self.cancelled
        )

    def latents(self, pictures: Decoded, noise: Tensor | None = None) -> Tensor:
        """Scaled latents of decoded pictures by the original encoder; with `noise` a sample of its distribution."""
        images, pixels = pictures.images, pictures.floats
        layers = self._layers(len(images), *images[0].shape[:2])
        if layers is None:
            if pixels is not None:
                return self.prior.encode(pixels, None if noise is None else noise.to(pixels.device))
            own = None if noise is None else noise.to(self._device)
            return encode_images(self.prior, images, noise=own, cancelled=self.cancelled)
        assert pixels is not None, "what runs layer by layer exists as a whole"
        own = None if noise is None else noise.to(pixels.device)
        latents = encode_pixels_tiled(self.prior.autoencoder, pixels, layers, own, cancelled=self.cancelled)
        return latents

    def decode(self, latents: Tensor, keys: Sequence[str]) -> Decoded:
        """Pictures of scaled latents [B, C, h, w]; SampleError "not_finite", see tensors.check_pictures."""
        height, width = (side * self.prior.factor for side in latents.shape[-2:])
        layers = self._layers(len(latents), height, width)
        if layers is not None:
            floats = decode_latents_tiled(self.prior.autoencoder, latents, layers, self.cancelled)
        elif max(height, width) <= TILE * self.prior.factor:
            floats = self.prior.decode(latents.to(self._device))
        else:
            return Decoded(decode_images(self.prior, latents.to(self._device), keys=keys, cancelled=self.cancelled))
        return Decoded(tensor_to_images(floats, keys), floats)

    @property
    def _device(self) -> torch.device:
        """The autoencoder's: the rest of the prior may wait elsewhere."""
        return next(self.prior.autoencoder.parameters()).device

    def _layers(self, count: int, height: int, width: int) -> LayerTiles | None:
        """How to run layer by layer; None to run whole or in cross-faded tiles."""
        small = max(height, width) <= TILE * self.prior.factor
        if small or self.tiles == "faded" or not isinstance(self.prior.autoencoder, AutoencoderKL):
            return None
        if self.tiles == "auto" and count * height * width > EXACT_PX:
            return None
        return LayerTiles(how="released" if self.tiles == "released" else "exact", offload=self._device.type != "cpu")
