"""Recipe of the coarse restorer. Torch-free, so that recipes list fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from components.recipes import Recipe, RecipeError
from components.systems.swinir.released import check_sizes


@dataclass(kw_only=True)
class SwinIRRecipe(Recipe):
    """Trains a SwinIR on pairs with the summed square error (DiffBIR, stage 1).

    Attributes:
        size: replaces fields of SwinIRConfig, e.g. `size.embed_dim`; empty: the published network.
        drop_path: probability of a dropped branch in the last block in training; released 0.1.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more work.
        warm_start: a model folder with start weights; its sizes replace `size`.
    """

    size: dict[str, Any] = field(default_factory=dict)
    drop_path: float = 0.1
    gradient_checkpointing: bool = False
    warm_start: str = ""

    @property
    def opens_prior(self) -> bool:
        """False: SwinIR has no prior."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_path < 1:
            raise RecipeError(f"drop_path must be in [0, 1), got {self.drop_path}")
        try:
            check_sizes(self.size)
        except ValueError as error:
            raise RecipeError(f"size: {error}") from error
