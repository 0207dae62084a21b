"""The memory of a restoration with DRA, from the configurations alone: networks on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from components.models import Model
from components.options import replace_options
from components.peak_memory import MemoryPlan
from components.priors.conditions import SizedConditions
from components.priors.encoder_copy import embed_step
from components.priors.files import Precision
from components.priors.hub import prior_shape
from components.priors.robust_encoder import RobustEncoder
from components.priors.step_memory import StepNetworks, plan_steps
from components.priors.unet_walk import text_inputs, walk_unet
from components.systems.dra.adapters import AdapterJoins, UnetAdapters
from components.systems.dra.config import adapter_config
from components.systems.dra.network import ADAPTERS, ENCODER
from components.systems.dra.options import Options, restore_defaults


def plan_memory(
    model: Model,
    size: tuple[int, int],
    options: Mapping[str, Any],
    precision: Precision = "fp32",
    offload: bool = False,
) -> MemoryPlan:
    """The memory that a picture takes on the device. What exact tiles store lies in the CPU's memory on a GPU.

    Args:
        model: a model folder. The LoRA takes no memory: it is merged.
        size: (height, width) at which the networks run, in pixels.
        options: of the restoration, by name; the others are the model's defaults.
        precision: of UNet, adapters and text encoders; the autoencoder stays in fp32.
        offload: the networks are on the device in turns.

    Raises:
        ModelError: the prior's configuration cannot be read.
        ValueError: an option is unknown or out of range.
    """
    defaults = replace_options(restore_defaults(model.info.get("recipe") or {}), Options())
    config, robust = adapter_config(model.info["config"][ADAPTERS]), bool(model.info["config"][ENCODER])

    def build(unet: Any, autoencoder: nn.Module) -> StepNetworks:
        adapters = UnetAdapters(unet, config)

        def predict(latents: Tensor, timesteps: Tensor, conditions: SizedConditions) -> Tensor:
            features = adapters.features(latents[:1])  # of one picture, for both halves of guidance
            embedding = embed_step(unet, timesteps, conditions.pooled, conditions.time_ids, latents.dtype)
            joins = AdapterJoins(adapters, features, adapters.shifts(embedding))
            return walk_unet(unet, latents, text_inputs(unet, embedding, conditions.text), joins)

        pictures = (RobustEncoder(autoencoder),) if robust else ()
        return StepNetworks(steps=(adapters,), pictures=pictures, predict=predict)

    shape = prior_shape(str(model.info["prior"]["id"]), "")
    return plan_steps(shape, build, size, replace_options(options, defaults), precision, offload)
