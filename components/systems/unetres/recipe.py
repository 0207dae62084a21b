"""Recipe of the networks' training. Torch-free, so that recipes list fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from components.objectives.distillation import Distillation
from components.recipes import Recipe, RecipeError
from components.systems.system import Stage, check_stage_keys
from components.systems.unetres.config import config_from
from components.systems.unetres.options import check_options

RegressionLoss = Literal["charbonnier", "log_mse"]
GeneratorStart = Literal["regression", "new"]

STAGES = (
    Stage(
        name="regression",
        version=1,
        continues=("regression", "generator"),
        keys=("loss", "charbonnier_eps", "log_mse_eps"),
    ),
    Stage(name="denoiser", version=1, follows="regression"),
    Stage(
        name="generator",
        version=1,
        follows="denoiser",
        continues=("generator",),
        keys=("distillation", "features", "generator_start"),
        warm_starts_beside=True,
    ),
)


@dataclass(kw_only=True)
class Features:
    """A distance of the real score's features, part of the generator's regression; ours, after Lin and Yang 2023.

    It asks for detail as a perceptual loss does, with a network that the project trains on its own pictures.

    Attributes:
        weight: 0 leaves it out.
        t_low, t_high: range of the time steps whose noise both pictures get, both included.
    """

    weight: float = 0.0
    t_low: int = 0
    t_high: int = 400

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 <= self.t_low <= self.t_high <= 999:
            raise RecipeError(f"features need weight >= 0 and 0 <= t_low <= t_high <= 999: {self}")


def picture_distillation() -> Distillation:
    """Defaults of a distillation on pictures: there are no texts, so no guidance."""
    return Distillation(cfg_scale=1.0, prompt=False, text_dropout=0.0)


@dataclass(kw_only=True)
class UNetResRecipe(Recipe):
    """Trains the networks of a UNetRes on pictures.

    Stage regression restores, stage denoiser learns the score of sharp pictures, and stage generator adds detail by
    score matching (InstaRevive's way).

    Attributes:
        size: replaces fields of UNetResConfig for the stage's own network, e.g. `size.widths`.
        loss: of the regression. "charbonnier" (Charbonnier et al. 1994) weighs all pixels alike; "log_mse" weighs all
            pictures alike, in decibels.
        charbonnier_eps: where that loss turns from square to absolute, in units of a picture in [0, 1].
        log_mse_eps: a mean square error of a picture in [0, 1] below which it hardly counts (1e-5 is 50 dB).
        distillation: of the generator; see Distillation.
        features: of the generator; see Features.
        generator_start: "regression" gives a new generator the weights of the regression, except for its last layer,
            which is zero; "new" gives it random ones.
        warm_start: a model folder with start weights; its sizes replace `size`. A generator's may also be given beside
            the denoiser's model.
        restore_options: default options of the trained model's restorer, see options.Options.
    """

    size: dict[str, Any] = field(default_factory=dict)
    loss: RegressionLoss = "charbonnier"
    charbonnier_eps: float = 1e-3
    log_mse_eps: float = 1e-5
    distillation: Distillation = field(default_factory=picture_distillation)
    features: Features = field(default_factory=Features)
    generator_start: GeneratorStart = "regression"
    warm_start: str = ""
    restore_options: dict[str, Any] = field(default_factory=dict)

    @property
    def opens_prior(self) -> bool:
        """False: the networks learn from pictures alone."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (("loss", get_args(RegressionLoss)), ("generator_start", get_args(GeneratorStart))):
            if getattr(self, name) not in values:
                raise RecipeError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        for name in ("charbonnier_eps", "log_mse_eps"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} must be positive, got {getattr(self, name)}")
        distillation = self.distillation
        if distillation.cfg_scale != 1 or distillation.prompt or distillation.lpips or distillation.inpaint:
            raise RecipeError("a distillation on pictures has no texts, LPIPS or masks: leave these settings out")
        if distillation.fake != "full" or distillation.regression == "none":
            raise RecipeError("distillation needs fake=full and a regression")
        for name, check in (("size", config_from), ("restore_options", check_options)):
            try:
                check(getattr(self, name))
            except ValueError as error:
                raise RecipeError(f"{name}: {error}") from error
        if distillation.window > self.resolution:
            raise RecipeError(f"distillation.window is {distillation.window}, above resolution {self.resolution}")
        if self.features.weight and not distillation.score:
            raise RecipeError("features are those of the real score: leave distillation.score on")
        check_stage_keys(self, STAGES)
