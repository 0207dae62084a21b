"""What InstaRevive's training minimises: dynamic score matching of a one-step generator (section 3.2).

Two phases a step, each with an optimiser of its own, on the same generated latents (instarevive.md section 5.1):

    generator    alpha L_reg + (1 - alpha) lambda L_dsm
    fake_score   mean square error of the noise that it predicts on the generator's latents

All randomness comes from the Noise handed to `phases`, by these names: "text_dropout", "generator" (where the generator
takes noise), "score_timestep", "score_noise", "fake_timestep" and "fake_noise" (with " 1" and so on behind the last two
in further steps of the fake score).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.objectives.diffusion import epsilon_loss
from components.objectives.precomputed import clean_latents, embed_nothing, embedded_prompts, repeated
from components.objectives.regression import PerceptualLoss, latent_distance, pyramid_distance
from components.objectives.score_matching import (
    draw_timesteps,
    largest_timesteps,
    regression_share,
    score_gap,
    score_matching_loss,
    squared_distances,
)
from components.samplers.guidance import guide
from components.systems.instarevive.network import Conditions, EpsPredictor, ScoreNetwork, join
from components.systems.instarevive.settings import Distillation
from components.training import average
from components.types import Batch, Loss

if TYPE_CHECKING:
    from components.priors.sdxl import Prior
    from components.randomness import Noise

Coarse = Callable[[Tensor], Tensor]
"""A coarse restorer: pictures [B, 3, H, W] in [0, 1] -> the same size and about the same range."""


class Autoencoder(Protocol):
    """Pictures in [-1, 1] <-> scaled latents; gradients flow through `decode`. A Prior is one."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


class Texts(Protocol):
    """The conditions of a batch for every network of the training."""

    def conditions(self, batch: Batch, dropped: Tensor) -> Conditions:
        """Of the batch's prompts; rows where bool [B] `dropped` is true have the empty one."""

    def nothing(self, batch: Batch) -> Conditions:
        """The empty prompt for every sample, sizes as in `conditions`."""


class Generator(Protocol):
    """LQ latents, conditions and perhaps noise -> clean latents. A OneStepGenerator is one."""

    @property
    def wants_noise(self) -> bool: ...

    def __call__(self, lq: Tensor, given: Conditions, noise: Tensor | None = None) -> Tensor: ...


