"""Folders of weights: shipped ones, and the user's below RESTORAY_HOME. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "RESTORAY_HOME"

SHIPPED = Path(__file__).parent / "priors" / "weights"
"""Folder of the model folders that ship with the code."""


def home() -> Path:
    """Return the folder for weights, caches and runs: $RESTORAY_HOME, else ~/.restoray."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.restoray").expanduser().absolute()


def weights_folder() -> Path:
    """Return the folder of downloaded and imported weights; each model or prior has a folder of its name in it."""
    return home() / "weights"


def stored_models() -> list[str]:
    """Return the names of the model folders in `weights_folder`."""
    return sorted(path.parent.name for path in weights_folder().glob("*/model.json"))


def shipped_models() -> list[str]:
    """Return the names of the shipped model folders."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/model.json"))
