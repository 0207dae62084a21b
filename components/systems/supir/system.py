"""SUPIR as a system. Its stages train the degradation-robust encoder and the adaptor, in this order."""

from __future__ import annotations

from components.captions.views import PreviewView
from components.options import restore_defaults
from components.systems.supir.options import check_options
from components.systems.supir.recipe import STAGES, SupirRecipe
from components.systems.supir.released import LICENCE, PUBLISHED, RELEASE_DEFAULTS, RELEASED, check_sizes, find_files
from components.systems.system import Networks, System
from components.systems.weights_io import WeightsCode, WeightsIO


def networks() -> Networks:
    """The system's networks; the call imports torch."""
    from components.systems.supir.build import adaptor_objective, build_restorer, encoder_objective, look, measure
    from components.systems.supir.memory import plan_memory

    return Networks(
        objectives={"encoder": encoder_objective, "adaptor": adaptor_objective},
        look=look,
        measure=measure,
        build_restorer=build_restorer,
        plan_memory=plan_memory,
        precisions=("fp32", "bf16", "fp16", "fp8"),
    )


def weights_code() -> WeightsCode:
    """Import and export of released weights; the call imports torch."""
    from components.systems.supir.weights import expected_layout, export_weights, import_weights

    return WeightsCode(import_weights=import_weights, export_weights=export_weights, layout=expected_layout)


SUPIR = System(
    recipe=SupirRecipe,
    stages=STAGES,
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
    views={"coarse": PreviewView()},
    weights=WeightsIO(
        published=PUBLISHED,
        licence=LICENCE,
        files=RELEASED,
        defaults=RELEASE_DEFAULTS,
        check_sizes=check_sizes,
        find=find_files,
        code=weights_code,
    ),
)
