"""Model folders in stores: fetched once into a folder of this machine, whose bytes have the sha256 of model.json."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from components.writing import replace_file
from pipelines.core.errors import Failure, UsageError
from pipelines.core.folders import folder_lock, waiting
from pipelines.core.home import cache_folder
from pipelines.core.places.files import sha256_of
from pipelines.core.places.place import Place


def fetch_model(place: Place) -> Path:
    """The local copy of a model folder; fetches what is missing. Processes of one machine fetch one after the other.

    Returns:
        A folder below RESTORAY_HOME/cache/models; its name is the sha256 of model.json, so a model that changes in its
        place gets another one.

    Raises:
        UsageError: the place holds no model.
        Failure: a file is not the one that model.json names.
    """
    place.check()
    try:
        text = (place / "model.json").read_bytes()
        info = json.loads(text)
        files = {part["file"]: part["sha256"] for part in info["parts"].values()}
        files |= {f"files/{name}": sha256 for name, sha256 in info["files"].items()}
    except FileNotFoundError:
        raise UsageError(f"{place} is no model folder: it holds no model.json.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{place}: model.json is not that of a model.") from None
    folder = cache_folder() / "models" / hashlib.sha256(text).hexdigest()[:16]
    if (folder / "model.json").is_file():  # comes last
        return folder
    with waiting(folder_lock, folder):
        for name, sha256 in files.items():
            _fetch(place, folder, name, sha256)
        replace_file(folder / "model.json", text)
    return folder


def _fetch(place: Place, folder: Path, name: str, sha256: str) -> None:
    target = folder / name
    if ".." in Path(name).parts or os.path.isabs(name):
        raise UsageError(f"{place}: model.json names the file {name!r}, which is not below it.")
    if target.is_file() and sha256_of(target) == sha256:
        return
    (place / name).download(target)
    if sha256_of(target) != sha256:
        target.unlink()
        raise Failure(f"{place / name} does not have the sha256 that model.json names.")
