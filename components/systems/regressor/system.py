"""Community restorers as a system: any network that spandrel detects, from pictures to pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.options import restore_defaults
from components.systems.regressor.options import check_options
from components.systems.regressor.recipe import STAGES, RegressorRecipe
from components.systems.regressor.released import FILES, PUBLISHED, check_sizes, find_files
from components.systems.system import Networks, System
from components.systems.weights_io import WeightsCode, WeightsIO


def networks() -> Networks:
    """Imports torch and spandrel."""
    from components.systems.regressor.memory import plan_memory
    from components.systems.regressor.objective import finetune_objective, look, measure
    from components.systems.regressor.restorer import build_restorer

    return Networks(
        objectives={"finetune": finetune_objective},
        look=look,
        measure=measure,
        build_restorer=build_restorer,
        plan_memory=plan_memory,
    )


def weights_code() -> WeightsCode:
    """Imports torch and spandrel."""
    from components.systems.regressor.weights import expected_layout, export_weights, import_weights

    return WeightsCode(import_weights=import_weights, export_weights=export_weights, layout=expected_layout)


def own_scale(config: Mapping[str, Any]) -> float:
    """The factor by which a model enlarges, from its config."""
    return float(config.get("factor", 1))


REGRESSOR = System(
    recipe=RegressorRecipe,
    stages=STAGES,
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
    own_scale=own_scale,
    weights=WeightsIO(
        published=PUBLISHED,
        files=FILES,
        check_sizes=check_sizes,
        find=find_files,
        code=weights_code,
        spellings=("released", "basicsr"),
        takes_origin=True,
    ),
)
