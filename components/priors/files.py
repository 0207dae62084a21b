"""Reads configuration files and model folders of priors, and shortens errors to one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from components.models import Model, ModelError, load_strictly
from components.places import SHIPPED_PRIORS

Precision = Literal["fp32", "bf16", "fp16", "fp8"]

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}
"""The dtype that networks compute in. With fp8 their weights are stored in 8 bits, see components.weight_storage."""


def check_prior_folder(model: Model) -> None:
    """Raises ModelError unless a model folder holds a prior: model.json then names the system "prior"."""
    if model.info["system"] != "prior":
        raise ModelError(f"{model.path}: holds a {model.info['system']} model, not a prior")


class Fillable(Protocol):
    """A prior whose weights and name can be replaced."""

    name: str
    digest: str

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...


def fill_prior(prior: Fillable, model: Model) -> None:
    """Loads the weights of a model folder into an untrained prior and names the prior after it.

    The name identifies it: a shipped name, or the path of the folder.

    Raises:
        ModelError: a part is missing, or its weights do not fit; the message names every key.
    """
    for part, module in prior.modules.items():
        load_strictly(module, model.part(part), f"{model.path}: part {part}")
    prior.name = model.path.name if model.path.parent == SHIPPED_PRIORS else str(model.path.resolve())
    prior.digest = model.digest


def read_json(path: Path) -> dict[str, Any]:
    """Reads a configuration file. Raises ModelError if it is missing or not a JSON object."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path}: not a configuration (a JSON object)")
    return document


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
