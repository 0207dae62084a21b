"""UNetRes as a system: a regression, the score of sharp pictures, and a generator of detail."""

from __future__ import annotations

from components.options import restore_defaults
from components.systems.system import Networks, System
from components.systems.unetres.options import check_options
from components.systems.unetres.recipe import STAGES, UNetResRecipe


def networks() -> Networks:
    """Imports torch."""
    from components.systems.unetres.objective import (
        denoiser_objective,
        generator_objective,
        look,
        measure,
        regression_objective,
    )
    from components.systems.unetres.restorer import build_restorer

    return Networks(
        objectives={
            "regression": regression_objective,
            "denoiser": denoiser_objective,
            "generator": generator_objective,
        },
        look=look,
        measure=measure,
        build_restorer=build_restorer,
    )


UNETRES = System(
    recipe=UNetResRecipe,
    stages=STAGES,
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
)
