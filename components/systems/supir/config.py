"""Sizes of SUPIR's adaptor. Torch-free: recipes and option checks need them early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Connector = Literal["zero_sft", "zero_conv"]
HIDDEN = 128
"""Width of a ZeroSFT's hidden layer, at every level (supir.md, section 1.3)."""
HEAD_DIM = 64
"""Width of a head of the cross-attention connectors; narrower features have one head."""


@dataclass(frozen=True, kw_only=True)
class AdaptorConfig:
    """Sizes of the adaptor; the rest follows from the prior's UNet.

    Attributes:
        transformer_depth: transformer blocks of each level's attentions, coarse levels last; the middle block has the
            last number. Empty for the prior's own depths, as released ([1, 2, 10] on SDXL: 1,298 million parameters
            with the connectors). [1, 1, 4] (653 million) fits the paper's "more than 600 million", and [1, 1, 5] has
            exactly half of the blocks.
        connector: "zero_sft", or "zero_conv": the plain zero convolution of the paper's Table 2c.
        cross_attention: whether the decoder also attends to the control features before each upsampler, as released;
            the paper has no such connector.

    Raises:
        ValueError: an unknown connector, or a depth below 1.
    """

    transformer_depth: Sequence[int] = ()
    connector: Connector = "zero_sft"
    cross_attention: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "transformer_depth", tuple(self.transformer_depth))
        if self.connector not in get_args(Connector):
            raise ValueError(f"connector must be one of {', '.join(get_args(Connector))}, got {self.connector!r}")
        if any(not isinstance(depth, int) or depth < 1 for depth in self.transformer_depth):
            raise ValueError(f"transformer_depth must hold numbers from 1, got {list(self.transformer_depth)}")

    def to_dict(self) -> dict[str, Any]:
        """For model.json."""
        return {**asdict(self), "transformer_depth": list(self.transformer_depth)}


def adaptor_config(values: Mapping[str, Any]) -> AdaptorConfig:
    """Sizes by name.

    Raises:
        ValueError: an unknown name, or see AdaptorConfig.
    """
    names = {field.name for field in fields(AdaptorConfig)}
    if unknown := sorted(set(values) - names):
        raise ValueError(f"unknown adaptor settings {unknown}; there are {sorted(names)}")
    return AdaptorConfig(**values)
