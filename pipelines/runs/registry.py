"""Models by name: finds models:/name@alias in local MLflow stores, and registers trained students."""

from __future__ import annotations

from pathlib import Path

from components.recipes import Recipe
from pipelines.core.errors import RestorayError, UsageError
from pipelines.core.home import runs_folder
from pipelines.runs.tracking import Tracker, resolve


def local_model(name: str) -> Path | str:
    """The model of a name: models:/name@alias gives the folder in the newest run that has it.

    Every other name is returned as it is, as a Path if such a folder exists.

    Raises:
        UsageError: no run in ./runs or under RESTORAY_HOME has such a model.
    """
    if not name.startswith("models:/"):
        return Path(name) if Path(name).exists() else name

    stores = [store for root in (Path("runs"), runs_folder()) for store in root.glob("*/mlflow.db")]
    reason = "no run with an mlflow.db is in ./runs or under RESTORAY_HOME"
    for store in sorted(stores, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return resolve(name, store.parent)
        except RestorayError as error:
            reason = str(error)
    raise UsageError(f'no model "{name}": {reason}')


def registered_models() -> list[tuple[str, Path]]:
    """Return the addresses models:/name@alias and folders of the models in local MLflow stores, the newest store first.

    An address that several stores have is that of the newest. A store or model that cannot be read is left out.
    """
    stores = [store for root in (Path("runs"), runs_folder()) for store in root.glob("*/mlflow.db")]
    folders: dict[str, Path] = {}
    for store in sorted(stores, key=lambda path: path.stat().st_mtime, reverse=True):
        tracker = Tracker(store.parent)
        try:
            for address in tracker.addresses():
                if address not in folders:
                    folders[address] = tracker.resolve(address)
        except RestorayError:
            continue
    return list(folders.items())


def register(recipe: Recipe, out: Path) -> int | None:
    """Register a student that has passed its gate, in the MLflow store of the training's folder.

    Returns:
        The version; None while the store cannot be reached.
    """
    tracker = Tracker(out, recipe.name)
    run = tracker.start_parent(recipe.name, {"teacher": str(recipe.teacher)})
    version = tracker.register_model(run, out / "model", recipe.name)
    tracker.finish(run)
    return version
