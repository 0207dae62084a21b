"""A small autoencoder that starts with space-to-depth, and functions that encode and decode with it or AutoencoderKL.

The downsampling factor and the number of latent channels can be chosen. All convolutions run at 1/factor of the
picture's size, so the autoencoder trains in minutes on a CPU. Encoder and decoder are each the sum of a linear map of a
patch, which carries most of the signal, and a residual network for the nonlinear rest. The linear maps can be
initialised with the principal components of real patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def autoencoder_factor(autoencoder: nn.Module) -> int:
    """The downsampling factor of an AutoencoderKL or a SpaceToDepthAutoencoder."""
    if isinstance(autoencoder, SpaceToDepthAutoencoder):
        return autoencoder.factor
    return 2 ** (len(_config(autoencoder)["block_out_channels"]) - 1)


def encode_pixels(autoencoder: nn.Module, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/factor, W/factor], in the pictures' dtype.

    Without `noise`, the latents are the mode of the encoder's distribution. With standard normal `noise` [B, C, h, w],
    they are a sample of the distribution. A SpaceToDepthAutoencoder has no distribution and ignores `noise`.
    """
    if isinstance(autoencoder, SpaceToDepthAutoencoder):
        return autoencoder.encode(images)
    with torch.autocast(images.device.type, enabled=False):
        pixels = images.to(next(autoencoder.parameters()).dtype)
        distribution = autoencoder.encode(pixels).latent_dist  # type: ignore[operator]
    return draw_latents(autoencoder, distribution, noise, images.dtype)


def decode_latents(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] -> pictures [B, 3, H, W], not clipped, in the latents' dtype."""
    if isinstance(autoencoder, SpaceToDepthAutoencoder):
        return autoencoder.decode(latents)
    with torch.autocast(latents.device.type, enabled=False):
        unscaled = unscale_latents(autoencoder, latents)
        images = autoencoder.decode(unscaled.to(next(autoencoder.parameters()).dtype)).sample  # type: ignore[operator]
    return images.to(latents.dtype)  # type: ignore[no-any-return]


def draw_latents(autoencoder: nn.Module, distribution: Any, noise: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scaled latents [B, C, h, w] of a DiagonalGaussianDistribution: a sample with `noise`, the mode without."""
    latents: Tensor = distribution.mode()
    if noise is not None:
        latents = distribution.mean + distribution.std * noise.to(latents)
    return scale_latents(autoencoder, latents.to(dtype))


def scale_latents(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """An AutoencoderKL's own latents [B, C, h, w] -> scaled ones: (x - shift) scaling_factor / deviation.

    The shift is shift_factor (SD3, Flux) plus latents_mean, and the deviation latents_std (Playground), where the
    configuration has them.
    """
    shift, deviation = _shift_and_deviation(autoencoder, latents)
    if shift is not None:
        latents = latents - shift
    latents = latents * _config(autoencoder)["scaling_factor"]
    return latents if deviation is None else latents / deviation


def unscale_latents(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of scale_latents."""
    shift, deviation = _shift_and_deviation(autoencoder, latents)
    if deviation is not None:
        latents = latents * deviation
    latents = latents / _config(autoencoder)["scaling_factor"]
    return latents if shift is None else latents + shift


def _shift_and_deviation(autoencoder: nn.Module, like: Tensor) -> tuple[Tensor | float | None, Tensor | None]:
    config = _config(autoencoder)
    mean, deviation = (
        None if config.get(name) is None else like.new_tensor(config[name]).view(1, -1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    shift: Tensor | float | None = config.get("shift_factor")
    if mean is not None:
        shift = mean if shift is None else mean + shift
    return shift, deviation


def _config(autoencoder: nn.Module) -> Mapping[str, Any]:
    return autoencoder.config  # type: ignore[return-value]


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))) with 3x3 kernels; no normalisation, since the activations are of order one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class ResidualNetwork(nn.Module):
    """[B, inputs, h, w] -> [B, outputs, h, w]: a conv, residual blocks, SiLU, and a zero-initialised conv."""

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.conv_out = nn.Conv2d(width, outputs, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.blocks(self.conv_in(x))))


class SpaceToDepthAutoencoder(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] <-> latents [B, latent_channels, H/factor, W/factor].

    Args:
        factor: downsampling factor.
        latent_channels: channels of the latents.
        width, encoder_blocks, decoder_blocks: channels and numbers of blocks of the residual networks.
        scaling_factor: multiplies the latents, so that their standard deviation is near one.
    """

    def __init__(
        self,
        factor: int = 4,
        latent_channels: int = 12,
        width: int = 64,
        encoder_blocks: int = 2,
        decoder_blocks: int = 4,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.factor, self.latent_channels, self.scaling_factor = factor, latent_channels, scaling_factor
        patch = 3 * factor * factor
        self.encode_linear = nn.Conv2d(patch, latent_channels, 1)
        self.decode_linear = nn.Conv2d(latent_channels, patch, 1)
        self.encode_residual = ResidualNetwork(patch, latent_channels, width, encoder_blocks)
        self.decode_residual = ResidualNetwork(latent_channels, patch, width, decoder_blocks)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures -> scaled latents. Raises ValueError if a side is not a multiple of the factor."""
        if images.shape[-1] % self.factor or images.shape[-2] % self.factor:
            raise ValueError(f"sides must be multiples of {self.factor}, got {tuple(images.shape[-2:])}")
        with torch.autocast(images.device.type, enabled=False):  # not in half precision, as for SDXL's autoencoder
            patches = F.pixel_unshuffle(images, self.factor)
            return (self.encode_linear(patches) + self.encode_residual(patches)) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures, not clipped."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents / self.scaling_factor
            return F.pixel_shuffle(self.decode_linear(latents) + self.decode_residual(latents), self.factor)

    @torch.no_grad()
    def set_principal_components(self, images: Tensor, whitening: float = 0.5) -> None:
        """Set the linear maps to the principal components of the pictures' patches.

        Args:
            images: [B, 3, H, W] in [-1, 1].
            whitening: exponent from 0 to 1. Latent channel i has standard deviation std_i ** (1 - whitening), times a
                common gain that makes the mean square one; std_i is that of component i. 0 keeps the distances of
                pixel space, so that a low sigma already hides the channels of fine detail. 1 gives all channels equal
                variance, so that the denoiser spends its capacity on fine detail. 0.5 is our choice.
        """
        patches = F.pixel_unshuffle(images.double(), self.factor).movedim(1, -1).reshape(-1, 3 * self.factor**2)
        mean = patches.mean(0)
        variance, basis = torch.linalg.eigh(torch.cov((patches - mean).T))
        order = variance.argsort(descending=True)[: self.latent_channels]
        deviation = variance[order].clamp_min(1e-8).sqrt()
        basis = basis[:, order]
        # The sign of an eigenvector is arbitrary. It is fixed here, so that all machines get the same weights.
        basis = basis * basis.sum(0).sign().where(basis.sum(0) != 0, torch.ones_like(deviation))
        gain = deviation**-whitening
        gain = gain / (deviation * gain).square().mean().sqrt()
        encoding, decoding = (basis * gain).T, basis / gain
        self.encode_linear.weight.copy_(encoding[..., None, None])
        self.encode_linear.bias.copy_(-encoding @ mean)  # type: ignore[union-attr]
        self.decode_linear.weight.copy_(decoding[..., None, None])
        self.decode_linear.bias.copy_(mean)  # type: ignore[union-attr]
