"""An AutoencoderKL on a picture of any size, layer by layer over tiles: equal to the whole, or as SUPIR releases it.

A layer runs on all tiles before the next layer starts, so that what depends on the whole picture can be computed.

    exact      Tiles lie side by side. A convolution reads one pixel of its neighbours' borders, and zeros only beyond
               the picture. Group norms use the moments of the whole map. The middle block runs on the whole map, which
               is small there; large attention runs in chunks of queries. Equal to the untiled network up to rounding.
    released   The scheme of pkuliyi2015, for results of the released tool. Tiles overlap, and every tile is padded with
               zeros at its own borders. A norm's variance is the mean of the tiles' variances, without the spread of
               their means, and a tile attends to itself alone. Not equal to the untiled network.

Memory: the activations of all tiles of a layer exist at once, and in a resnet those of its middle too; the released
tool stores the same. For SDXL's decoder that is at most 384 channels at the picture's size (6.4 GB in float32 for 2048
px), for its encoder 256. With `offload` they stay in the CPU's memory. All other tensors (a normalised map, padding,
workspaces of convolutions) exist for one tile; in the exact way's middle block, for the whole map at latent size.

Shapes: B pictures, C channels, G groups of a norm, T tiles; boxes are (top, left, height, width), in reading order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, DiagonalGaussianDistribution, Encoder
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from components.priors.autoencoder import draw_latents, unscale_latents
from components.priors.tile_layouts import Cores, Layout, Overlapping, released_boxes
from components.priors.unet_walk import split_heads
from components.types import Box, Cancellation, Cancelled

SCORES = 2**28
"""Largest number of attention scores of one chunk of queries, ours: 1 GiB if a backend stores them in float32."""


@dataclass(frozen=True)
class LayerTiles:
    """How an autoencoder is cut; the defaults are SUPIR's.

    Attributes:
        how: "exact" or "released", see above.
        encoder_tile: largest side of the encoder's tiles in pixels, without their halo; a multiple of the factor.
        decoder_tile: largest side of the decoder's tiles in latent pixels.
        encoder_pad, decoder_pad: halo of the released way in the same units; encoder_pad is a multiple of the factor.
        offload: keep activations in the CPU's memory between layers, while the network is on another device.

    Raises:
        ValueError: another way, a tile that is not positive, or a negative halo.
    """

    how: Literal["exact", "released"] = "exact"
    encoder_tile: int = 512
    decoder_tile: int = 64
    encoder_pad: int = 32
    decoder_pad: int = 11
    offload: bool = False

    def __post_init__(self) -> None:
        if self.how not in ("exact", "released"):
            raise ValueError(f'tiles are "exact" or "released", got "{self.how}"')
        if min(self.encoder_tile, self.decoder_tile) < 1 or min(self.encoder_pad, self.decoder_pad) < 0:
            raise ValueError(f"tiles must be positive and halos not negative, got {self}")


# ------------------------------------------------------------------------------------- pictures, moments and latents


def encode_pixels_tiled(
    autoencoder: nn.Module,
    images: Tensor,
    tiles: LayerTiles,
    noise: Tensor | None = None,
    encoder: nn.Module | None = None,
    cancelled: Cancelled | None = None,
) -> Tensor:
    """autoencoder.encode_pixels over tiles: pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w].

    Args:
        noise: standard normal of the latents' shape for a sample; None takes the mode.
        encoder, cancelled: see encode_tiled.

    Raises:
        ValueError, Cancellation: see encode_tiled.
    """
    moments = encode_tiled(autoencoder, images, tiles, encoder, cancelled)
    return draw_latents(autoencoder, DiagonalGaussianDistribution(moments), noise, images.dtype)


def decode_latents_tiled(
    autoencoder: nn.Module, latents: Tensor, tiles: LayerTiles, cancelled: Cancelled | None = None
) -> Tensor:
    """autoencoder.decode_latents over tiles: scaled latents [B, C, h, w] -> pictures [B, 3, H, W], not clipped."""
    return decode_tiled(autoencoder, unscale_latents(autoencoder, latents), tiles, cancelled).to(latents.dtype)


@torch.no_grad()
def encode_tiled(
    autoencoder: nn.Module,
    images: Tensor,
    tiles: LayerTiles,
    encoder: nn.Module | None = None,
    cancelled: Cancelled | None = None,
) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> mean and log variance [B, 2 C, H/factor, W/factor], without gradients.

    Args:
        images: may lie on another device than the network; the result lies on theirs, in the network's dtype.
        encoder: replaces the autoencoder's own, as a robust encoder's `encoder` does.
        cancelled: called before each tile of each layer.

    Raises:
        ValueError: no AutoencoderKL with SDXL's blocks, or a side or a tile that is not a multiple of the factor.
        Cancellation: `cancelled()` was true.
    """
    check_tileable(autoencoder)
    network = _encoder_of(autoencoder) if encoder is None else encoder
    moments = run_encoder(network, images, tiles, cancelled)
    return _convolution(autoencoder, "quant_conv", moments)


