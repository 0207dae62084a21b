"""Training of an SD3-shaped prior: the MM-DiT with its text encoders, by conditional flow matching.

The autoencoder is another prior's and stays frozen, so the stage needs no stage before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components.captions.tags import VOCABULARY
from components.models import Model, ModelError, load_model, load_strictly
from components.objectives.flow_matching import flow_matching_loss, logit_normal_times
from components.objectives.precomputed import clean_latents
from components.priors.conditions import Conditions
from components.priors.files import check_prior_folder, first_line
from components.priors.nano import build_tokenizer_json
from components.priors.sd3 import TEXT_PARTS, SD3Prior, generate_latents
from components.priors.sd3_config import NANO_SD3
from components.priors.sd3_nano import build_sd3_prior
from components.randomness import Noise, seeded_init
from components.samplers.flow import noisy_latents
from components.systems.prior import training
from components.systems.prior.recipe import PriorRecipe
from components.systems.prior.training import PriorObjective, autoencoder_psnr, embed_with_dropout, merge_sizes
from components.types import Batch, Loss


class FlowObjective(PriorObjective[SD3Prior]):
    """Conditional flow matching on text and picture pairs; the MM-DiT and its text encoders train."""

    def __init__(
        self,
        prior: SD3Prior,
        config: Mapping[str, Any],
        tokenizer_json: str,
        text_dropout: float,
        pooled_dropout: float = 0.0,
        time_mean: float = 0.0,
        time_deviation: float = 1.0,
    ) -> None:
        names = [name for name in prior.modules if name == "transformer" or name in TEXT_PARTS]
        trainable = nn.ModuleDict({name: prior.modules[name] for name in names})
        super().__init__(prior, config, tokenizer_json, {"denoiser": trainable})
        self.text_dropout, self.pooled_dropout = text_dropout, pooled_dropout
        self.time_mean, self.time_deviation = time_mean, time_deviation

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase; draws "time", "noise" and the numbers of embed_with_dropout."""
        clean = clean_latents(self.prior, batch)
        eps = noise.normal("noise", tuple(clean.shape[1:]))
        times = logit_normal_times(
            noise.normal("time", ()), self.time_mean, self.time_deviation, self.prior.schedule.shift
        )
        text, pooled = embed_with_dropout(self.prior, batch.prompts, noise, self.text_dropout, self.pooled_dropout)
        velocity = self.prior.velocity(Conditions(text=text, pooled=pooled))
        value = flow_matching_loss(velocity(noisy_latents(clean, eps, times), times), clean, eps).mean()
        yield "denoiser", Loss(value=value, metrics={"loss": value.detach()})


def flow_objective(
    recipe: PriorRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> FlowObjective:
    """The objective of stage flow.

    Args:
        recipe: resolved recipe.
        parents: none.
        examples: unused; the autoencoder has its weights.
        device: where the networks go.

    Raises:
        ModelError: the warm start or the autoencoder is missing, or the sizes do not fit together.
    """
    start = load_model(recipe.warm_start, prior=True) if recipe.warm_start else None
    source = start or load_model(recipe.autoencoder_from, prior=True)
    check_prior_folder(source)
    if start is not None:
        config: Mapping[str, Any] = start.info["config"]
        tokenizer_json = start.file("tokenizer.json").read_text(encoding="utf-8")
    else:
        config = {**merge_sizes(NANO_SD3, recipe.size), "autoencoder": source.info["config"]["autoencoder"]}
        tokenizer_json = build_tokenizer_json(VOCABULARY, int(config["text_length"]))
    try:
        with seeded_init(recipe.seed, "prior"):
            prior = build_sd3_prior(config, tokenizer_json)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{recipe.name}: no prior of SD3's shape on {source.path} ({first_line(error)})") from error
    for part in prior.modules if start is not None else ("autoencoder",):
        load_strictly(prior.modules[part], source.part(part), f"{source.path}: part {part}")
    prior.to(device)
    return FlowObjective(
        prior,
        config,
        tokenizer_json,
        text_dropout=recipe.text_dropout,
        pooled_dropout=recipe.pooled_dropout,
        time_mean=recipe.time_mean,
        time_deviation=recipe.time_deviation,
    )


def look(objective: PriorObjective[Any], recipe: PriorRecipe, lq: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
    """Previews of any stage, [B, 3, H, W] in [-1, 1]. Stage flow: pictures from the prompts, 20 steps, guidance 4.

    The others: see training.look.
    """
    if recipe.stage != "flow":
        return training.look(objective, recipe, lq, prompts, seed)
    prior: SD3Prior = objective.prior
    latents_shape = (prior.latent_channels, lq.shape[-2] // prior.factor, lq.shape[-1] // prior.factor)
    noise = Noise(seed, np.arange(len(lq)), str(lq.device)).normal("start", latents_shape)
    return prior.decode(generate_latents(prior, noise, prompts, steps=20, cfg_scale=4.0))


@torch.no_grad()
def measure(objective: PriorObjective[Any], heldout: Sequence[Batch]) -> dict[str, float]:
    """Numbers of the parts for the model card; stage flow: the autoencoder's mean PSNR on held-out pictures, dB."""
    if isinstance(objective, FlowObjective):
        return {"autoencoder_psnr_heldout": autoencoder_psnr(objective.prior, heldout)}
    return training.measure(objective, heldout)
