"""Noise schedules of diffusers folders, and what their networks predict."""

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
"""Settings of diffusers' FlowMatch schedulers that change the times themselves; the others choose a sampler's steps."""


def read_schedule(folder: Path) -> tuple[Schedule | FlowSchedule, Prediction]:
    """Noise schedule and kind of prediction of a pipeline's folder; FlowMatch schedulers are a flow's.

    Raises:
        ModelError: no such file, or a schedule of another kind.
    """
    path = folder / SCHEDULER
    said = read_json(path)
    if str(said.get("_class_name", "")).startswith("FlowMatch"):
        return _flow_schedule(said, path), "flow_prediction"
    kind = said.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction") or said.get("rescale_betas_zero_snr"):
        raise ModelError(f"{path}: needs epsilon or v_prediction on an unscaled schedule, this one says {kind!r}")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    try:
        return Schedule(**{name: said[name] for name in names if name in said}), kind
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: {error}") from error


def _flow_schedule(said: Mapping[str, Any], path: Path) -> FlowSchedule:
    """Raises ModelError where the times of training depend on more than a shift."""
    odd = [name for name in FLOW_EXTRAS if said.get(name)]
    if odd:
        raise ModelError(f"{path}: a flow's times with {', '.join(odd)} are not supported, a shift alone is")
    numbers = {name: said[name] for name in ("num_train_timesteps", "shift") if name in said}
    try:
        return FlowSchedule(**numbers)
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: {error}") from error
