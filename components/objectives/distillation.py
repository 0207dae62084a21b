"""Settings of a score distillation in a recipe. Torch-free, so that recipes list fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from components.recipes import ADDED_LATER, RecipeError


@dataclass(kw_only=True)
class Distillation:
    """How the generator is trained (InstaRevive section 3.2, instarevive.md section 5).

    The ablations of Table 3 are `score: false`, `dynamic: false` and `prompt: false`.

    Attributes:
        score: score matching; without it the generator learns by regression alone, and there is no fake score.
        dynamic: T_max and alpha depend on the distance (Eqs. 6, 7); without it times cover the whole range and alpha is
            fixed_alpha.
        prompt: use captions; without them every prompt is empty.
        kappa: factor on the distance in Eq. 6.
        reduction: of the squared distance over a sample's elements: "mean", or "sum" as Eq. 7 has it literally.
        per_sample: a T_max for each picture instead of one for the batch.
        t_floor: lowest T_max, so that times always have a range.
        t_share: lowest time, as a share of T_max.
        t_low, t_high: alpha goes from 0 to 1 as T_max goes from t_low to t_high; t_high 0: T_max of the first step.
        fixed_alpha: weight of the regression without dynamic control.
        weight: lambda, of the score matching.
        matching_distance: the score matching of a sample counts by d^2 / (d^2 + this^2), d the rms distance
            of its result from its target; 0 counts all samples alike. Ours: a sample that the regression restores well
            has nothing left to draw.
        window: side of the window of each sample that the scores see, at a random place, in latent pixels; 0 is the
            whole. Ours: networks that work on a coarse grid have errors that repeat with it, and a generator that
            always has the same place in the grid learns to draw them.
        cfg_scale: guidance of the real score; 1 for none.
        text_dropout: probability of an empty prompt, which guidance and restoration without a prompt need.
        regression: "perceptual" (LPIPS if `lpips` names weights, else the pyramid), "l2" of latents, "both", or "none"
            for targets that do not match the inputs (recipe's `unpaired`): the scores are then the only loss.
        lpips: file, folder or hub id of LPIPS's weights; see objectives.regression.load_lpips.
        perceptual_weight, l2_weight: weights of the two terms.
        fake: "full" trains a copy of the real score, "lora" a LoRA on it, which needs less memory.
        lora_rank: of that LoRA.
        fake_range: times of the fake score's training: "full", or "same", up to T_max as for the generator.
        fake_steps: steps of the fake score after each step of the generator, each with its own noise; released 1. A
            generator that changes fast needs more, or its fake score lags behind (DMD2 has 5).
        inpaint: as in the restorer, latents without a missing pixel come from the input. Losses and scores see the
            completed picture, and only its missing part has gradients. The paper masks at inference only.
        checkpoint_decoder: recompute the decoder's activations in the backward pass.
    """

    score: bool = True
    dynamic: bool = True
    prompt: bool = True
    kappa: float = 1.5
    reduction: Literal["mean", "sum"] = "mean"
    per_sample: bool = False
    t_floor: int = 20
    t_share: float = 0.02
    t_low: float = 0.0
    t_high: float = 1000.0
    fixed_alpha: float = 0.5
    weight: float = 1.0
    matching_distance: float = field(default=0.0, metadata=ADDED_LATER)
    window: int = field(default=0, metadata=ADDED_LATER)
    cfg_scale: float = 3.0
    text_dropout: float = 0.1
    regression: Literal["perceptual", "l2", "both", "none"] = "perceptual"
    lpips: str = ""
    perceptual_weight: float = 1.0
    l2_weight: float = 1.0
    fake: Literal["full", "lora"] = "full"
    lora_rank: int = 64
    fake_range: Literal["full", "same"] = "full"
    fake_steps: int = 1
    inpaint: bool = False
    checkpoint_decoder: bool = False

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("kappa", self.kappa, 0, None),
            ("weight", self.weight, 0, None),
            ("matching_distance", self.matching_distance, 0, None),
            ("window", self.window, 0, None),
            ("cfg_scale", self.cfg_scale, 0, None),
            ("perceptual_weight", self.perceptual_weight, 0, None),
            ("l2_weight", self.l2_weight, 0, None),
            ("t_low", self.t_low, 0, None),
            ("t_high", self.t_high, 0, None),
            ("t_floor", self.t_floor, 1, None),
            ("lora_rank", self.lora_rank, 1, None),
            ("fake_steps", self.fake_steps, 1, None),
            ("t_share", self.t_share, 0, 1),
            ("fixed_alpha", self.fixed_alpha, 0, 1),
            ("text_dropout", self.text_dropout, 0, 1),
        ):
            if value < low or (high is not None and value > high):
                span = f"at least {low}" if high is None else f"between {low} and {high}"
                raise RecipeError(f"{name} must be {span}, got {value}")
        for name, choices in (
            ("reduction", ("mean", "sum")),
            ("regression", ("perceptual", "l2", "both", "none")),
            ("fake", ("full", "lora")),
            ("fake_range", ("full", "same")),
        ):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.t_high and self.t_low >= self.t_high:
            raise RecipeError(f"t_low must be below t_high, got {self.t_low} and {self.t_high}")
        if self.matching_distance and self.regression == "none":
            raise RecipeError("matching_distance needs targets that match: leave it out with regression none")
        if not self.score and ((not self.dynamic and self.fixed_alpha == 0) or self.regression == "none"):
            raise RecipeError(
                "score=false with fixed_alpha 0 or without regression leaves no loss: turn one of them on"
            )
