"""Networks from model folders, and their tensors for new ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from components.models import Model, ModelError, load_strictly
from components.systems.unetres.config import config_from
from components.systems.unetres.network import UNetRes

REGRESSION, DENOISER, GENERATOR = "regression", "denoiser", "generator"
"""Parts of a model folder: the network that restores by itself, the score of sharp pictures, and the network that adds
detail to the regression's result."""

INPUTS: Mapping[str, Mapping[str, int | bool]] = {
    REGRESSION: {"pictures": 1},
    DENOISER: {"pictures": 1, "level": True},
    GENERATOR: {"pictures": 2},
}
"""What goes into each network, see network.UNetRes."""


def parameters_of(network: nn.Module) -> dict[str, Tensor]:
    """The trained tensors by key."""
    return {name: parameter.detach() for name, parameter in network.named_parameters()}


def network_of(model: Model, part: str = REGRESSION) -> UNetRes:
    """A network of a model folder, in evaluation mode.

    Raises:
        ModelError: a model of another system, an invalid config, or keys or shapes that do not fit it.
    """
    if model.info["system"] != "unetres" or part not in model.info["parts"]:
        raise ModelError(f"{model.path}: holds no {part} of a UNetRes, but a {model.info['system']} model")
    try:
        config = config_from(model.info["config"][part])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{model.path}: its config makes no UNetRes: {error}") from error
    network = UNetRes(config, **INPUTS[part])  # type: ignore[arg-type]
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    load_strictly(network, model.part(part), f"{model.path}: part {part}")
    return network.eval()  # type: ignore[no-any-return]
