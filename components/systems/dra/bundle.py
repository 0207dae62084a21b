"""DRA's networks on a prior as one bundle: the prior with its LoRA, the adapters, and a robust encoder.

What differs by the shape of the prior is in the classes of network.py (SDXL-shaped UNets) and tokens.py (MM-DiTs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from components.priors.families.record import FamilyPrior
from components.priors.lora import LoraWeights, add_lora, load_peft_state, merge_lora, peft_state
from components.priors.parameters import copy_strictly
from components.priors.robust_encoder import RobustEncoder
from components.randomness import seeded_init
from components.systems.dra.config import AdapterConfig, LoraConfig, Shape, lora_config, stored_adapter_config

ADAPTERS, LORA, ENCODER, FAMILY = "adapters", "lora", "encoder", "family"
"""Parts of a model folder: restoration adapters, diffusion adapters by peft's keys, and the robust encoder; and the
name of the prior's family in its config."""

OwnPrior = TypeVar("OwnPrior", bound=FamilyPrior)
OwnAdapters = TypeVar("OwnAdapters", bound=nn.Module)


class Bundle(Generic[OwnPrior, OwnAdapters]):
    """The bundle. All is frozen; a training stage switches on what it trains.

    Args:
        prior: its denoiser gets the LoRA in place.
        adapters: form of the restoration adapters.
        lora: size of the diffusion adapters.
        encoder: the robust encoder of the prior's autoencoder; None for the autoencoder's own.
        seed: fixes the random start of adapters and LoRA.
        family: name of the prior's family; "" for the class's own.

    Raises:
        ValueError: the prior's blocks take no such adapters.

    Attributes:
        shape: what the adapters act on.
        own_family: family of a model that names none.
        targets: name suffixes of the layers with the LoRA, by LoraConfig.targets.
        adapters: the restoration adapters, in float32 at first.
        lora: layers with the LoRA by their name in the denoiser; their LoRA weights are in float32 at first.
        blocks: block functions of the walk, plain, compiled or recomputing.
    """

    shape: ClassVar[Shape]
    own_family: ClassVar[str]
    targets: ClassVar[Mapping[str, tuple[str, ...]]]
    blocks: Any
    adapters: OwnAdapters

    def __init__(
        self,
        prior: OwnPrior,
        adapters: AdapterConfig | None = None,
        lora: LoraConfig | None = None,
        encoder: RobustEncoder | None = None,
        seed: int = 0,
        family: str = "",
    ) -> None:
        self.prior, self.encoder, self.lora_config = prior, encoder, lora or LoraConfig()
        self.family = family or self.own_family
        config, like = adapters or AdapterConfig(), next(prior.network.parameters())
        if like.is_meta:
            with torch.device("meta"):
                self.adapters = self.adapters_of(prior.network, config, prior.factor)
        else:  # the random start is computed on the CPU, so that it has the same bits on every device
            with seeded_init(seed, ADAPTERS):
                self.adapters = self.adapters_of(prior.network, config, prior.factor)
            self.adapters.to(like.device)
        self.lora: dict[str, LoraLayer] = {}
        if self.lora_config.rank:
            targets = self.targets[self.lora_config.targets]
            rank, alpha = self.lora_config.rank, self.lora_config.scale
            self.lora = add_lora(prior.network, LORA, rank=rank, alpha=alpha, targets=targets, seed=seed)
            for layer in self.lora.values():
                layer.lora_A[LORA].float()
                layer.lora_B[LORA].float()
        self.freeze()

    @classmethod
    def adapters_of(cls, network: Any, config: AdapterConfig, factor: int) -> OwnAdapters:
        """New adapters of a denoiser, of which only the sizes are read; `factor` is the prior's, see FamilyPrior."""
        raise AssertionError("each shape has its own")

    @property
    def sees_pictures(self) -> bool:
        """Whether `features` takes LQ pictures instead of their latents."""
        adapters: Any = self.adapters
        return bool(adapters.factor > 1)

    def features(self, lq: Tensor) -> Sequence[Tensor]:
        """The features of LQ latents [B, C, h, w] for `predict`; once for a picture, see the adapters' `features`."""
        return self.adapters.features(lq)  # type: ignore[no-any-return, operator]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the denoiser computes in; the sampler's latents keep their own."""
        raise AssertionError("each shape has its own")

    @property
    def trainable(self) -> nn.Module:
        """Restoration and diffusion adapters as one module: both train together (section 3.2)."""
        modules: dict[str, nn.Module] = {ADAPTERS: self.adapters}
        if self.lora:
            modules[LORA] = LoraWeights(self.lora, LORA)
        return nn.ModuleDict(modules)

    def freeze(self) -> Self:
        """Sets evaluation mode and disables gradients everywhere."""
        self.prior.freeze()
        self.adapters.eval().requires_grad_(False)
        if self.encoder is not None:
            self.encoder.eval().requires_grad_(False)
        return self

    def to(self, device: str | torch.device) -> Self:
        """Moves the networks."""
        self.prior.to(device)
        self.adapters.to(device)
        if self.encoder is not None:
            self.encoder.to(device)
        return self

    def merge_lora(self) -> Self:
        """Adds the LoRA to the denoiser's weights for good: no step then computes it. `parts` has none afterwards."""
        merge_lora(self.prior.network, LORA)
        self.lora = {}
        return self

    def config(self) -> dict[str, Any]:
        """The settings that from_parts needs; model.json holds them."""
        adapters: Any = self.adapters
        return {
            FAMILY: self.family,
            ADAPTERS: adapters.config.to_dict(),
            LORA: self.lora_config.to_dict(),
            ENCODER: self.encoder is not None,
        }

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Weights by part."""
        parts = {ADAPTERS: {key: parameter.detach() for key, parameter in self.adapters.named_parameters()}}
        if self.lora:
            parts[LORA] = peft_state(self.lora, LORA)
        if self.encoder is not None:
            parts[ENCODER] = {key: parameter.detach() for key, parameter in self.encoder.named_parameters()}
        return parts

    @classmethod
    def from_parts(cls, prior: OwnPrior, config: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> Self:
        """The bundle of a model folder.

        Raises:
            ValueError: a part is missing or unknown, or its weights do not fit.
        """
        encoder = RobustEncoder(prior.autoencoder) if config[ENCODER] else None
        adapters, lora = stored_adapter_config(config[ADAPTERS], cls.shape), lora_config(config[LORA])
        network = cls(prior, adapters, lora, encoder, family=str(config.get(FAMILY, "")))
        names = set(network.parts())
        if set(parts) != names:
            raise ValueError(f"a model of this config has the parts {sorted(names)}, got {sorted(parts)}")
        copy_strictly(dict(network.adapters.named_parameters()), parts[ADAPTERS], ADAPTERS)
        if network.lora:
            load_peft_state(network.lora, LORA, parts[LORA])
        if encoder is not None:
            copy_strictly(dict(encoder.named_parameters()), parts[ENCODER], ENCODER)
        return network

    def encode_lq(self, images: Tensor) -> Tensor:
        """LQ pictures [B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w] by the robust encoder, if there is one."""
        return self.prior.encode(images) if self.encoder is None else self.encoder(images)
