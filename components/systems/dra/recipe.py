"""Recipe of DRA's training. Torch-free, so that listing recipes is fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from components.priors.families import family_of
from components.recipes import Recipe, RecipeError
from components.systems.dra.config import Shape, adapter_config, check_adapter_shape, lora_config, shape_of
from components.systems.dra.options import check_options, restore_defaults
from components.systems.system import Stage, check_stage_keys

STAGES = (Stage(name="adapters", version=1, continues=("adapters",), precomputed=("latents", "embeddings")),)
"""The only stage: restoration and diffusion adapters train together (section 3.2)."""


_FOREIGN: Mapping[Shape, Mapping[str, float]] = {
    "maps": {"time_mean": 0.0, "time_deviation": 1.0, "time_shift": 1.0},
    "tokens": {"max_clean_weight": 1.0, "noise_offset": 0.0, "timestep_importance": 0.0},
}
"""Settings of the other shape's loss, with their defaults."""


@dataclass(kw_only=True)
class DraRecipe(Recipe):
    """Restoration and diffusion adapters of a frozen prior.

    Attributes:
        family: of the prior, see priors.families; its record says what the adapters act on and what the loss is.
        prior: of that family; "" for the family's own, see PriorFamily.default_prior.
        encoder: model folder with the robust encoder of the same prior (SUPIR's stage 1); "" for the prior's own
            encoder. Its weights become a part of the trained model.
        adapters: form of the restoration adapters, see config.AdapterConfig, e.g. `adapters.block`.
        lora: size of the diffusion adapters, see config.LoraConfig, e.g. `lora.rank`.
        null_share: probability of the null text.
        lq_share: probability of LQ as the target, with the words for its degradation as the prompt.
        max_clean_weight, noise_offset, timestep_importance: of a noise-predicting prior, see objectives.diffusion; 1, 0
            and 0 are the plain loss.
        time_mean, time_deviation, time_shift: of a prior trained by flow matching, see logit_normal_times.
        gradient_checkpointing: compute activations again in the backward pass: less memory, more compute.
        frozen_precision: precision of the frozen prior's weights, in which it also computes.
        restore_options: default options of the trained model's restorer, see options.Options.
    """

    prior: str = ""
    family: str = "sdxl"
    encoder: str = ""
    adapters: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    null_share: float = 0.15
    lq_share: float = 0.1
    max_clean_weight: float = 1.0
    noise_offset: float = 0.0
    timestep_importance: float = 0.0
    time_mean: float = 0.0
    time_deviation: float = 1.0
    time_shift: float = 1.0
    gradient_checkpointing: bool = False
    frozen_precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    restore_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            family = family_of(self.family)
            shape = shape_of(family)
        except ValueError as error:
            raise RecipeError(f"family: {error}") from error
        self.prior = self.prior or family.default_prior
        if self.embeddings and not family.text.columns:
            raise RecipeError(f"precomputed embeddings have SDXL's shape: family {self.family} must embed its own")
        if changed := [name for name, plain in _FOREIGN[shape].items() if getattr(self, name) != plain]:
            raise RecipeError(f"{', '.join(changed)}: not a setting of the loss of family {self.family}")
        if self.time_deviation <= 0 or self.time_shift <= 0:
            raise RecipeError(
                f"time_deviation and time_shift must be above 0, got {self.time_deviation} and {self.time_shift}"
            )
        if min(self.null_share, self.lq_share) < 0 or self.null_share + self.lq_share > 1 + 1e-6:
            raise RecipeError(
                "null_share and lq_share must be at least 0 and sum to at most 1, "
                f"got {self.null_share} and {self.lq_share}"
            )
        if self.max_clean_weight < 1:
            raise RecipeError(f"max_clean_weight must be at least 1, got {self.max_clean_weight}")
        if not 0 <= self.timestep_importance < 1:
            raise RecipeError(f"timestep_importance must be in [0, 1), got {self.timestep_importance}")
        defaults = restore_defaults({"family": self.family})
        checks: dict[str, Callable[[dict[str, Any]], Any]] = {
            "adapters": lambda values: check_adapter_shape(adapter_config(values), shape),
            "lora": lora_config,
            "restore_options": lambda values: check_options(values, defaults),
        }
        for name, check in checks.items():
            try:
                check(getattr(self, name))
            except ValueError as error:
                raise RecipeError(f"{name}: {error}") from error
        check_stage_keys(self, STAGES)
