"""Sizes of the networks. Torch-free: recipes and option checks need them early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from components.naming import did_you_mean


@dataclass(frozen=True, kw_only=True)
class UNetResConfig:
    """Sizes of a network; all defaults are ours (4.05 million parameters for the regression).

    Attributes:
        widths: channels of each level; the grid halves from level to level.
        blocks: residual blocks on the way down, at the bottom and on the way up: 2 len(widths) - 1 numbers.
        factor: the picture's side over the side of the first level's grid (pixel unshuffle).

    Raises:
        ValueError: invalid sizes; the message names them.
    """

    widths: Sequence[int] = (48, 96, 192)
    blocks: Sequence[int] = (2, 3, 4, 3, 2)
    factor: int = 4

    def __post_init__(self) -> None:
        for name in ("widths", "blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = [self.factor, *self.widths, *self.blocks]
        if not self.widths or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers):
            raise ValueError(f"widths, blocks and factor must be positive whole numbers: {self}")
        if len(self.blocks) != 2 * len(self.widths) - 1:
            raise ValueError(f"{len(self.widths)} widths need {2 * len(self.widths) - 1} numbers of blocks: {self}")

    @property
    def multiple_px(self) -> int:
        """Picture sides must be multiples of this."""
        return self.factor * 2 ** (len(self.widths) - 1)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def config_from(sizes: Mapping[str, Any]) -> UNetResConfig:
    """A config from some of its fields.

    Raises:
        ValueError: an unknown name (with the nearest one), a wrong type, or invalid sizes.
    """
    names = tuple(UNetResConfig.__dataclass_fields__)
    for name, value in sizes.items():
        if name not in names:
            raise ValueError(f"unknown size {name!r}. {did_you_mean(name, names)}")
        if (name == "factor") != isinstance(value, int):
            raise ValueError(f"{name} must be {'a whole number' if name == 'factor' else 'a list'}, got {value!r:.80}")
    return UNetResConfig(**sizes)
