"""A degradation-robust encoder: a second encoder for a frozen autoencoder, trained to ignore degradations.

SUPIR (Yu et al. 2024, section 3.1) calls it E_dr. Its latents of an LQ picture condition a restorer, and their decoded
picture D(E_dr(lq)) is a first restoration.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from components.priors.autoencoder import (
    SpaceToDepthAutoencoder,
    autoencoder_factor,
    decode_latents,
    encode_pixels,
    scale_latents,
)


class RobustEncoder(nn.Module):
    """The encoder, with the autoencoder's own weights at first. All else of the autoencoder is shared and frozen.

    Args:
        autoencoder: AutoencoderKL or SpaceToDepthAutoencoder. It is no submodule: its weights are not the encoder's.
    """

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self._autoencoder = (autoencoder,)  # a tuple, so that torch does not register it
        self.encoder = copy.deepcopy(_encoder_of(autoencoder))

    @property
    def autoencoder(self) -> nn.Module:
        """The frozen autoencoder."""
        return self._autoencoder[0]

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w], the mode; in the pictures' dtype."""
        with torch.autocast(images.device.type, enabled=False):
            weight = next(self.encoder.parameters())
            pixels = images.to(weight.dtype)
            if isinstance(self.autoencoder, SpaceToDepthAutoencoder):
                patches = nn.functional.pixel_unshuffle(pixels, self.autoencoder.factor)
                latents = self.encoder["linear"](patches) + self.encoder["residual"](patches)  # type: ignore[index]
                return (latents * self.autoencoder.scaling_factor).to(images.dtype)
            mode = self.moments(pixels).chunk(2, dim=1)[0]
            return scale_latents(self.autoencoder, mode.to(images.dtype))

    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and log variance [B, 2 C, h, w] of an AutoencoderKL's distribution, unscaled."""
        moments: Tensor = self.encoder(pixels)
        convolution = getattr(self.autoencoder, "quant_conv", None)
        return moments if convolution is None else convolution(moments)


class RobustLatents:
    """An autoencoder whose encoder is the robust one, for tiling.py (see its LatentPrior)."""

    def __init__(self, encoder: RobustEncoder) -> None:
        self.encoder = encoder

    @property
    def autoencoder(self) -> nn.Module:
        return self.encoder.autoencoder

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    @property
    def factor(self) -> int:
        return autoencoder_factor(self.autoencoder)

    @property
    def latent_channels(self) -> int:
        if isinstance(self.autoencoder, SpaceToDepthAutoencoder):
            return self.autoencoder.latent_channels
        return int(self.autoencoder.config["latent_channels"])  # type: ignore[index, union-attr]

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """See RobustEncoder; `noise` is refused, since the latents are the mode."""
        if noise is not None:
            raise ValueError("the robust encoder's latents are the mode, without noise")
        return self.encoder(images)  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures, not clipped, by the frozen decoder."""
        return decode_latents(self.autoencoder, latents)


def first_restoration(encoder: RobustEncoder, lq: Tensor) -> Tensor:
    """D(E_dr(lq)): pictures [B, 3, H, W] in [-1, 1] -> the same shape, not clipped (SUPIR, Fig. 14)."""
    return decode_latents(encoder.autoencoder, encoder(lq))


def encode_restoration(encoder: RobustEncoder, restored: Tensor, noise: Tensor | None = None) -> Tensor:
    """Scaled latents of a first restoration by the original encoder: the target of restoration guidance, as released.

    Args:
        restored: pictures [B, 3, H, W] in [-1, 1].
        noise: standard normal of the latents' shape for a sample, as released; None for the mode.
    """
    return encode_pixels(encoder.autoencoder, restored, noise)


def _encoder_of(autoencoder: nn.Module) -> nn.Module:
    if isinstance(autoencoder, SpaceToDepthAutoencoder):
        return nn.ModuleDict({"linear": autoencoder.encode_linear, "residual": autoencoder.encode_residual})
    return autoencoder.encoder  # type: ignore[return-value]
