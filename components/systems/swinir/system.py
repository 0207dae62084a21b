"""SwinIR as a system: one stage, which trains the network on pairs."""

from __future__ import annotations

from components.systems.swinir.options import check_options, restore_defaults
from components.systems.swinir.recipe import SwinIRRecipe
from components.systems.swinir.released import LICENCE, PUBLISHED, RELEASED, check_sizes, find_files
from components.systems.system import Networks, Stage, System
from components.systems.weights_io import WeightsCode, WeightsIO


def networks() -> Networks:
    """Imports torch."""
    from components.systems.swinir.objective import build_objective, look, measure
    from components.systems.swinir.restorer import build_restorer

    return Networks(objectives={"restorer": build_objective}, look=look, measure=measure, build_restorer=build_restorer)


def weights_code() -> WeightsCode:
    """Imports torch."""
    from components.systems.swinir.weights import expected_layout, export_weights, import_weights

    return WeightsCode(import_weights=import_weights, export_weights=export_weights, layout=expected_layout)


SWINIR = System(
    recipe=SwinIRRecipe,
    stages=(Stage(name="restorer", version=1),),
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
    weights=WeightsIO(
        published=PUBLISHED,
        licence=LICENCE,
        files=RELEASED,
        check_sizes=check_sizes,
        find=find_files,
        code=weights_code,
    ),
)
