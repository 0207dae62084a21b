"""SUPIR's connectors: how the adaptor's features enter the UNet's expansion path (supir.md, section 1.3).

In the paper's Fig. 3 a ZeroSFT is a zero convolution with a spatial feature transform and a group norm. In the
released code, which this follows, the norm covers the decoder's channels and those of the skip connection, and it stays
active at the start: only a control scale of 0 leaves the prior's own function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.priors.encoder_copy import skip_widths
from components.priors.unet_walk import Blocks, Joins, split_heads
from components.systems.supir.config import HEAD_DIM, HIDDEN, AdaptorConfig

Scale = float | Tensor
"""Control scale: a number, or a tensor of one number."""


def zero(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with all of its weights at zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class ZeroSFT(nn.Module):
    """The skip connection's join: concatenation, group norm and a spatial feature transform from the control features.

    Args:
        control: channels of the control feature.
        skip: channels of the skip connection.
        decoder: channels of the decoder's feature; 0 after the middle block.
        groups: of the norm.
    """

    def __init__(self, control: int, skip: int, decoder: int, groups: int) -> None:
        super().__init__()
        width = skip + decoder
        self.param_free_norm = nn.GroupNorm(groups, width, eps=1e-5)  # the release's name; it has weights
        self.mlp_shared = nn.Sequential(nn.Conv2d(control, HIDDEN, 3, padding=1), nn.SiLU())
        self.zero_mul = zero(nn.Conv2d(HIDDEN, width, 3, padding=1))
        self.zero_add = zero(nn.Conv2d(HIDDEN, width, 3, padding=1))
        self.zero_conv = zero(nn.Conv2d(control, skip, 1))

    def forward(self, control: Tensor, skip: Tensor, decoder: Tensor | None = None, scale: Scale = 1.0) -> Tensor:
        """Control [B, c, h, w], skip [B, s, h, w] and decoder [B, d, h, w] -> [B, d + s, h, w], decoder first."""
        raw = _join(decoder, skip)
        if _is(scale, 0):
            return raw
        hidden = self.mlp_shared(control)
        normalised = self.param_free_norm(_join(decoder, skip + self.zero_conv(control)))
        return _mix(raw, normalised * (1 + self.zero_mul(hidden)) + self.zero_add(hidden), scale)


class ZeroConv(nn.Module):
    """The plain zero convolution of the paper's ablation (Table 2c); arguments as in ZeroSFT."""

    def __init__(self, control: int, skip: int, decoder: int = 0, groups: int = 32) -> None:
        super().__init__()
        self.zero_conv = zero(nn.Conv2d(control, skip, 1))

    def forward(self, control: Tensor, skip: Tensor, decoder: Tensor | None = None, scale: Scale = 1.0) -> Tensor:
        """See ZeroSFT.forward."""
        raw = _join(decoder, skip)
        return raw if _is(scale, 0) else _mix(raw, _join(decoder, skip + self.zero_conv(control)), scale)


