"""Recipe of InstaRevive's training. Torch-free, so that recipes list fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from components.objectives.distillation import Distillation
from components.priors.families import FAMILIES, family_of
from components.recipes import Gate, Recipe, RecipeError
from components.systems.instarevive.options import check_options
from components.systems.instarevive.settings import AlignStart


@dataclass(kw_only=True)
class InstaReviveRecipe(Recipe):
    """Distils a prior into a one-step restoration generator (arXiv 2504.00508); its only stage is "onestep".

    Attributes:
        family: of the prior, see priors.families.
        prior: of that family; "" for the family's own, see PriorFamily.default_prior.
        timestep, input, kernel: see network.OneStep; for timestep -1, a warm start's own time step, else the nearest.
        align_start: with input=noise, start weights of the aligning convolution, see network.aligning_conv.
        mask_as_bias: see network.EpsPredictor; null: as in the warm start's training, else false (the correct mask).
        warm_start: a model folder of InstaRevive with the generator's start weights, for tasks that start from another
            task's; "" for the prior's. Both scores always start from the prior's weights: a one-step generator is a
            poor score network (reference, section 5.1).
        coarse: model folder of the frozen coarse restorer (swinir or regressor) in front; "" for none.
        distillation: see Distillation.
        teacher: model folder of any restoration system; "" for none. Its prior replaces `prior` and `family` and starts
            generator and scores. The trained student must pass `gate` against the teacher.
        distil: the recipe needs a teacher.
        gate: see Gate.
        ip_adapter: weights of an IP-Adapter for the real score, which then takes the input picture too: a safetensors
            file, or owner/name/file on the hub; "" for none.
        picture_encoder: the adapter's CLIP: a folder, a hub id, or owner/name/folder.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more work.
        restore_options: default options of the trained model's restorer, see options.Options.
    """

    prior: str = ""
    family: str = "pixart"
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

    @property
    def loss_weights(self) -> Mapping[str, str]:
        return {"distillation.lpips": self.distillation.lpips} if self.distillation.lpips else {}

    @property
    def student_gate(self) -> Gate | None:
        """`gate` if there is a teacher, else None."""
        return self.gate if self.teacher else None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            family = family_of(self.family)
        except ValueError as error:
            raise RecipeError(f"family: {error}") from error
        self.prior = self.prior or family.default_prior
        family_known = not (self.teacher or self.distil)  # the family of a teacher is not known yet
        if self.timestep < -1 or self.kernel not in (1, 3):
            raise RecipeError(f"needs timestep >= -1 and kernel 1 or 3, got {self.timestep} and {self.kernel}")
        if self.align_start != "lq" and self.input != "noise":
            raise RecipeError(f"align_start={self.align_start} needs input=noise")
        if family_known and self.embeddings and not family.text.columns:
            raise RecipeError(f"precomputed embeddings have SDXL's shape: family {self.family} must embed its own")
        if bool(self.ip_adapter) != bool(self.picture_encoder):
            raise RecipeError("ip_adapter and picture_encoder go together: name both or neither")
        if self.ip_adapter and ((family_known and family.kind != "unet") or not self.distillation.score):
            unets = [other.name for other in FAMILIES.values() if other.kind == "unet"]
            names = f"{', '.join(unets[:-1])} or {unets[-1]}"
            raise RecipeError(f"an IP-Adapter needs a real score of a UNet: family {names}, and score true")
        if self.distillation.inpaint and self.degradation.preset != "strokes":
            raise RecipeError("distillation.inpaint needs masks of the missing pixels: set degradation.preset=strokes")
        if self.unpaired and self.teacher:
            raise RecipeError(
                "the gate compares a student with targets, and unpaired inputs have none: leave teacher or unpaired out"
            )
        if self.unpaired and self.distillation.regression != "none":
            raise RecipeError("unpaired inputs differ from the targets: set distillation.regression=none")
        try:
            check_options(self.restore_options)
        except ValueError as error:
            raise RecipeError(f"restore_options: {error}") from error
