"""DRA as a system: one stage trains restoration and diffusion adapters of a frozen prior."""

from __future__ import annotations

from components.systems.dra.options import check_options, restore_defaults
from components.systems.dra.recipe import STAGES, DraRecipe
from components.systems.system import Networks, System


def networks() -> Networks:
    """The system's networks; the call imports torch."""
    from components.systems.dra.build import adapters_objective, build_restorer, look

    return Networks(objectives={"adapters": adapters_objective}, look=look, build_restorer=build_restorer)


DRA = System(
    recipe=DraRecipe,
    stages=STAGES,
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
)
