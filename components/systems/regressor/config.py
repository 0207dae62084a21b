"""Facts about a network that restoring needs. Torch-free: model.json holds them, and option checks read them early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

GRAY, RGB = 1, 3


@dataclass(frozen=True, kw_only=True)
class RegressorConfig:
    """Facts about a network.

    Attributes:
        architecture: spandrel's name of it.
        tags: what spandrel reads from the shapes, for people.
        factor: the result's side over the network's input's side.
        colours: channels of its pictures, 3 or 1.
        multiple_px: sides of its pictures are multiples of this, and tiles start at multiples of it: the architecture's
            own rule and its attention windows together.
        minimum_px: least side of its pictures; a multiple too.
        square: whether its pictures must be square.
        precisions: in which its authors or spandrel run it.
        context_px: pixels around a tile that the network needs, measured at the import; see reach.measure_reach.
        tile_levels: largest difference of a tile from the whole picture with that context, in 8-bit levels, measured at
            the import. Above 0.5 no context suffices: the network looks at the whole picture.

    Raises:
        ValueError: invalid numbers; the message names them.
    """

    architecture: str
    tags: Sequence[str] = ()
    factor: int = 1
    colours: int = RGB
    multiple_px: int = 1
    minimum_px: int = 1
    square: bool = False
    precisions: Sequence[str] = ("fp32",)
    context_px: int = 0
    tile_levels: float = 0.0

    def __post_init__(self) -> None:
        for name in ("tags", "precisions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = (self.factor, self.multiple_px, self.minimum_px)
        if min(numbers) < 1 or self.context_px < 0 or self.colours not in (GRAY, RGB) or self.minimum_px % numbers[1]:
            raise ValueError(f"invalid sizes of a network: {self}")

    @property
    def tiles_are_exact(self) -> bool:
        """Whether a picture in tiles equals the whole one up to rounding."""
        return self.tile_levels <= EXACT_LEVELS

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


EXACT_LEVELS = 0.5
"""A difference below it moves a rounded 8-bit value by one level at most; ours."""


def config_from(document: Mapping[str, Any]) -> RegressorConfig:
    """The config in a model.json; ValueError if it does not have these fields."""
    names = {item.name for item in fields(RegressorConfig)}
    wrong = sorted(set(document) ^ names)
    if wrong:
        raise ValueError(f"its config has other fields than a regressor's: {', '.join(wrong)}")
    return RegressorConfig(**document)
