"""A system: its recipe, its training stages, its restorer and its published weights. Torch-free.

Only `networks` needs torch, and imports it when it is called. Listing recipes stays fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.captions.views import View
from components.naming import did_you_mean
from components.options import SystemOptionCheck
from components.recipes import Recipe, RecipeError
from components.systems.weights_io import WeightsIO
from components.types import Batch, Objective, Restorer

if TYPE_CHECKING:
    from torch import Tensor

    from components.models import Model


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage of a system.

    Attributes:
        name: as in recipes.
        version: increased by hand when a change of the code alters the stage's result.
        follows: the stage whose model this stage starts from; "" for a stage that starts from the recipe alone.
        continues: stages whose models may replace the model of `follows`, or the recipe's warm start. A trained or
            published model is then trained further.
        keys: recipe keys that this stage reads and at least one other stage of the system ignores.
        warm_starts_beside: whether a warm start may be given beside the model of `follows`.
        precomputed: columns that replace an encoder in its objective: "latents", "embeddings".
    """

    name: str
    version: int
    follows: str = ""
    continues: Sequence[str] = ()
    keys: Sequence[str] = ()
    warm_starts_beside: bool = False
    precomputed: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How models that are small parts on a large prior hold that prior in memory once.

    Attributes:
        prior_of: model folder -> (text that is equal for models that can share their prior, the prior's name for
            people).
        build: (model folders on one prior, keyword options of build_restorer) -> a restorer of each, in order. Each
            restores as it does alone, bit for bit, whatever the others do before or at the same time.
    """

    prior_of: Callable[[Model], tuple[str, str]]
    build: Callable[..., Sequence[Restorer]]


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The part of a system that needs torch.

    Attributes:
        objectives: builder by stage: (recipe, parent models by stage, callable for example pictures or None, device=)
            -> objective.
        look: (objective, recipe, LQ pictures, prompts, seed) -> previews during training; None if there are none.
        measure: (objective, held-out batches) -> numbers for the model card; None if there are none.
        encoded_with: (recipe, parent folders by stage) -> name of the prior that must have encoded the columns.
        build_restorer: (model folder, keyword options) -> restorer; None if the system restores nothing by itself.
        plan_memory: (model folder, (height, width), restorer options, precision, offload) -> peak_memory.MemoryPlan;
            None if the system cannot tell.
        precisions: what build_restorer takes for `precision`.
        sharing: how several models hold one prior; None if each has its own.
    """

    objectives: Mapping[str, Callable[..., Objective]] = field(default_factory=dict)
    look: Callable[..., Tensor | None] | None = None
    measure: Callable[..., dict[str, float]] | None = None
    encoded_with: Callable[[Any, Mapping[str, Path]], str] = lambda recipe, parents: str(recipe.prior)
    build_restorer: Callable[..., Restorer] | None = None
    plan_memory: Callable[..., Any] | None = None
    precisions: Sequence[str] = ("fp32", "bf16", "fp16")
    sharing: Sharing | None = None


@dataclass(frozen=True, kw_only=True)
class System:
    """One restoration (or prior) system.

    Attributes:
        recipe: dataclass of its recipes.
        stages: its training stages, in order.
        networks: imports torch and returns the part that needs it.
        check_options: checks and types a request's options without torch; None if it restores nothing by itself.
        restore_defaults: resolved recipe -> default options of its model's restorer; torch-free.
        own_scale: config of a model -> the result's side over the picture's for `scale=keep`; 1 for networks that keep
            the size.
        views: the system's own views for captioners, by name; data tasks call them.
        weights: reads and writes the weights that its authors published; None if there are none.
    """

    recipe: type[Recipe]
    stages: Sequence[Stage]
    networks: Callable[[], Networks]
    check_options: SystemOptionCheck | None = None
    restore_defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda recipe: {}
    own_scale: Callable[[Mapping[str, Any]], float] = lambda config: 1.0
    views: Mapping[str, View] = field(default_factory=dict)
    weights: WeightsIO | None = None

    def stage(self, name: str) -> Stage:
        """The stage of that name; RecipeError with the nearest name if there is none."""
        return stage_of(self.stages, name)

    def build_objective(
        self,
        recipe: Recipe,
        parents: Mapping[str, Model],
        examples: Callable[[], Tensor] | None = None,
        device: str = "cpu",
    ) -> Objective:
        """The objective of a recipe's stage.

        Args:
            recipe: resolved recipe.
            parents: models to start from, by the stage that trained them.
            examples: returns pictures [N, 3, H, W] in [-1, 1], for objectives that need examples when they are built.
            device: where the networks go.

        Raises:
            ModelError: a parent, prior or warm start is missing or does not fit.
        """
        return self.networks().objectives[self.stage(recipe.stage).name](recipe, parents, examples, device=device)

    def look(
        self, objective: Objective, recipe: Recipe, lq: Tensor, prompts: Sequence[str], seed: int
    ) -> Tensor | None:
        """Previews of LQ pictures [B, 3, H, W] in [-1, 1] by the networks in training; None if there is no preview."""
        look = self.networks().look
        return look(objective, recipe, lq, prompts, seed) if look is not None else None

    def measure(self, objective: Objective, heldout: Sequence[Batch]) -> dict[str, float]:
        """Numbers for the model card, measured on held-out batches; empty if the system has no measure."""
        measure = self.networks().measure
        return measure(objective, heldout) if measure is not None else {}


def stage_of(stages: Sequence[Stage], name: str) -> Stage:
    """The stage of that name; RecipeError with the nearest name if there is none."""
    for stage in stages:
        if stage.name == name:
            return stage
    raise RecipeError(f"unknown stage {name!r}. {did_you_mean(name, [stage.name for stage in stages])}")


def check_stage_keys(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Refuse a changed key that the recipe's stage does not read: it would have no effect.

    Raises:
        RecipeError: names the key and the stages that read it.
    """
    readers: dict[str, list[str]] = {}
    for stage in stages:
        for key in stage.keys:
            readers.setdefault(key, []).append(stage.name)
    items = {item.name: item for item in fields(recipe)}
    for key, names in readers.items():
        factory = items[key].default_factory
        default = items[key].default if factory is MISSING else factory()
        if recipe.stage not in names and getattr(recipe, key) != default:
            raise RecipeError(f"{key} is for stage {' and '.join(names)}, not {recipe.stage}")
