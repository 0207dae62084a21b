"""UNetRes: a U-Net of plain residual blocks on a grid with a fourth of the picture's side.

    pictures -> pixel unshuffle -> conv -> levels of residual blocks, halved and doubled -> conv -> pixel shuffle, +

The block structure is that of DRUNet (Zhang et al. 2021, "Plug-and-play image restoration with deep denoiser prior",
section 3.2): no normalisation, 2x2 strided convolutions between the levels, and skip connections that add. The pixel
unshuffle is ours: it makes a CPU ten times as fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.randomness import seeded_init
from components.systems.unetres.config import UNetResConfig

COLOURS = 3


class Block(nn.Module):
    """x + conv(relu(conv(x))) with 3x3 kernels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        with torch.no_grad():
            self.conv2.weight.mul_(0.1)  # ours: a deep stack then starts near the identity

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class UNetRes(nn.Module):
    """Pictures -> a change of the first of them, which starts at zero.

    Args:
        config: sizes.
        pictures: number of pictures that go in side by side; the first one is changed.
        level: a number for each sample goes in too, as a constant map (DRUNet's noise level map).
    """

    def __init__(self, config: UNetResConfig, pictures: int = 1, level: bool = False) -> None:
        super().__init__()
        self.config, self.pictures, self.level = config, pictures, level
        patch, widths, levels = COLOURS * config.factor**2, config.widths, len(config.widths)
        self.head = nn.Conv2d(pictures * patch + level, widths[0], 3, padding=1)
        self.down = nn.ModuleList(_blocks(widths[i], config.blocks[i]) for i in range(levels - 1))
        self.shrink = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], 2, stride=2) for i in range(levels - 1))
        self.bottom = _blocks(widths[-1], config.blocks[levels - 1])
        self.enlarge = nn.ModuleList(
            nn.ConvTranspose2d(widths[i + 1], widths[i], 2, stride=2) for i in range(levels - 1)
        )
        self.up = nn.ModuleList(_blocks(widths[i], config.blocks[-1 - i]) for i in range(levels - 1))
        self.tail = nn.Conv2d(widths[0], patch, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, *others: Tensor) -> Tensor:
        """The first pictures plus their change, [B, 3, H, W], not clipped, in their dtype; arguments as in `change`."""
        return images + self.change(images, *others).to(images.dtype)

    def change(self, images: Tensor, *others: Tensor, level: Tensor | None = None) -> Tensor:
        """The change [B, 3, H, W] of pictures.

        Args:
            images: [B, 3, H, W] in [-1, 1]; sides are multiples of config.multiple_px.
            others: more pictures of that shape; with the first, `pictures` of them.
            level: [B], if the network takes one.

        Raises:
            ValueError: other sides, another number of pictures, or a level where none belongs.
        """
        first = self._grid(images, *others, level=level)
        x, skips = self._down(first)
        for grid in reversed(range(len(skips))):
            x = self.up[grid](self.enlarge[grid](x) + skips[grid])
        return F.pixel_shuffle(self.tail(x + first), self.config.factor)

    def features(self, images: Tensor, *others: Tensor, level: Tensor | None = None) -> list[Tensor]:
        """What each level has computed on the way down, [B, C, h, w], the finest first; arguments as in `change`."""
        bottom, skips = self._down(self._grid(images, *others, level=level))
        return [*skips, bottom]

    def _grid(self, images: Tensor, *others: Tensor, level: Tensor | None) -> Tensor:
        """The inputs on the first level's grid, after the first convolution."""
        multiple = self.config.multiple_px
        if images.shape[-1] % multiple or images.shape[-2] % multiple:
            raise ValueError(f"sides must be multiples of {multiple}, got {tuple(images.shape[-2:])}")
        if len(others) + 1 != self.pictures:
            raise ValueError(f"the network takes {self.pictures} pictures, got {len(others) + 1}")
        if self.level != (level is not None):
            raise ValueError(f"the network takes {'a' if self.level else 'no'} level")
        x = F.pixel_unshuffle(torch.cat([images, *others], dim=1), self.config.factor)
        if level is not None:
            x = torch.cat([x, level.to(x).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[-2:])], dim=1)
        # half the time of the default order on a CPU
        return self.head(x.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]

    def _down(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The lowest level's result and those of the levels above, the finest first."""
        skips = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            x = blocks(x)
            skips.append(x)
            x = shrink(x)
        return self.bottom(x), skips


def _blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(count)))


def build_unetres(config: UNetResConfig, seed: int, name: str, pictures: int = 1, level: bool = False) -> UNetRes:
    """A new network whose start weights depend on (seed, name) only."""
    with seeded_init(seed, name):
        network = UNetRes(config, pictures, level)
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
