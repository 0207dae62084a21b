"""The prior as a system: three training stages, and no restorer of its own."""

from __future__ import annotations

from components.systems.prior.recipe import PriorRecipe
from components.systems.system import Networks, Stage, System


def networks() -> Networks:
    """Imports torch."""
    from components.systems.prior.training import (
        autoencoder_objective,
        denoiser_objective,
        image_encoder_objective,
        look,
        measure,
    )

    builders = {
        "autoencoder": autoencoder_objective,
        "encoder": image_encoder_objective,
        "denoiser": denoiser_objective,
    }
    return Networks(
        objectives=builders,
        look=look,
        measure=measure,
        encoded_with=lambda recipe, parents: str(next(iter(parents.values()), recipe.warm_start)),
    )


PRIOR = System(
    recipe=PriorRecipe,
    stages=(
        Stage(name="autoencoder", version=1),
        Stage(name="encoder", version=2, follows="autoencoder"),
        # its text encoders learn, so it takes no precomputed embeddings
        Stage(name="denoiser", version=1, follows="encoder", precomputed=("latents",)),
    ),
    networks=networks,
)