@torch.no_grad()
def decode_tiled(
    autoencoder: nn.Module, latents: Tensor, tiles: LayerTiles, cancelled: Cancelled | None = None
) -> Tensor:
    """Unscaled latents [B, C, h, w] -> pictures [B, 3, h factor, w factor], not clipped, without gradients.

    Devices, dtype, `cancelled` and errors are those of encode_tiled.
    """
    check_tileable(autoencoder)
    _layout(latents.shape[-2], latents.shape[-1], tiles, "decoder", 1)  # refuses wrong sizes before any layer runs
    hidden = _convolution(autoencoder, "post_quant_conv", latents.to(next(autoencoder.parameters()).dtype))
    return run_decoder(autoencoder.decoder, hidden, tiles, cancelled)  # type: ignore[arg-type]


def _encoder_of(autoencoder: nn.Module) -> nn.Module:
    return autoencoder.encoder  # type: ignore[return-value]


def _convolution(autoencoder: nn.Module, name: str, x: Tensor) -> Tensor:
    """The autoencoder's 1x1 convolution at latent size, if it has one; x keeps its device."""
    convolution = getattr(autoencoder, name, None)
    if convolution is None:
        return x
    with torch.autocast(convolution.weight.device.type, enabled=False):
        return convolution(x.to(convolution.weight.device)).to(x.device)  # type: ignore[no-any-return]


def _layout(height: int, width: int, tiles: LayerTiles, part: str, factor: int) -> Layout:
    """The tiles of an encoder (whose map is in pixels, with this factor) or of a decoder."""
    tile, pad, unit = (
        (tiles.encoder_tile, tiles.encoder_pad, factor)
        if part == "encoder"
        else (tiles.decoder_tile, tiles.decoder_pad, 1)
    )
    if height < 1 or width < 1 or height % unit or width % unit:
        raise ValueError(f"sides must be positive multiples of {unit}, got {height} x {width}")
    if tile % unit or (tiles.how == "released" and pad % unit):
        raise ValueError(f"the {part}'s tile and halo must be multiples of {unit}, got {tile} and {pad}")
    if tiles.how == "exact":
        return Cores.even(height, width, tile, unit)
    inputs, outputs = zip(*released_boxes(height, width, tile, pad), strict=True)
    return Overlapping(inputs, outputs)


# -------------------------------------------------------------------------------------------------------- the walk


@torch.no_grad()
def run_encoder(encoder: nn.Module, images: Tensor, tiles: LayerTiles, cancelled: Cancelled | None = None) -> Tensor:
    """An AutoencoderKL's encoder, without the convolution after it: [B, 3, H, W] -> [B, 2 C, H/factor, W/factor].

    Devices, dtype and errors are those of encode_tiled.
    """
    _check_coder(encoder, Encoder)
    network: Any = encoder
    factor = 2 ** sum(block.downsamplers is not None for block in network.down_blocks)
    layout = _layout(images.shape[-2], images.shape[-1], tiles, "encoder", factor)
    walk = _Walk(network, tiles.offload, cancelled)
    with torch.autocast(walk.device.type, enabled=False):
        sheet = walk.convolve(Sheet(layout, _cut(images, layout.boxes()), []), network.conv_in)
        for block in network.down_blocks:
            for resnet in block.resnets:
                walk.resnet(sheet, resnet)
            if block.downsamplers is not None:
                sheet = walk.halve(sheet, block.downsamplers[0].conv)
        sheet = walk.middle(sheet, network.mid_block)
        return walk.finish(sheet, network.conv_norm_out, network.conv_out, images.device)


