"""`restoray.train` and `restoray.recipes`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.degradations import PRESETS
from components.recipes import Recipe
from pipelines.api.settings import setting_texts
from pipelines.core.cluster import running_ray
from pipelines.core.console import Console
from pipelines.core.devices import check_gpus
from pipelines.core.errors import UsageError, unknown
from pipelines.core.home import shipped_files
from pipelines.core.metrics import OnMetrics
from pipelines.core.places.addresses import is_address
from pipelines.core.places.place import Where, place_of
from pipelines.core.places.working_copy import check_one_machine, local_copy, working_copy
from pipelines.corpus.stored import corpus_folder
from pipelines.runs.one_training import train_folder, train_inputs, train_one
from pipelines.runs.registry import register
from pipelines.training.inputs import check_inputs
from pipelines.training.recipes import load_checked_recipe, recipe_documents
from pipelines.training.train import TrainResult, store_mib


def train(
    recipe: str | Path,
    *,
    inputs: Mapping[str, str | Path] | None = None,
    out: str | Path,
    minutes: float = 0.0,
    on_metrics: OnMetrics | None = None,
    quiet: bool = False,
    **settings: Any,
) -> TrainResult:
    """Train one stage. The same call continues a training from its last checkpoint.

    Args:
        recipe: name of a recipe (`restoray.recipes()["recipes"]`), or a YAML file.
        inputs: corpora by the names in the recipe's `sources`, and folders of earlier stages; here or in a store.
        out: folder of the stage: model/, metrics.jsonl, samples/ and checkpoints.
        minutes: the training ends at its first checkpoint after this time; 0 for no limit.
        on_metrics: called now and then, in another thread, with the new rows (step, name, value, time in s since 1970).
        quiet: print no progress on standard error.
        settings: of the recipe; `optimizer__lr=1e-4` changes optimizer.lr.

    Returns:
        TrainResult: `model` (folder), `heldout` (losses by trainable and step) and `seconds`.

    Raises:
        UsageError: an unknown recipe or setting, wrong inputs, or `out` holds another training.
        Unfinished: the minutes are over; the same call continues.
        RetryLater: another process works in `out`.
        GateFailed: the trained student is worse than its teacher; its model stays in `out`.
        Failure: the training ended without a model.
    """
    resolved = load_checked_recipe(str(recipe), setting_texts(settings))
    console = Console(silent=quiet)
    return train_recipe(resolved, inputs or {}, place_of(out), console, minutes, on_metrics)[0]


def train_recipe(
    recipe: Recipe,
    inputs: Mapping[str, str | Path],
    out: Where,
    console: Console,
    minutes: float = 0.0,
    on_metrics: OnMetrics | None = None,
) -> tuple[TrainResult, int | None]:
    """Train a resolved recipe; see `train`. A student that has passed its gate is registered.

    Returns:
        The result, and the version of a registered student.
    """
    folders = train_inputs({name: input_folder(name, folder) for name, folder in inputs.items()})
    check_inputs(recipe, folders)
    check_gpus(recipe)
    # each node opens a corpus in a store by itself
    stored = [place_of(folder) for name, folder in inputs.items() if is_address(folder) and name not in folders.corpora]
    with working_copy(out) as folder:
        with (
            train_folder(recipe, folders, folder),
            running_ray(store_mib(recipe)),
            console.bar(recipe.name) as progress,
        ):
            check_one_machine(out, *stored)
            result = train_one(recipe, folders, folder, progress, minutes, on_metrics=on_metrics)
        # without its gate a student would have raised in train_one
        return result, register(recipe, folder) if recipe.teacher else None


def input_folder(name: str, folder: str | Path) -> Path:
    """Return the folder of a corpus or an earlier stage on this machine; one in a store is fetched.

    Raises:
        UsageError: there is no such folder.
    """
    if is_address(folder):
        where = place_of(folder)
        return corpus_folder(where) if (where / "index.json").is_file() else local_copy(where)
    if not Path(folder).is_dir():
        raise UsageError(f"input {name}: there is no folder {folder}.")
    return Path(folder)


def recipes(name: str | Path | None = None) -> dict[str, Any]:
    """List what is shipped by kind, or return one recipe with all its settings.

    Args:
        name: name of a recipe, or a YAML file; None for the lists.

    Returns:
        The names by kind (recipes, mixtures, plans, datasets, degradations), or the resolved recipe as nested mappings.

    Raises:
        UsageError: no recipe has that name; the message has the nearest one.
    """
    if name is None:
        listing = {kind: sorted(shipped_files(kind)) for kind in ("recipes", "mixtures", "plans", "datasets")}
        return {**listing, "degradations": list(PRESETS)}
    text = str(name)
    if not text.endswith((".yaml", ".yml")) and text not in shipped_files("recipes"):
        raise unknown("recipe", text, shipped_files("recipes"))
    return recipe_documents(load_checked_recipe(text, []))[0]
