"""SwinIR (Liang et al. 2021) in DiffBIR's form, which works on a grid with an eighth of the picture's side.

    picture -> pixel unshuffle -> conv -> groups of window-attention blocks -> conv, + -> x2 steps -> picture

Modules have the names in the published files, whose keys therefore load unchanged (instarevive.md sections 1 and 3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.randomness import seeded_init
from components.systems.swinir.config import RGB_MEAN, SwinIRConfig

MASKED = -100.0
"""Added to the logits of two places that share a shifted window but are not neighbours in the picture."""


def windows_of(grid: Tensor, window: int) -> Tensor:
    """[B, H, W, C] -> [B, windows, window * window, C], in reading order."""
    batch, height, width, channels = grid.shape
    tiles = grid.view(batch, height // window, window, width // window, window, channels)
    return tiles.transpose(2, 3).reshape(batch, -1, window * window, channels)


def grid_of(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of windows_of."""
    batch, _, _, channels = windows.shape
    tiles = windows.view(batch, height // window, width // window, window, window, channels)
    return tiles.transpose(2, 3).reshape(batch, height, width, channels)


def relative_positions(window: int) -> Tensor:
    """Index into the bias table for each pair of places in a window, int64 [window^2, window^2] (Swin, Eq. 4)."""
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()])
    offsets = places[:, :, None] - places[:, None, :] + window - 1  # 0 .. 2 window - 2 along each axis
    return offsets[0] * (2 * window - 1) + offsets[1]


def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """The mask that is added to the logits of shifted windows, float32 [windows, window^2, window^2]: 0 or MASKED.

    Rolling the grid brings opposite borders into one window. They must not attend to each other.
    """

    def strips(length: int) -> Tensor:
        places = torch.arange(length)
        return (places >= length - window).long() + (places >= length - shift).long()

    region = strips(height)[:, None] * 3 + strips(width)[None]
    inside = windows_of(region[None, :, :, None], window)[0, :, :, 0]
    return torch.where(inside[:, None, :] != inside[:, :, None], MASKED, 0.0)


