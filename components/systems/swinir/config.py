"""Sizes of a SwinIR. Torch-free: recipes and option checks need them early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean of DIV2K, as in the authors' code: subtracted before the network and added after it."""


@dataclass(frozen=True, kw_only=True)
class SwinIRConfig:
    """Sizes of the network; the defaults are those of the published files (15,792,587 parameters).

    Attributes:
        img_size: side of the feature grid that the stored masks fit; other grids work too.
        patch_size: 1 only: a token is a pixel of the feature grid.
        in_chans: colours.
        embed_dim: width of a token.
        depths: blocks of each group.
        num_heads: attention heads of each group's blocks.
        window_size: side of an attention window, tokens.
        mlp_ratio: inner width of a block's MLP over embed_dim.
        sf: factor of the upsampling part: 2, 4 or 8.
        img_range: factor on the picture inside the network.
        upsampler: "nearest+conv", the only published one.
        resi_connection: convolution at a group's end: "1conv", or "3conv" (three with a narrow one between).
        unshuffle: always true: without it the network would run at the picture's size.
        unshuffle_scale: the picture's side over the feature grid's.
        features: width of the upsampling part, which takes most of a small network's time; published 64.

    Raises:
        ValueError: invalid sizes; the message names them.
    """

    img_size: int = 64
    patch_size: int = 1
    in_chans: int = 3
    embed_dim: int = 180
    depths: Sequence[int] = field(default=(6,) * 8)
    num_heads: Sequence[int] = field(default=(6,) * 8)
    window_size: int = 8
    mlp_ratio: float = 2
    sf: int = 8
    img_range: float = 1.0
    upsampler: str = "nearest+conv"
    resi_connection: str = "1conv"
    unshuffle: bool = True
    unshuffle_scale: int = 8
    features: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "depths", tuple(self.depths))
        object.__setattr__(self, "num_heads", tuple(self.num_heads))
        if not self.depths or len(self.depths) != len(self.num_heads) or min(*self.depths, *self.num_heads) < 1:
            raise ValueError(f"depths and num_heads need one number of at least 1 for each group: {self}")
        if min(self.img_size, self.embed_dim, self.window_size, self.unshuffle_scale) < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                f"img_size, embed_dim, window_size, unshuffle_scale and mlp_ratio must be positive: {self}"
            )
        wrong = [heads for heads in self.num_heads if self.embed_dim % heads]
        if wrong:
            raise ValueError(f"embed_dim {self.embed_dim} cannot be split into {wrong[0]} heads")
        if self.sf not in (2, 4, 8):
            raise ValueError(f"sf must be 2, 4 or 8, got {self.sf}")
        if self.in_chans != len(RGB_MEAN) or self.patch_size != 1 or not self.unshuffle:
            raise ValueError("in_chans must be 3, patch_size 1 and unshuffle true: no other networks are supported")
        if self.upsampler != "nearest+conv" or self.resi_connection not in ("1conv", "3conv"):
            raise ValueError(f"unknown upsampler {self.upsampler!r} or resi_connection {self.resi_connection!r}")

    @property
    def multiple_px(self) -> int:
        """Picture sides must be multiples of this, so that the feature grid has whole windows."""
        return self.unshuffle_scale * self.attention_window

    @property
    def attention_window(self) -> int:
        """window_size, or the whole feature grid if that is smaller."""
        return min(self.window_size, self.img_size)

    @property
    def shift(self) -> int:
        """Shift of every other block's windows in tokens; 0 if one window covers the feature grid."""
        return 0 if self.img_size <= self.window_size else self.window_size // 2

    def to_dict(self) -> dict[str, Any]:
        """The config for model.json."""
        return {**asdict(self), "depths": list(self.depths), "num_heads": list(self.num_heads)}