@torch.no_grad()
def run_decoder(decoder: nn.Module, latents: Tensor, tiles: LayerTiles, cancelled: Cancelled | None = None) -> Tensor:
    """An AutoencoderKL's decoder, without the convolution before it: [B, C, h, w] -> [B, 3, h factor, w factor].

    Devices, dtype and errors are those of encode_tiled.
    """
    _check_coder(decoder, Decoder)
    network: Any = decoder
    layout = _layout(latents.shape[-2], latents.shape[-1], tiles, "decoder", 1)
    walk = _Walk(network, tiles.offload, cancelled)
    with torch.autocast(walk.device.type, enabled=False):
        sheet = walk.convolve(Sheet(layout, _cut(latents, layout.boxes()), []), network.conv_in)
        sheet = walk.middle(sheet, network.mid_block)
        for block in network.up_blocks:
            for resnet in block.resnets:
                walk.resnet(sheet, resnet)
            if block.upsamplers is not None:
                sheet = walk.double(sheet, block.upsamplers[0].conv)
        return walk.finish(sheet, network.conv_norm_out, network.conv_out, latents.device)


@dataclass
class Sheet:
    """A feature map as tiles.

    Attributes:
        layout: where they lie.
        parts: the stored tiles [B, C, rows, columns], in the order of the layout's boxes.
        moments: mean and variance of each tile's groups [2, B, G], float32; empty where no norm follows.
    """

    layout: Layout
    parts: list[Tensor]
    moments: list[Tensor]


def _cut(x: Tensor, boxes: Sequence[Box]) -> list[Tensor]:
    return [x[..., top : top + height, left : left + width] for top, left, height, width in boxes]


