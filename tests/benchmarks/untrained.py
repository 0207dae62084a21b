"""Untrained models of the diffusion systems on the shipped nano prior, with the shapes and costs of trained ones.

Tensors of zeros get random numbers, so that no part is without effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.models import Model, ModelCard, save_model
from components.priors.opening import load_prior
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl import Prior
from components.randomness import generator
from components.systems.dra.config import LoraConfig
from components.systems.dra.network import Dra
from components.systems.instantir.network import InstantIR
from components.systems.supir.config import AdaptorConfig
from components.systems.supir.network import Adaptor, Supir

RESAMPLER = {"dim": 64, "depth": 2, "dim_head": 16, "heads": 4, "num_queries": 16}  # instantir-dcp-nano's


def instantir(prior: Prior) -> InstantIR:
    return InstantIR(prior, RESAMPLER, {"rank": 16, "alpha": 16.0}, aggregator=True)


def supir(prior: Prior) -> Supir:
    return Supir(prior, RobustEncoder(prior.autoencoder), Adaptor(prior.unet, AdaptorConfig()))


def dra(prior: Prior) -> Dra:
    return Dra(prior, None, LoraConfig(rank=16))


SYSTEMS: Mapping[str, Callable[[Prior], Any]] = {"instantir": instantir, "supir": supir, "dra": dra}


def save_untrained(system: str, path: Path, steps: int = 4) -> Model:
    """Write a model folder of a system; its restorer takes `steps` steps without guidance."""
    prior = load_prior("nano")
    network = SYSTEMS[system](prior)
    parts = {
        part: {name: _filled(part, name, value) for name, value in t.items()} for part, t in network.parts().items()
    }
    own = {"steps_at_restore": steps, "cfg_scale": 1.0}
    recipe = {"name": "untrained", **own, "restore_options": {"steps": steps, "cfg_scale": 1.0}}
    card = ModelCard(
        name="untrained",
        system=system,
        recipe=recipe,
        prior={"id": "nano", "digest": prior.digest},
        config=network.config(),
    )
    return save_model(path, card, parts)


def _filled(part: str, name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point() or bool(value.any()):
        return value.clone()
    noise = generator(5, part, name).standard_normal(tuple(value.shape), dtype=np.float32)
    return 0.02 * torch.from_numpy(noise)
