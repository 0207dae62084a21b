"""`restoray train` and `recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.support import complete_recipe, named_inputs, plain, yaml_text
from pipelines.commands.words import Address, DryRun, Json, Out, Overrides
from pipelines.core.console import Console
from pipelines.core.errors import UsageError


def train(
    recipe: Annotated[str, typer.Argument(autocompletion=complete_recipe, help="The name of a recipe or a YAML file.")],
    overrides: Overrides = None,
    out: Out = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", metavar="NAME=FOLDER", help="A corpus or the folder of an earlier stage; may be repeated."
        ),
    ] = None,
    dry_run: DryRun = False,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Train one stage from its recipe."""
    from pipelines.training.recipes import load_checked_recipe, recipe_documents

    console = Console(silent=as_json)
    resolved = load_checked_recipe(recipe, overrides or [])
    if dry_run:
        document, _ = recipe_documents(resolved)
        console.result(document, [yaml_text(document)])
        return
    if out is None:
        raise UsageError("train needs --out FOLDER (or --dry-run).")
    from pipelines.api.training import train_recipe
    from pipelines.core.places.place import place_of

    place = place_of(out)
    result, version = train_recipe(resolved, named_inputs(inputs or []), place, console)
    lines = [f"model: {place / 'model'}"]
    if resolved.teacher:
        lines.append(f"registered as {resolved.name}, version {version}; {place / 'gate' / 'gate.json'}")
    console.result(plain(result), lines)


def recipes(
    name: Annotated[
        str | None, typer.Argument(autocompletion=complete_recipe, help="A recipe to print with all its settings.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, plans, datasets and degradations, or print one recipe resolved."""
    from pipelines.api.training import recipes as list_recipes

    console, document = Console(silent=as_json), list_recipes(name)
    if name is not None:
        console.result(document, [yaml_text(document)])
        return
    console.result(document, [f"{kind}: {', '.join(names) or 'none'}" for kind, names in document.items()])
