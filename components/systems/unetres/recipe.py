"""Recipe of the networks' training. Torch-free, so that recipes list fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from components.recipes import Recipe, RecipeError
from components.systems.unetres.config import config_from
from components.systems.unetres.options import check_options


@dataclass(kw_only=True)
class UNetResRecipe(Recipe):
    """Trains a UNetRes on pairs. Stage regression: Charbonnier loss (Charbonnier et al. 1994).

    Attributes:
        size: replaces fields of UNetResConfig, e.g. `size.widths`; empty: the default network.
        charbonnier_eps: where the loss turns from square to absolute, in units of a picture in [0, 1].
        warm_start: a model folder with start weights; its sizes replace `size`.
        restore_options: default options of the trained model's restorer, see options.Options.
    """

    size: dict[str, Any] = field(default_factory=dict)
    charbonnier_eps: float = 1e-3
    warm_start: str = ""
    restore_options: dict[str, Any] = field(default_factory=dict)

    @property
    def opens_prior(self) -> bool:
        """False: the networks learn from pictures alone."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.charbonnier_eps <= 0:
            raise RecipeError(f"charbonnier_eps must be positive, got {self.charbonnier_eps}")
        for name, check in (("size", config_from), ("restore_options", check_options)):
            try:
                check(getattr(self, name))
            except ValueError as error:
                raise RecipeError(f"{name}: {error}") from error
