"""What distinguishes one family of priors from another, as one record. Torch-free: recipes list families.

The functions of a record import torch and diffusers when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from components.types import Prediction

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from components.priors.conditions import Conditions, NetworkInputs
    from components.priors.files import Precision
    from components.samplers.schedules import FlowSchedule, Schedule


class FamilyPrior(Protocol):
    """A prior of any family; it is also a SourcedPrior and a tiling.LatentPrior.

    Attributes:
        name, digest: identify the prior; a model trained on it records both.
        network: the denoiser.
    """

    name: str
    digest: str
    network: Any

    @property
    def source(self) -> dict[str, str]: ...

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All networks by part name."""

    @property
    def autoencoder(self) -> nn.Module: ...

    @property
    def schedule(self) -> Schedule | FlowSchedule: ...

    @property
    def prediction(self) -> Prediction: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def factor(self) -> int:
        """The side of a latent pixel in pixels."""

    def to(self, device: str | torch.device) -> Any: ...

    def freeze(self) -> Any: ...

    def halve_text_encoder(self) -> Any:
        """Casts the text encoders to bfloat16, for training."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, H/factor, W/factor]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, H, W], not clipped."""

    def conditions(self, prompts: Sequence[str]) -> Conditions:
        """Embeds prompts; the result has no size ids."""


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """What recipes must know of the text that a family's network takes; the text itself is FamilyPrior.conditions.

    Attributes:
        columns: precomputed columns of embeddings ("text" and "pooled" of SDXL's shape) fit.
        halved: a text encoder is so large that a training in bf16 casts it to bfloat16.
    """

    columns: bool = False
    halved: bool = False


@dataclass(frozen=True, kw_only=True)
class PriorFamily:
    """One family of priors.

    Attributes:
        name: as in recipes and in model.json.
        default_prior: shipped name or hub id of the prior if a recipe names none.
        kind: of the denoiser: "unet", or "dit" for transformers.
        part: the denoiser's subfolder in a diffusers folder, and its part and config key in our model folders.
        networks: published sizes of denoisers by hub id, in the arguments of diffusers' class.
        latents: the latent format of the published priors: their autoencoder in AutoencoderKL's arguments (channels,
            scaling_factor, shift_factor, and the blocks, which give the factor). Empty if there are none.
        schedule: the published noise schedule, see schedules.schedule_from.
        prediction: output of the published denoisers.
        text: the text layout.
        licences: published licences by hub id.
        build: a denoiser's arguments -> an untrained denoiser; no memory is needed inside torch.device("meta"). Raises
            ValueError or TypeError for the arguments of another family.
        inputs: returns the function that turns conditions into the denoiser's arguments.
        open: (name, precision, with_network) -> a frozen prior on the CPU, by a folder, a shipped name or a hub id.
            With with_network False the caller brings other weights, and those of the denoiser may be missing. Raises
            ModelError.
    """

    name: str
    default_prior: str
    kind: Literal["unet", "dit"]
    part: Literal["unet", "transformer"]
    networks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    latents: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    prediction: Prediction = "epsilon"
    text: TextLayout
    licences: Mapping[str, str] = field(default_factory=dict)
    build: Callable[[Mapping[str, Any]], nn.Module]
    inputs: Callable[[], NetworkInputs]
    open: Callable[[str, Precision, bool], FamilyPrior]
