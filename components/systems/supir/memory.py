"""The memory of a restoration with SUPIR, from the configurations alone: networks on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from components.models import Model
from components.options import restore_defaults
from components.peak_memory import MemoryPlan
from components.priors.encoder_copy import unet_skeleton
from components.priors.files import Precision
from components.priors.hub import prior_shape
from components.priors.robust_encoder import RobustEncoder
from components.priors.step_memory import StepNetworks, plan_steps, unet_inputs
from components.systems.supir.config import adaptor_config
from components.systems.supir.network import ADAPTOR, Adaptor, control_features, predict_eps
from components.systems.supir.options import Options, parse_options


def plan_memory(
    model: Model,
    size: tuple[int, int],
    options: Mapping[str, Any],
    precision: Precision = "fp32",
    offload: bool = False,
) -> MemoryPlan:
    """The memory that a picture takes on the device. What exact tiles store lies in the CPU's memory on a GPU.

    Args:
        model: a folder with an adaptor.
        size: (height, width) at which the networks run, in pixels.
        options: of the restoration, by name; the others are the model's defaults.
        precision: of UNet, adaptor and text encoders; the autoencoder stays in fp32.
        offload: the networks are on the device in turns.

    Raises:
        ModelError: the prior's configuration cannot be read.
        ValueError: an option is unknown or out of range.
    """
    defaults = parse_options(restore_defaults(model.info.get("recipe") or {}), Options())
    config = adaptor_config(model.info["config"][ADAPTOR] or {})

    shape = prior_shape(str(model.info["prior"]["id"]), "")

    def build(autoencoder: nn.Module) -> StepNetworks:
        unet: Any = unet_skeleton(shape.unet)
        adaptor = Adaptor(unet, config)

        def call(tile: tuple[int, int], rows: int) -> Tensor:
            latents, timesteps, conditions = unet_inputs(unet, tile, rows)
            features = control_features(adaptor, latents, timesteps, latents, conditions)
            return predict_eps(unet, adaptor, latents, timesteps, features, conditions, 1.0)

        return StepNetworks(steps=(unet, adaptor), pictures=(RobustEncoder(autoencoder),), call=call)

    return plan_steps(shape.autoencoder, build, size, parse_options(options, defaults), precision, offload)
