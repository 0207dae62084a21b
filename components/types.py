"""The types and protocols that all systems, stages and commands share. Read this first.

This module does not import torch at run time, so data workers that only decode and degrade stay small.

Conventions
    images     RGB. As arrays: uint8, or float32 in [0, 1], [H, W, 3]. As tensors: float32 [B, 3, H, W] in [-1, 1].
    latents    float tensors [B, C, h, w], already multiplied by the prior's scaling factor.
    sigma      noise level in variance-exploding form, [B]: noisy = clean + sigma * noise.
    position   index of a sample in the endless training stream; (seed, position, name) determines every random bit.
    key        name of a sample, unique in its corpus; every error names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from components.naming import limited
from components.randomness import Noise

if TYPE_CHECKING:
    from torch import Tensor, nn


Image = np.ndarray
"""RGB [H, W, 3], uint8 or float32 in [0, 1]."""

Plan = Mapping[str, Any]
"""A drawn degradation in JSON types (numbers, strings, lists, mappings); it always gives the same picture."""

Box = tuple[int, int, int, int]
"""(top, left, height, width) in latent pixels."""

Prediction = Literal["epsilon", "v_prediction", "flow_prediction"]
"""The output of a network for noisy latents, in diffusers' terms; the last two are velocities, of a variance-preserving
schedule and of a flow."""

Denoiser = Callable[["Tensor", "Tensor"], "Tensor"]
"""(latents [B, C, h, w], sigma [B]) -> predicted clean latents [B, C, h, w].

The latents are in variance-exploding form (clean + sigma * noise). A wrapper of a variance-preserving network rescales
them. The function is a closure over prompts, guidance, control features and tiling.
"""


class SampleError(ValueError):
    """One sample cannot be used. It has the fields of a quarantine row and never ends a job.

    Attributes:
        code: short machine-readable reason, e.g. "truncated", "not_image", "too_large".
        key: the sample's name; "" if the caller must add it.
        detail: one sentence for people.
    """

    def __init__(self, code: str, detail: str, key: str = "") -> None:
        detail = limited(detail)
        super().__init__(f"[{code}] {key + ': ' if key else ''}{detail}")
        self.code, self.detail, self.key = code, detail, key

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions with several arguments need this to be picklable
        return (type(self), (self.code, self.detail, self.key))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch of B samples.

    Attributes:
        keys: sample names, for errors.
        positions: int64 [B], positions in the stream; with the seed they determine all randomness.
        hq: targets, float32 [B, 3, H, W] in [-1, 1].
        lq: degraded inputs, already resized to hq's size, same range.
        prompts: one text for each sample; "" for none.
        plans: the degradation of each lq; an empty mapping if the corpus contains the pair.
        masks: optional float32 [B, 1, H, W], 1 = missing (inpainting).
        sizes: int64 [B, 6]: original height and width, crop top and left, target height and width (SDXL's size ids).
        latents: optional precomputed clean latents of hq [B, C, h, w].
        embeddings: optional precomputed embeddings of the prompts: "text" [B, L, D] and "pooled" [B, P].
        latents_missing, embeddings_missing: rising indices of rows without precomputed values. Their values are zeros;
            the objective then encodes hq or embeds the prompt (components.objectives.precomputed).
    """

    keys: Sequence[str]
    positions: np.ndarray
    hq: Tensor
    lq: Tensor
    prompts: Sequence[str]
    sizes: Tensor
    plans: Sequence[Plan] = ()
    masks: Tensor | None = None
    latents: Tensor | None = None
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    latents_missing: Sequence[int] = ()
    embeddings_missing: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A scalar to back-propagate, and detached scalars to log."""

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Degradation(Protocol):
    """Degrades clean pictures. `draw` draws a plan at random, `apply` executes it deterministically."""

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """Draw a plan; equal arguments give equal plans on any machine."""

    def apply(self, hq: Image, plan: Plan) -> Image:
        """Degrade float32 [H, W, 3] in [0, 1]; return the same size and range. Equal plans give equal bits."""

    def target(self, hq: Image) -> Image:
        """Return the training target: hq, or a sharpened hq if the degradation's authors sharpen it."""

    def target_plan(self) -> Plan | None:
        """Return `target` as a plan, for batched execution on a device; None if the target is hq."""
        return None


