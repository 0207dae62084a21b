"""DRA as a system: one stage trains restoration and diffusion adapters of a frozen prior."""

from __future__ import annotations

from components.systems.dra.options import check_options, restore_defaults
from components.systems.dra.recipe import STAGES, DraRecipe
from components.systems.dra.released import PUBLISHED, RELEASED, check_sizes, find_files
from components.systems.system import Networks, Sharing, System
from components.systems.weights_io import WeightsCode, WeightsIO


def networks() -> Networks:
    """The system's networks; the call imports torch."""
    from components.systems.dra.build import adapters_objective, build_restorer, build_restorers, look, prior_of
    from components.systems.dra.memory import plan_memory

    return Networks(
        objectives={"adapters": adapters_objective},
        look=look,
        build_restorer=build_restorer,
        plan_memory=plan_memory,
        sharing=Sharing(prior_of=prior_of, build=build_restorers),
        precisions=("fp32", "bf16", "fp16", "fp8"),
    )


def weights_code() -> WeightsCode:
    """Import and export of weights; the call imports torch."""
    from components.systems.dra.weights import expected_layout, export_weights, import_weights

    return WeightsCode(import_weights=import_weights, export_weights=export_weights, layout=expected_layout)


DRA = System(
    recipe=DraRecipe,
    stages=STAGES,
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
    weights=WeightsIO(published=PUBLISHED, files=RELEASED, check_sizes=check_sizes, find=find_files, code=weights_code),
)
