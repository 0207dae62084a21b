"""Recipes for the command line and for plans: every name inside a recipe is checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.places import shipped_models, shipped_priors, stored_models
from components.recipes import Recipe, RecipeError, as_dict, identity, resolve
from components.systems import SYSTEMS
from components.systems.recipes import load_recipe
from pipelines.core.errors import UsageError, unknown
from pipelines.core.home import shipped_files
from pipelines.stream.texts import check_missing_captions


def resolve_settings(schema: type, document: Any, overrides: Sequence[str], where: str) -> Any:
    """Merge dataclass defaults, YAML and overrides into a dataclass; a wrong key or type raises UsageError."""
    try:
        return resolve(schema, document, list(overrides), where)
    except (RecipeError, ValueError) as error:
        raise UsageError(str(error)) from error


def load_checked_recipe(name: str, overrides: Sequence[str], teacher_follows: bool = False) -> Recipe:
    """Call components.systems.recipes.load_recipe and check the names inside; every error is a UsageError.

    Args:
        teacher_follows: another stage of the plan trains the teacher, so the recipe has none yet.
    """
    try:
        recipe = load_recipe(name, overrides)
    except RecipeError as error:
        raise UsageError(str(error)) from error
    if teacher_follows and (not recipe.distil or recipe.teacher):
        reason = "has one already" if recipe.teacher else "distils none"
        raise UsageError(f"{name}: the plan names a stage as the teacher, and the recipe {reason}.")
    check_recipe(recipe, teacher_follows)
    return recipe


def recipe_documents(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a recipe as plain data twice: complete, and for the digest."""
    return dict(as_dict(recipe)), dict(identity(recipe))


def recipe_version(recipe: Recipe) -> int:
    """Return the version number of the recipe's training stage."""
    return SYSTEMS[recipe.system].stage(recipe.stage).version


def check_recipe(recipe: Recipe, teacher_follows: bool = False) -> None:
    """Check the names inside a resolved recipe: degradation, prior, models, and the captioner of missing captions.

    Args:
        teacher_follows: see load_checked_recipe.

    Raises:
        UsageError: a name does not exist; the message suggests the closest one.
    """
    check_missing_captions(recipe)
    check_degradation(recipe.degradation.preset, recipe.degradation.options)
    if recipe.opens_prior:
        check_start("prior", recipe.prior, prior=True)
    if recipe.warm_start:
        check_start("warm_start", recipe.warm_start, prior=recipe.trains_prior)
    if recipe.distil and not recipe.teacher and not teacher_follows:
        raise UsageError(f"{recipe.name} distils a teacher, and none is set. Name a trained model: teacher=MODEL.")
    for key, name in (("coarse", recipe.coarse), ("encoder", recipe.encoder), ("teacher", recipe.teacher)):
        if name:
            check_start(key, name, hub=False)


def check_degradation(preset: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError unless the preset exists and takes these options."""
    from components.degradations import build_degradation

    try:
        build_degradation(preset, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def check_start(key: str, name: str, hub: bool = True, prior: bool = False) -> None:
    """Raises UsageError unless `name` is a shipped or stored model, an existing path, or (with hub) a hub id."""
    models = [*(shipped_priors() if prior else shipped_models()), *stored_models()]
    if name not in models and not Path(name).exists() and not (hub and re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        commands = [f"restoray train {name}"] if name in shipped_files("recipes") else []
        has_weights = name in SYSTEMS and SYSTEMS[name].weights is not None
        commands += [f"restoray weights import {name}"] if has_weights else []
        if commands and key in ("warm_start", "coarse"):
            raise UsageError(
                f"there is no model {name} for {key}: make it ({' or '.join(commands)}), name another folder with "
                f"{key}=MODEL, or leave it out with {key}=."
            )
        raise unknown(key, name, models)
