"""Sizes of a SwinIR. Torch-free: recipes and checks of options need them early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Taken out before and put back after: of DIV2K, as the authors have it."""


@dataclass(frozen=True, kw_only=True)
class SwinIRConfig:
    """Size of the network; the defaults are the published files' (15,792,587 parameters).

    Attributes:
        img_size: side of the feature grid that the stored masks are made for; any other grid works as well.
        patch_size: 1: a token is a pixel of the feature grid.
        in_chans: colours.
        embed_dim: width of a token.
        depths: blocks of each group.
        num_heads: attention heads of each group's blocks.
        window_size: side of an attention window, tokens.
        mlp_ratio: inner width of a block's MLP over embed_dim.
        sf: factor of the upsampling part: 2, 4 or 8.
        img_range: the picture is multiplied by it inside.
        upsampler: "nearest+conv", the only one published.
        resi_connection: convolution at a group's end: "1conv", or "3conv" (a thinner one of three).
        unshuffle: always true: without it the network would run at the picture's size.
        unshuffle_scale: the picture's side over the feature grid's.
        features: width of the upsampling part, which costs most of a small network's time; 64 where it is published.

    Raises:
        ValueError: sizes that make no network; says which.
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
            raise ValueError("only networks on RGB pictures with pixel unshuffle and patches of one are known here")
        if self.upsampler != "nearest+conv" or self.resi_connection not in ("1conv", "3conv"):
            raise ValueError(f"unknown upsampler {self.upsampler!r} or resi_connection {self.resi_connection!r}")

    @property
    def multiple_px(self) -> int:
        """Sides of a picture must be multiples of this: whole windows of the feature grid."""
        return self.unshuffle_scale * self.attention_window

    @property
    def attention_window(self) -> int:
        """window_size, or the whole feature grid where that is smaller."""
        return min(self.window_size, self.img_size)

    @property
    def shift(self) -> int:
        """Tokens by which every other block's windows are moved; 0 where one window covers the feature grid."""
        return 0 if self.img_size <= self.window_size else self.window_size // 2

    def to_dict(self) -> dict[str, Any]:
        """As model.json keeps it."""
        return {**asdict(self), "depths": list(self.depths), "num_heads": list(self.num_heads)}
