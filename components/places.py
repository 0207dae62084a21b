"""Folders of weights: shipped ones, and the user's below RESTORAY_HOME. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "RESTORAY_HOME"

SHIPPED_PRIORS = Path(__file__).parent / "priors" / "weights"
SHIPPED_MODELS = Path(__file__).parent / "systems" / "weights"
"""Folders of the model folders that ship with the code. A prior and a restorer may have the same name."""


def home() -> Path:
    """Return the folder for weights, caches and runs: $RESTORAY_HOME, else ~/.restoray."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.restoray").expanduser().absolute()


def weights_folder() -> Path:
    """Return the folder of downloaded and imported weights; each model or prior has a folder of its name in it."""
    return home() / "weights"


def find_model_folder(name: str | Path, prior: bool = False) -> Path | None:
    """Return the model folder of a path, a shipped name or a name below `weights_folder`; None if there is none.

    Args:
        prior: a shipped name is that of a prior, else that of a restorer.
    """
    shipped = SHIPPED_PRIORS if prior else SHIPPED_MODELS
    for path in (Path(name), shipped / str(name), weights_folder() / str(name)):
        if (path / "model.json").is_file():
            return path
    return None


def on_this_machine(folder: Path) -> Path:
    """Return our folder for one of shipped weights as another machine's installation names it; others stay as they are.

    A driver sends folders to the workers of a cluster, whose code lies elsewhere.
    """
    if not (folder / "model.json").is_file():
        for shipped in (SHIPPED_MODELS, SHIPPED_PRIORS):
            if folder.parts[-4:-1] == shipped.parts[-3:] and (shipped / folder.name).is_dir():
                return shipped / folder.name
    return folder


def stored_models() -> list[str]:
    """Return the names of the model folders in `weights_folder`."""
    return sorted(path.parent.name for path in weights_folder().glob("*/model.json"))


def shipped_models() -> list[str]:
    """Return the names of the shipped restorers."""
    return sorted(path.parent.name for path in SHIPPED_MODELS.glob("*/model.json"))


def shipped_priors() -> list[str]:
    """Return the names of the shipped priors."""
    return sorted(path.parent.name for path in SHIPPED_PRIORS.glob("*/model.json"))
