"""The memory of a restoration, with the network on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from components.models import Model, ModelError
from components.options import replace_options, restore_defaults
from components.peak_memory import MemoryPlan, Phase, parameter_bytes, peak_bytes
from components.priors.files import DTYPES, Precision
from components.systems.regressor.network import network_of, padded_size
from components.systems.regressor.options import MODELS_OWN, Options
from components.systems.regressor.restorer import check_precision
from components.systems.regressor.tiles import tile_sides


def plan_memory(
    model: Model,
    size: tuple[int, int],
    options: Mapping[str, Any],
    precision: Precision = "fp32",
    offload: bool = False,
) -> MemoryPlan:
    """The memory that a picture takes on the device.

    Args:
        model: a model folder.
        size: (height, width) of the result, px.
        options: of the restoration, by name; the others are the model's defaults.
        precision: of the network.
        offload: changes nothing: there is one network.

    Raises:
        ModelError: the folder is damaged, the architecture does not run in this precision, or cannot be estimated.
        ValueError: an option is unknown or out of range.
    """
    check_precision(model, precision)
    network = network_of(model).to("meta")
    share = DTYPES[precision].itemsize / DTYPES["fp32"].itemsize
    config = network.config
    own = replace_options(restore_defaults(model.info.get("recipe") or {}), Options())
    chosen = replace_options(options, own)
    context = config.context_px if chosen.context_px == MODELS_OWN else chosen.context_px
    tile, _, _ = tile_sides(config, chosen.tile_of(config.factor), context)
    whole = padded_size((-(-size[0] // config.factor), -(-size[1] // config.factor)), config)
    sides = (min(tile, whole[0]), min(tile, whole[1]))
    images = torch.empty(1, 3, *sides, device="meta")
    try:
        peak = peak_bytes(lambda: network(images))
    except (NotImplementedError, RuntimeError) as error:
        raise ModelError(
            f"{model.path}: no estimate of the memory of a {config.architecture}, whose steps depend on the picture"
        ) from error
    work = peak + images.numel() * images.element_size()
    phase = Phase(name="network", weights=int(share * parameter_bytes(network)), peak=int(share * work))
    settings = {"precision": precision, "tile_px": max(sides)}
    return MemoryPlan(settings=settings, phases=(phase,), in_turns=False)
