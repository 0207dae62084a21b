"""Recipe of SUPIR's training stages. Torch-free, so that listing recipes is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from components.recipes import ADDED_LATER, Recipe, RecipeError
from components.systems.supir.config import adaptor_config
from components.systems.supir.options import check_options
from components.systems.system import Stage, check_stage_keys

Anchor = Literal["reconstruction", "hq", "printed"]
EncoderLoss = Literal["mse", "log_mse"]
"""As in objectives/robust_encoding.py, which needs torch."""

STAGES = (
    Stage(name="encoder", version=1, continues=("encoder", "adaptor"), keys=("anchor", "keep", "loss")),
    Stage(
        name="adaptor",
        version=1,
        follows="encoder",
        continues=("adaptor",),
        keys=(
            "adaptor",
            "text_dropout",
            "max_clean_weight",
            "noise_offset",
            "timestep_importance",
            "gradient_checkpointing",
            "frozen_precision",
        ),
        precomputed=("latents", "embeddings"),
    ),
)
"""The training stages in order. The encoder's loss needs pictures of both sides, so it takes no columns."""


@dataclass(kw_only=True)
class SupirRecipe(Recipe):
    """SUPIR's two stages: the degradation-robust encoder, and the adaptor of the frozen prior.

    Attributes:
        anchor: encoder: the target of its loss, see objectives/robust_encoding.py; "printed" is the paper's.
        keep: encoder: weight of keeping good pictures; 0 with anchor printed.
        loss: encoder: "mse", or "log_mse", which weighs all pictures alike, in decibels.
        adaptor: adaptor: sizes, see config.AdaptorConfig, e.g. `adaptor.transformer_depth`.
        text_dropout: adaptor: probability of an empty prompt.
        max_clean_weight, noise_offset, timestep_importance: adaptor: see objectives.diffusion; 1, 0 and 0 are the plain
            loss.
        gradient_checkpointing: adaptor: compute activations again in the backward pass: less memory, more compute.
        frozen_precision: adaptor: precision of the frozen prior's weights, in which it also computes.
        restore_options: default options of the trained model's restorer, see options.Options.
    """

    anchor: Anchor = "reconstruction"
    keep: float = 1.0
    loss: EncoderLoss = field(default="mse", metadata=ADDED_LATER)
    adaptor: dict[str, Any] = field(default_factory=dict)
    text_dropout: float = 0.0
    max_clean_weight: float = 1.0
    noise_offset: float = 0.0
    timestep_importance: float = 0.0
    gradient_checkpointing: bool = False
    frozen_precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    restore_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor not in get_args(Anchor):
            raise RecipeError(f"anchor must be one of {', '.join(get_args(Anchor))}, got {self.anchor!r}")
        if self.loss not in get_args(EncoderLoss):
            raise RecipeError(f"loss must be one of {', '.join(get_args(EncoderLoss))}, got {self.loss!r}")
        if self.keep < 0:
            raise RecipeError(f"keep must be at least 0, got {self.keep}")
        if self.stage == "encoder" and self.anchor == "printed" and self.keep:
            raise RecipeError("keep pulls to an anchor, and anchor printed has none: give keep=0 too")
        if not 0 <= self.text_dropout <= 1:
            raise RecipeError(f"text_dropout must be in [0, 1], got {self.text_dropout}")
        if self.max_clean_weight < 1:
            raise RecipeError(f"max_clean_weight must be at least 1, got {self.max_clean_weight}")
        if not 0 <= self.timestep_importance < 1:
            raise RecipeError(f"timestep_importance must be in [0, 1), got {self.timestep_importance}")
        for name, check in (("adaptor", adaptor_config), ("restore_options", check_options)):
            try:
                check(getattr(self, name))
            except ValueError as error:
                raise RecipeError(f"{name}: {error}") from error
        check_stage_keys(self, STAGES)
