"""The objective of fine-tuning, and its previews and measures during training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.models import Model, ModelError, load_model
from components.objectives.regression import charbonnier_distance, latent_distance, log_mse_distance
from components.randomness import Noise, generator
from components.systems.regressor.network import Regressor, SameSize, network_of, open_regressor
from components.systems.regressor.recipe import RegressorRecipe
from components.systems.regressor.released import PART
from components.tensors import psnr_of_batch
from components.types import Batch, Loss, Objective

MOST_DB = 50.0
"""Limit of a picture's PSNR in the log: inputs without a fault have 100 dB, and would be all that the mean shows."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""(restored, target), both [B, 3, H, W] in [0, 1], the first a little outside -> [B]."""


class FinetuneObjective(Objective):
    """A distance between restored and HQ pictures, and one to a teacher's result, a mean over pictures.

    The network sees its input as the restorer feeds it at scale 1: its factor is undone by shrinking first.

    Args:
        network: all of its parameters train.
        released: its tensors under the keys of the file that they come from.
        distance: of pictures.
        teacher: frozen; None for none.
        teacher_weight: share of the distance to the teacher's result, 0 to 1.

    Raises:
        ModelError: the network's parameters are not those of the file under other names.
    """

    def __init__(
        self,
        network: Regressor,
        released: Mapping[str, Tensor],
        distance: Distance = charbonnier_distance,
        teacher: Regressor | None = None,
        teacher_weight: float = 0.5,
    ) -> None:
        self.released, self.keys = released, released_keys(released, network)
        self.network, self.distance = SameSize(network.requires_grad_(True)), distance
        keep_still(network.train())
        self.teacher = None if teacher is None else SameSize(teacher.eval().requires_grad_(False))
        self.teacher_weight = teacher_weight if teacher is not None else 0.0
        self.trainables: Mapping[str, nn.Module] = {PART: network}
        self.config: Mapping[str, Any] = network.config.to_dict()
        self.progress: MutableMapping[str, float] = {}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors under the keys of the file that the training started from."""
        own = self.network.regressor.state_dict()
        return {PART: {**self.released, **{key: own[name].detach() for key, name in self.keys.items()}}}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase, without noise.

        Metrics, means over pictures: loss, psnr and psnr_lq (dB, up to MOST_DB), and psnr_teacher, of its result.
        """
        lq, hq = to_unit(batch.lq), to_unit(batch.hq)
        restored = self.network(lq).float()
        value = self.distance(restored, hq)
        metrics = {
            "psnr": psnr_of_batch(restored.detach(), hq).clamp_max(MOST_DB).mean(),
            "psnr_lq": psnr_of_batch(lq, hq).clamp_max(MOST_DB).mean(),
        }
        if self.teacher is not None:
            with torch.no_grad():
                goal = self.teacher(lq).float()
            value = (1 - self.teacher_weight) * value + self.teacher_weight * self.distance(restored, goal)
            metrics["psnr_teacher"] = psnr_of_batch(goal, hq).clamp_max(MOST_DB).mean()
        value = value.mean()
        yield PART, Loss(value=value, metrics={"loss": value.detach(), **metrics})


def to_unit(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] -> [0, 1]."""
    return (images + 1) / 2


def keep_still(network: nn.Module) -> None:
    """Put the random layers and the running statistics of a network in training mode back to evaluation.

    Its own random layers would draw from torch's global generator, and the statistics of a few crops are poor.
    """
    for module in network.modules():
        norms = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norms or isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "DropPath":
            module.eval()


def released_keys(released: Mapping[str, Tensor], network: Regressor) -> dict[str, str]:
    """The network's own key of each tensor by its key in the file, for all tensors that the network holds unchanged.

    Some architectures rename keys when they load. Then a second network is loaded from tensors of random numbers, which
    are told apart wherever they end.

    Raises:
        ModelError: a parameter is no tensor of the file, so that a trained one could not be written under its keys.
    """
    own = network.state_dict()
    keys = {
        key: f"network.{key}"
        for key, tensor in released.items()
        if f"network.{key}" in own and torch.equal(own[f"network.{key}"].cpu().to(tensor.dtype), tensor)
    }
    parameters = {name for name, _ in network.named_parameters()}
    if parameters - set(keys.values()):
        draw = generator(0, "released keys")
        marks = {
            key: torch.from_numpy(draw.standard_normal(tuple(tensor.shape), dtype="float32"))
            if tensor.is_floating_point() and tensor.ndim
            else tensor
            for key, tensor in released.items()
        }
        places: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for name, tensor in open_regressor(marks, "the start's weights", network.config).state_dict().items():
            places.setdefault(tuple(tensor.shape), []).append((name, tensor))
        keys = {
            key: name
            for key, mark in marks.items()
            for name, tensor in places.get(tuple(mark.shape), [])
            if mark.is_floating_point() and mark.ndim and torch.equal(tensor, mark)
        }
    missing = sorted(name.removeprefix("network.") for name in parameters - set(keys.values()))
    if missing:
        raise ModelError(
            f"a {network.config.architecture} cannot be trained from this file: its loader rearranges "
            f"{len(missing)} tensors ({', '.join(missing[:3])})"
        )
    return keys


def finetune_objective(
    recipe: RegressorRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> FinetuneObjective:
    """The objective of stage finetune.

    Args:
        recipe: resolved recipe.
        parents: at most one model folder to start from; it replaces recipe.warm_start.
        examples: unused.
        device: where the networks go.

    Raises:
        ModelError: no start, or start or teacher is no usable regressor.
    """
    start = next(iter(parents.values()), None)
    if start is None and not recipe.warm_start:
        raise ModelError(f"{recipe.name}: an imported network is trained further, and none is named: warm_start=MODEL")
    start = start or load_model(recipe.warm_start)
    network = network_of(start).to(device)
    teacher = network_of(load_model(recipe.teacher)).to(device) if recipe.teacher else None
    return FinetuneObjective(network, start.part(PART), _distance_of(recipe), teacher, recipe.teacher_weight)


def _distance_of(recipe: RegressorRecipe) -> Distance:
    distances: Mapping[str, Distance] = {
        "charbonnier": functools.partial(charbonnier_distance, eps=recipe.charbonnier_eps),
        "log_mse": functools.partial(log_mse_distance, eps=recipe.log_mse_eps),
        "l2": latent_distance,
    }
    return distances[recipe.loss]


def look(
    objective: FinetuneObjective, recipe: RegressorRecipe, lq: Tensor, prompts: Sequence[str], seed: int
) -> Tensor:
    """LQ pictures [B, 3, H, W] in [-1, 1], restored; same shape and range, not clipped."""
    return objective.network(to_unit(lq)) * 2 - 1  # type: ignore[no-any-return]


@torch.no_grad()
def measure(objective: FinetuneObjective, heldout: Sequence[Batch]) -> dict[str, float]:
    """Mean PSNR over held-out pictures, dB, of the restored and of the LQ pictures."""
    psnrs: dict[str, list[Tensor]] = {"psnr_heldout": [], "psnr_heldout_lq": []}
    for batch in heldout:
        hq, lq = to_unit(batch.hq), to_unit(batch.lq)
        for name, image in (("psnr_heldout", objective.network(lq)), ("psnr_heldout_lq", lq)):
            psnrs[name].append(psnr_of_batch(image.float(), hq).clamp_max(MOST_DB))
    return {name: float(torch.cat(values).mean()) for name, values in psnrs.items()}
