"""InstantIR's Latent Aggregator: a copy of the UNet's compression path that fuses the LQ latents with a preview.

The input is one double-sized latent, LQ latents first and preview second, so that self-attention fuses them. At each of
the UNet's skip levels the halves are split again. A spatial feature transform (InstantIR Eq. 6) then lets the LQ half
modulate the preview half. There is no text cross-attention. Pooled text and sizes still enter through the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from components.priors.encoder_copy import NO_ADAPTER, embed_step, skip_widths, unet_skeleton
from components.priors.parameters import base_parameters, base_state, copy_strictly
from components.randomness import seeded_init

SFT_WIDTH = 128  # the released model's, at every level (instantir.md section 4)


class Residuals(NamedTuple):
    """The tensors that are added to the UNet: one for each skip connection [B, W, h, w], one for the middle block."""

    down: tuple[Tensor, ...]
    mid: Tensor

    def scale_by(self, scale: float | Tensor) -> Residuals:
        """All residuals times `scale`, a number or [B]."""
        if isinstance(scale, Tensor):
            scale = scale.view(-1, 1, 1, 1)
        return Residuals(tuple(r * scale for r in self.down), self.mid * scale)

    def to(self, dtype: torch.dtype) -> Residuals:
        """All residuals in another dtype."""
        return Residuals(tuple(r.to(dtype) for r in self.down), self.mid.to(dtype))


class SpatialFeatureTransform(nn.Module):
    """preview (1 + mul(lq)) + add(lq), Eq. 6 (Wang et al. 2018)."""

    def __init__(self, channels: int, width: int = SFT_WIDTH) -> None:
        super().__init__()
        self.mlp_shared = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.SiLU())
        self.mul = nn.Conv2d(width, channels, 3, padding=1)
        self.add = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, preview: Tensor, lq: Tensor) -> Tensor:
        """[B, channels, h, w] twice -> the same shape."""
        shared = self.mlp_shared(lq)
        return preview * (1 + self.mul(shared)) + self.add(shared)


class Aggregator(nn.Module):
    """The Latent Aggregator (see the module's docstring). `Aggregator.from_unet` makes one.

    Args:
        config: the UNet's configuration.
        device: "cpu", or "meta" for shapes without memory. The copied part is uninitialised until weights are loaded.
        dtype: dtype of the copied part; None is float32.
    """

    def __init__(self, config: Mapping[str, Any], device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        skeleton = unet_skeleton(config)
        self.config = {**config, **NO_ADAPTER}
        self.conv_in = skeleton.conv_in
        with torch.device("meta"):
            conv = self.conv_in
            self.ref_conv_in = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)  # type: ignore[arg-type]
        self.time_proj, self.time_embedding = skeleton.time_proj, skeleton.time_embedding
        self.add_time_proj, self.add_embedding = skeleton.add_time_proj, skeleton.add_embedding
        self.down_blocks, self.mid_block = skeleton.down_blocks, skeleton.mid_block
        for module in self.modules():
            if hasattr(module, "attn2"):
                module.attn2, module.norm2 = None, None  # type: ignore[assignment]
        self.to(dtype).to_empty(device=device)  # the cast happens on meta, so the weights are never in memory twice
        widths = skip_widths(self)
        self.controlnet_down_blocks = nn.ModuleList(_join(width) for width in widths)
        self.controlnet_mid_block = _join(widths[-1])

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel, seed: int = 0) -> Aggregator:
        """A new Aggregator with the UNet's compression path; it adds nothing at first, since its last layers are zero.

        Args:
            unet: the prior's UNet; its perceptor and previewer are not copied.
            seed: fixes the random start of the spatial feature transforms.
        """
        like = next(unet.parameters())
        # the random start is computed on the CPU, so that it has the same bits on every device
        with seeded_init(seed, "aggregator"):
            aggregator = cls(dict(unet.config), "meta" if like.is_meta else "cpu", like.dtype)
        aggregator.to(device=like.device, dtype=like.dtype)
        own = aggregator.state_dict()
        source = {name: value for name, value in base_state(unet).items() if name in own}
        source |= {f"ref_{name}": value for name, value in source.items() if name.startswith("conv_in.")}
        copy_strictly({n: p for n, p in own.items() if not n.startswith("controlnet_")}, source, "aggregator's copy")
        return aggregator

    def forward(
        self,
        lq: Tensor,
        timesteps: Tensor,
        preview: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        conditioning_scale: float | Tensor = 1.0,
        cat_dim: int = -2,
    ) -> Residuals:
        """The residuals for the UNet.

        Args:
            lq: latents of the LQ picture [B, C, h, w]; sides divisible by 2 ** (levels - 1).
            timesteps: [B] or [1].
            preview: latents of the preview, the same shape.
            text_embeds: pooled text [B, P].
            time_ids: size ids [B, 6].
            conditioning_scale: factor of all residuals; a number or [B].
            cat_dim: -2 concatenates along the height (released), -1 along the width.

        Raises:
            ValueError: the shapes differ, a side is not divisible by 2 ** (levels - 1), or cat_dim is not -2 or -1.
        """
        self.check_pair(lq, preview, cat_dim)
        temb = self.embedding(timesteps.expand(len(lq)), text_embeds, time_ids, lq.dtype)
        sample = torch.cat([self.conv_in(lq), self.ref_conv_in(preview)], dim=cat_dim)
        features = [sample]
        for block in self.down_blocks:
            sample, skips = block(hidden_states=sample, temb=temb)
            features.extend(skips)
        sample = self.mid_block(sample, temb)  # type: ignore[misc]
        down = tuple(
            _apply_join(join, feature, cat_dim)
            for join, feature in zip(self.controlnet_down_blocks, features, strict=True)
        )
        return Residuals(down, _apply_join(self.controlnet_mid_block, sample, cat_dim)).scale_by(conditioning_scale)

    def embedding(self, timesteps: Tensor, text_embeds: Tensor, time_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """See embed_step."""
        return embed_step(self, timesteps, text_embeds, time_ids, dtype)

    def check_pair(self, lq: Tensor, preview: Tensor, cat_dim: int) -> None:
        """Raises ValueError where LQ latents and preview cannot be concatenated; see forward."""
        if cat_dim not in (-2, -1):
            raise ValueError(f"cat_dim must be -2 (height) or -1 (width), got {cat_dim}")
        if lq.shape != preview.shape:
            raise ValueError(f"LQ latents {tuple(lq.shape)} and preview {tuple(preview.shape)} differ in shape")
        multiple = 2 ** (len(self.down_blocks) - 1)
        if lq.shape[-2] % multiple or lq.shape[-1] % multiple:
            raise ValueError(f"latent sides must be multiples of {multiple}, got {tuple(lq.shape[-2:])}")


def load_aggregator(aggregator: Aggregator, state: Mapping[str, Tensor]) -> None:
    """Copy weights that have aggregator.pt's names. Raises ValueError that lists every fault."""
    copy_strictly(base_parameters(aggregator), state, "aggregator")


def aggregator_state(aggregator: Aggregator) -> dict[str, Tensor]:
    """The weights under aggregator.pt's names."""
    return base_state(aggregator)


def _join(channels: int) -> nn.ModuleList:
    """A spatial feature transform, then a 1x1 convolution that starts at zero."""
    zero = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)  # type: ignore[arg-type]
    return nn.ModuleList([SpatialFeatureTransform(channels), zero])


def _apply_join(join: Any, feature: Tensor, cat_dim: int) -> Tensor:
    transform, zero = join[0], join[1]
    half = feature.shape[cat_dim] // 2
    lq = feature.narrow(cat_dim, 0, half)
    preview = feature.narrow(cat_dim, feature.shape[cat_dim] - half, half)
    return zero(transform(preview, lq))
