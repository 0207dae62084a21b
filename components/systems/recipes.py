"""Loads recipes by name: a YAML file, its mixture and key=value changes become a checked dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.naming import did_you_mean
from components.overrides import literal
from components.recipes import CORPUS, Recipe, RecipeError, resolve
from components.systems import SYSTEMS

RECIPES = Path(__file__).resolve().parents[2] / "pipelines" / "recipes"
MIXTURES = RECIPES.parent / "mixtures"


def recipe_names(folder: Path = RECIPES) -> list[str]:
    """Names of the recipes in a folder."""
    return sorted(p.stem for p in folder.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] = (), folder: Path = RECIPES) -> Recipe:
    """Load and check a recipe.

    Args:
        name: a recipe's name in `folder`, or a path to a YAML file.
        overrides: "key=value" changes, dots for nested keys.

    Raises:
        RecipeError: no such recipe or system, an unknown key, a wrong type, a value out of range, or a missing value.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name}.yaml"
        if not path.is_file():
            raise RecipeError(f"no recipe {str(name)!r}. {did_you_mean(str(name), recipe_names(folder))}")
    if not path.is_file():
        raise RecipeError(f"no recipe file {str(name)!r}")
    document = _load_yaml(path)
    if not isinstance(document, DictConfig):
        raise RecipeError(f"{path.name} is not a recipe: it is not a mapping")
    document.setdefault("name", literal(path.stem))
    system = document.get("system")
    if system not in SYSTEMS:
        raise RecipeError(f"{path.name}: unknown system {system!r}. {did_you_mean(str(system), SYSTEMS)}")
    schema = SYSTEMS[system].recipe
    for override in overrides:
        if override.startswith("mixture="):
            document["mixture"] = literal(override.partition("=")[2])
    if document.get("mixture"):
        mixture = load_mixture(document["mixture"])
        document["sources"], document["captioners"] = mixture["sources"], mixture.get("captioners", {})
    recipe: Recipe = resolve(schema, document, overrides, path.name)
    sources = {**CORPUS, **(document.get("sources") or {}), **recipe.sources}  # includes sources of weight 0
    for source in recipe.captioners:
        if source not in sources:
            raise RecipeError(
                f"{path.name}: captioners names {source!r}, which is not a source. {did_you_mean(source, sources)}"
            )
    try:
        SYSTEMS[system].stage(recipe.stage)
    except RecipeError as error:
        raise RecipeError(f"{path.name}: {error}") from error
    return recipe


def load_mixture(name: str | Path, folder: Path = MIXTURES) -> dict[str, Any]:
    """The mixture of a recipe: {"sources": {input: weight}, "captioners": {input: captioner}}.

    Raises:
        RecipeError: no such mixture, or a file of another form.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name}.yaml"
        if not path.is_file():
            raise RecipeError(f"no mixture {str(name)!r}. {did_you_mean(str(name), recipe_names(folder))}")
    if not path.is_file():
        raise RecipeError(f"no mixture file {str(name)!r}")
    document = OmegaConf.to_container(_load_yaml(path))
    mixture = {str(k): v for k, v in document.items()} if isinstance(document, dict) else {}
    wrong = [key for key in mixture if key not in ("sources", "captioners") or not isinstance(mixture[key], dict)]
    if wrong or not mixture.get("sources"):
        what = f"{wrong[0]!r} is neither" if wrong else "there are no sources"
        raise RecipeError(f"{path.name}: a mixture maps sources to weights, and captioners to sources; {what}")
    return mixture


def _load_yaml(path: Path) -> Any:
    """The document of a YAML file. Raises RecipeError if the file cannot be read as YAML."""
    try:
        return OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"{path.name} cannot be read: {reason:.500}") from error
