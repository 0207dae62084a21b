"""InstaRevive's objective: dynamic score matching of a one-step generator on a prior's latents (section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.objectives.distillation import Distillation
from components.objectives.precomputed import clean_latents, embed_batch_prompts, embed_empty_prompt, repeat_embeddings
from components.objectives.regression import PerceptualLoss, latent_distance, pyramid_distance
from components.objectives.score_distillation import Inputs, ScoreDistillation, ScoreNetwork
from components.priors.conditions import Conditions, join
from components.priors.sdxl import Prior
from components.randomness import Noise
from components.samplers.guidance import guide
from components.systems.instarevive.network import EpsPredictor
from components.types import Batch, SourcedPrior

Coarse = Callable[[Tensor], Tensor]
"""A coarse restorer: pictures [B, 3, H, W] in [0, 1] -> the same size and about the same range."""


class Autoencoder(Protocol):
    """Pictures in [-1, 1] <-> scaled latents; gradients flow through `decode`. A Prior is one."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Texts(Protocol):
    """The conditions of a batch for every network of the training."""

    def conditions(self, batch: Batch, dropped: Tensor) -> Conditions:
        """Conditions of the batch's prompts; rows where bool [B] `dropped` is true have the empty prompt."""

    def unconditional(self, batch: Batch) -> Conditions:
        """Conditions with the empty prompt for every sample, sizes as in `conditions`."""


class Generator(Protocol):
    """LQ latents, conditions and perhaps noise -> clean latents. A OneStepGenerator is one."""

    @property
    def takes_noise(self) -> bool: ...

    def __call__(self, lq: Tensor, conditions: Conditions, noise: Tensor | None = None) -> Tensor: ...


