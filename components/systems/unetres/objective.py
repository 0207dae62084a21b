"""The objectives of the stages, and their previews and measures during training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.models import Model, ModelError, load_model
from components.objectives.regression import charbonnier_distance, log_mse_distance
from components.objectives.score_distillation import ScoreNetwork
from components.randomness import Noise
from components.systems.unetres.build import DENOISER, GENERATOR, INPUTS, REGRESSION, network_of, parameters_of
from components.systems.unetres.config import config_from
from components.systems.unetres.detail import DetailObjective, start_from_regression
from components.systems.unetres.network import UNetRes, build_unetres
from components.systems.unetres.recipe import UNetResRecipe
from components.systems.unetres.score import DenoiserObjective, NoScore, score_of
from components.tensors import psnr_of_batch
from components.types import Batch, Loss, Objective

MOST_DB = 50.0
"""Limit of a picture's PSNR in the log: inputs without a fault have 100 dB, and would be all that the mean shows."""


class RegressionObjective(Objective):
    """A distance between restored and HQ pictures in [0, 1], a mean over pictures.

    Args:
        network: all of its parameters train.
        distance: (restored, HQ), both [B, 3, H, W] in [0, 1], the first a little outside -> [B].
        generator: of the model that the stage goes on from, part of the model folder, unchanged.
    """

    def __init__(
        self,
        network: UNetRes,
        distance: Callable[[Tensor, Tensor], Tensor] = charbonnier_distance,
        generator: UNetRes | None = None,
    ) -> None:
        self.network, self.distance = network.train().requires_grad_(True), distance
        self.generator = generator
        self.trainables: Mapping[str, nn.Module] = {REGRESSION: network}
        self.config: Mapping[str, Any] = {name: each.config.to_dict() for name, each in self._networks().items()}
        self.progress: MutableMapping[str, float] = {}

    def _networks(self) -> dict[str, UNetRes]:
        return {REGRESSION: self.network} | ({} if self.generator is None else {GENERATOR: self.generator})

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The regression's parameters, and those of a generator that came with it."""
        return {name: parameters_of(network) for name, network in self._networks().items()}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase, without noise. Metrics, means over pictures: loss, psnr and psnr_lq (dB, up to MOST_DB)."""
        restored, hq = to_unit(self.network(batch.lq).float()), to_unit(batch.hq)
        value = self.distance(restored, hq).mean()
        images = restored.detach()
        metrics = {
            "loss": value.detach(),
            "psnr": psnr_of_batch(images, hq).clamp_max(MOST_DB).mean(),
            "psnr_lq": psnr_of_batch(to_unit(batch.lq), hq).clamp_max(MOST_DB).mean(),
        }
        yield REGRESSION, Loss(value=value, metrics=metrics)


def distance_of(recipe: UNetResRecipe) -> Callable[[Tensor, Tensor], Tensor]:
    """The regression's distance of a recipe."""
    if recipe.loss == "log_mse":
        return functools.partial(log_mse_distance, eps=recipe.log_mse_eps)
    return functools.partial(charbonnier_distance, eps=recipe.charbonnier_eps)


def to_unit(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] -> [0, 1]."""
    return (images + 1) / 2


def _start(recipe: UNetResRecipe, parents: Mapping[str, Model]) -> Model | None:
    """The model folder that a stage starts from, if there is one."""
    start = next(iter(parents.values()), None)
    return load_model(recipe.warm_start) if start is None and recipe.warm_start else start


def _network(recipe: UNetResRecipe, start: Model | None, part: str) -> UNetRes:
    """A network of the stage: of the start, if it has that part, else a new one."""
    if start is not None and part in start.info["parts"]:
        return network_of(start, part)
    return build_unetres(config_from(recipe.size), recipe.seed, part, **INPUTS[part])  # type: ignore[arg-type]


def regression_objective(
    recipe: UNetResRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> RegressionObjective:
    """The objective of stage regression. A generator of the start stays in the model, so it restores as before.

    Args:
        recipe: resolved recipe.
        parents: at most one model folder to start from; it replaces recipe.warm_start.
        examples: unused.
        device: where the networks go.

    Raises:
        ModelError: parent or warm start is no usable model.
    """
    start = _start(recipe, parents)
    network, generator = _network(recipe, start, REGRESSION), None
    if start is not None and GENERATOR in start.info["parts"]:
        generator = network_of(start, GENERATOR).to(device)
    return RegressionObjective(network.to(device), distance_of(recipe), generator)


def denoiser_objective(
    recipe: UNetResRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> DenoiserObjective:
    """The objective of stage denoiser, on the model of stage regression; arguments as in regression_objective."""
    start = _start(recipe, parents)
    if start is None:
        raise ModelError(f"{recipe.name}: stage denoiser passes a regression on: name its model")
    network, regression = _network(recipe, start, DENOISER), network_of(start, REGRESSION)
    return DenoiserObjective(score_of(network.to(device)), regression.to(device))


def generator_objective(
    recipe: UNetResRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> DetailObjective:
    """The objective of stage generator, on the model of stage denoiser; arguments as in regression_objective.

    With both a parent and recipe.warm_start the generator alone comes from the latter.
    """
    start = _start(recipe, parents)
    if start is None:
        raise ModelError(f"{recipe.name}: stage generator needs a regression and a denoiser: name their model")
    own = load_model(recipe.warm_start) if parents and recipe.warm_start else start  # a generator to go on with
    regression, generator = network_of(start).to(device), _network(recipe, own, GENERATOR).to(device)
    if recipe.generator_start == "regression" and GENERATOR not in own.info["parts"]:
        start_from_regression(generator, regression)
    real: ScoreNetwork = NoScore()
    fake = None
    if recipe.distillation.score:
        real = score_of(network_of(start, DENOISER).to(device).requires_grad_(False))
        fake = score_of(network_of(start, DENOISER).to(device)).train()
    return DetailObjective(generator, regression, real, fake, recipe.distillation, recipe.features)


UNetResObjective = RegressionObjective | DenoiserObjective | DetailObjective


def restore(objective: UNetResObjective, lq: Tensor) -> Tensor | None:
    """LQ pictures [B, 3, H, W] in [-1, 1] restored by the networks in training; None for a denoiser."""
    if isinstance(objective, RegressionObjective):
        return objective.network(lq)  # type: ignore[no-any-return]
    if isinstance(objective, DetailObjective):
        return objective.generator(objective.regression(lq), lq)  # type: ignore[no-any-return]
    return None


def look(
    objective: UNetResObjective, recipe: UNetResRecipe, lq: Tensor, prompts: Sequence[str], seed: int
) -> Tensor | None:
    """See `restore`; same shape and range as LQ, not clipped."""
    return restore(objective, lq)


@torch.no_grad()
def measure(objective: UNetResObjective, heldout: Sequence[Batch]) -> dict[str, float]:
    """Mean PSNR over held-out pictures, dB, of the restored and of the LQ pictures; empty for a denoiser."""
    psnrs: dict[str, list[Tensor]] = {"psnr_heldout": [], "psnr_heldout_lq": []}
    for batch in heldout:
        hq, restored = to_unit(batch.hq), restore(objective, batch.lq)
        if restored is None:
            return {}
        for name, image in (("psnr_heldout", restored), ("psnr_heldout_lq", batch.lq)):
            psnrs[name].append(psnr_of_batch(to_unit(image), hq))
    return {name: float(torch.cat(values).mean()) for name, values in psnrs.items()}
