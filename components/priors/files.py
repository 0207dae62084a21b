"""Reads configuration files of priors, and shortens errors to one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from components.models import Model, ModelError

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
