"""Where things lie: RESTORAY_HOME for what a user keeps, and the data files that come with the code.

Nothing is read or made at import; folders are made by whoever writes to them.
"""

from __future__ import annotations

from pathlib import Path

from components.places import HOME_VARIABLE as HOME_VARIABLE
from components.places import home as home
from components.places import weights_folder as weights_folder


def cache_folder() -> Path:
    """What can be made again: precomputed embeddings, decoded metric files."""
    return home() / "cache"


def runs_folder() -> Path:
    """Runs that were given no --out, one folder each."""
    return home() / "runs"


def package_folder() -> Path:
    """The folder of the installed `pipelines` package, with recipes/, mixtures/ and plans/ inside."""
    return Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """`datasets` or `clusters`: at the top of a checkout, inside the package of a wheel.

    Raises:
        FileNotFoundError: neither place has it, so the installation is broken.
    """
    packaged, checkout = package_folder() / "_data" / name, package_folder().parent / name
    # Only a checkout has pyproject.toml beside the packages; in site-packages `datasets` is somebody else's package.
    folder = checkout if (checkout.parent / "pyproject.toml").is_file() else packaged
    if not folder.is_dir():
        raise FileNotFoundError(f"the installation has no {name} folder; expected it at {folder}")
    return folder


def shipped(kind: str) -> dict[str, Path]:
    """YAML files that come with the code by name: kind is recipes, mixtures, plans, datasets or clusters."""
    folder = package_folder() / kind if kind in ("recipes", "mixtures", "plans") else data_folder(kind)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
