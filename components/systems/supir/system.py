"""SUPIR as a system. Its stages train the degradation-robust encoder and the adaptor, in this order."""

from __future__ import annotations

from components.systems.supir.options import check_options, restore_defaults
from components.systems.supir.recipe import STAGES, SupirRecipe
from components.systems.system import Networks, System


def networks() -> Networks:
    """The system's networks; the call imports torch."""
    from components.systems.supir.build import adaptor_objective, build_restorer, encoder_objective, look, measure

    return Networks(
        objectives={"encoder": encoder_objective, "adaptor": adaptor_objective},
        look=look,
        measure=measure,
        build_restorer=build_restorer,
    )


SUPIR = System(
    recipe=SupirRecipe,
    stages=STAGES,
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
)
