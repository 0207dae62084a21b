"""Recipe and stages of a prior's training. Torch-free, so that recipes list fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from components.recipes import ADDED_LATER, Recipe, RecipeError
from components.systems.system import Stage, check_stage_keys

STAGES = (
    Stage(name="autoencoder", version=1),
    Stage(name="encoder", version=2, follows="autoencoder"),
    # its text encoders learn, so it takes no precomputed embeddings
    Stage(
        name="denoiser",
        version=1,
        follows="encoder",
        keys=("max_clean_weight", "noise_offset"),
        precomputed=("latents",),
    ),
    # likewise
    Stage(name="flow", version=1, keys=("autoencoder_from", "time_mean", "time_deviation"), precomputed=("latents",)),
)


@dataclass(kw_only=True)
class PriorRecipe(Recipe):
    """Trains a prior of SDXL's shape in three stages, or one of SD3's shape in one.

    SDXL's shape: autoencoder, encoder (of pictures), denoiser (with its text encoders). SD3's shape: flow, the MM-DiT
    with its text encoders, on the autoencoder of another prior.

    Attributes:
        size: replaces entries of priors.nano.NANO, e.g. `size.unet.block_out_channels`; in stage flow those of
            priors.sd3_config.NANO_SD3.
        latent_noise: standard deviation of the noise that is added to latents in the autoencoder's training, so that
            its decoder tolerates a sampler's small errors.
        text_dropout: probability of an empty prompt, for guidance.
        pooled_dropout: probability that only the pooled prompt is empty. The cross-attention does not learn what the
            pooled prompt already holds, and picture adapters are part of the cross-attention.
        contrast_temperature: of the picture encoder's InfoNCE loss.
        max_clean_weight: a sample's loss is weighted by min(1 / alphas_cumprod[t], this), over its mean. 1 is the
            plain loss (InstantIR Eq. 1). Larger values weigh errors of the clean latents: a short training then learns
            layout and colour, which high noise levels decide, before grain.
        noise_offset: strength of the channel means added to the noise, see objectives.diffusion.offset_noise.
        warm_start: a model folder (or shipped prior) with start weights; "" for random ones.
        autoencoder_from: shipped name or model folder of the prior whose autoencoder stage flow takes.
        time_mean, time_deviation: of the logits of the times in stage flow, see logit_normal_times; 0 and 1 are SD3's.
            The times get the shift of the prior's schedule.
    """

    size: dict[str, Any] = field(default_factory=dict)
    latent_noise: float = 0.05
    text_dropout: float = 0.1
    pooled_dropout: float = 0.0
    contrast_temperature: float = 0.1
    warm_start: str = ""
    max_clean_weight: float = 1.0
    noise_offset: float = 0.0
    autoencoder_from: str = field(default="nano", metadata=ADDED_LATER)
    time_mean: float = field(default=0.0, metadata=ADDED_LATER)
    time_deviation: float = field(default=1.0, metadata=ADDED_LATER)

    @property
    def trains_prior(self) -> bool:
        """True."""
        return True

    @property
    def opens_prior(self) -> bool:
        """False: the stages train a prior."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_dropout", "pooled_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.max_clean_weight < 1:
            raise RecipeError(f"max_clean_weight must be at least 1, got {self.max_clean_weight}")
        if self.time_deviation <= 0:
            raise RecipeError(f"time_deviation must be above 0, got {self.time_deviation}")
        check_stage_keys(self, STAGES)
