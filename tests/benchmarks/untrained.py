"""Untrained models of the diffusion systems on nano priors, with the shapes and costs of trained ones.

Tensors of zeros get random numbers, so that no part is without effect. The prior of SD3's shape is untrained too: its
folder is written beside the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.models import Model, ModelCard, load_model, save_model
from components.priors.families import FAMILIES
from components.priors.opening import load_prior
from components.priors.robust_encoder import RobustEncoder
from components.priors.sdxl import Prior
from components.randomness import generator
from components.recipes import as_dict
from components.systems import SYSTEMS as CODE
from components.systems.dra.config import AdapterConfig, LoraConfig
from components.systems.dra.network import Dra
from components.systems.dra.tokens import TokenDra
from components.systems.instantir.network import InstantIR
from components.systems.recipes import load_recipe
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

DRA_SD3 = "dra-sd3"
"""DRA on a prior of SD3's shape."""

MODELS = (*SYSTEMS, DRA_SD3)
"""Names for save_untrained: the systems on the nano prior, and DRA_SD3."""


def save_sd3_prior(path: Path) -> Model:
    """Write an untrained prior of the sizes of nano-sd3, about 6 MB."""
    recipe: Any = load_recipe("prior-flow-nano")
    objective: Any = CODE[recipe.system].build_objective(recipe, {})
    card = ModelCard(name=path.name, system=recipe.system, recipe=as_dict(recipe), config=objective.config)
    return save_model(path, card, objective.parts(), objective.files, half=True)


def save_untrained(name: str, path: Path, steps: int = 4) -> Model:
    """Write a model folder of one of MODELS; its restorer takes `steps` steps without guidance."""
    system, family, prior_id = name, "sdxl", "nano"
    if name == DRA_SD3:
        place = path.parent / "nano-sd3"
        prior_id = str(place if (place / "model.json").is_file() else save_sd3_prior(place).path)
        system, family, prior = "dra", "sd3", FAMILIES["sd3"].open(prior_id, "fp32", True)
        network: Any = TokenDra(prior, AdapterConfig(every=1), LoraConfig(rank=8))  # type: ignore[arg-type]
        digest = load_model(prior_id, prior=True).digest
    else:
        own = load_prior("nano")
        network, digest = SYSTEMS[name](own), own.digest
    parts = {
        part: {name: _filled(part, name, value) for name, value in t.items()} for part, t in network.parts().items()
    }
    settings = {"steps_at_restore": steps, "cfg_scale": 1.0, "family": family}
    recipe = {"name": "untrained", **settings, "restore_options": {"steps": steps, "cfg_scale": 1.0}}
    card = ModelCard(
        name="untrained",
        system=system,
        recipe=recipe,
        prior={"id": prior_id, "digest": digest},
        config=network.config(),
    )
    return save_model(path, card, parts)


def _filled(part: str, name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point() or bool(value.any()):
        return value.clone()
    noise = generator(5, part, name).standard_normal(tuple(value.shape), dtype=np.float32)
    return 0.02 * torch.from_numpy(noise)
