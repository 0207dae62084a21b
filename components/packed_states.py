"""A training state in a few megabytes, to go on elsewhere: averaged weights in half precision, and factored moments.

A full state has three float32 numbers for each weight besides the average. A packed one keeps the averaged weights
(those of the model folder, so they cost nothing). Of AdamW's second moments it keeps the means over rows and over
columns (Shazeer and Stern 2018, section 3). The first moments start at zero again: they are a mean of the last ten
gradients. So the training goes on at the same step with nearly the same step sizes, not with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.models import ModelError
from components.training import Ema
from components.types import Objective

WEIGHTS, ROWS, COLUMNS, WHOLE = "weights", "rows", "columns", "whole"


def pack_state(state: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a packed state.

    Args:
        state: of training.training_state.
        parts: of the model folder with the averaged weights; a trainable of the same name is not stored again.
    """
    tensors: dict[str, Tensor] = {}
    for name, weights in state["trainables"].items():
        if name not in parts:
            averaged = {key: state["ema"].get(f"{name}.{key}", value) for key, value in weights.items()}
            tensors |= {f"{WEIGHTS}/{name}/{key}": value.detach().half() for key, value in averaged.items()}
        moments = state["optimizers"][name]["state"]
        for key, entry in zip(weights, (moments.get(n) for n in range(len(weights))), strict=True):
            if entry is not None:
                tensors |= _factors(f"{name}/{key}", entry["exp_avg_sq"])
    return {key: value.contiguous().clone() for key, value in tensors.items()}


@torch.no_grad()
def unpack_state(
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Mapping[str, Tensor]],
    step: int,
    objective: Objective,
    optimizers: Mapping[str, torch.optim.Optimizer],
    ema: Ema | None,
) -> None:
    """Load a packed state into an objective, its optimisers and its average.

    Args:
        tensors: of pack_state.
        parts: of the model folder.
        step: finished steps, for AdamW's bias correction.

    Raises:
        ModelError: weights are missing or have another shape; the message names them.
    """
    for name, module in objective.trainables.items():
        own = {key: p for key, p in module.named_parameters() if p.requires_grad}
        prefix = f"{WEIGHTS}/{name}/"
        stored = parts.get(name) or {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        unfit = sorted(key for key, p in own.items() if key not in stored or stored[key].shape != p.shape)
        if unfit:
            raise ModelError(f"the packed state does not fit {name!r}: {unfit[:8]}")
        optimizer = optimizers[name]
        for key, parameter in own.items():
            parameter.copy_(stored[key])
            moment = _moment(tensors, f"{name}/{key}", parameter)
            if moment is not None:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": moment,
                }
            if ema is not None and f"{name}.{key}" in ema.shadow:
                ema.shadow[f"{name}.{key}"].copy_(parameter)


def write_state(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors of a packed state."""
    save_file(dict(tensors), path)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a packed state."""
    return load_file(path)


def _factors(name: str, moment: Tensor) -> dict[str, Tensor]:
    """Means of a second moment over its columns and over its rows; vectors stay whole."""
    if moment.ndim < 2:
        return {f"{WHOLE}/{name}": moment.float()}
    matrix = moment.flatten(1).float()
    return {f"{ROWS}/{name}": matrix.mean(dim=1), f"{COLUMNS}/{name}": matrix.mean(dim=0)}


def _moment(tensors: Mapping[str, Tensor], name: str, parameter: Tensor) -> Tensor | None:
    """The second moment of a parameter from its factors: rows x columns / mean; None if it was never stepped."""
    if f"{WHOLE}/{name}" in tensors:
        return tensors[f"{WHOLE}/{name}"].to(parameter)
    if f"{ROWS}/{name}" not in tensors:
        return None
    rows, columns = (tensors[f"{kind}/{name}"].double() for kind in (ROWS, COLUMNS))
    mean = rows.mean().clamp_min(1e-30)
    return (rows[:, None] * columns[None] / mean).view(parameter.shape).to(parameter)
