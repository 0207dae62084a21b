"""A real restorer small enough for tests of jobs and services: an edge-preserving filter with a seeded dither.

It is built from a model folder, in the worker, as every system is. Its tests load it by path and register it with
Ray's pickler by value, since tests are no package that a worker could import.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from components.systems import System
from components.types import Cancellation, Cancelled, OnStep, Request, Restored, StepEvent

MAX_STEPS = 1_000_000
"""Only the restorer judges this one, as InstantIR's prior does."""


def check_options(given: Mapping[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """See components.options.SystemOptionCheck."""
    return typed_options(given, {"steps": int, "cfg_scale": float})


def write_model(folder: Path, strength: float = 20.0) -> Path:
    """A model folder of one part with one number: the filter's strength in 8-bit levels."""
    import torch

    from components.models import ModelCard, save_model

    card = ModelCard(name="tiny", system="tiny", recipe={"name": "tiny-filter"}, licence="Apache-2.0")
    save_model(folder, card, {"filter": {"strength": torch.tensor([strength])}})
    return folder


@dataclass
class TinyRestorer:
    """Args: strength of the filter; step_s, what a step costs besides; lethal, a key over which the process dies."""

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
                if step <= 2:  # further passes change nothing that a test looks at
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
    """From the model folder's part; raises where the folder is broken."""
    strength = float(load_file(model / "parts" / "filter.safetensors")["strength"][0])
    return TinyRestorer(strength=strength, step_s=step_s, lethal=lethal)


def build_never(model: Path) -> TinyRestorer:
    """A system whose loading fails."""
    raise RuntimeError(f"weights of {model.name} do not fit")


def build_dying(model: Path) -> TinyRestorer:
    """A system whose loading kills the process, as the kernel does when memory is short."""
    os._exit(1)


SYSTEM = System(recipe=Recipe, stages={}, build_objective=build_never, check_options=check_options)
"""For `SYSTEMS`, where the driver looks up what judges a model's options."""
