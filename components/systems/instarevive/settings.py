"""Settings of the distillation, as a recipe holds them. Torch-free, so that recipes list fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from components.priors.one_text_config import PIXART, SD21
from components.priors.sdxl_config import SDXL
from components.recipes import RecipeError

Family = Literal["pixart", "sd", "sdxl", "nano"]
"""pixart: a DiT, text and mask. sd: a UNet, text. sdxl and nano: a UNet, text, pooled text and size ids."""


AlignStart = Literal["lq", "noised"]
"""What a generator that takes noise begins with: LQ latents alone, or noised to its time step."""

PRIORS: Mapping[str, str] = {"pixart": PIXART, "sd": SD21, "sdxl": SDXL, "nano": "nano"}
"""The prior of each family where none is named."""


@dataclass(kw_only=True)
class Gate:
    """How far a distilled student may fall behind its teacher, on held-out pictures one by one.

    Attributes:
        psnr_db: largest mean loss of PSNR.
        perceptual: largest mean loss of `metric`, as a share of the teacher's mean.
        metric: the perceptual one, by pyiqa's name; the default needs no download ("lpips" fetches weights).
        pictures: held-out pictures at most.
        teacher_options, student_options: of their restorers (steps, guidance, prompt): what a teacher is worth depends
            on them. Neither has a prompt of its own.
    """

    psnr_db: float = 0.5
    perceptual: float = 0.02
    metric: str = "gmsd"
    pictures: int = 64
    teacher_options: dict[str, Any] = field(default_factory=dict)
    student_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.psnr_db, self.perceptual) < 0 or self.pictures < 1:
            raise RecipeError("gate needs psnr_db and perceptual of at least 0, and a picture")
        if self.metric in ("", "psnr"):
            raise RecipeError(f"gate.metric must be a second metric beside psnr, got {self.metric!r}")


@dataclass(kw_only=True)
class Distillation:
    """How the generator is trained (InstaRevive section 3.2, instarevive.md section 5).

    The ablations of Table 3 are `score: false`, `dynamic: false` and `prompt: false`.

    Attributes:
        score: match scores; without it the generator learns by regression alone, and there is no fake score.
        dynamic: T_max and alpha follow the distance (Eqs. 6, 7); without it times span the whole range and alpha is
            fixed_alpha.
        prompt: captions; without them every prompt is empty.
        kappa: factor on the distance in Eq. 6.
        reduction: of the squared distance over a sample's elements: "mean", or Eq. 7's literal "sum".
        per_sample: a T_max for each picture instead of one for the batch.
        t_floor: T_max is not below it, so that times still have a range.
        t_share: the lowest time over T_max.
        t_low, t_high: T_max between which alpha goes from 0 to 1; t_high 0 stands for T_max at the first step.
        fixed_alpha: weight of the regression without dynamic control.
        weight: lambda, of the score matching.
        cfg_scale: guidance of the real score; 1 is none.
        text_dropout: probability of an empty prompt, so that guidance has one to go by and prompts may be left out.
        regression: "perceptual" (LPIPS where `lpips` names weights, else the pyramid), "l2" of latents, "both", or
            "none" for targets that show other things than the inputs (recipe's `unpaired`): scores alone then teach.
        lpips: file, folder or hub id of LPIPS's weights; see objectives.regression.load_lpips.
        perceptual_weight, l2_weight: of the two.
        fake: "full" trains a copy of the real score, "lora" a low-rank change of it, which needs less memory.
        lora_rank: of that change.
        fake_range: times of the fake score's training: "full", or the "same" as the generator's, as long as T_max
            stands there.
        fake_steps: steps of the fake score after each of the generator's, with noise of their own; released 1. A
            generator that moves fast needs more, or it follows a score of what it made long ago (DMD2 has 5).
        inpaint: keep what the restorer keeps: latents without a missing pixel come from the input, so that losses and
            scores see the filled-in picture, and gradients its missing part. The paper masks at inference only.
        checkpoint_decoder: the decoder's activations are computed again instead of kept.
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
        for name, known in (
            ("reduction", ("mean", "sum")),
            ("regression", ("perceptual", "l2", "both", "none")),
            ("fake", ("full", "lora")),
            ("fake_range", ("full", "same")),
        ):
            if getattr(self, name) not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.t_high and self.t_low >= self.t_high:
            raise RecipeError(f"t_low must be below t_high, got {self.t_low} and {self.t_high}")
        if not self.score and ((not self.dynamic and self.fixed_alpha == 0) or self.regression == "none"):
            raise RecipeError(
                "without score, and with fixed_alpha 0 or without regression, there is nothing to learn from"
            )
