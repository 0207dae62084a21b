"""The coarse restorer's objective, and its previews and measures during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.models import Model, load_model, resolve_model
from components.randomness import Noise
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import SwinIR, build_swinir, drop_path
from components.systems.swinir.recipe import SwinIRRecipe
from components.systems.swinir.released import PART, check_sizes
from components.systems.swinir.weights import network_of, parameters_of
from components.tensors import psnr_of_batch
from components.types import Batch, Loss, Objective


class SwinIRObjective(Objective):
    """Summed square error between restored and HQ picture, both in [0, 1] (instarevive.md section 3).

    Args:
        network: all of its parameters train.
        drop_rate: see network.drop_path.
        pictures: number of pictures of a step, over which the loss sums. A micro-batch's sum is enlarged accordingly,
            because the loop averages over micro-batches and workers. 0: those of the batch.
    """

    def __init__(self, network: SwinIR, drop_rate: float = 0.1, pictures: int = 0) -> None:
        self.network, self.drop_rate = network.train().requires_grad_(True), drop_rate
        self.pictures = pictures
        self.trainables: Mapping[str, nn.Module] = {PART: network}
        self.config: Mapping[str, Any] = network.config.to_dict()
        self.progress: MutableMapping[str, float] = {}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The network's parameters under the released keys."""
        return {PART: parameters_of(self.network)}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase. Without gradients (held-out losses) no branch is dropped.

        Noise names: "drop_path <block> <branch>". Metrics, means over pictures in [0, 1]: loss (mean square error) and
        psnr (dB).
        """
        factors = drop_path(self.drop_rate, self.network.depth, noise.uniform) if torch.is_grad_enabled() else None
        hq, lq = (to_unit(side) for side in (batch.hq, batch.lq))
        restored = restore(self.network, lq, factors).float()
        value = F.mse_loss(restored, hq, reduction="sum")
        metrics = {"loss": value.detach() / hq.numel(), "psnr": psnr_of_batch(restored.detach(), hq).mean()}
        yield PART, Loss(value=value * ((self.pictures or len(batch)) / len(batch)), metrics=metrics)


def to_unit(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] -> [0, 1]."""
    return (images + 1) / 2


def restore(network: SwinIR, images: Tensor, factors: Tensor | None = None) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] of any size -> the same size, not clipped.

    Pictures are padded below and to the right to multiples of config.multiple_px by repeating the border. The result is
    cropped.
    """
    height, width = images.shape[-2:]
    multiple = network.config.multiple_px
    padding = (0, -width % multiple, 0, -height % multiple)
    padded = F.pad(images, padding, mode="replicate") if any(padding) else images
    return network(padded, factors)[..., :height, :width]


def build_objective(
    recipe: SwinIRRecipe,
    parents: Mapping[str, Model],
    examples: Callable[[], Tensor] | None = None,
    device: str = "cpu",
) -> SwinIRObjective:
    """The objective of the one stage.

    Args:
        recipe: resolved recipe.
        parents: none, as there is only one stage.
        examples: unused.
        device: where the network goes.

    Raises:
        ModelError: warm_start names no usable SwinIR.
        ValueError: invalid sizes, or an output of another size than the picture.
    """
    if recipe.warm_start:
        network = network_of(load_model(resolve_model(recipe.warm_start)))
        network.gradient_checkpointing = recipe.gradient_checkpointing
    else:
        config = SwinIRConfig(**check_sizes(recipe.size))
        network = build_swinir(config, recipe.seed, recipe.gradient_checkpointing)
    check_same_size(network.config)
    return SwinIRObjective(network.to(device), recipe.drop_path, recipe.batch_size)


def check_same_size(config: SwinIRConfig) -> None:
    """Raises ValueError for a network whose output has another size than its input."""
    if config.sf != config.unshuffle_scale:
        raise ValueError(f"sf and unshuffle_scale must be equal, got {config.sf} and {config.unshuffle_scale}")


def look(objective: SwinIRObjective, recipe: SwinIRRecipe, lq: Tensor, prompts: Sequence[str], seed: int) -> Tensor:
    """LQ pictures [B, 3, H, W] in [-1, 1], restored; same shape and range, not clipped."""
    return restore(objective.network, to_unit(lq)) * 2 - 1


@torch.no_grad()
def measure(objective: SwinIRObjective, heldout: Sequence[Batch]) -> dict[str, float]:
    """Mean PSNR over held-out pictures, dB, of the restored and of the LQ pictures."""
    psnrs: dict[str, list[Tensor]] = {"psnr_heldout": [], "psnr_heldout_lq": []}
    for batch in heldout:
        hq, lq = to_unit(batch.hq), to_unit(batch.lq)
        for name, image in (("psnr_heldout", restore(objective.network, lq)), ("psnr_heldout_lq", lq)):
            psnrs[name].append(psnr_of_batch(image, hq))
    return {name: float(torch.cat(values).mean()) for name, values in psnrs.items()}