class WindowAttention(nn.Module):
    """Self-attention inside windows with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_positions(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, windows, N, C]; mask [windows, N, N] is added to the logits."""
        windows, places = x.shape[1:3]
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        bias = bias.expand(windows, -1, -1, -1) if mask is None else bias + mask[:, None].to(bias)
        # windows are merged with heads: fused kernels take four dimensions, and one bias serves the whole batch
        query, key, value = parts.flatten(2, 3).unbind(0)
        bias_mask = bias.flatten(0, 1)[None].to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_mask)
        attended = attended.view(len(x), windows, self.heads, places, -1)
        return self.proj(attended.transpose(2, 3).flatten(3))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Window attention and an MLP, each with a norm before it and a residual; `shift` moves the windows."""

    attn_mask: Tensor | None

    def __init__(self, config: SwinIRConfig, heads: int, shift: int) -> None:
        super().__init__()
        dim, self.window, self.shift = config.embed_dim, config.attention_window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, self.window, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.own_size = config.img_size
        mask = shift_mask(self.own_size, self.own_size, self.window, shift) if shift else None
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor, factors: Tensor | None) -> Tensor:
        """x [B, H, W, C]; factors [2, B] multiply the outputs of the two branches (0 drops one)."""
        height, width = x.shape[1:3]
        inner = self.norm1(x)
        mask = self._mask(height, width, x.device)
        if self.shift:
            inner = inner.roll((-self.shift, -self.shift), dims=(1, 2))
        inner = grid_of(self.attn(windows_of(inner, self.window), mask), self.window, height, width)
        if self.shift:
            inner = inner.roll((self.shift, self.shift), dims=(1, 2))
        x = x + _scale_branch(inner, factors, 0)
        return x + _scale_branch(self.mlp(self.norm2(x)), factors, 1)

    def _mask(self, height: int, width: int, device: torch.device) -> Tensor | None:
        if not self.shift or (height, width) == (self.own_size, self.own_size):
            return self.attn_mask
        return shift_mask(height, width, self.window, self.shift).to(device)


def _scale_branch(output: Tensor, factors: Tensor | None, branch: int) -> Tensor:
    return output if factors is None else output * factors[branch].to(output).view(-1, 1, 1, 1)


class Blocks(nn.Module):
    """The blocks of a group; every other one has shifted windows."""

    def __init__(self, config: SwinIRConfig, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(config, heads, config.shift * (i % 2)) for i in range(depth))


class Group(nn.Module):
    """Blocks, a convolution and a residual (the authors' RSTB)."""

    def __init__(self, config: SwinIRConfig, depth: int, heads: int) -> None:
        super().__init__()
        self.residual_group = Blocks(config, depth, heads)
        self.conv = last_conv(config.embed_dim, config.resi_connection)

    def forward(self, x: Tensor, factors: Tensor | None) -> Tensor:
        """x [B, H, W, C]; factors [blocks, 2, B]."""
        inner = x
        for number, block in enumerate(self.residual_group.blocks):
            inner = block(inner, None if factors is None else factors[number])
        return x + self.conv(inner.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchNorm(nn.Module):
    """The normalisation of the first tokens, under its key in the files."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)


def last_conv(dim: int, kind: str) -> nn.Module:
    """The 3x3 convolution after blocks, or three with a quarter of the width between."""
    if kind == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    waist = dim // 4
    return nn.Sequential(
        nn.Conv2d(dim, waist, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(waist, waist, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(waist, dim, 3, padding=1),
    )


class SwinIR(nn.Module):
    """The coarse restorer: RGB pictures in [0, 1] -> restored pictures, not clipped.

    Args:
        config: its sizes.
        gradient_checkpointing: recompute groups in the backward pass: less memory, a third more work.
    """

    def __init__(self, config: SwinIRConfig = SwinIRConfig(), gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config, self.gradient_checkpointing = config, gradient_checkpointing
        dim, scale, wide = config.embed_dim, config.unshuffle_scale, config.features
        self.conv_first = nn.Sequential(
            nn.PixelUnshuffle(scale), nn.Conv2d(config.in_chans * scale**2, dim, 3, padding=1)
        )
        self.patch_embed = PatchNorm(dim)
        self.layers = nn.ModuleList(
            Group(config, depth, heads) for depth, heads in zip(config.depths, config.num_heads, strict=True)
        )
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = last_conv(dim, config.resi_connection)
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, wide, 3, padding=1), nn.LeakyReLU())
        self.stages = [f"conv_up{i + 1}" for i in range(config.sf.bit_length() - 1)]
        for name in self.stages:
            self.add_module(name, nn.Conv2d(wide, wide, 3, padding=1))
        self.conv_hr = nn.Conv2d(wide, wide, 3, padding=1)
        self.conv_last = nn.Conv2d(wide, config.in_chans, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, WindowAttention):
                nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.config.depths)

    def forward(self, images: Tensor, factors: Tensor | None = None) -> Tensor:
        """Restore pictures.

        Args:
            images: [B, 3, H, W] in [0, 1]; sides are multiples of config.multiple_px.
            factors: float [blocks, 2, B], of the blocks' two branches, see drop_path; None for 1.

        Returns:
            [B, 3, H * sf / unshuffle_scale, W * sf / unshuffle_scale]: the picture's size if the two are equal.

        Raises:
            ValueError: other sides.
        """
        multiple = self.config.multiple_px
        if images.shape[-1] % multiple or images.shape[-2] % multiple:
            raise ValueError(f"sides must be multiples of {multiple}, got {tuple(images.shape[-2:])}")
        mean = torch.tensor(RGB_MEAN, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
        first = self.conv_first((images - mean) * self.config.img_range)
        x = first + self.conv_after_body(self._body(first, factors))
        x = self.conv_before_upsample(x)
        for name in self.stages:
            x = F.leaky_relu(self.get_submodule(name)(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
        x = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
        return x / self.config.img_range + mean

    def _body(self, x: Tensor, factors: Tensor | None) -> Tensor:
        tokens = self.patch_embed.norm(x.permute(0, 2, 3, 1))
        begin = 0
        for group in self.layers:
            assert isinstance(group, Group)
            end = begin + len(group.residual_group.blocks)
            part = None if factors is None else factors[begin:end]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(group, tokens, part, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = group(tokens, part)
            begin = end
        return self.norm(tokens).permute(0, 3, 1, 2)


def build_swinir(config: SwinIRConfig, seed: int = 0, gradient_checkpointing: bool = False) -> SwinIR:
    """A new network whose start weights depend on the seed only."""
    with seeded_init(seed, "swinir"):
        return SwinIR(config, gradient_checkpointing)


def drop_path(rate: float, depth: int, uniform: Callable[[str], Tensor]) -> Tensor | None:
    """Factors of the branches in a training step (stochastic depth, Huang et al. 2016), float32 [depth, 2, B].

    Args:
        rate: of the last block; it rises from 0 at the first block in equal steps. Released: 0.1.
        depth: number of blocks.
        uniform: name -> [B] in [0, 1), as Noise.uniform.

    Returns:
        0 for a dropped branch, 1 / (1 - its rate) for others; None for rate 0.

    Raises:
        ValueError: rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path must be in [0, 1), got {rate}")
    if rate == 0:
        return None
    rows = []
    for block in range(depth):
        share = rate * block / max(1, depth - 1)
        draws = torch.stack([uniform(f"drop_path {block} {branch}") for branch in ("attention", "mlp")])
        rows.append((draws >= share).to(torch.float32) / (1 - share))
    return torch.stack(rows)
