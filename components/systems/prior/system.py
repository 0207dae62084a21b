"""Priors as a system: training stages of two shapes, and no restorer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from components.systems.prior.recipe import STAGES, PriorRecipe
from components.systems.system import Networks, System


def networks() -> Networks:
    """Imports torch."""
    from components.systems.prior.flow import flow_objective, look, measure
    from components.systems.prior.training import autoencoder_objective, denoiser_objective, image_encoder_objective

    builders = {
        "autoencoder": autoencoder_objective,
        "encoder": image_encoder_objective,
        "denoiser": denoiser_objective,
        "flow": flow_objective,
    }
    return Networks(objectives=builders, look=look, measure=measure, encoded_with=_encoded_with)


def _encoded_with(recipe: PriorRecipe, parents: Mapping[str, Path]) -> str:
    own = recipe.autoencoder_from if recipe.stage == "flow" else ""
    return str(next(iter(parents.values()), recipe.warm_start or own))


PRIOR = System(recipe=PriorRecipe, stages=STAGES, networks=networks)
