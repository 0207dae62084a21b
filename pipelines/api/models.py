"""`restoray.models`: the models that `load`, `restore` and `serve` can name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from components.places import SHIPPED_MODELS, shipped_models, stored_models, weights_folder
from components.systems import SYSTEMS
from pipelines.runs.registry import registered_models


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model that restores.

    Attributes:
        name: what `load` takes.
        kind: "shipped", "stored" (in RESTORAY_HOME/weights, by an import for example) or "registered" (in the MLflow
            store of a run in ./runs or RESTORAY_HOME/runs).
        system: its system.
        licence: of its weights, as model.json states it.
        folder: the model folder.
    """

    name: str
    kind: str
    system: str
    licence: str
    folder: Path


def models() -> list[ModelEntry]:
    """List the models that restore: shipped ones, those in RESTORAY_HOME/weights, and registered ones.

    Any model folder can be used by its path, also one that is not in this list. A model of SYSTEMS that cannot restore,
    a prior for example, is left out, and so is a folder whose model.json is broken (`restoray doctor` names it).
    """
    shipped = [(name, "shipped", SHIPPED_MODELS / name) for name in shipped_models()]
    stored = [(name, "stored", weights_folder() / name) for name in stored_models()]
    registered = [(name, "registered", folder) for name, folder in registered_models()]
    return [entry for name, kind, folder in (*shipped, *stored, *registered) for entry in _entries(name, kind, folder)]


def _entries(name: str, kind: str, folder: Path) -> Iterator[ModelEntry]:
    """Yield the entry of a model folder; nothing if it does not restore."""
    try:
        info = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        system = SYSTEMS.get(str(info["system"]))
        if system is not None and system.check_options is not None:
            licence = str(info.get("licence", "unstated"))
            yield ModelEntry(name=name, kind=kind, system=str(info["system"]), licence=licence, folder=folder)
    except (OSError, ValueError, KeyError, TypeError):
        return
