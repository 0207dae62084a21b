"""The systems, in one dictionary. Adding one: its module or folder here, a line below, a recipe, a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.captions.views import View
from components.options import SystemOptionCheck
from components.recipes import Recipe
from components.systems.instantir import options as instantir_options
from components.systems.instantir import released as instantir_released
from components.systems.instantir.recipe import InstantIRRecipe
from components.systems.instarevive import options as instarevive_options
from components.systems.instarevive import released as instarevive_released
from components.systems.instarevive.recipe import InstaReviveRecipe
from components.systems.instarevive.views import CoarseView
from components.systems.prior_recipe import PriorRecipe
from components.systems.swinir import options as swinir_options
from components.systems.swinir import released as swinir_released
from components.systems.swinir.recipe import SwinIRRecipe
from components.systems.weights_io import Exported, Imported, Shapes, WeightsIO

if TYPE_CHECKING:
    from torch import Tensor

    from components.types import Objective, Restorer


@dataclass(frozen=True, kw_only=True)
class System:
    """One restoration (or prior) system.

    Attributes:
        recipe: dataclass of its recipes.
        stages: training stages and the integer version of each: raise it when a code change alters what a stage makes.
        follows: stage -> the stage whose model it goes on from; a stage that is not named starts from the recipe alone.
        continues: stage -> the stages whose models may be given as its start, in the place of the one before or of the
            recipe's warm start: what was trained, or published, is trained on.
        build_objective: (recipe, parent models by stage, callable for example pictures or None, device=) -> objective.
        look: (objective, recipe, LQ pictures, prompts, seed) -> pictures to look at while it trains; None for none.
        measure: (objective, held-out batches) -> numbers for the model card; None for none.
        build_restorer: (model folder, keyword options) -> restorer; None where the system restores nothing by itself.
        check_options: judges and types a request's options without torch; None as build_restorer.
        restore_defaults: resolved recipe -> the options that it settles for its model's restorer; torch-free too.
        precomputed: stage -> which columns its objective takes in an encoder's place ("latents", "embeddings").
        encoded_with: (recipe, parent folders by stage) -> the prior whose encoders these columns must come from.
        views: pictures of the system's own that a captioner may look at, by name; torch-free, called in data tasks. One
            that looks through a model of the recipe's has `for_recipe(recipe)`, which gives the view to use.
        weights: reads and writes the weights that its authors published; None where there are none.
    """

    recipe: type[Recipe]
    stages: Mapping[str, int]
    build_objective: Callable[..., Objective]
    follows: Mapping[str, str] = field(default_factory=dict)
    continues: Mapping[str, Sequence[str]] = field(default_factory=dict)
    look: Callable[..., Tensor] | None = None
    measure: Callable[..., dict[str, float]] | None = None
    build_restorer: Callable[..., Restorer] | None = None
    check_options: SystemOptionCheck | None = None
    restore_defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda recipe: {}
    precomputed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    encoded_with: Callable[[Any, Mapping[str, Path]], str] = lambda recipe, parents: str(recipe.prior)
    views: Mapping[str, View] = field(default_factory=dict)
    weights: WeightsIO | None = None


# torch is imported by the builders, not here: listing recipes must stay fast
def _prior_objective(*args: Any, **kwargs: Any) -> Objective:
    from components.systems.prior import build_objective

    return build_objective(*args, **kwargs)


def _instantir_objective(*args: Any, **kwargs: Any) -> Objective:
    from components.systems.instantir.build import build_objective

    return build_objective(*args, **kwargs)


def _prior_look(*args: Any, **kwargs: Any) -> Tensor:
    from components.systems.prior import look

    return look(*args, **kwargs)


def _prior_measure(*args: Any, **kwargs: Any) -> dict[str, float]:
    from components.systems.prior import measure

    return measure(*args, **kwargs)


def _instantir_look(*args: Any, **kwargs: Any) -> Tensor:
    from components.systems.instantir.looks import look

    return look(*args, **kwargs)


def _instantir_restorer(*args: Any, **kwargs: Any) -> Restorer:
    from components.systems.instantir.build import build_restorer

    return build_restorer(*args, **kwargs)


def _instantir_import(*args: Any, **kwargs: Any) -> Imported:
    from components.systems.instantir.weights import import_weights

    return import_weights(*args, **kwargs)


def _instantir_export(*args: Any, **kwargs: Any) -> Exported:
    from components.systems.instantir.weights import export_weights

    return export_weights(*args, **kwargs)


def _instantir_layout(*args: Any, **kwargs: Any) -> Shapes:
    from components.systems.instantir.weights import expected_layout

    return expected_layout(*args, **kwargs)


def _instarevive_objective(*args: Any, **kwargs: Any) -> Objective:
    from components.systems.instarevive.training import build_objective

    return build_objective(*args, **kwargs)


def _instarevive_encoded_with(*args: Any) -> str:
    from components.systems.instarevive.training import encoded_with

    return encoded_with(*args)


def _instarevive_look(*args: Any, **kwargs: Any) -> Tensor:
    from components.systems.instarevive.training import look

    return look(*args, **kwargs)


def _instarevive_measure(*args: Any, **kwargs: Any) -> dict[str, float]:
    from components.systems.instarevive.training import measure

    return measure(*args, **kwargs)


def _instarevive_restorer(*args: Any, **kwargs: Any) -> Restorer:
    from components.systems.instarevive.build import build_restorer

    return build_restorer(*args, **kwargs)


def _instarevive_import(*args: Any, **kwargs: Any) -> Imported:
    from components.systems.instarevive.weights import import_weights

    return import_weights(*args, **kwargs)


def _instarevive_export(*args: Any, **kwargs: Any) -> Exported:
    from components.systems.instarevive.weights import export_weights

    return export_weights(*args, **kwargs)


def _instarevive_layout(*args: Any, **kwargs: Any) -> Shapes:
    from components.systems.instarevive.weights import expected_layout

    return expected_layout(*args, **kwargs)


def _swinir_objective(*args: Any, **kwargs: Any) -> Objective:
    from components.systems.swinir.objective import build_objective

    return build_objective(*args, **kwargs)


def _swinir_look(*args: Any, **kwargs: Any) -> Tensor:
    from components.systems.swinir.objective import look

    return look(*args, **kwargs)


def _swinir_measure(*args: Any, **kwargs: Any) -> dict[str, float]:
    from components.systems.swinir.objective import measure

    return measure(*args, **kwargs)


def _swinir_restorer(*args: Any, **kwargs: Any) -> Restorer:
    from components.systems.swinir.restorer import build_restorer

    return build_restorer(*args, **kwargs)


def _swinir_import(*args: Any, **kwargs: Any) -> Imported:
    from components.systems.swinir.weights import import_weights

    return import_weights(*args, **kwargs)


def _swinir_export(*args: Any, **kwargs: Any) -> Exported:
    from components.systems.swinir.weights import export_weights

    return export_weights(*args, **kwargs)


def _swinir_layout(*args: Any, **kwargs: Any) -> Shapes:
    from components.systems.swinir.weights import expected_layout

    return expected_layout(*args, **kwargs)


SYSTEMS: dict[str, System] = {
    "prior": System(
        recipe=PriorRecipe,
        stages={"autoencoder": 1, "encoder": 2, "denoiser": 1},
        follows={"encoder": "autoencoder", "denoiser": "encoder"},
        build_objective=_prior_objective,
        look=_prior_look,
        measure=_prior_measure,
        precomputed={"denoiser": ("latents",)},  # its text encoders learn
        encoded_with=lambda recipe, parents: str(next(iter(parents.values()), recipe.warm_start)),
    ),
    "instantir": System(
        recipe=InstantIRRecipe,
        stages={"dcp": 2, "previewer": 2, "aggregator": 2},
        follows={"previewer": "dcp", "aggregator": "previewer"},
        continues={
            "dcp": ("dcp", "previewer", "aggregator"),
            "previewer": ("previewer", "aggregator"),
            "aggregator": ("aggregator",),
        },
        build_objective=_instantir_objective,
        look=_instantir_look,
        build_restorer=_instantir_restorer,
        check_options=instantir_options.check_options,
        restore_defaults=instantir_options.restore_defaults,
        precomputed=dict.fromkeys(("dcp", "previewer", "aggregator"), ("latents", "embeddings")),
        weights=WeightsIO(
            published=instantir_released.PUBLISHED,
            files=instantir_released.RELEASED,
            spellings=instantir_released.SPELLINGS,
            check_sizes=instantir_released.check_sizes,
            find=instantir_released.find_files,
            import_weights=_instantir_import,
            export_weights=_instantir_export,
            layout=_instantir_layout,
        ),
    ),
    "instarevive": System(
        recipe=InstaReviveRecipe,
        stages={"onestep": 1},
        continues={"onestep": ("onestep",)},
        build_objective=_instarevive_objective,
        look=_instarevive_look,
        measure=_instarevive_measure,
        build_restorer=_instarevive_restorer,
        check_options=instarevive_options.check_options,
        restore_defaults=instarevive_options.restore_defaults,
        precomputed={"onestep": ("latents", "embeddings")},
        encoded_with=_instarevive_encoded_with,
        views={"coarse": CoarseView()},
        weights=WeightsIO(
            published=instarevive_released.PUBLISHED,
            files=instarevive_released.RELEASED,
            check_sizes=instarevive_released.check_sizes,
            find=instarevive_released.find_files,
            import_weights=_instarevive_import,
            export_weights=_instarevive_export,
            layout=_instarevive_layout,
        ),
    ),
    "swinir": System(
        recipe=SwinIRRecipe,
        stages={"restorer": 1},
        build_objective=_swinir_objective,
        look=_swinir_look,
        measure=_swinir_measure,
        build_restorer=_swinir_restorer,
        check_options=swinir_options.check_options,
        restore_defaults=swinir_options.restore_defaults,
        weights=WeightsIO(
            published=swinir_released.PUBLISHED,
            files=swinir_released.RELEASED,
            check_sizes=swinir_released.check_sizes,
            find=swinir_released.find_files,
            import_weights=_swinir_import,
            export_weights=_swinir_export,
            layout=_swinir_layout,
        ),
    ),
}


def parent_stage(recipe: Recipe) -> str:
    """The stage whose model a recipe's stage goes on from; "" for a first stage, or one that a warm start replaces."""
    return "" if getattr(recipe, "warm_start", "") else SYSTEMS[recipe.system].follows.get(recipe.stage, "")


def build_restorer(model: str | Path, **options: Any) -> Restorer:
    """The restorer of a trained model folder or shipped model.

    Raises:
        ModelError: no usable model, an unknown system, or a system that does not restore.
    """
    from components.models import ModelError, load_model
    from components.naming import did_you_mean

    folder = load_model(model)
    system = SYSTEMS.get(folder.info["system"])
    if system is None:
        raise ModelError(f"{folder.path}: unknown system. {did_you_mean(str(folder.info['system']), SYSTEMS)}")
    if system.build_restorer is None:
        raise ModelError(f"{folder.path}: a {folder.info['system']!r} model does not restore pictures by itself")
    return system.build_restorer(folder, **options)
