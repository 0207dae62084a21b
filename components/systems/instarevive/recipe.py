"""Recipe of InstaRevive's training. Torch-free, so that recipes list fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from components.recipes import Recipe, RecipeError
from components.systems.instarevive.options import check_options
from components.systems.instarevive.settings import PRIORS, AlignStart, Distillation, Family, Gate


@dataclass(kw_only=True)
class InstaReviveRecipe(Recipe):
    """Distils a prior into a restoring generator of one step (arXiv 2504.00508); its one stage is "onestep".

    Attributes:
        family: shape of the prior's network, see settings.Family.
        prior: of that shape; "" for the family's own, see settings.PRIORS.
        timestep, input, kernel: see network.OneStep; a start's own time step goes before the nearest one (-1).
        align_start: with input=noise, what the generator begins with, see network.aligning_conv.
        mask_as_bias: see network.EpsPredictor; null: what the start was trained with, else the correct mask.
        warm_start: a model folder of InstaRevive whose generator goes on, for tasks that start from another task's
            weights; "" starts from the prior's own. Both scores start from the prior's in any case: a generator of one
            step is a poor score network (reference, section 5.1).
        coarse: model folder of the frozen coarse restorer (swinir) in front; "" for none.
        distillation: see Distillation.
        teacher: model folder of any restoring system: its prior (whose network starts generator and scores) stands
            in the place of `prior` and `family`, and the trained student must pass `gate` against it; "" for none.
        distil: there must be a teacher.
        gate: see Gate.
        ip_adapter: weights of an IP-Adapter on the real score, which is then told the input picture: a safetensors
            file, or owner/name/file on the hub; "" for none.
        picture_encoder: the CLIP that goes with it: a folder, a hub id, or owner/name/folder.
        gradient_checkpointing: activations are computed again instead of kept: less memory, a third more work.
        restore_options: options that the trained model restores with, see options.Options.
    """

    prior: str = ""
    family: Family = "pixart"
    timestep: int = -1
    input: Literal["lq", "noise"] = "lq"
    kernel: int = 1
    align_start: AlignStart = "lq"
    mask_as_bias: bool | None = None
    warm_start: str = ""
    coarse: str = ""
    distillation: Distillation = field(default_factory=Distillation)
    teacher: str = ""
    distil: bool = False
    gate: Gate = field(default_factory=Gate)
    ip_adapter: str = ""
    picture_encoder: str = ""
    gradient_checkpointing: bool = False
    restore_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prior = self.prior or PRIORS[self.family]
        own = not (self.teacher or self.distil)  # a teacher's family is known when it is opened
        if self.timestep < -1 or self.kernel not in (1, 3):
            raise RecipeError(f"needs timestep >= -1 and kernel 1 or 3, got {self.timestep} and {self.kernel}")
        if self.align_start != "lq" and self.input != "noise":
            raise RecipeError(f"align_start={self.align_start} is for input=noise: without it there is no noise")
        if own and self.embeddings and self.family in ("pixart", "sd"):
            raise RecipeError(f"precomputed embeddings are those of SDXL's shape: family {self.family} embeds its own")
        if bool(self.ip_adapter) != bool(self.picture_encoder):
            raise RecipeError("ip_adapter and picture_encoder go together: name both or neither")
        if self.ip_adapter and ((own and self.family == "pixart") or not self.distillation.score):
            raise RecipeError("an IP-Adapter sits on the real score of a UNet: family sdxl, sd or nano, and score true")
        if self.distillation.inpaint and self.degradation.preset != "strokes":
            raise RecipeError("distillation.inpaint needs masks of what is missing: degradation.preset=strokes")
        if self.unpaired and self.teacher:
            raise RecipeError(
                "a student is judged by targets, and unpaired inputs have none: leave teacher or unpaired out"
            )
        if self.unpaired and self.distillation.regression != "none":
            raise RecipeError("unpaired inputs show other things than the targets: distillation.regression=none")
        try:
            check_options(self.restore_options)
        except ValueError as error:
            raise RecipeError(f"restore_options: {error}") from error
