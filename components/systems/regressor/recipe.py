"""Recipe of a regressor's fine-tuning. Torch-free, so that recipes list fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from components.recipes import Gate, Recipe, RecipeError
from components.systems.regressor.options import check_options
from components.systems.system import Stage

RegressionLoss = Literal["charbonnier", "log_mse", "l2"]

STAGES = (Stage(name="finetune", version=1, continues=("finetune",)),)


@dataclass(kw_only=True)
class RegressorRecipe(Recipe):
    """Trains an imported network further on pictures, with a distance of pixels.

    Attributes:
        loss: see components.objectives.regression; "charbonnier" weighs all pixels alike, "log_mse" all pictures alike
            in decibels, "l2" is the mean square error.
        charbonnier_eps: where that loss turns from square to absolute, in units of a picture in [0, 1].
        log_mse_eps: a mean square error of a picture in [0, 1] below which it hardly counts.
        warm_start: a model folder of a regressor, with the start weights.
        teacher: a model folder of a regressor whose result is a second target; "" for none. The trained model must then
            pass the gate.
        teacher_weight: share of the distance to the teacher's result in the loss.
        gate: how much worse than its teacher the trained model may be.
        restore_options: default options of the trained model's restorer, see options.Options.
    """

    loss: RegressionLoss = "charbonnier"
    charbonnier_eps: float = 1e-3
    log_mse_eps: float = 1e-5
    warm_start: str = ""
    teacher: str = ""
    teacher_weight: float = 0.5
    gate: Gate = field(default_factory=Gate)
    restore_options: dict[str, Any] = field(default_factory=dict)

    @property
    def opens_prior(self) -> bool:
        """False: the networks learn from pictures alone."""
        return False

    @property
    def student_gate(self) -> Gate | None:
        """`gate` if there is a teacher, else None."""
        return self.gate if self.teacher else None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in get_args(RegressionLoss):
            raise RecipeError(f"loss must be one of {', '.join(get_args(RegressionLoss))}, got {self.loss!r}")
        for name in ("charbonnier_eps", "log_mse_eps"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.teacher_weight <= 1:
            raise RecipeError(f"teacher_weight must be between 0 and 1, got {self.teacher_weight}")
        if self.unpaired:
            raise RecipeError("unpaired inputs differ from the targets, and a distance of pixels needs pairs")
        try:
            check_options(self.restore_options)
        except ValueError as error:
            raise RecipeError(f"restore_options: {error}") from error