class Captioner(Protocol):
    """Writes one caption for each picture."""

    def caption(self, images: Sequence[Image]) -> list[str]: ...


class SourcedPrior(Protocol):
    """A prior whose source model.json records."""

    @property
    def source(self) -> Mapping[str, str]:
        """id, digest and, for a diffusers prior, image_encoder."""


class Objective(Protocol):
    """The objective of a training stage. A class that derives from it inherits the defaults here.

    Attributes:
        trainables: modules by name; each has its own optimiser. Checkpoints store their state dicts.
        config: architecture for model.json, enough to rebuild the modules.
        progress: small numbers that change during training and that a resumed run needs; checkpoints store them.
        averaged: names of the trainables whose weights are averaged; None for all.
        files: text files of the model folder by name, such as a tokenizer.
    """

    trainables: Mapping[str, nn.Module]
    config: Mapping[str, Any]
    progress: MutableMapping[str, float]
    averaged: Sequence[str] | None = None
    files: Mapping[str, str] = MappingProxyType({})

    @property
    def prior(self) -> SourcedPrior | None:
        """The prior that the networks use; None for none."""
        return None

    def parts(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return all parts of the model folder, inherited ones too: tensors by key, by part name."""

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """Yield (trainable, loss) for each phase.

        The loop steps that trainable's optimiser after each yield. So a later phase, such as a fake score, can reuse an
        earlier phase's detached latents. With accumulation, the micro-batches advance in lockstep, phase by phase.
        """

    def step_phases(self, batches: Sequence[tuple[Batch, Noise]]) -> Sequence[Iterator[tuple[str, Loss]]]:
        """Return `phases` of each micro-batch of one step, in order.

        An objective whose loss depends on the step's whole batch measures all micro-batches here, without gradients. It
        measures those of the other workers too if gradients are on, since held-out losses are computed by one worker
        alone. So the loss does not depend on how the pictures are split into micro-batches and workers.
        """
        return [self.phases(batch, noise) for batch, noise in batches]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A spatial condition of a denoiser (lq latents, masks): tensors on one latent grid [.., h, w]."""

    tensors: Mapping[str, Tensor]

    def crop(self, box: Box) -> Condition:
        """Return the part inside `box`; the tiled denoiser of all systems uses it."""
        top, left, height, width = box
        return Condition(tensors={k: v[..., top : top + height, left : left + width] for k, v in self.tensors.items()})


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to restore.

    Attributes:
        key: name for errors and files.
        image: uint8 [H, W, 3].
        seed: determines every random bit of this picture, independent of its batch.
        prompt, negative_prompt: texts for guidance; "" is a valid prompt.
        size: (height, width) of the result; None keeps the input's size.
        options: system-specific options by name; the error for an unknown name suggests one.
        reference: optional second picture uint8 [H', W', 3] for options that need one, such as the hq picture.
    """

    key: str
    image: Image
    seed: int = 0
    prompt: str = ""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: Image | None = None


@dataclass(frozen=True, kw_only=True)
class Restored:
    """One restored picture: uint8 [H, W, 3], and entries for the PNG's text chunks."""

    key: str
    image: Image
    info: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """Progress of a sampler: step (1-based) of `of` steps; preview latents [B, C, h, w] if the sampler has them."""

    step: int
    of: int
    preview: Tensor | None = None


OnStep = Callable[[StepEvent], None]
Cancelled = Callable[[], bool]


class Cancellation(Exception):
    """Raised inside a sampler when `cancelled()` is true."""


class Restorer(Protocol):
    """Restores pictures. Batch jobs, the service and evaluation use the same object.

    A class that derives from it inherits the defaults of `of_model`, `preview`, `decode` and `check_prompts_used`.
    """

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        """Restore in request order. Except for float rounding, a picture does not depend on others in the batch."""

    def of_model(self, digest: str) -> Restorer:
        """Return the restorer of one of several models that share a prior, by its digest; this one holds one model."""
        return self

    def preview(self, request: Request) -> Image | None:
        """Return a preliminary result, uint8 [H, W, 3], for a captioner; None if the system has none."""
        return None

    def decode(self, latents: Tensor) -> list[Image] | None:
        """Return the pictures of the preview latents in a StepEvent, uint8 [H, W, 3]; None if the system has none."""
        return None

    def check_prompts_used(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError, or the system's own error, for options with which a prompt has no effect."""
        return None
