"""Where a user's own files lie: RESTORAY_HOME and its weights. Standard library only; importing reads nothing."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "RESTORAY_HOME"


def home() -> Path:
    """The folder for weights, caches and runs: $RESTORAY_HOME, else ~/.restoray."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.restoray").expanduser().absolute()


def weights_folder() -> Path:
    """Downloaded and imported weights: a model or prior lies below it under its own name."""
    return home() / "weights"


def stored_models() -> list[str]:
    """Names of the model folders among them."""
    return sorted(path.parent.name for path in weights_folder().glob("*/model.json"))