class _Walk:
    """The layers of one network on sheets.

    Args:
        network: an encoder or a decoder. Its norms have one number of groups, so that a tile's moments can be computed
            when the tile is stored; with `offload` this saves a transfer of every tile.
        offload, cancelled: see LayerTiles and encode_tiled.
    """

    def __init__(self, network: Any, offload: bool, cancelled: Cancelled | None) -> None:
        self.device: torch.device = network.conv_in.weight.device
        self.dtype: torch.dtype = network.conv_in.weight.dtype
        self.store = torch.device("cpu") if offload else self.device
        self.groups: int = network.conv_norm_out.num_groups
        self.cancelled = cancelled

    def check(self) -> None:
        if self.cancelled is not None and self.cancelled():
            raise Cancellation("cancelled between two tiles")

    def here(self, part: Tensor) -> Tensor:
        return part.to(self.device, self.dtype)

    def convolve(self, sheet: Sheet, convolution: nn.Conv2d, norm: nn.GroupNorm | None = None) -> Sheet:
        """A 3x3 convolution, after a norm and SiLU if `norm` is given."""
        prepare = self.here if norm is None else self.activation(sheet, norm)
        result = Sheet(sheet.layout, [], [])
        for index in range(len(sheet.parts)):
            self.append(result, self.convolved(sheet, index, convolution, prepare))
        return result

    def convolved(
        self, sheet: Sheet, index: int, convolution: nn.Conv2d, prepare: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """One tile of a 3x3 convolution; `prepare` acts on each pixel alone, before the zeros around the picture."""
        self.check()
        window, missing = sheet.layout.window(sheet.parts, index, 1, 1)
        return F.conv2d(_padded(prepare(window), missing), convolution.weight, convolution.bias)

    def resnet(self, sheet: Sheet, block: Any) -> None:
        """A resnet in place: a tile replaces its input as soon as it is ready, since only it still needs it."""
        hidden = self.convolve(sheet, block.conv1, block.norm1)
        prepare = self.activation(hidden, block.norm2)
        for index, part in enumerate(sheet.parts):
            value = self.convolved(hidden, index, block.conv2, prepare)
            x = self.here(part)
            self.put(sheet, index, value + (x if block.conv_shortcut is None else block.conv_shortcut(x)))

    def halve(self, sheet: Sheet, convolution: nn.Conv2d) -> Sheet:
        """A 3x3 convolution with stride 2 that reads one pixel below and right, as the encoder's downsampler."""
        result = Sheet(sheet.layout.halved(), [], [])
        for index in range(len(sheet.parts)):
            self.check()
            window, missing = sheet.layout.window(sheet.parts, index, 0, 1)
            padded = _padded(self.here(window), missing)
            self.append(result, F.conv2d(padded, convolution.weight, convolution.bias, stride=2))
        return result

    def double(self, sheet: Sheet, convolution: nn.Conv2d) -> Sheet:
        """Each pixel four times, then a 3x3 convolution."""
        result = Sheet(sheet.layout.doubled(), [], [])
        for index in range(len(sheet.parts)):
            self.check()
            window, missing = sheet.layout.window(sheet.parts, index, 1, 1)
            enlarged = F.interpolate(self.here(window), scale_factor=2.0, mode="nearest")
            # a neighbour's pixel became two, of which the convolution reads one; F.pad cuts where a number is negative
            padded = F.pad(enlarged, [2 * m - 1 for m in missing])
            self.append(result, F.conv2d(padded, convolution.weight, convolution.bias))
        return result

    def middle(self, sheet: Sheet, mid: Any) -> Sheet:
        """The middle block, in the layout's own way; the result has the sheet's layout."""
        layout, store = sheet.layout, self.store
        apart = layout.middle() != layout
        if apart:
            self.store = self.device  # the whole map is used at once
            whole = _joined(sheet.parts, layout, self.device)
            sheet.parts.clear()  # the caller goes on with the result
            sheet = self.spread(whole, layout.middle())
            del whole
        self.resnet(sheet, mid.resnets[0])
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            if attention is not None:
                self.attention(sheet, attention)
            self.resnet(sheet, resnet)
        self.store = store
        return self.spread(sheet.parts[0], layout) if apart else sheet

    def attention(self, sheet: Sheet, attention: Any) -> None:
        """Self-attention in place, among the pixels of a tile."""
        prepare = self.normalisation(sheet, attention.group_norm)
        for index, part in enumerate(sheet.parts):
            x = self.here(part)
            self.put(sheet, index, x + self.attended(attention, prepare(x)))

    def attended(self, attention: Any, x: Tensor) -> Tensor:
        """Self-attention among all pixels of [B, C, h, w], in chunks of queries: the same result in less memory."""
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = (
            split_heads(layer(tokens), attention.heads) for layer in (attention.to_q, attention.to_k, attention.to_v)
        )
        outputs = []
        for chunk in query.split(max(1, SCORES // tokens.shape[1]), dim=2):
            self.check()
            outputs.append(F.scaled_dot_product_attention(chunk, key, value))
        output = attention.to_out[0](torch.cat(outputs, dim=2).transpose(1, 2).flatten(2))
        return output.transpose(1, 2).unflatten(2, x.shape[-2:])  # type: ignore[no-any-return]

    def activation(self, sheet: Sheet, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """A group norm of the sheet and SiLU, for any part of it."""
        normalise = self.normalisation(sheet, norm)
        return lambda x: F.silu(normalise(x), inplace=True)

    def normalisation(self, sheet: Sheet, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """A group norm as a scale and a shift of each channel [B, C, 1, 1]."""
        counts = torch.tensor([part.shape[-2] * part.shape[-1] for part in sheet.parts], dtype=torch.float64)
        means, variances = torch.stack(sheet.moments).to("cpu", torch.float64).unbind(1)
        mean, variance = sheet.layout.merge(counts, means, variances)
        wide = norm.num_channels // norm.num_groups
        deviation = (variance + norm.eps).sqrt().repeat_interleave(wide, dim=1)
        scale = norm.weight.to("cpu", torch.float64) / deviation
        shift = norm.bias.to("cpu", torch.float64) - mean.repeat_interleave(wide, dim=1) * scale
        # float32 also for a network in half precision, as in torch's own group norm
        scale, shift = (v.to(torch.float32).to(self.device)[:, :, None, None] for v in (scale, shift))
        return lambda x: (self.here(x) * scale).add_(shift).to(self.dtype)

    def finish(self, sheet: Sheet, norm: nn.GroupNorm, convolution: nn.Conv2d, device: torch.device) -> Tensor:
        """The last norm and convolution -> the whole result [B, C, H, W] on `device`."""
        prepare = self.activation(sheet, norm)
        parts = (self.convolved(sheet, index, convolution, prepare) for index in range(len(sheet.parts)))
        return _joined(parts, sheet.layout, device)

    def spread(self, x: Tensor, layout: Layout) -> Sheet:
        """Cuts a whole map [B, C, H, W]."""
        sheet = Sheet(layout, [], [])
        for part in _cut(x, layout.boxes()):
            self.append(sheet, part)
        return sheet

    def append(self, sheet: Sheet, value: Tensor) -> None:
        sheet.moments.append(_moments(value, self.groups))
        sheet.parts.append(value.to(self.store))

    def put(self, sheet: Sheet, index: int, value: Tensor) -> None:
        sheet.moments[index] = _moments(value, self.groups)
        sheet.parts[index] = value.to(self.store)


def _padded(x: Tensor, missing: Sequence[int]) -> Tensor:
    return F.pad(x, list(missing)) if any(missing) else x


def _moments(x: Tensor, groups: int) -> Tensor:
    """Mean and variance of each group of [B, C, h, w] -> [2, B, groups], float32."""
    variance, mean = torch.var_mean(x.float().unflatten(1, (groups, -1)).flatten(2), dim=2, correction=0)
    return torch.stack([mean, variance])


def _joined(parts: Any, layout: Layout, device: torch.device) -> Tensor:
    """The whole map [B, C, H, W] from its tiles, an iterable of tensors in order."""
    outer, results = layout.boxes(), layout.results()
    height = max(top + rows for top, _, rows, _ in results)
    width = max(left + columns for _, left, _, columns in results)
    whole: Tensor | None = None
    for part, box, result in zip(parts, outer, results, strict=True):
        if whole is None:
            whole = torch.empty(*part.shape[:2], height, width, dtype=part.dtype, device=device)
        top, left, rows, columns = result
        inner = part[..., top - box[0] : top - box[0] + rows, left - box[1] : left - box[1] + columns]
        whole[..., top : top + rows, left : left + columns].copy_(inner)
    assert whole is not None
    return whole


# ------------------------------------------------------------------------------------------------ what can be tiled


def check_tileable(autoencoder: nn.Module) -> None:
    """Raises ValueError that names what differs from SDXL's AutoencoderKL: the walk would compute it wrongly."""
    if not isinstance(autoencoder, AutoencoderKL):
        raise ValueError(f"only an AutoencoderKL can be tiled by layers, got {type(autoencoder).__name__}")
    _check_coder(_encoder_of(autoencoder), Encoder)
    _check_coder(autoencoder.decoder, Decoder)
    for name in ("quant_conv", "post_quant_conv"):
        convolution = getattr(autoencoder, name, None)
        if convolution is not None and convolution.kernel_size != (1, 1):
            raise ValueError(f"{name}: not a 1x1 convolution")


def _check_coder(network: nn.Module, kind: type[nn.Module]) -> None:
    """Raises ValueError if the walk does not know one of the network's modules."""
    what = kind.__name__.lower()
    if not isinstance(network, kind):
        raise ValueError(f"not an AutoencoderKL's {what}: {type(network).__name__}")
    coder: Any = network
    block_kind = DownEncoderBlock2D if kind is Encoder else UpDecoderBlock2D
    blocks = coder.down_blocks if kind is Encoder else coder.up_blocks
    wrong = [type(b).__name__ for b in blocks if not isinstance(b, block_kind)]
    if not isinstance(coder.mid_block, UNetMidBlock2D):
        wrong.append(type(coder.mid_block).__name__)
    if wrong:
        raise ValueError(f"{what}: cannot tile {wrong[0]}; blocks must be {block_kind.__name__} and UNetMidBlock2D")
    if not isinstance(coder.conv_norm_out, nn.GroupNorm) or not isinstance(coder.conv_act, nn.SiLU):
        raise ValueError(f"{what}: its end must be a group norm and SiLU")
    for name, module in network.named_modules():
        difference = _difference(module, coder.conv_norm_out.num_groups)
        if difference:
            raise ValueError(f"{what}, {name}: {difference}; only SDXL's AutoencoderKL can be tiled by layers")


def _difference(module: nn.Module, groups: int) -> str:
    """What the walk would compute wrongly in a module; "" for nothing."""
    part: Any = module
    if isinstance(module, nn.GroupNorm):
        return "" if module.num_groups == groups and module.affine else "a norm with other groups or without weights"
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        return "" if plain and module.kernel_size in ((1, 1), (3, 3)) else "another convolution than 3x3 or 1x1"
    if isinstance(module, ResnetBlock2D):
        # diffusers calls a decoder's resnets "group" and an encoder's "default"; without an embedding both are plain
        if part.time_emb_proj is not None or part.time_embedding_norm not in ("default", "group"):
            return "a resnet with a time embedding"
        if part.upsample is not None or part.downsample is not None or part.output_scale_factor != 1:
            return "a resnet that resamples or scales its output"
        if part.dropout.p or not isinstance(part.nonlinearity, nn.SiLU):
            return "a resnet with dropout or another activation than SiLU"
    elif isinstance(module, Downsample2D):
        if not part.use_conv or part.padding != 0 or part.norm is not None:
            return "a downsampler that is not a convolution padded below and right"
    elif isinstance(module, Upsample2D):
        if part.use_conv_transpose or not (part.use_conv and part.interpolate) or part.norm is not None:
            return "an upsampler that is not an interpolation and a convolution"
    elif isinstance(module, Attention):
        extra = (part.spatial_norm, part.norm_q, part.norm_k, part.add_k_proj)
        if part.group_norm is None or any(e is not None for e in extra) or part.to_out[1].p:
            return "attention with other norms, added keys or dropout"
        if not part.residual_connection or part.rescale_output_factor != 1:
            return "attention without a plain residual"
    return ""
