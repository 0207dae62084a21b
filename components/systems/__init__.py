"""All systems by name. A new system needs a folder here, a line below, a recipe and a test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.naming import did_you_mean
from components.recipes import Recipe
from components.systems.dra.system import DRA
from components.systems.instantir.system import INSTANTIR
from components.systems.instarevive.system import INSTAREVIVE
from components.systems.prior.system import PRIOR
from components.systems.regressor.system import REGRESSOR
from components.systems.supir.system import SUPIR
from components.systems.swinir.system import SWINIR
from components.systems.system import System
from components.systems.unetres.system import UNETRES
from components.types import Restorer

if TYPE_CHECKING:
    from components.models import Model

SYSTEMS: dict[str, System] = {
    "prior": PRIOR,
    "instantir": INSTANTIR,
    "instarevive": INSTAREVIVE,
    "supir": SUPIR,
    "dra": DRA,
    "swinir": SWINIR,
    "unetres": UNETRES,
    "regressor": REGRESSOR,
}


def parent_stage(recipe: Recipe) -> str:
    """The stage whose model the recipe's stage starts from; "" for a first stage, or where a warm start replaces it."""
    return "" if recipe.warm_start else SYSTEMS[recipe.system].stage(recipe.stage).follows


def build_restorer(model: str | Path, **options: Any) -> Restorer:
    """The restorer of a trained model folder or shipped model.

    Raises:
        ModelError: no usable model, an unknown system, or a system that does not restore, or not in this precision.
    """
    from components.models import ModelError, load_model  # imports torch

    folder = load_model(model)
    system = SYSTEMS.get(folder.info["system"])
    if system is None:
        raise ModelError(f"{folder.path}: unknown system. {did_you_mean(str(folder.info['system']), SYSTEMS)}")
    networks = system.networks()
    build = networks.build_restorer
    if build is None:
        raise ModelError(f"{folder.path}: a {folder.info['system']!r} model does not restore pictures by itself")
    check_precision(folder, str(options.get("precision", "fp32")))
    return build(folder, **options)


def check_precision(folder: Model, precision: str) -> None:
    """Raises ModelError if models of this system do not run in a precision."""
    from components.models import ModelError  # imports torch

    system = str(folder.info["system"])
    precisions = SYSTEMS[system].networks().precisions
    if precision not in precisions:
        raise ModelError(
            f"{folder.path}: a {system!r} model does not run in {precision}, but in {', '.join(precisions)}"
        )
