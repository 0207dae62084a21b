"""The objective of SUPIR's adaptor; that of its encoder is shared (objectives/robust_encoding.py).

All randomness comes from the Noise argument of `phases`, under these names: "timestep", "noise", "noise_offset" and
"conditions" (whether the text is dropped).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from components.objectives.diffusion import WeightedEpsilon
from components.objectives.precomputed import clean_latents, embed_batch_prompts, embed_empty_prompt
from components.priors.conditions import SizedConditions
from components.priors.sdxl import Prior
from components.randomness import Noise
from components.systems.supir.network import ADAPTOR, Supir
from components.types import Batch, Loss, Objective


class AdaptorObjective(Objective):
    """The plain diffusion loss on HQ latents, with the LQ latents of the frozen robust encoder as control.

    Negative samples are pictures of the stream like others, whose prompts say what is poor about them (section 3.2).

    Args:
        network: with an adaptor, all of whose parameters train; prior and robust encoder are frozen.
        text_dropout: probability of an empty prompt.
        max_clean_weight, noise_offset, timestep_importance: see objectives.diffusion; 1, 0 and 0 are the plain loss.

    Raises:
        ValueError: there is no adaptor, or a setting is out of range.
    """

    def __init__(
        self,
        network: Supir,
        *,
        text_dropout: float = 0.0,
        max_clean_weight: float = 1.0,
        noise_offset: float = 0.0,
        timestep_importance: float = 0.0,
    ) -> None:
        if network.adaptor is None:
            raise ValueError("the adaptor's stage needs a network with an adaptor")
        if not 0 <= text_dropout <= 1:
            raise ValueError(f"text_dropout must be between 0 and 1, got {text_dropout}")
        self.network, self.text_dropout = network.freeze(), text_dropout
        network.adaptor.train().requires_grad_(True)
        self.loss = WeightedEpsilon(network.prior.schedule, max_clean_weight, noise_offset, timestep_importance)
        self.trainables: Mapping[str, nn.Module] = {ADAPTOR: network.adaptor}
        self.config: Mapping[str, Any] = network.config()
        self.progress: MutableMapping[str, float] = {}
        self._empty: tuple[Tensor, Tensor] | None = None

    @property
    def prior(self) -> Prior:
        """The frozen prior, with its name and digest."""
        return self.network.prior

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Encoder and adaptor."""
        return self.network.parts()

    @property
    def empty_prompt(self) -> tuple[Tensor, Tensor]:
        """The empty prompt's embeddings [1, L, D] and [1, P]; the frozen encoders compute them once."""
        if self._empty is None:
            self._empty = embed_empty_prompt(self.prior)
        return self._empty

    @torch.no_grad()
    def conditions(self, batch: Batch, noise: Noise) -> SizedConditions:
        """Texts after dropout, and sizes."""
        dropped = noise.uniform("conditions") < self.text_dropout
        if batch.embeddings:
            text, pooled = embed_batch_prompts(self.prior, batch, dropped, self.empty_prompt)
        else:
            prompts = ["" if drop else text for text, drop in zip(batch.prompts, dropped.tolist(), strict=True)]
            text, pooled = self.prior.embed_prompts(prompts)
        return SizedConditions(text=text, pooled=pooled, time_ids=self.prior.time_ids(batch.sizes))

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase: mean squared error of the predicted noise."""
        clean, conditions = clean_latents(self.prior, batch), self.conditions(batch, noise)
        with torch.no_grad():
            lq = self.network.encoder(batch.lq)
        noisy, target, timesteps = self.loss.noisy(clean, noise)
        eps = self.network.predict_eps(noisy, timesteps, lq, conditions)
        yield ADAPTOR, self.loss(eps, target, timesteps)
