"""The memory of a restoration with DRA, from the configurations alone: networks on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from components.models import Model
from components.options import replace_options
from components.peak_memory import MemoryPlan
from components.priors.autoencoder import autoencoder_factor
from components.priors.encoder_copy import embed_step
from components.priors.families import family_of
from components.priors.families.shapes import NetworkShape, network_shape
from components.priors.files import Precision
from components.priors.mmdit_walk import walk_mmdit
from components.priors.robust_encoder import RobustEncoder
from components.priors.sd3_config import CLIP_TOKENS, T5_TOKENS
from components.priors.sd3_files import text_parameters
from components.priors.step_memory import StepNetworks, plan_steps, unet_inputs
from components.priors.unet_walk import text_inputs, walk_unet
from components.systems.dra.adapters import AdapterBlocks, Call, TokenAdapterBlocks
from components.systems.dra.bundle import ADAPTERS, ENCODER
from components.systems.dra.config import Shape, shape_of, stored_adapter_config
from components.systems.dra.options import SAMPLERS, Options, restore_defaults
from components.systems.dra.shapes import BUNDLES, family_name


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
        precision: of denoiser, adapters and text encoders; the autoencoder stays in fp32.
        offload: the networks are on the device in turns.

    Raises:
        ModelError: the prior's configuration cannot be read.
        ValueError: an option is unknown or out of range.
    """
    family = family_of(family_name(model.info["config"]))
    shape, prior = shape_of(family), network_shape(str(model.info["prior"]["id"]), family)
    own = {"sampler": SAMPLERS[shape][0], **restore_defaults(model.info.get("recipe") or {})}
    config = stored_adapter_config(model.info["config"][ADAPTERS], shape)
    robust = bool(model.info["config"][ENCODER])

    def build(autoencoder: nn.Module) -> StepNetworks:
        network = prior.build()
        adapters = BUNDLES[shape].adapters_of(network, config, autoencoder_factor(autoencoder))
        pictures = (RobustEncoder(autoencoder),) if robust else ()
        own = _CALLS[shape](prior, network, adapters)
        return StepNetworks(steps=(network, adapters), pictures=pictures, **own)

    chosen = replace_options(options, replace_options(own, Options()))
    return plan_steps(prior.autoencoder, build, size, chosen, precision, offload)


def _on_maps(prior: NetworkShape, unet: Any, adapters: Any) -> dict[str, Any]:
    def call(tile: tuple[int, int], rows: int) -> Tensor:
        latents, timesteps, conditions = unet_inputs(unet, tile, rows)
        features = adapters.features(_seen(adapters, latents))  # of one picture, for both halves of guidance
        embedding = embed_step(unet, timesteps, conditions.pooled, conditions.time_ids, latents.dtype)
        step = Call(latents=latents, times=timesteps, embedding=embedding, **conditions.tensors())
        joins = adapters.joins(features, step, AdapterBlocks())
        return walk_unet(unet, latents, text_inputs(unet, embedding, conditions.text), joins)

    return {"call": call}


def _seen(adapters: Any, latents: Tensor) -> Tensor:
    """What the adapters see of the LQ picture of one row."""
    if adapters.factor == 1:
        return latents[:1]
    return latents.new_empty(1, 3, *(adapters.factor * side for side in latents.shape[-2:]))


def _on_tokens(prior: NetworkShape, network: Any, adapters: Any) -> dict[str, Any]:
    sizes = prior.network

    def call(tile: tuple[int, int], rows: int) -> Tensor:
        dtype = network.proj_out.bias.dtype  # weights may be stored in 8 bits
        latents = torch.empty(rows, sizes["in_channels"], *tile, dtype=dtype)
        text = torch.empty(rows, CLIP_TOKENS + T5_TOKENS, sizes["joint_attention_dim"], dtype=dtype)
        pooled = torch.empty(rows, sizes["pooled_projection_dim"], dtype=dtype)
        times = torch.zeros(rows)
        embedding = network.time_text_embed(times, pooled)
        step = Call(latents=latents, times=times, embedding=embedding, text=text, pooled=pooled)
        joins = adapters.joins(adapters.features(latents[:1]), step, TokenAdapterBlocks())
        return walk_mmdit(network, latents, embedding, text, joins)

    largest = sizes["pos_embed_max_size"] * sizes["patch_size"]
    return {"call": call, "text_parameters": text_parameters(), "largest_side": largest}


_CALLS: Mapping[Shape, Callable[[NetworkShape, Any, Any], dict[str, Any]]] = {
    "maps": _on_maps,
    "tokens": _on_tokens,
}
