"""The restoration adapters (section 3.2, Fig. 3): small modules between the blocks of a frozen UNet or MM-DiT.

    L  = block_lq(F)                    F: the adapter before's feature; for the first one the encoded LQ latents
    h  = L + X + linear(SiLU(e))        X: the prior block's output, e: the prior's time embedding
    h  = h + block_1(h),  h = h + block_2(h)
    X' = X + zero(h)                    goes to the prior's next block; `zero` starts with zeros
    F' = L, or h with chain "fused"     goes to the next adapter

With F' = L the features L depend on neither time nor noise: `features` computes them once for a picture. Only their
sum with X and what follows is left for a step, and both halves of a guided call share them.

Shapes: B pictures, H B rows of a step (H halves of guidance), C channels, E embedding width, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from components.priors.mmdit_walk import TokenBlocks, TokenJoins
from components.priors.unet_walk import Blocks, Joins
from components.systems.dra.config import PATCH, AdapterConfig


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of each position: [B, c, h, w] -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class NafBlock(nn.Module):
    """A NAF block without its own residual connection: [B, c, h, w] -> [B, width, h, w].

    Args:
        before: channels c of the input.
        width: channels of the output.
    """

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(before, eps=1e-6), ChannelNorm(width, eps=1e-6)
        self.conv1 = nn.Conv2d(before, 2 * width, 1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.attention = nn.Conv2d(width, width, 1)
        self.conv3 = nn.Conv2d(width, width, 1)
        self.conv4 = nn.Conv2d(width, 2 * width, 1)
        self.conv5 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gated = _gate(self.conv2(self.conv1(self.norm1(x))))
        x = self.conv3(gated * self.attention(gated.mean(dim=(2, 3), keepdim=True)))
        return x + self.conv5(_gate(self.conv4(self.norm2(x))))  # type: ignore[no-any-return]


class Adapter(nn.Module):
    """One restoration adapter.

    Args:
        lq: block of the LQ feature.
        blocks: the two residual blocks.
        out: the last linear layer; its weights become zero.
        width: channels C of the prior's block.
        embedding: width E of the time embedding.
        silu: see AdapterConfig.
    """

    def __init__(
        self, lq: nn.Module, blocks: tuple[nn.Module, nn.Module], out: nn.Module, width: int, embedding: int, silu: str
    ) -> None:
        super().__init__()
        self.lq, self.emb, self.out = lq, nn.Linear(embedding, width), out
        self.r1, self.r2 = blocks
        self.silu = silu
        for parameter in out.parameters():
            nn.init.zeros_(parameter)

    def shift(self, embedding: Tensor) -> Tensor:
        """What the time embedding [B, E], before any activation, adds to a feature: [B, C]."""
        embedding = embedding.to(self.emb.bias.dtype)
        return self.emb(F.silu(embedding)) if self.silu == "before" else F.silu(self.emb(embedding))  # type: ignore[no-any-return]


def run_adapter(adapter: Any, x: Tensor, feature: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """One adapter after its LQ block, in its own dtype.

    Args:
        x: output of the prior's block, [H B, C, h, w] or tokens [H B, L, C].
        feature: L [B, ...], the other sides as x; every half of x gets it. With as many rows as x, each row its own.
        shift: see Adapter.shift, [H B, C].

    Returns:
        (X' in x's dtype, h in the adapter's).
    """
    own = x.to(adapter.emb.bias.dtype)
    spread = shift[:, :, None, None] if x.ndim == 4 else shift[:, None]
    hidden = (own.unflatten(0, (-1, len(feature))) + feature.to(own.dtype)).flatten(0, 1) + spread
    hidden = hidden + adapter.r1(hidden)
    hidden = hidden + adapter.r2(hidden)
    return x + adapter.out(hidden).to(x.dtype), hidden


RunAdapter = Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the denoiser, for what acts on it.

    Attributes:
        latents: noisy latents [H B, C, h, w].
        times: time steps as the denoiser takes them [H B].
        embedding: its whole embedding [H B, E], before any activation.
        text: token embeddings [H B, L, D].
        pooled: pooled text [H B, P].
        time_ids: size ids [H B, 6] of an SDXL-shaped UNet.
    """

    latents: Tensor
    times: Tensor
    embedding: Tensor
    text: Tensor
    pooled: Tensor
    time_ids: Tensor | None = None


@dataclass(frozen=True)
class AdapterBlocks(Blocks):
    """The block functions of the UNet's walk and of the adapters, plain, compiled or recomputing."""

    adapter: RunAdapter = run_adapter


# --- of a UNet --------------------------------------------------------------------------------------------------------


class UnetAdapters(nn.Module):
    """Adapters after all blocks of an SDXL-shaped UNet but the last one of its expansion path (section 4.1).

    Args:
        unet: the prior's; only its sizes are read.
        config: form of the adapters.

    Attributes:
        factor: side in the prior's pixels of a pixel of a latent in what `features` takes; 1 for LQ latents.
        widths: channels of each place, in the order of the walk.
    """

    factor = 1

    def __init__(self, unet: Any, config: AdapterConfig | None = None) -> None:
        super().__init__()
        self.config = config or AdapterConfig()
        self.levels = len(unet.down_blocks)
        self.widths = _block_widths(unet)
        embedding = int(unet.time_embedding.linear_2.out_features)
        before = (int(unet.config["in_channels"]), *self.widths[:-1])
        self.adapters = nn.ModuleList(
            _map_adapter(self.config, *widths, embedding, first=number == 0)
            for number, widths in enumerate(zip(before, self.widths, strict=True))
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the adapters compute in."""
        bias: Tensor = self.adapters[0].emb.bias  # type: ignore[union-attr, assignment]
        return bias.dtype

    def features(self, lq: Tensor) -> list[Tensor]:
        """The features L that depend on the LQ latents [B, C, h, w] alone: all of them, or with "fused" the first."""
        sizes, feature, features = self.sizes(lq.shape[-2], lq.shape[-1]), lq.to(self.dtype), list[Tensor]()
        for adapter, size in zip(self.adapters, sizes, strict=True):
            feature = adapter.lq(resample(feature, size))  # type: ignore[operator]
            features.append(feature)
            if self.config.chain == "fused":
                break
        return features

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of the UNet's features at each adapter, for latents of that size."""
        sides = [(height, width)]
        for _ in range(self.levels - 1):
            sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
        down = [min(number + 1, self.levels - 1) for number in range(self.levels)]
        up = [max(self.levels - 2 - number, 0) for number in range(self.levels - 1)]
        return [sides[level] for level in (*down, self.levels - 1, *up)]

    def shifts(self, embedding: Tensor) -> list[Tensor]:
        """Adapter.shift of each adapter, for the UNet's whole embedding [B, E] before the activation."""
        return [adapter.shift(embedding) for adapter in self.adapters]  # type: ignore[operator]

    def joins(self, features: Sequence[Tensor], call: Call, blocks: AdapterBlocks) -> Joins:
        """The adapters in one call of the UNet; `features` are those of the LQ latents."""
        return AdapterJoins(self, features, self.shifts(call.embedding), blocks.adapter)


class AdapterJoins(Joins):
    """The adapters in a walk of the UNet.

    Args:
        adapters: the modules.
        features: see UnetAdapters.features.
        shifts: see UnetAdapters.shifts.
        run: run_adapter, plain or compiled.
    """

    def __init__(
        self,
        adapters: UnetAdapters,
        features: Sequence[Tensor],
        shifts: Sequence[Tensor],
        run: RunAdapter = run_adapter,
    ) -> None:
        self._adapters, self._features, self._shifts, self._run = adapters, list(features), shifts, run
        self._number, self._hidden = 0, torch.empty(0)
        self.changes_skip = adapters.config.adapt_skip

    def after_down(self, number: int, x: Tensor) -> Tensor:
        return self._next(x)

    def middle(self, x: Tensor) -> Tensor:
        return self._next(x)

    def after_up(self, number: int, x: Tensor) -> Tensor:
        return self._next(x) if self._number < len(self._adapters.adapters) else x

    def _next(self, x: Tensor) -> Tensor:
        number = self._number
        adapter: Any = self._adapters.adapters[number]
        if number == len(self._features):  # with chain "fused": the hidden feature of the adapter before
            self._features.append(adapter.lq(resample(self._hidden, (x.shape[-2], x.shape[-1]))))
        x, self._hidden = self._run(adapter, x, self._features[number], self._shifts[number])
        self._number += 1
        return x


def resample(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """A feature [B, c, h, w] at another size, without parameters: means of areas to shrink, nearest to enlarge."""
    if feature.shape[-2:] == size:
        return feature
    smaller = size[0] <= feature.shape[-2] and size[1] <= feature.shape[-1]
    return F.interpolate(feature, size=size, mode="area" if smaller else "nearest")


# --- of an MM-DiT -----------------------------------------------------------------------------------------------------


class TokenAdapters(nn.Module):
    """Adapters after every fourth block (or another) of an MM-DiT, on its stream of picture tokens (section 4.1).

    Args:
        blocks: transformer blocks of the prior.
        width: of its tokens, C.
        embedding: of its embedding of time and pooled text, E.
        latent_channels: of its autoencoder.
        config: form of the adapters; `chain`, `silu` and `every` count here.

    Raises:
        ValueError: too few blocks for one adapter.

    Attributes:
        factor: see UnetAdapters.
    """

    factor = 1

    def __init__(
        self, blocks: int, width: int, embedding: int, latent_channels: int, config: AdapterConfig | None = None
    ) -> None:
        super().__init__()
        self.config, self.width = config or AdapterConfig(), width
        if blocks < self.config.every:
            raise ValueError(f"adapters are after every {self.config.every} blocks, and there are {blocks}")
        self.patch_embed = nn.Conv2d(latent_channels, width, PATCH, stride=PATCH)
        self.adapters = nn.ModuleList(
            Adapter(
                _token_block(width),
                (_token_block(width), _token_block(width)),
                nn.Linear(width, width),
                width,
                embedding,
                self.config.silu,
            )
            for _ in range(blocks // self.config.every)
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the adapters compute in."""
        bias: Tensor = self.patch_embed.bias  # type: ignore[assignment]
        return bias.dtype

    @property
    def places(self) -> list[int]:
        """Numbers (from 0) of the transformer blocks that an adapter follows."""
        return [self.config.every * (number + 1) - 1 for number in range(len(self.adapters))]

    def features(self, lq: Tensor) -> list[Tensor]:
        """The token features L [B, L, C] that depend on the LQ latents [B, c, h, w] alone, as in UnetAdapters.

        Raises:
            ValueError: a side of the latents is odd.
        """
        height, width = (side // PATCH for side in lq.shape[-2:])
        if (height * PATCH, width * PATCH) != tuple(lq.shape[-2:]):
            raise ValueError(f"sides of the latents must be multiples of {PATCH}, got {tuple(lq.shape[-2:])}")
        feature = self.patch_embed(lq.to(self.dtype)).flatten(2).transpose(1, 2)
        feature = feature + token_positions(self.width, height, width).to(feature)
        features = []
        for adapter in self.adapters:
            feature = adapter.lq(feature)  # type: ignore[operator]
            features.append(feature)
            if self.config.chain == "fused":
                break
        return features

    def shifts(self, embedding: Tensor) -> list[Tensor]:
        """Adapter.shift of each adapter, for the prior's embedding [B, E] before any activation."""
        return [adapter.shift(embedding) for adapter in self.adapters]  # type: ignore[operator]

    def joins(self, features: Sequence[Tensor], call: Call, blocks: TokenAdapterBlocks) -> TokenJoins:
        """The adapters in one call of the MM-DiT; `features` are those of the LQ latents."""
        return TokenAdapterJoins(self, features, self.shifts(call.embedding), blocks.adapter)

    def apply_adapter(
        self,
        number: int,
        x: Tensor,
        features: list[Tensor],
        shifts: Sequence[Tensor],
        hidden: Tensor | None = None,
        run: RunAdapter = run_adapter,
    ) -> tuple[Tensor, Tensor]:
        """Adapter `number` on the picture tokens [H B, L, C] of its block: (X', h).

        Args:
            features: see `features`; with chain "fused" the next one is computed from `hidden` and appended.
            shifts: see `shifts`.
            hidden: h of the adapter before; unused with chain "lq".
            run: run_adapter, plain, compiled or recomputing.
        """
        adapter: Any = self.adapters[number]
        if number == len(features):
            features.append(adapter.lq(hidden))
        return run(adapter, x, features[number], shifts[number])


@dataclass(frozen=True)
class TokenAdapterBlocks(TokenBlocks):
    """The block functions of the MM-DiT's walk and of the adapters, plain, compiled or recomputing."""

    adapter: RunAdapter = run_adapter


class TokenAdapterJoins(TokenJoins):
    """The adapters in a walk of the MM-DiT; arguments as in AdapterJoins."""

    def __init__(
        self,
        adapters: TokenAdapters,
        features: Sequence[Tensor],
        shifts: Sequence[Tensor],
        run: RunAdapter = run_adapter,
    ) -> None:
        self._adapters, self._features, self._shifts, self._run = adapters, list(features), shifts, run
        self._places = {place: number for number, place in enumerate(adapters.places)}
        self._hidden = torch.empty(0)

    def after_block(self, number: int, tokens: Tensor) -> Tensor:
        if number not in self._places:
            return tokens
        tokens, self._hidden = self._adapters.apply_adapter(
            self._places[number], tokens, self._features, self._shifts, self._hidden, self._run
        )
        return tokens


def token_positions(width: int, height: int, columns: int) -> Tensor:
    """Fixed sine and cosine positions of height x columns tokens, float32 [height columns, width], in reading order.

    Rows and columns count from 0 in steps of one token. diffusers' own grid of two sides would stretch the shorter side
    of a picture that is not square, and training has square ones only.
    """
    side = max(height, columns)
    square = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").view(side, side, width)
    return square[:height, :columns].reshape(height * columns, width).to(torch.float32)


# --- parts ------------------------------------------------------------------------------------------------------------


def _block_widths(unet: Any) -> list[int]:
    """Channels of the UNet's block outputs in the order of the walk, without the last block."""
    blocks = [*unet.down_blocks, unet.mid_block, *list(unet.up_blocks)[:-1]]
    return [int(block.resnets[-1].out_channels) for block in blocks]


def _map_adapter(config: AdapterConfig, before: int, width: int, embedding: int, first: bool) -> Adapter:
    # a norm of the LQ latents themselves would take their mean colour away
    lq = _lq_block(replace(config, norm="none") if first else config, before, width)
    blocks = (_map_block(config, width), _map_block(config, width))
    return Adapter(lq, blocks, nn.Conv2d(width, width, 1), width, embedding, config.silu)


def _map_block(config: AdapterConfig, width: int) -> nn.Module:
    """A residual block without its sum."""
    if config.block == "naf":
        return _with_norm(config, width, NafBlock(width, width))
    layers: list[nn.Module] = [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
    if config.block == "conv31":
        layers.append(nn.Conv2d(width, width, 1))
    return _with_norm(config, width, *layers)


def _lq_block(config: AdapterConfig, before: int, width: int) -> nn.Module:
    """The block of the LQ feature, which changes the channels."""
    if config.block == "naf":
        return _with_norm(config, before, NafBlock(before, width))
    if config.block == "conv31":
        return _with_norm(config, before, nn.Conv2d(before, width, 1))
    return _with_norm(config, before, nn.Conv2d(before, width, 3, padding=1), nn.SiLU())


def _token_block(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())


def _with_norm(config: AdapterConfig, channels: int, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(*([_group_norm(channels)] if config.norm == "group" else []), *layers)


def _group_norm(channels: int) -> nn.GroupNorm:
    """A group norm with 32 groups, or with fewer where the channels do not divide."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def _gate(x: Tensor) -> Tensor:
    """NAF's gate: the product of both halves of the channels."""
    one, other = x.chunk(2, dim=1)
    return one * other
