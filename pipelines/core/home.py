"""Paths: the user's data in RESTORAY_HOME, and the data files of the package.

The import of this module reads and creates nothing. The code that writes to a folder creates it.
"""

from __future__ import annotations

from pathlib import Path

from components.places import HOME_VARIABLE as HOME_VARIABLE
from components.places import home as home
from components.places import weights_folder as weights_folder


def cache_folder() -> Path:
    """Folder for data that can be computed again: precomputed embeddings, decoded metric files."""
    return home() / "cache"


def runs_folder() -> Path:
    """Folder for runs without --out, one sub-folder per run."""
    return home() / "runs"


def package_folder() -> Path:
    """Folder of the installed `pipelines` package; it holds recipes/, mixtures/ and plans/."""
    return Path(__file__).resolve().parents[1]


def data_folder(name: str) -> Path:
    """Path of `datasets` or `clusters`: at the top of a checkout, inside the package in a wheel.

    Raises:
        FileNotFoundError: neither place has the folder, so the installation is broken.
    """
    in_package, in_checkout = package_folder() / "_data" / name, package_folder().parent / name
    # Only a checkout has pyproject.toml next to the packages. In site-packages, `datasets` is another project's.
    folder = in_checkout if (in_checkout.parent / "pyproject.toml").is_file() else in_package
    if not folder.is_dir():
        raise FileNotFoundError(f"the installation has no {name} folder; expected it at {folder}")
    return folder


def shipped_files(kind: str) -> dict[str, Path]:
    """YAML files of the package by name; `kind` is recipes, mixtures, plans, datasets or clusters."""
    folder = package_folder() / kind if kind in ("recipes", "mixtures", "plans") else data_folder(kind)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
