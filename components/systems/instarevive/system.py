"""InstaRevive as a system: one stage, which distils a prior into a one-step restoration generator."""

from __future__ import annotations

from components.options import restore_defaults
from components.systems.instarevive.options import check_options
from components.systems.instarevive.recipe import InstaReviveRecipe
from components.systems.instarevive.released import (
    LICENCE,
    PUBLISHED,
    RELEASE_DEFAULTS,
    RELEASED,
    check_sizes,
    find_files,
)
from components.systems.instarevive.views import CoarseView
from components.systems.system import Networks, Stage, System
from components.systems.weights_io import WeightsCode, WeightsIO


def networks() -> Networks:
    """Imports torch."""
    from components.systems.instarevive.build import build_restorer
    from components.systems.instarevive.training import build_objective, encoded_with, look, measure

    return Networks(
        objectives={"onestep": build_objective},
        look=look,
        measure=measure,
        encoded_with=encoded_with,
        build_restorer=build_restorer,
    )


def weights_code() -> WeightsCode:
    """Imports torch."""
    from components.systems.instarevive.weights import expected_layout, export_weights, import_weights

    return WeightsCode(import_weights=import_weights, export_weights=export_weights, layout=expected_layout)


INSTAREVIVE = System(
    recipe=InstaReviveRecipe,
    stages=(Stage(name="onestep", version=1, continues=("onestep",), precomputed=("latents", "embeddings")),),
    networks=networks,
    check_options=check_options,
    restore_defaults=restore_defaults,
    views={"coarse": CoarseView()},
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
