"""The objectives of the stages, and their previews and measures during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.models import Model, load_model
from components.objectives.regression import charbonnier_distance
from components.randomness import Noise
from components.systems.unetres.build import REGRESSION, network_of, parameters_of
from components.systems.unetres.config import config_from
from components.systems.unetres.network import UNetRes, build_unetres
from components.systems.unetres.recipe import UNetResRecipe
from components.tensors import psnr_of_batch
from components.types import Batch, Loss, Objective


class RegressionObjective(Objective):
    """Charbonnier loss between restored and HQ picture, a mean over pixels.

    Args:
        network: all of its parameters train.
        eps: see UNetResRecipe.charbonnier_eps.
    """

    def __init__(self, network: UNetRes, eps: float = 1e-3) -> None:
        self.network, self.eps = network.train().requires_grad_(True), eps
        self.trainables: Mapping[str, nn.Module] = {REGRESSION: network}
        self.config: Mapping[str, Any] = {REGRESSION: network.config.to_dict()}
        self.progress: MutableMapping[str, float] = {}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The network's parameters."""
        return {REGRESSION: parameters_of(self.network)}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase, without noise. Metrics, means over pictures in [0, 1]: loss, psnr and psnr_lq (dB)."""
        restored = self.network(batch.lq).float()
        value = charbonnier_distance(restored / 2, batch.hq / 2, self.eps).mean()
        hq, images = to_unit(batch.hq), to_unit(restored.detach())
        metrics = {
            "loss": value.detach(),
            "psnr": psnr_of_batch(images, hq).mean(),
            "psnr_lq": psnr_of_batch(to_unit(batch.lq), hq).mean(),
        }
        yield REGRESSION, Loss(value=value, metrics=metrics)


def to_unit(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] -> [0, 1]."""
    return (images + 1) / 2


def regression_objective(
    recipe: UNetResRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> RegressionObjective:
    """The objective of stage regression.

    Args:
        recipe: resolved recipe.
        parents: at most one model folder of the same stage; it replaces recipe.warm_start.
        examples: unused.
        device: where the network goes.

    Raises:
        ModelError: parent or warm start is no usable model.
    """
    start = next(iter(parents.values()), None)
    if start is None and recipe.warm_start:
        start = load_model(recipe.warm_start)
    if start is not None:
        network = network_of(start, REGRESSION)
    else:
        network = build_unetres(config_from(recipe.size), recipe.seed, REGRESSION)
    return RegressionObjective(network.to(device), recipe.charbonnier_eps)


def look(
    objective: RegressionObjective, recipe: UNetResRecipe, lq: Tensor, prompts: Sequence[str], seed: int
) -> Tensor:
    """LQ pictures [B, 3, H, W] in [-1, 1], restored; same shape and range, not clipped."""
    return objective.network(lq)  # type: ignore[no-any-return]


@torch.no_grad()
def measure(objective: RegressionObjective, heldout: Sequence[Batch]) -> dict[str, float]:
    """Mean PSNR over held-out pictures, dB, of the restored and of the LQ pictures."""
    psnrs: dict[str, list[Tensor]] = {"psnr_heldout": [], "psnr_heldout_lq": []}
    for batch in heldout:
        hq = to_unit(batch.hq)
        for name, image in (("psnr_heldout", objective.network(batch.lq)), ("psnr_heldout_lq", batch.lq)):
            psnrs[name].append(psnr_of_batch(to_unit(image), hq))
    return {name: float(torch.cat(values).mean()) for name, values in psnrs.items()}