class Attention(nn.Module):
    """Cross-attention of tokens: queries [B, L, C], context [B, S, D] -> [B, L, C]."""

    def __init__(self, query: int, context: int) -> None:
        super().__init__()
        self.heads = math.gcd(query, max(1, query // HEAD_DIM))  # a width that is no multiple has wider heads
        self.to_q = nn.Linear(query, query, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, query, bias=False) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(query, query))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ZeroCrossAttn(nn.Module):
    """Attention of the decoder's feature to the control feature of the same size; despite its name not zero at first.

    Args:
        control: channels of the control feature.
        decoder: channels of the decoder's feature.
        groups: of both norms.
    """

    def __init__(self, control: int, decoder: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, decoder, eps=1e-5)
        self.norm2 = nn.GroupNorm(groups, control, eps=1e-5)
        self.attn = Attention(decoder, control)

    def forward(self, control: Tensor, decoder: Tensor, scale: Scale = 1.0) -> Tensor:
        """Control [B, c, h, w] and decoder [B, d, h', w'] -> [B, d, h', w']."""
        if _is(scale, 0):
            return decoder
        tokens = (self.norm1(decoder).flatten(2).transpose(1, 2), self.norm2(control).flatten(2).transpose(1, 2))
        return decoder + scale * self.attn(*tokens).transpose(1, 2).unflatten(2, decoder.shape[-2:])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Place:
    """A connector's place: its kind, the index of its control feature, and the channels that it joins.

    Attributes:
        kind: "middle" (after the middle block), "skip" (before a resnet of the expansion path) or "upsampler".
        feature: index among the control features, the finest first.
        control, skip, decoder: channels; skip is 0 at an upsampler, decoder 0 after the middle block.
    """

    kind: Literal["middle", "skip", "upsampler"]
    feature: int
    control: int
    skip: int
    decoder: int


def places_of(unet: Any, cross_attention: bool = True) -> list[Place]:
    """The places of the connectors in the order of the walk."""
    widths = skip_widths(unet)
    middle = widths[-1]
    places, feature = [Place("middle", len(widths), middle, middle, 0)], len(widths)
    for block in unet.up_blocks:
        for resnet in block.resnets:
            feature -= 1
            skip = widths[feature]
            places.append(Place("skip", feature, skip, skip, resnet.in_channels - skip))
        if block.upsamplers is not None and cross_attention:
            places.append(Place("upsampler", feature, widths[feature], 0, block.resnets[-1].out_channels))
    return places


def build_connectors(unet: Any, config: AdaptorConfig) -> nn.ModuleList:
    """New connectors for a UNet; their order is the release's, which counts from the last use to the first."""
    groups, modules = int(unet.config["norm_num_groups"]), list[nn.Module]()
    kind = ZeroSFT if config.connector == "zero_sft" else ZeroConv
    for place in places_of(unet, config.cross_attention):
        if place.kind == "upsampler":
            modules.append(ZeroCrossAttn(place.control, place.decoder, groups))
        else:
            modules.append(kind(place.control, place.skip, place.decoder, groups))
    return nn.ModuleList(reversed(modules))


class ConnectorJoins(Joins):
    """The connectors in a walk of the UNet. They compute in the control features' dtype, which may not be the UNet's.

    Args:
        connectors: see build_connectors.
        places: see places_of.
        features: of the adaptor, the finest first, the middle block's last.
        scale: control scale.
    """

    def __init__(
        self, connectors: nn.ModuleList, places: Sequence[Place], features: Sequence[Tensor], scale: Scale
    ) -> None:
        self._next = self._pairs(connectors, places, features)
        self._scale = scale
        self._cross = any(place.kind == "upsampler" for place in places)

    @staticmethod
    def _pairs(
        connectors: nn.ModuleList, places: Sequence[Place], features: Sequence[Tensor]
    ) -> Iterator[tuple[nn.Module, Tensor]]:
        for connector, place in zip(reversed(list(connectors)), places, strict=True):
            yield connector, features[place.feature]

    def middle(self, x: Tensor) -> Tensor:
        connector, control = next(self._next)
        return connector(control, x.to(control.dtype), None, self._scale).to(x.dtype)  # type: ignore[no-any-return]

    def resnet(self, blocks: Blocks, resnet: Any, x: Tensor, shift: Tensor, skip: Tensor) -> Tensor:
        connector, control = next(self._next)
        joined = connector(control, skip.to(control.dtype), x.to(control.dtype), self._scale)
        return blocks.resnet(resnet, joined.to(x.dtype), shift)

    def enlarge(self, x: Tensor) -> Tensor:
        if not self._cross:
            return x
        connector, control = next(self._next)
        return connector(control, x.to(control.dtype), self._scale).to(x.dtype)  # type: ignore[no-any-return]


def _join(decoder: Tensor | None, skip: Tensor) -> Tensor:
    return skip if decoder is None else torch.cat([decoder, skip], dim=1)


def _mix(raw: Tensor, joined: Tensor, scale: Scale) -> Tensor:
    return joined if _is(scale, 1) else scale * joined + (1 - scale) * raw


def _is(scale: Scale, number: float) -> bool:
    """Whether the scale is known to be this number; a tensor's value is not looked at."""
    return not isinstance(scale, Tensor) and scale == number
