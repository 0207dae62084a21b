"""A small real restorer for tests of jobs and services: an edge-preserving filter with a seeded dither.

A worker builds it from a model folder, like every system. Tests load this module by path and register it with Ray's
pickler by value: tests are not a package, so a worker cannot import it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
from safetensors.numpy import load_file

from components.images import to_uint8
from components.options import typed_options
from components.randomness import generator
from components.recipes import Recipe
from components.systems.system import Networks, System
from components.types import Cancellation, Cancelled, OnStep, Request, Restored, Restorer, StepEvent

MAX_STEPS = 1_000_000
"""Limit that only the restorer checks, like the limit of InstantIR's prior."""


def check_options(options: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """See components.options.SystemOptionCheck."""
    return typed_options(options, {"steps": int, "cfg_scale": float})


def write_model(folder: Path, strength: float = 20.0) -> Path:
    """Write a model folder with one part and one number: the filter's strength in 8-bit levels."""
    import torch

    from components.models import ModelCard, save_model

    card = ModelCard(name="tiny", system="tiny", recipe={"name": "tiny-filter"}, licence="Apache-2.0")
    save_model(folder, card, {"filter": {"strength": torch.tensor([strength])}})
    return folder


@dataclass
class TinyRestorer(Restorer):
    """Args: strength of the filter; step_s, seconds of sleep per step; lethal, the key at which the process exits."""

    strength: float
    step_s: float = 0.0
    lethal: str = ""

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        answers = []
        for request in requests:
            options = check_options(request.options)
            steps = options.get("steps", 1)
            if not 1 <= steps <= MAX_STEPS:
                raise ValueError(f"steps must be between 1 and {MAX_STEPS}, got {steps}")
            if self.lethal and request.key == self.lethal:
                os._exit(1)
            height, width = request.size or request.image.shape[:2]
            image = cv2.resize(request.image, (width, height), interpolation=cv2.INTER_CUBIC)
            for step in range(1, steps + 1):
                if cancelled is not None and cancelled():
                    raise Cancellation
                time.sleep(self.step_s)
                if step <= 2:  # tests need no more passes
                    image = cv2.bilateralFilter(image, 5, self.strength, 2.0)
                if on_step is not None:
                    on_step(StepEvent(step=step, of=steps))
            if request.reference is not None:
                image = cv2.addWeighted(image, 0.5, cv2.resize(request.reference, (width, height)), 0.5, 0)
            amplitude = options.get("cfg_scale", 1.0) / 255
            dither = generator(request.seed, "dither").uniform(-amplitude, amplitude, image.shape)
            pixels = to_uint8((image / 255 + dither).astype(np.float32))
            answers.append(Restored(key=request.key, image=pixels, info={"filter": "bilateral"}))
        return answers


def build_tiny(model: Path, step_s: float = 0.0, lethal: str = "") -> TinyRestorer:
    """Build the restorer from the model folder; raises if the folder is broken."""
    strength = float(load_file(model / "parts" / "filter.safetensors")["strength"][0])
    return TinyRestorer(strength=strength, step_s=step_s, lethal=lethal)


def build_never(model: Path) -> TinyRestorer:
    """A factory that fails."""
    raise RuntimeError(f"weights of {model.name} do not fit")


def build_dying(model: Path) -> TinyRestorer:
    """A factory that kills its process, as the kernel does without free memory."""
    os._exit(1)


SYSTEM = System(recipe=Recipe, stages=(), networks=Networks, check_options=check_options)
"""Entry for `SYSTEMS`, where the driver finds the check of a model's options."""


def run_job(
    model: str | Path,
    src: Path,
    out: Path,
    options: Mapping[str, Any] | None = None,
    *,
    factory: Callable[[], Restorer] | None = None,
    workers: int = 0,
    batch_size: int = 1,
    progress: Any = None,
    **job: Any,
) -> Any:
    """Call restore_folder with untyped options; workers=0 runs in this process. `job`: fields of RestoreJob."""
    from pipelines.core.pool import Pool
    from pipelines.restoration.batch import RestoreJob, restore_folder
    from pipelines.restoration.models import open_model

    opened = open_model(model)
    if factory is not None:
        opened = replace(opened, factory=factory)
    pool = Pool(workers=workers, batch_size=batch_size)
    return restore_folder(
        opened, src, out, RestoreJob(ask=opened.request_options(options or {}), **job), pool, progress
    )
