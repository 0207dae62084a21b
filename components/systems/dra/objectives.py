"""The objectives of DRA: the prior's own loss with three variants of a sample (section 3.3).

An SDXL-shaped prior predicts noise; an MM-DiT learns velocities by conditional flow matching.

    normal    the caption                    target HQ latents
    null      ""                             target HQ latents
    lq        descriptors of the degradation target LQ latents, by the prior's own encoder

The condition is the LQ picture in all variants. The last variant makes the descriptors mean poor quality, so that they
serve as a negative prompt. All randomness comes from the Noise argument of `phases`, under these names: "variant" and
"noise", and by the prior "timestep" and "noise_offset", or "time".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from components.degradations.plans import descriptors
from components.objectives.diffusion import WeightedEpsilon
from components.objectives.flow_matching import flow_matching_loss, logit_normal_times
from components.objectives.precomputed import clean_latents, embed_batch_prompts, embed_empty_prompt
from components.priors.conditions import SizedConditions
from components.randomness import Noise
from components.samplers.flow import noisy_latents
from components.systems.dra.bundle import ADAPTERS, Bundle
from components.systems.dra.network import Dra
from components.systems.dra.tokens import TokenDra
from components.types import Batch, Loss, Objective, Plan


@dataclass(frozen=True)
class Variants:
    """What each sample of a batch trains: bool [B] each; the prompts are those of the variants.

    Attributes:
        null: the prompt is empty.
        lq: the target is the LQ picture, and the prompt names its degradation.
        prompts: one text for each sample.
    """

    null: Tensor
    lq: Tensor
    prompts: Sequence[str]


def descriptor_prompt(plan: Plan) -> str:
    """The words for what really happened to a picture, joined by commas; "" for a plan without operations or faults."""
    return ", ".join(descriptors(plan)) if plan else ""


def draw_variants(
    uniform: Tensor, prompts: Sequence[str], plans: Sequence[Plan], null_share: float, lq_share: float
) -> Variants:
    """The variants of a batch. A picture whose plan names no fault has nothing to describe: it stays normal.

    Args:
        uniform: [B] in [0, 1): below null_share the sample is "null", in the lq_share above it "lq".
        prompts: captions.
        plans: degradation of each picture, or empty for a batch of stored pairs.
    """
    texts = [descriptor_prompt(plan) for plan in plans] or [""] * len(prompts)
    null = uniform < null_share
    described = torch.tensor([bool(text) for text in texts], device=uniform.device)
    lq = ~null & (uniform < null_share + lq_share) & described
    rows = zip(prompts, texts, null.tolist(), lq.tolist(), strict=True)
    chosen = ["" if is_null else text if is_lq else prompt for prompt, text, is_null, is_lq in rows]
    return Variants(null=null, lq=lq, prompts=chosen)


OwnBundle = TypeVar("OwnBundle", bound=Bundle[Any, Any])


class VariantsObjective(Objective, Generic[OwnBundle]):
    """The variants; restoration and diffusion adapters train together. The loss is each shape's own.

    Args:
        network: its adapters and its LoRA train; prior and robust encoder are frozen.
        null_share: probability of the null variant.
        lq_share: probability of the LQ variant.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, network: OwnBundle, *, null_share: float = 0.15, lq_share: float = 0.1) -> None:
        check_shares(null_share, lq_share)
        self.network, self.null_share, self.lq_share = network.freeze(), null_share, lq_share
        trainable = network.trainable.train().requires_grad_(True)
        self.trainables: Mapping[str, nn.Module] = {ADAPTERS: trainable}
        self.config: Mapping[str, Any] = network.config()
        self.progress: MutableMapping[str, float] = {}

    @property
    def prior(self) -> Any:
        """The frozen prior, with its name and digest."""
        return self.network.prior

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Adapters, LoRA and, if there is one, the robust encoder."""
        return self.network.parts()

    def variants(self, batch: Batch, noise: Noise) -> Variants:
        """The drawn variants of a batch."""
        return draw_variants(noise.uniform("variant"), batch.prompts, batch.plans, self.null_share, self.lq_share)

    @torch.no_grad()
    def targets(self, batch: Batch, variants: Variants) -> Tensor:
        """Clean latents [B, C, h, w] of the variants: HQ's, or LQ's by the prior's own encoder."""
        clean, rows = clean_latents(self.prior, batch), variants.lq.nonzero()[:, 0]
        if not len(rows):
            return clean
        return clean.index_copy(0, rows, self.prior.encode(batch.lq[rows]).to(clean.dtype))

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase: mean squared error of the prediction."""
        variants = self.variants(batch, noise)
        clean = self.targets(batch, variants)
        with torch.no_grad():
            lq = batch.lq if self.network.sees_pictures else self.network.encode_lq(batch.lq)
        yield ADAPTERS, self.denoising_loss(batch, variants, clean, self.network.features(lq), noise)

    def denoising_loss(
        self, batch: Batch, variants: Variants, clean: Tensor, features: Sequence[Tensor], noise: Noise
    ) -> Loss:
        """The prior's own loss for the clean latents of the variants, given the LQ features."""
        raise AssertionError("each shape has its own")


