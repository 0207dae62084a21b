"""The digest of a stage: sha256 over everything that determines its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.captions.presets import folder_digest
from components.places import find_model_folder
from components.recipes import Recipe


def canonical(document: Any) -> bytes:
    """JSON bytes with sorted keys and no spaces: equal documents give equal bytes. NaN raises ValueError."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogateescape")  # a path may hold bytes that are not text


def stage_digest(resolved: Mapping[str, Any], inputs: Mapping[str, str], version: int) -> str:
    """sha256 of a stage's identity.

    Args:
        resolved: settings and recipe without placement keys, as plain data.
        inputs: digest of each stage that this one needs, by name.
        version: the verb's integer version.
    """
    return hashlib.sha256(canonical({"recipe": resolved, "inputs": inputs, "version": version})).hexdigest()


def model_digest(model: str, prior: bool = False) -> str:
    """sha256 of the model.json of a folder or shipped model; "" for other names, such as a hub's."""
    folder = find_model_folder(model, prior) if model else None
    return "" if folder is None else hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()


def train_identity(recipe: Recipe) -> dict[str, Any]:
    """Digests of the local weights that a training starts from, and of its local captioner.

    A hub id has no digest here: the recipe holds its name.
    """
    identity: dict[str, Any] = {}
    starts = {
        "prior": recipe.prior,
        "warm_start": recipe.warm_start,
        "coarse": recipe.coarse,
        "teacher": recipe.teacher,
    }
    for name, start in starts.items():
        prior = name == "prior" or (name == "warm_start" and recipe.trains_prior)
        if digest := model_digest(start, prior):
            identity[name] = digest
    captioner = Path(recipe.missing_captions.model).expanduser() if recipe.missing_captions.model else None
    if captioner and captioner.is_dir():
        identity["captioner"] = folder_digest(captioner)
    return identity
