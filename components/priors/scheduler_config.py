"""Reads the noise schedule, the kind of prediction and the sampler's settings from a diffusers folder.

A setting that changes results is honoured, or refused by name. Settings of samplers besides DDIM and DDPM (the order
of a solver, Karras' levels) do not apply, since the models here are sampled by these two or in one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.models import ModelError
from components.priors.files import read_json
from components.samplers.schedules import FlowSchedule, Sampling, Schedule
from components.types import Prediction

SCHEDULER = "scheduler/scheduler_config.json"
SCHEDULE_EXTRAS = ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas")
"""Settings of diffusers' schedulers, besides the betas, that change the noise of training."""

SAMPLER_EXTRAS = ("clip_sample", "thresholding")
"""Settings of DDIM and DDPM that change the clean estimates while sampling."""

FLOW_EXTRAS = ("use_dynamic_shifting", "invert_sigmas", "shift_terminal")
"""Settings of diffusers' FlowMatch schedulers that change the times of training; the others only affect sampling."""

FLOW_SAMPLER_EXTRAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")
"""Their settings that change the steps of a sampler, for priors that are sampled in many steps."""


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
    extras = [name for name in SCHEDULE_EXTRAS if config.get(name)]
    if extras:
        raise ModelError(f"{path}: {', '.join(extras)} is not supported: the schedule follows from its betas alone")
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"{path}: prediction_type must be epsilon or v_prediction, got {kind!r}")
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    try:
        return Schedule(**{name: config[name] for name in names if name in config}), kind
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: {error}") from error


def check_flow_sampling(folder: Path) -> None:
    """Raises ModelError for settings of a FlowMatch scheduler that samplers.flow does not have."""
    path = folder / SCHEDULER
    config = read_json(path)
    if extras := [name for name in FLOW_SAMPLER_EXTRAS if config.get(name)]:
        raise ModelError(
            f"{path}: {', '.join(extras)} is not supported: levels of a sampler are even times with a shift"
        )


def read_sampling(folder: Path) -> Sampling:
    """The sampler's settings of a pipeline's folder; those of Sampling where the file has none.

    Raises:
        ModelError: the file is missing, or a setting is not supported.
    """
    path = folder / SCHEDULER
    config = read_json(path)
    extras = [name for name in SAMPLER_EXTRAS if config.get(name)]
    if extras:
        raise ModelError(
            f"{path}: {', '.join(extras)} is not supported: clean estimates are not clipped while sampling"
        )
    names = {"spacing": "timestep_spacing", "offset": "steps_offset", "final_clean": "set_alpha_to_one"}
    try:
        return Sampling(**{field: config[name] for field, name in names.items() if name in config})
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
