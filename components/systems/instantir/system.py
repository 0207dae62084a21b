"""InstantIR as a system. Its stages train the perceptor (dcp), the previewer and the aggregator, in this order."""

from __future__ import annotations

from components.systems.instantir.options import check_options, restore_defaults
from components.systems.instantir.recipe import STAGES, InstantIRRecipe
from components.systems.instantir.released import (
    LICENCE,
    PUBLISHED,
    RELEASE_DEFAULTS,
    RELEASED,
    SPELLINGS,
    check_sizes,
    find_files,
)
from components.systems.system import Networks, System
from components.systems.weights_io import WeightsCode, WeightsIO


def networks() -> Networks:
    """The system's networks; the call imports torch."""
    from components.systems.instantir.build import (
        aggregator_objective,
        build_restorer,
        perceptor_objective,
        previewer_objective,
    )
    from components.systems.instantir.looks import look

    builders = {"dcp": perceptor_objective, "previewer": previewer_objective, "aggregator": aggregator_objective}
    return Networks(objectives=builders, look=look, build_restorer=build_restorer)


def weights_code() -> WeightsCode:
    """Import and export of released weights; the call imports torch."""
    from components.systems.instantir.weights import expected_layout, export_weights, import_weights

    return WeightsCode(import_weights=import_weights, export_weights=export_weights, layout=expected_layout)


INSTANTIR = System(
    recipe=InstantIRRecipe,
    stages=STAGES,
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
    weights=WeightsIO(
        published=PUBLISHED,
        licence=LICENCE,
        files=RELEASED,
        spellings=SPELLINGS,
        defaults=RELEASE_DEFAULTS,
        check_sizes=check_sizes,
        find=find_files,
        code=weights_code,
    ),
)