class PriorTexts:
    """Texts by the frozen text encoders of a prior of SDXL's shape.

    Args:
        prior: its encoders embed prompts without precomputed embeddings.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self._unconditional: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def conditions(self, batch: Batch, dropped: Tensor) -> Conditions:
        if batch.embeddings:
            text, pooled = embed_batch_prompts(self.prior, batch, dropped, self._empty())
        else:
            drops = dropped.tolist()
            text, pooled = self.prior.embed_prompts(["" if d else p for p, d in zip(batch.prompts, drops, strict=True)])
        return Conditions(text=text, pooled=pooled, time_ids=self.prior.time_ids(batch.sizes))

    def unconditional(self, batch: Batch) -> Conditions:
        text, pooled = repeat_embeddings(self._empty(), len(batch))
        return Conditions(text=text, pooled=pooled, time_ids=self.prior.time_ids(batch.sizes))

    def _empty(self) -> tuple[Tensor, Tensor]:
        if self._unconditional is None:
            self._unconditional = embed_empty_prompt(self.prior)
        return self._unconditional


class InstaReviveObjective(ScoreDistillation):
    """The distillation on a prior's latents, with texts, guidance and inpainting; see ScoreDistillation.

    Args:
        generator: a module that is a Generator; its parameters that require gradients train.
        real: the frozen score.
        fake: the trained score, see scores.build_scores; None with `settings.score` off.
        autoencoder: frozen.
        texts: frozen.
        settings: see Distillation; with `lpips` set, `perceptual` must be its network.
        coarse: the frozen coarse restorer in front; None for none.
        picture_embedder: pictures [B, 3, H, W] in [-1, 1] -> embeddings [B, D] of the inputs, which the real score
            takes in addition to the text (identity.py); None for none.
        perceptual: loss on decoded pictures; default: the pyramid, which needs no weights.
        config: architecture for model.json.
        parts: returns all parts of the model folder; default: the generator's tensors as part "generator".
        prior: with `source` for model.json; None for no entry.

    Raises:
        ValueError: a fake score or LPIPS is missing or not wanted; the scores' schedules differ.
    """

    def __init__(
        self,
        generator: nn.Module,
        real: ScoreNetwork,
        fake: EpsPredictor | None,
        autoencoder: Autoencoder,
        texts: Texts,
        settings: Distillation | None = None,
        *,
        coarse: Coarse | None = None,
        picture_embedder: Callable[[Tensor], Tensor] | None = None,
        perceptual: PerceptualLoss | None = None,
        config: Mapping[str, Any] | None = None,
        parts: Callable[[], Mapping[str, Mapping[str, Tensor]]] | None = None,
        prior: SourcedPrior | None = None,
    ) -> None:
        super().__init__(generator, real, fake, settings)
        if self.settings.lpips and perceptual is None:
            raise ValueError("lpips names weights: load them (objectives.regression.load_lpips) and give the network")
        self.autoencoder, self.texts, self.coarse = autoencoder, texts, coarse
        self.picture_embedder = picture_embedder
        self.perceptual = perceptual or pyramid_distance
        self._prior, self.config, self._parts = prior, config or {}, parts

    @property
    def prior(self) -> SourcedPrior | None:
        """The builder's `prior`."""
        return self._prior

    def parts(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The builder's `parts`, else the generator's tensors."""
        return self._parts() if self._parts is not None else {"generator": dict(self.generator.state_dict())}

    @torch.no_grad()
    def clean(self, batch: Batch, noise: Noise) -> Tensor:
        """The generator's clean latents [B, C, h, w] of a batch, without prompt dropout."""
        dropped = torch.full((len(batch),), not self.settings.prompt, device=batch.hq.device)
        return self._generate(batch, self.texts.conditions(batch, dropped), noise, self.lq_latents(batch))

    @torch.no_grad()
    def _inputs(self, batch: Batch, noise: Noise) -> Inputs:
        dropped = noise.uniform("text_dropout") < self.settings.text_dropout
        if not self.settings.prompt:
            dropped = torch.ones_like(dropped)
        conditions = self.texts.conditions(batch, dropped)
        target = clean_latents(self.autoencoder, batch)  # type: ignore[arg-type]
        return Inputs(conditions=conditions, target=target, lq=self.lq_latents(batch))

    def _generate(self, batch: Batch, conditions: Conditions, noise: Noise, lq: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] with gradients; with inpaint, the input's latents where no pixel is missing.

        Args:
            lq: see lq_latents.

        Raises:
            ValueError: inpaint, and a batch without masks.
        """
        takes_noise = bool(self.generator.takes_noise)
        start = noise.normal("generator", tuple(lq.shape[1:])).to(lq) if takes_noise else None
        latents: Tensor = self.generator(lq, conditions, start)
        if not self.settings.inpaint:
            return latents
        if batch.masks is None:
            raise ValueError("inpaint needs masks of the missing pixels: set degradation.preset=strokes")
        with torch.no_grad():
            input_latents = lq if self.coarse is None else self.autoencoder.encode(batch.lq)
            missing = F.adaptive_max_pool2d(batch.masks, latents.shape[-2:]) > 0  # as in the restorer
        return torch.where(missing, latents, input_latents)

    @torch.no_grad()
    def lq_latents(self, batch: Batch) -> Tensor:
        """Latents of the LQ pictures, or of their coarse restorations."""
        if self.coarse is None:
            return self.autoencoder.encode(batch.lq)
        return self.autoencoder.encode(self.coarse((batch.lq + 1) / 2) * 2 - 1)

    def _regression(
        self, latents: Tensor, target: Tensor, batch: Batch, noise: Noise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_reg per sample [B], and its terms by name."""
        settings, terms = self.settings, {}
        if settings.regression != "l2":
            decode = self.autoencoder.decode
            images = (
                checkpoint(decode, latents, use_reentrant=False) if settings.checkpoint_decoder else decode(latents)
            )
            # not clipped: values out of range need gradients
            terms["loss_perceptual"] = settings.perceptual_weight * self.perceptual(images, batch.hq)
        if settings.regression != "perceptual":
            terms["loss_l2"] = settings.l2_weight * latent_distance(latents, target)
        total = torch.stack(list(terms.values())).sum(dim=0)
        return total, {"loss_regression": total, **(terms if len(terms) > 1 else {})}

    def _score_conditions(self, batch: Batch, conditions: Conditions) -> tuple[Conditions, Conditions]:
        """Conditions and empty ones for the scores, with the IP-Adapter's embeddings; the empty ones have zeros."""
        empty = self.texts.unconditional(batch)
        if self.picture_embedder is None:
            return conditions, empty
        image = self.picture_embedder(batch.lq)
        return replace(conditions, image=image), replace(empty, image=torch.zeros_like(image))

    def _real_eps(self, noisy: Tensor, t: Tensor, conditions: tuple[Conditions, Conditions]) -> Tensor:
        """With guidance (section 5.2)."""
        settings, (own, empty) = self.settings, conditions
        if settings.cfg_scale == 1 or not settings.prompt:
            return self.real.predict_eps(noisy, t, own)
        both = self.real.predict_eps(noisy.repeat(2, 1, 1, 1), t.repeat(2), join([empty, own]))
        negative, positive = both.chunk(2)
        return guide(negative, positive, settings.cfg_scale)

    def _fake_eps(self, noisy: Tensor, t: Tensor, conditions: tuple[Conditions, Conditions]) -> Tensor:
        """Without guidance."""
        assert self.fake is not None
        return self.fake.predict_eps(noisy, t, conditions[0])  # type: ignore[no-any-return]
