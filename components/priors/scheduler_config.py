"""Reads the noise schedule and the kind of prediction from a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.models import ModelError
from components.priors.files import read_json
from components.samplers.schedules import FlowSchedule, Schedule
from components.types import Prediction

SCHEDULER = "scheduler/scheduler_config.json"
FLOW_EXTRAS = ("use_dynamic_shifting", "invert_sigmas", "shift_terminal")
"""Settings of diffusers' FlowMatch schedulers that change the times of training; the others only affect sampling."""


def read_schedule(folder: Path) -> tuple[Schedule | FlowSchedule, Prediction]:
    """The noise schedule and the kind of prediction of a pipeline's folder; FlowMatch gives a FlowSchedule.

    Raises:
        ModelError: the file is missing, or the schedule has another kind.
    """
    path = folder / SCHEDULER
    config = read_json(path)
    if str(config.get("_class_name", "")).startswith("FlowMatch"):
        return _flow_schedule(config, path), "flow_prediction"
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction") or config.get("rescale_betas_zero_snr"):
        raise ModelError(f"{path}: needs epsilon or v_prediction on an unscaled schedule, got {kind!r}")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    try:
        return Schedule(**{name: config[name] for name in names if name in config}), kind
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: {error}") from error


def _flow_schedule(config: Mapping[str, Any], path: Path) -> FlowSchedule:
    """The FlowSchedule of a config; ModelError if the times of training depend on more than a shift."""
    extras = [name for name in FLOW_EXTRAS if config.get(name)]
    if extras:
        raise ModelError(f"{path}: times with {', '.join(extras)} are not supported, only a shift is")
    numbers = {name: config[name] for name in ("num_train_timesteps", "shift") if name in config}
    try:
        return FlowSchedule(**numbers)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: {error}") from error
