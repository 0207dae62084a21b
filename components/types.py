"""The vocabulary: the few types and protocols that every system, stage and verb shares. Read this first.

Nothing here imports torch at run time, so that data workers which only decode and degrade stay small.

Conventions
    images     RGB. As arrays: uint8, or float32 in [0, 1], [H, W, 3]. As tensors: float32 [B, 3, H, W] in [-1, 1].
    latents    float tensors [B, C, h, w], already multiplied by the prior's scaling factor.
    sigma      noise level in variance-exploding form, [B]: noisy = clean + sigma * noise.
    position   place of a sample in the endless training stream; (seed, position, name) fixes every random bit.
    key        name of a sample, unique in its corpus: every error names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

    from components.randomness import Noise

Image = np.ndarray
"""RGB [H, W, 3], uint8 or float32 in [0, 1]."""

Plan = Mapping[str, Any]
"""One drawn degradation: small, JSON-serialisable (numbers, strings, lists, mappings); replays to the same picture."""

Box = tuple[int, int, int, int]
"""(top, left, height, width) in latent pixels."""

Prediction = Literal["epsilon", "v_prediction", "flow_prediction"]
"""What a network makes of noisy latents, in diffusers' words; the last two are velocities, of a variance-preserving
schedule and of a flow."""

Denoiser = Callable[["Tensor", "Tensor"], "Tensor"]
"""(latents [B, C, h, w], sigma [B]) -> predicted clean latents [B, C, h, w].

The latents are in variance-exploding form (clean + sigma * noise); whoever wraps a variance-preserving network scales
inside. Prompts, guidance, control features and tiling are closed over.
"""


class SampleError(ValueError):
    """One sample cannot be used. Carries what a quarantine row needs; never ends a job by itself.

    Attributes:
        code: short machine-readable reason, e.g. "truncated", "not_image", "too_large".
        key: the sample's name, "" where the raiser does not know it (the caller adds it).
        detail: one sentence for people.
    """

    def __init__(self, code: str, detail: str, key: str = "") -> None:
        super().__init__(f"[{code}] {key + ': ' if key else ''}{detail}")
        self.code, self.detail, self.key = code, detail, key

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions with several arguments do not pickle by themselves
        return (type(self), (self.code, self.detail, self.key))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One training batch of B samples.

    Attributes:
        keys: sample names, so that every error can name its sample.
        positions: int64 [B], places in the stream; the only source of randomness besides the seed.
        hq: targets, float32 [B, 3, H, W] in [-1, 1].
        lq: degraded inputs, already resized to hq's size, same range.
        prompts: "" where there is no caption.
        plans: the degradation each lq was made with; empty mapping where the pair came as it is.
        masks: optional float32 [B, 1, H, W], 1 = missing (inpainting).
        sizes: int64 [B, 6]: original height and width, crop top and left, target height and width (SDXL's size ids).
        latents: optional precomputed clean latents of hq [B, C, h, w].
        embeddings: optional precomputed embeddings of the prompts: "text" [B, L, D] and "pooled" [B, P].
        latents_missing, embeddings_missing: rows (their numbers, rising) of which there are none: theirs are zeros, and
            whoever needs them encodes hq or embeds the prompt (components.objectives.precomputed).
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
    """A scalar to back-propagate and detached scalars to log."""

    value: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Degradation(Protocol):
    """Turns a clean picture into a poor one. `draw` decides, `apply` executes; only `draw` needs randomness."""

    def draw(self, seed: int, key: str, position: int) -> Plan:
        """Draw a plan; the same arguments give the same plan anywhere."""

    def apply(self, hq: Image, plan: Plan) -> Image:
        """Degrade float32 [H, W, 3] in [0, 1]; returns the same size and range. Equal plans give equal bits."""

    def target(self, hq: Image) -> Image:
        """What the restoration is trained towards: hq itself, or sharpened where the recipe's authors did so."""


class Captioner(Protocol):
    """Writes one caption for each picture."""

    def caption(self, images: Sequence[Image]) -> list[str]: ...


class Objective(Protocol):
    """What a training stage minimises.

    Attributes:
        trainables: modules by name; each has its own optimiser. Their state dicts are what a checkpoint keeps.
        config: architecture for model.json, enough to build the modules again.
    """

    trainables: Mapping[str, nn.Module]
    config: Mapping[str, Any]

    def parts(self) -> Mapping[str, Mapping[str, Tensor]]:
        """All parts of the finished model folder, inherited ones too: tensors by key, by part name."""

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """Yield (trainable, loss) in turn.

        The loop steps that trainable's optimiser between two yields, so a later phase (a fake score, say) can reuse
        the earlier one's detached latents. Under accumulation the micro-batches advance in lockstep, phase by phase.
        """


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A spatial condition of a denoiser (LQ latents, masks): tensors that share one latent grid [.., h, w]."""

    tensors: Mapping[str, Tensor]

    def crop(self, box: Box) -> Condition:
        """The part inside `box`, so that one tiled denoiser serves every system."""
        top, left, height, width = box
        return Condition(tensors={k: v[..., top : top + height, left : left + width] for k, v in self.tensors.items()})


@dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to restore.

    Attributes:
        key: name, for errors and file names.
        image: uint8 [H, W, 3].
        seed: fixes every random bit of this picture, whatever it is batched with.
        prompt, negative_prompt: text for guidance; "" is a legal prompt.
        size: (height, width) of the result; None keeps the input's.
        options: system-specific settings by name; unknown names are refused with the near one.
        reference: optional second picture uint8 [H', W', 3] for options that ask for one, such as the HQ picture.
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
    """One restored picture: uint8 [H, W, 3], and what a PNG's text chunks should say about it."""

    key: str
    image: Image
    info: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """Progress of a sampler: step (1-based) of `of`; preview latents [B, C, h, w] where the caller may want a look."""

    step: int
    of: int
    preview: Tensor | None = None


OnStep = Callable[[StepEvent], None]
Cancelled = Callable[[], bool]


class Cancellation(Exception):
    """Raised inside a sampler when `cancelled()` became true."""


class Restorer(Protocol):
    """Restores pictures; the same object stands behind batch jobs, the service and evaluation."""

    def restore(
        self, requests: Sequence[Request], on_step: OnStep | None = None, cancelled: Cancelled | None = None
    ) -> list[Restored]:
        """Restore in request order. A picture's bits do not depend on its neighbours beyond float rounding."""
