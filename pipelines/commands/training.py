"""`restoray train` and `recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.support import complete_recipe, input_folders, plain, stored_inputs, yaml_text
from pipelines.commands.words import Address, DryRun, Json, Out, Overrides
from pipelines.core.console import Console
from pipelines.core.devices import check_gpus
from pipelines.core.errors import UsageError, unknown
from pipelines.core.home import shipped_files


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
    from pipelines.core.cluster import running_ray
    from pipelines.core.places.place import place_of
    from pipelines.core.places.working_copy import check_one_machine, working_copy
    from pipelines.runs.one_training import train_folder, train_inputs, train_one
    from pipelines.training.inputs import check_inputs
    from pipelines.training.train import store_mib

    folders = train_inputs(input_folders(inputs or []))
    check_inputs(resolved, folders)
    check_gpus(resolved)
    place = place_of(out)
    with working_copy(place) as folder:
        with (
            train_folder(resolved, folders, folder),
            running_ray(store_mib(resolved)),
            console.bar(resolved.name) as progress,
        ):
            check_one_machine(place, *stored_inputs(inputs or [], set(folders.corpora)))
            result = train_one(resolved, folders, folder, progress)
        lines = [f"model: {place / 'model'}"]
        if resolved.teacher:  # the student has passed its gate, otherwise train_one would have raised
            from pipelines.runs.registry import register

            version = register(resolved, folder)
            lines.append(f"registered as {resolved.name}, version {version}; {place / 'gate' / 'gate.json'}")
    console.result(plain(result), lines)


def recipes(
    name: Annotated[
        str | None, typer.Argument(autocompletion=complete_recipe, help="A recipe to print with all its settings.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, plans, datasets and degradations, or print one recipe resolved."""
    console = Console(silent=as_json)
    if name is not None:
        if not name.endswith((".yaml", ".yml")) and name not in shipped_files("recipes"):
            raise unknown("recipe", name, shipped_files("recipes"))
        from pipelines.training.recipes import load_checked_recipe, recipe_documents

        document, _ = recipe_documents(load_checked_recipe(name, []))
        console.result(document, [yaml_text(document)])
        return
    from components.degradations import PRESETS

    listing = {kind: sorted(shipped_files(kind)) for kind in ("recipes", "mixtures", "plans", "datasets")}
    listing["degradations"] = list(PRESETS)
    console.result(listing, [f"{kind}: {', '.join(names) or 'none'}" for kind, names in listing.items()])
