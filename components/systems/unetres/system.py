"""UNetRes as a system."""

from __future__ import annotations

from components.systems.system import Networks, Stage, System
from components.systems.unetres.options import check_options, restore_defaults
from components.systems.unetres.recipe import UNetResRecipe


def networks() -> Networks:
    """Imports torch."""
    from components.systems.unetres.objective import look, measure, regression_objective
    from components.systems.unetres.restorer import build_restorer

    return Networks(
        objectives={"regression": regression_objective}, look=look, measure=measure, build_restorer=build_restorer
    )


UNETRES = System(
    recipe=UNetResRecipe,
    stages=(Stage(name="regression", version=1),),
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
)