class PriorTexts:
    """Texts by the frozen text encoders of a prior of SDXL's shape.

    Args:
        prior: its encoders embed what a batch does not bring along.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior
        self._nothing: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def conditions(self, batch: Batch, dropped: Tensor) -> Conditions:
        if batch.embeddings:
            text, pooled = embedded_prompts(self.prior, batch, dropped, self._empty())
        else:
            gone = dropped.tolist()
            text, pooled = self.prior.embed_prompts(["" if g else p for p, g in zip(batch.prompts, gone, strict=True)])
        return Conditions(text=text, pooled=pooled, time_ids=self.prior.time_ids(batch.sizes))

    def nothing(self, batch: Batch) -> Conditions:
        text, pooled = repeated(self._empty(), len(batch))
        return Conditions(text=text, pooled=pooled, time_ids=self.prior.time_ids(batch.sizes))

    def _empty(self) -> tuple[Tensor, Tensor]:
        if self._nothing is None:
            self._nothing = embed_nothing(self.prior)
        return self._nothing


@dataclass(frozen=True, kw_only=True)
class Control:
    """Dynamic control of one batch.

    Attributes:
        distance: d of Eq. 7, float32 [] or, per sample, [B].
        t_max: int64 of the same shape.
        alpha: weight of the regression, float32 of the same shape.
    """

    distance: Tensor
    t_max: Tensor
    alpha: Tensor


class InstaReviveObjective:
    """See the module's docstring.

    Args:
        generator: a module that is a Generator; all of its parameters that require gradients train.
        real: the frozen score.
        fake: the trained score, see scores.build_scores; None with `settings.score` off.
        autoencoder: frozen.
        texts: frozen.
        settings: see Distillation; with `lpips` set, hand its network over as `perceptual`.
        coarse: the frozen coarse restorer in front; None for none.
        picture_embedder: pictures [B, 3, H, W] in [-1, 1] -> embeddings [B, D] of the inputs that the real score is
            told beside the text (identity.py); None for none.
        perceptual: loss on decoded pictures; default: the pyramid, which needs no weights.
        config: architecture for model.json.
        parts: gives all parts of the model folder; default: the generator's tensors as part "generator".
        prior: with `source` for model.json; None where there is nothing to record.

    Attributes:
        averaged: the generator alone: nobody sees the fake score but the training, and its average would cost as much.
        progress: "t_start" once it is known: T_max of the first training step, which a resumed run needs.

    Raises:
        ValueError: a fake score or LPIPS is missing, or has no place; the scores' schedules differ.
    """

    averaged = ("generator",)

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
        prior: Any = None,
    ) -> None:
        self.settings = settings or Distillation()
        if self.settings.score != (fake is not None):
            raise ValueError("score matching needs a fake score, and regression alone has no place for one")
        if self.settings.lpips and perceptual is None:
            raise ValueError("lpips names weights: load them (objectives.regression.load_lpips) and give the network")
        if fake is not None and fake.schedule != real.schedule:
            raise ValueError(f"real and fake score have different schedules: {real.schedule} and {fake.schedule}")
        self.generator, self.real, self.fake = generator, real, fake
        self.autoencoder, self.texts, self.coarse = autoencoder, texts, coarse
        self.picture_embedder = picture_embedder
        self.perceptual = perceptual or pyramid_distance
        self.schedule = real.schedule
        self.prior, self.config = prior, config or {}
        self.trainables: Mapping[str, nn.Module] = {"generator": generator}
        if fake is not None:
            self.trainables = {**self.trainables, "fake_score": fake}
        self.progress: dict[str, float] = {}
        self._parts = parts

    def parts(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What the builder said, else the generator's tensors."""
        return self._parts() if self._parts is not None else {"generator": dict(self.generator.state_dict())}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """Yield ("generator", loss), and with score matching ("fake_score", loss) as often as fake_steps says.

        Metrics: t_max, alpha, distance, loss_regression (with loss_perceptual, loss_l2 where both are there), loss_dsm;
        loss_fake.
        """
        settings, training = self.settings, torch.is_grad_enabled()
        gone = noise.uniform("text_dropout") < settings.text_dropout
        if not settings.prompt:
            gone = torch.ones_like(gone)
        given = self.texts.conditions(batch, gone)
        target = clean_latents(self.autoencoder, batch)  # type: ignore[arg-type]
        latents = self._generate(batch, given, noise)
        control = self._control(latents, target, training)
        regression, metrics = latents.new_zeros(len(batch)), dict[str, Tensor]()
        if settings.regression == "none":
            control = replace(control, alpha=torch.zeros_like(control.alpha))
        else:
            regression, metrics = self._regression(latents, target, batch)
        value = regression
        if settings.score:
            told, empty = self._told(batch, given)
            matching = self._score_loss(latents, told, empty, control.t_max, noise)
            value = control.alpha * regression + (1 - control.alpha) * settings.weight * matching
            metrics["loss_dsm"] = matching
        named = {"t_max": control.t_max.float(), "alpha": control.alpha, "distance": control.distance, **metrics}
        # a phase's graph is gone once its loss was stepped: nothing of it may reach the next one
        detached = latents.detach()
        yield "generator", Loss(value=value.mean(), metrics={k: v.detach().mean() for k, v in named.items()})
        steps = settings.fake_steps if training else 1  # held-out losses of a phase add up
        for step in range(steps if settings.score else 0):
            fake_loss = self._fake_loss(detached, given, control.t_max, noise, f" {step}" if step else "")
            yield "fake_score", Loss(value=fake_loss, metrics={"loss_fake": fake_loss.detach() / steps})

    @torch.no_grad()
    def clean(self, batch: Batch, noise: Noise) -> Tensor:
        """What the generator makes of a batch, told every prompt: clean latents [B, C, h, w]."""
        nobody = torch.full((len(batch),), not self.settings.prompt, device=batch.hq.device)
        return self._generate(batch, self.texts.conditions(batch, nobody), noise)

    def _generate(self, batch: Batch, given: Conditions, noise: Noise) -> Tensor:
        """The generator's clean latents [B, C, h, w], with gradients; with inpaint the input's where it is whole.

        Raises:
            ValueError: inpaint, and a batch without masks.
        """
        lq = self.lq_latents(batch)
        wants = bool(getattr(self.generator, "wants_noise", False))
        start = noise.normal("generator", tuple(lq.shape[1:])).to(lq) if wants else None
        latents: Tensor = self.generator(lq, given, start)
        if not self.settings.inpaint:
            return latents
        if batch.masks is None:
            raise ValueError("inpaint needs masks of what is missing: degrade with strokes")
        with torch.no_grad():
            known = lq if self.coarse is None else self.autoencoder.encode(batch.lq)
            missing = F.adaptive_max_pool2d(batch.masks, latents.shape[-2:]) > 0  # as the restorer has it
        return torch.where(missing, latents, known)

    @torch.no_grad()
    def lq_latents(self, batch: Batch) -> Tensor:
        """Latents of the LQ pictures, or of what the coarse restorer makes of them."""
        if self.coarse is None:
            return self.autoencoder.encode(batch.lq)
        return self.autoencoder.encode(self.coarse((batch.lq + 1) / 2) * 2 - 1)

    @torch.no_grad()
    def _control(self, latents: Tensor, target: Tensor, training: bool) -> Control:
        """T_max and alpha of a batch.

        While training the distance is that of all workers' batches (Eq. 7's sum is over the batch, which they share);
        held-out losses are one worker's affair, and waiting for the others would never end.
        """
        settings = self.settings
        squares = squared_distances(latents, target, settings.reduction)
        if not settings.per_sample:
            squares = _over_workers(squares.mean(), training)
        distance = squares.sqrt()
        if not settings.dynamic:
            last = torch.full_like(distance, self.schedule.num_train_timesteps - 1, dtype=torch.int64)
            return Control(distance=distance, t_max=last, alpha=torch.full_like(distance, settings.fixed_alpha))
        t_max = largest_timesteps(self.schedule, settings.kappa * distance, settings.t_floor)
        high = settings.t_high or self._t_start(t_max, training)
        return Control(distance=distance, t_max=t_max, alpha=regression_share(t_max, settings.t_low, high))

    def _t_start(self, t_max: Tensor, training: bool) -> float:
        """T_max of the first training step; before it, of the batch at hand."""
        if "t_start" in self.progress:
            return self.progress["t_start"]
        start = max(float(_over_workers(t_max.float().mean(), training)), self.settings.t_low + 1)
        if training:
            self.progress["t_start"] = start
        return start

    def _regression(self, latents: Tensor, target: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L_reg per sample [B], and its terms by name."""
        settings, terms = self.settings, {}
        if settings.regression != "l2":
            decode = self.autoencoder.decode
            images = (
                checkpoint(decode, latents, use_reentrant=False) if settings.checkpoint_decoder else decode(latents)
            )
            # not clipped: a value out of range must find its way back
            terms["loss_perceptual"] = settings.perceptual_weight * self.perceptual(images, batch.hq)
        if settings.regression != "perceptual":
            terms["loss_l2"] = settings.l2_weight * latent_distance(latents, target)
        total = torch.stack(list(terms.values())).sum(dim=0)
        return total, {"loss_regression": total, **(terms if len(terms) > 1 else {})}

    def _told(self, batch: Batch, given: Conditions) -> tuple[Conditions, Conditions]:
        """Conditions and the empty ones for the scores, with what an IP-Adapter is told: nothing is zeros there."""
        empty = self.texts.nothing(batch)
        if self.picture_embedder is None:
            return given, empty
        image = self.picture_embedder(batch.lq)
        return replace(given, image=image), replace(empty, image=torch.zeros_like(image))

    def _score_loss(self, latents: Tensor, given: Conditions, empty: Conditions, t_max: Tensor, noise: Noise) -> Tensor:
        """L_dsm per sample [B]: the real score guided, the fake one not (section 5.2)."""
        assert self.fake is not None
        settings = self.settings
        t = draw_timesteps(noise.uniform("score_timestep"), t_max, settings.t_share)
        with torch.no_grad():
            clean = latents.detach()
            noisy = self.schedule.add_noise(clean, noise.normal("score_noise", tuple(clean.shape[1:])).to(clean), t)
            if settings.cfg_scale == 1 or not settings.prompt:
                eps_real = self.real.predict_eps(noisy, t, given)
            else:
                both = self.real.predict_eps(noisy.repeat(2, 1, 1, 1), t.repeat(2), join([empty, given]))
                negative, positive = both.chunk(2)
                eps_real = guide(negative, positive, settings.cfg_scale)
            eps_fake = self.fake.predict_eps(noisy, t, given)
        return score_matching_loss(latents, score_gap(self.schedule, clean, noisy, t, eps_real, eps_fake))

    def _fake_loss(self, latents: Tensor, given: Conditions, t_max: Tensor, noise: Noise, suffix: str = "") -> Tensor:
        """The fake score's own training on detached latents [B, C, h, w] (section 5.3), one number.

        `suffix` to the noise's names tells the steps of one batch apart.
        """
        assert self.fake is not None
        if self.settings.fake_range == "same":
            t = draw_timesteps(noise.uniform(f"fake_timestep{suffix}"), t_max, self.settings.t_share)
        else:  # at step 0 a flow-matching prior has no noise at all
            t = noise.integers(f"fake_timestep{suffix}", 1, self.schedule.num_train_timesteps)
        eps = noise.normal(f"fake_noise{suffix}", tuple(latents.shape[1:])).to(latents)
        noisy = self.schedule.add_noise(latents, eps, t)
        return epsilon_loss(self.fake.predict_eps(noisy, t, given), eps).mean()


def _over_workers(value: Tensor, training: bool) -> Tensor:
    return average({"value": value})["value"].to(value) if training else value