class AdaptersObjective(VariantsObjective[Dra]):
    """On an SDXL-shaped prior: noise prediction.

    Args:
        network, null_share, lq_share: see VariantsObjective.
        max_clean_weight, noise_offset, timestep_importance: see objectives.diffusion; 1, 0 and 0 are the plain loss.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        network: Dra,
        *,
        null_share: float = 0.15,
        lq_share: float = 0.1,
        max_clean_weight: float = 1.0,
        noise_offset: float = 0.0,
        timestep_importance: float = 0.0,
    ) -> None:
        super().__init__(network, null_share=null_share, lq_share=lq_share)
        self.loss = WeightedEpsilon(network.prior.schedule, max_clean_weight, noise_offset, timestep_importance)
        self._empty: tuple[Tensor, Tensor] | None = None

    @property
    def empty_prompt(self) -> tuple[Tensor, Tensor]:
        """The empty prompt's embeddings [1, L, D] and [1, P]; the frozen encoders compute them once."""
        if self._empty is None:
            self._empty = embed_empty_prompt(self.prior)
        return self._empty

    @torch.no_grad()
    def conditions(self, batch: Batch, variants: Variants) -> SizedConditions:
        """Texts of the variants. Size ids: the picture's own size, not cropped (dra.md, section 4)."""
        if batch.embeddings:
            text, pooled = embed_batch_prompts(self.prior, batch, variants.null, self.empty_prompt)
            rows = variants.lq.nonzero()[:, 0]
            if len(rows):  # precomputed embeddings are the captions'
                own = self.prior.embed_prompts([variants.prompts[row] for row in rows.tolist()])
                text = text.index_copy(0, rows, own[0].to(text.dtype))
                pooled = pooled.index_copy(0, rows, own[1].to(pooled.dtype))
        else:
            text, pooled = self.prior.embed_prompts(variants.prompts)
        height, width = batch.hq.shape[-2:]
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(batch), -1)
        return SizedConditions(text=text, pooled=pooled, time_ids=self.prior.time_ids(sizes))

    def denoising_loss(
        self, batch: Batch, variants: Variants, clean: Tensor, features: Sequence[Tensor], noise: Noise
    ) -> Loss:
        conditions = self.conditions(batch, variants)
        noisy, target, timesteps = self.loss.noisy(clean, noise)
        eps = self.network.predict_eps(noisy, timesteps, features, conditions)
        return self.loss(eps, target, timesteps)


class FlowAdaptersObjective(VariantsObjective[TokenDra]):
    """On an MM-DiT: conditional flow matching with logit-normal times, as in the prior's own training.

    Args:
        network, null_share, lq_share: see VariantsObjective.
        time_mean, time_deviation, time_shift: see flow_matching.logit_normal_times; 0, 1 and 1 are the paper's.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        network: TokenDra,
        *,
        null_share: float = 0.15,
        lq_share: float = 0.1,
        time_mean: float = 0.0,
        time_deviation: float = 1.0,
        time_shift: float = 1.0,
    ) -> None:
        super().__init__(network, null_share=null_share, lq_share=lq_share)
        self.times = partial(logit_normal_times, mean=time_mean, deviation=time_deviation, shift=time_shift)
        self.times(torch.zeros(1))  # checks the ranges

    def denoising_loss(
        self, batch: Batch, variants: Variants, clean: Tensor, features: Sequence[Tensor], noise: Noise
    ) -> Loss:
        with torch.no_grad():
            conditions = self.prior.conditions(variants.prompts)
        eps, times = noise.normal("noise", tuple(clean.shape[1:])), self.times(noise.normal("time", ()))
        velocity = self.network.predict_velocity(noisy_latents(clean, eps, times), times, features, conditions)
        value = flow_matching_loss(velocity, clean, eps).mean()
        return Loss(value=value, metrics={"loss": value.detach()})


def check_shares(null_share: float, lq_share: float) -> None:
    """Raises ValueError if a share is negative or their sum is above 1."""
    if min(null_share, lq_share) < 0 or null_share + lq_share > 1 + 1e-6:
        raise ValueError(
            f"null_share and lq_share must be at least 0 and sum to at most 1, got {null_share} and {lq_share}"
        )
