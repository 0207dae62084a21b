"""Recipe of InstantIR's training stages. Torch-free, so that listing recipes is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from components.recipes import Recipe, RecipeError
from components.systems.system import Stage, check_stage_keys

WEIGHTING = ("max_clean_weight", "noise_offset", "timestep_importance")

STAGES = (
    Stage(
        name="dcp",
        version=2,
        continues=("dcp", "previewer", "aggregator"),
        keys=(
            "resampler_dim",
            "resampler_depth",
            "resampler_head_dim",
            "resampler_heads",
            "resampler_queries",
            "time_modulation",
            *WEIGHTING,
        ),
        precomputed=("latents", "embeddings"),
    ),
    Stage(
        name="previewer",
        version=2,
        follows="dcp",
        continues=("previewer", "aggregator"),
        keys=("lora_rank", "lora_alpha", "distance", "huber_c", "teacher_cfg_scale", "teacher_timesteps"),
        precomputed=("latents", "embeddings"),
    ),
    Stage(
        name="aggregator",
        version=2,
        follows="previewer",
        continues=("aggregator",),
        keys=("reference", "reference_noise", "preview_cfg_scale", "compile", "frozen_precision", *WEIGHTING),
        precomputed=("latents", "embeddings"),
    ),
)
"""The training stages in order."""

AT_LEAST_ONE = (
    "resampler_dim",
    "resampler_depth",
    "resampler_head_dim",
    "resampler_heads",
    "resampler_queries",
    "lora_rank",
    "teacher_timesteps",
    "steps_at_restore",
)


@dataclass(kw_only=True)
class InstantIRRecipe(Recipe):
    """InstantIR's three stages: dcp (perceptor), previewer, aggregator. Defaults are the paper's (arXiv 2410.06551).

    Attributes:
        resampler_dim, resampler_depth, resampler_head_dim, resampler_heads, resampler_queries: size of the Resampler.
        lora_rank, lora_alpha: rank and alpha of the Previewer's LoRA.
        image_dropout, text_dropout, both_dropout: probabilities of dropping the picture, the prompt, or both; one draw
            decides.
        max_clean_weight: dcp and aggregator: largest weight of a time step's loss, see objectives.diffusion; 1 is
            the paper's plain loss.
        noise_offset: dcp and aggregator: see objectives.diffusion.offset_noise; 0 as in the paper.
        distance: distance of the Previewer's consistency loss: Eq. 5's squared L2, or the released Huber.
        huber_c: constant of the Huber distance.
        teacher_cfg_scale: range of the guided teacher step's scale; empty for no guidance.
        teacher_timesteps: points of the teacher's DDIM grid.
        timestep_importance: dcp and aggregator: a in the loss weights 1 - a cos(pi t / T); the released code has an
            option of 0.5 that is off.
        time_modulation: dcp: whether keys and values depend on the time step (Eq. 4); later stages keep dcp's setting.
        perceptor_scale: Eq. 3's w, in this stage and in its model. null takes the parent model's, or the released 1
            without a parent. 0 leaves the perceptor out.
        view: the perceptor's view of a picture: "whole", or the released "crop", which cuts the edges off. The model's
            restorer uses the same view, unless an option or a preset of the request replaces it.
        reference: aggregator: "preview", or "lq" for a model without previews; the model's restorer uses the same.
        reference_noise: aggregator: fresh noise on the reference (section 4.4, last row of Table 2a).
        preview_cfg_scale: aggregator: above 1 previews are guided with a scale from 1 .. this (released option, off).
        gradient_checkpointing: compute activations again in the backward pass: less memory, a third more compute.
        compile: aggregator: the functions that torch.compile compiles, see fast.Speed.
        frozen_precision: aggregator: precision of the frozen networks' weights, in which they also compute; the model's
            parts stay fp32.
        steps_at_restore, cfg_scale: options for restoring held-out pictures during training.
    """

    resampler_dim: int = 1280
    resampler_depth: int = 4
    resampler_head_dim: int = 64
    resampler_heads: int = 20
    resampler_queries: int = 64
    lora_rank: int = 64
    lora_alpha: float = 1.0
    image_dropout: float = 0.15  # section 4.1: LQ dropout of 15 % in both stages
    text_dropout: float = 0.0
    both_dropout: float = 0.0
    max_clean_weight: float = 1.0
    noise_offset: float = 0.0
    distance: Literal["l2", "huber"] = "l2"
    huber_c: float = 0.001
    teacher_cfg_scale: list[float] = field(default_factory=list)
    teacher_timesteps: int = 50
    timestep_importance: float = 0.0
    time_modulation: bool = True
    perceptor_scale: float | None = None
    view: Literal["whole", "crop"] = "whole"
    reference: Literal["preview", "lq"] = "preview"
    reference_noise: bool = False
    preview_cfg_scale: float = 1.0
    gradient_checkpointing: bool = False
    compile: Literal["off", "autoencoder", "blocks"] = "off"
    frozen_precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    steps_at_restore: int = 30  # section 4.1: 30 DDIM steps
    cfg_scale: float = 7.0  # section 4.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_dropout", "text_dropout", "both_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.max_clean_weight < 1:
            raise RecipeError(f"max_clean_weight must be at least 1, got {self.max_clean_weight}")
        if self.image_dropout + self.text_dropout + self.both_dropout > 1:
            raise RecipeError("image_dropout + text_dropout + both_dropout must not exceed 1")
        if not 0 <= self.timestep_importance < 1:
            raise RecipeError(f"timestep_importance must be in [0, 1), got {self.timestep_importance}")
        scale = self.perceptor_scale
        if scale is not None and (scale < 0 or (self.stage == "dcp" and scale == 0)):
            raise RecipeError(
                f"perceptor_scale must be at least 0, above 0 where the perceptor trains, got {self.perceptor_scale}"
            )
        if self.preview_cfg_scale < 1:
            raise RecipeError(f"preview_cfg_scale must be at least 1, got {self.preview_cfg_scale}")
        check_stage_keys(self, STAGES)
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lora_alpha", "huber_c"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.cfg_scale < 0 or min(self.teacher_cfg_scale, default=0.0) < 0:
            raise RecipeError("cfg_scale and teacher_cfg_scale must be at least 0")
        if self.reference == "lq" and self.preview_cfg_scale > 1:
            raise RecipeError("preview_cfg_scale guides previews, and reference lq has none")
        if self.teacher_cfg_scale and (
            len(self.teacher_cfg_scale) != 2 or self.teacher_cfg_scale[0] > self.teacher_cfg_scale[1]
        ):
            raise RecipeError(f"teacher_cfg_scale needs [low, high] or [], got {self.teacher_cfg_scale}")
