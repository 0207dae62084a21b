"""The prior under a generator: autoencoder, text encoders, schedule and start weights, for all families."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from components.models import ModelError, resolve_model
from components.naming import did_you_mean
from components.priors.conditions import Conditions, join
from components.priors.families import FAMILIES
from components.priors.families.record import FamilyPrior
from components.priors.files import DTYPES, Precision
from components.systems.instarevive.network import EpsPredictor, build_network, latent_multiple
from components.types import Prediction

PROMPT_CACHE_SIZE = 32
"""Embedded prompts in the cache: most jobs use one prompt for all pictures, and T5-XXL is slower than the rest."""


@dataclass(kw_only=True)
class Backbone:
    """A prior of any family; it is a tiling.LatentPrior.

    Attributes:
        family: see priors.families.
        prior: frozen.
    """

    family: str
    prior: FamilyPrior
    _prompt_cache: OrderedDict[str, Conditions] = field(default_factory=OrderedDict, repr=False)

    @property
    def network(self) -> nn.Module:
        """The prior's own noise predictor."""
        return self.prior.network  # type: ignore[no-any-return]

    @network.setter
    def network(self, network: Any) -> None:
        self.prior.network = network

    @property
    def autoencoder(self) -> nn.Module:
        return self.prior.autoencoder

    @property
    def prediction(self) -> Prediction:
        return self.prior.prediction

    @property
    def source(self) -> dict[str, str]:
        """The prior's entry in model.json."""
        return self.prior.source

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def factor(self) -> int:
        return self.prior.factor

    @property
    def latent_channels(self) -> int:
        return self.prior.latent_channels

    @property
    def multiple_px(self) -> int:
        """The network needs picture sides that are multiples of this."""
        return self.factor * latent_multiple(self.network.config)  # type: ignore[arg-type]

    def to(self, device: str | torch.device) -> Backbone:
        self.prior.to(device)
        self._prompt_cache.clear()
        return self

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> scaled latents; see priors.autoencoder.encode_pixels."""
        return self.prior.encode(images, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures, not clipped."""
        return self.prior.decode(latents)

    def conditions(self, prompts: Sequence[str], sizes: Tensor, *, together: bool = False) -> Conditions:
        """The conditions for a network of this family.

        Args:
            prompts: B texts.
            sizes: int64 [B, 6], see types.Batch.
            together: for training: embeds the batch's prompts in one call and caches only the empty prompt. The result
                then depends on the batch alone, not on earlier calls. Without it, each prompt is embedded by itself, so
                that its rounding does not depend on other prompts, and the last ones are cached.

        Raises:
            ValueError: the prior has no text encoder and no stored embedding of a prompt.
        """
        unique = [prompt for prompt in dict.fromkeys(prompts) if prompt or not together]
        if together:
            conditions = dict(zip(unique, self._embed(unique), strict=True)) if unique else {}
            conditions |= {"": self._alone("")} if "" in prompts else {}
        else:
            conditions = {prompt: self._alone(prompt) for prompt in unique}
        return join([conditions[prompt] for prompt in prompts]).with_sizes(sizes.to(self.device, torch.float32))

    def _alone(self, prompt: str) -> Conditions:
        """Conditions of one prompt, embedded by itself; the last ones are cached."""
        if prompt not in self._prompt_cache:
            (self._prompt_cache[prompt],) = self._embed([prompt])
            if len(self._prompt_cache) > PROMPT_CACHE_SIZE:
                self._prompt_cache.popitem(last=False)
        self._prompt_cache.move_to_end(prompt)
        return self._prompt_cache[prompt]

    def _embed(self, prompts: Sequence[str]) -> list[Conditions]:
        """Conditions of each prompt, all embedded in one call."""
        # a training step may use the cached embeddings next, and inference tensors would break it
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            conditions = self.prior.conditions(prompts)
        return [conditions.row(i) for i in range(len(prompts))]

    def predictor(self, *, mask_as_bias: bool = False, trainable: bool = False) -> EpsPredictor:
        """The prior's network as a noise predictor: itself, or with `trainable` a copy with gradients."""
        network = copy.deepcopy(self.network).requires_grad_(True) if trainable else self.network
        inputs = FAMILIES[self.family].inputs()
        return EpsPredictor(network, self.prior.schedule, self.prediction, mask_as_bias, inputs)

    def config(self) -> dict[str, Any]:
        """The config for model.json, which builds the network again without the prior."""
        arguments: Mapping[str, Any] = self.network.config  # type: ignore[assignment]
        network = {k: v for k, v in arguments.items() if not k.startswith("_")}
        return {
            "family": self.family,
            "network": network,
            "schedule": asdict(self.prior.schedule),
            "prediction": self.prediction,
        }


def open_backbone(
    family: str,
    name: str = "",
    record: Mapping[str, str] | None = None,
    precision: Precision = "fp32",
    *,
    with_network: bool = True,
) -> Backbone:
    """A backbone on the CPU, frozen.

    Args:
        family: one of priors.families.FAMILIES.
        name: the prior: a diffusers folder or hub id, a model folder or a shipped name; "" for the family's own.
        record: the prior's entry in a trained model's model.json; a prior with another digest is refused.
        precision: of its weights.
        with_network: False if other weights replace the prior's own, which then may be missing.

    Raises:
        ModelError: an unknown family, no such prior, or another digest than in `record`.
    """
    if family not in FAMILIES:
        raise ModelError(f"unknown generator family {family!r}. {did_you_mean(str(family), FAMILIES)}")
    name = name or FAMILIES[family].default_prior
    digest = (record or {}).get("digest", "")
    place = str(resolve_model(name, prior=True)) if digest else name  # the hub has no digests
    prior = FAMILIES[family].open(place, precision, with_network)
    if digest and prior.digest != digest:
        raise ModelError(
            f"prior {name!r} has digest {prior.digest[:12]}, but the model was trained on {digest[:12]}: "
            "bring that prior back, or train the model again"
        )
    return Backbone(family=family, prior=prior)


def network_like(config: Mapping[str, Any], precision: Precision = "fp32") -> nn.Module:
    """An untrained network of a model folder's config, frozen.

    Raises:
        ValueError: an unknown family, or a configuration of another shape.
    """
    network = build_network(str(config["family"]), config["network"])
    # torch's own method: the one of diffusers warns at every cast
    return nn.Module.to(network, dtype=DTYPES[precision]).eval().requires_grad_(False)
