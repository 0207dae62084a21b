"""InstaRevive's objective: dynamic score matching of a one-step generator (section 3.2).

Each step has two phases on the same generated latents, each with its own optimiser (instarevive.md section 5.1):

    generator    alpha L_reg + (1 - alpha) lambda L_dsm
    fake_score   mean square error of the noise that it predicts on the generator's latents

All randomness comes from the Noise argument of `phases`, by these names: "text_dropout", "generator" (if the generator
takes noise), "score_timestep", "score_noise", "fake_timestep" and "fake_noise" (the last two with the suffix " 1" and
so on in further steps of the fake score).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from components.objectives.diffusion import epsilon_loss
from components.objectives.precomputed import clean_latents, embed_batch_prompts, embed_empty_prompt, repeat_embeddings
from components.objectives.regression import PerceptualLoss, latent_distance, pyramid_distance
from components.objectives.score_matching import (
    draw_timesteps,
    largest_timesteps,
    regression_share,
    score_gap,
    score_matching_loss,
    squared_distances,
)
from components.priors.sdxl import Prior
from components.randomness import Noise
from components.samplers.guidance import guide
from components.systems.instarevive.network import Conditions, EpsPredictor, ScoreNetwork, join
from components.systems.instarevive.settings import Distillation
from components.training import average
from components.types import Batch, Loss, Objective, SourcedPrior

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


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What frozen networks compute for a batch: conditions, and latents [B, C, h, w] of targets and inputs."""

    conditions: Conditions
    target: Tensor
    lq: Tensor


@dataclass(frozen=True, kw_only=True)
class Control:
    """Dynamic control of one step, as one micro-batch takes it.

    Attributes:
        distance: d of Eq. 7, float32 [] or, per sample, [B].
        t_max: int64 of the same shape.
        alpha: weight of the regression, float32 of the same shape.
    """

    distance: Tensor
    t_max: Tensor
    alpha: Tensor


class InstaReviveObjective(Objective):
    """See the module's docstring.

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

    Attributes:
        averaged: the generator alone: only the training uses the fake score, and its average would cost as much.
        progress: "t_start" after the first training step: its T_max, which a resumed run needs.

    Raises:
        ValueError: a fake score or LPIPS is missing or not wanted; the scores' schedules differ.
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
        prior: SourcedPrior | None = None,
    ) -> None:
        self.settings = settings or Distillation()
        if self.settings.score != (fake is not None):
            raise ValueError("score=true needs a fake score, and score=false takes none")
        if self.settings.lpips and perceptual is None:
            raise ValueError("lpips names weights: load them (objectives.regression.load_lpips) and give the network")
        if fake is not None and fake.schedule != real.schedule:
            raise ValueError(f"real and fake score have different schedules: {real.schedule} and {fake.schedule}")
        self.generator, self.real, self.fake = generator, real, fake
        self.autoencoder, self.texts, self.coarse = autoencoder, texts, coarse
        self.picture_embedder = picture_embedder
        self.perceptual = perceptual or pyramid_distance
        self.schedule = real.schedule
        self._prior, self.config = prior, config or {}
        self.trainables: Mapping[str, nn.Module] = {"generator": generator}
        if fake is not None:
            self.trainables = {**self.trainables, "fake_score": fake}
        self.progress: MutableMapping[str, float] = {}
        self._parts = parts

    @property
    def prior(self) -> SourcedPrior | None:
        """The builder's `prior`."""
        return self._prior

    def parts(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The builder's `parts`, else the generator's tensors."""
        return self._parts() if self._parts is not None else {"generator": dict(self.generator.state_dict())}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """Yield ("generator", loss), and with score matching ("fake_score", loss) fake_steps times.

        Metrics: t_max, alpha, distance, loss_regression (with loss_perceptual and loss_l2 if both are used), loss_dsm;
        loss_fake.
        """
        return self._phases(batch, noise, None, None)

    def step_phases(self, batches: Sequence[tuple[Batch, Noise]]) -> Sequence[Iterator[tuple[str, Loss]]]:
        """`phases` of each micro-batch; all of them have the T_max and alpha of the step's whole batch (Eq. 7).

        With several micro-batches the generator runs twice, first without gradients for the distances. A graph that
        waited for the others would take the memory of the whole batch.
        """
        if len(batches) == 1 or not self._control_needs_all():
            return [self.phases(batch, noise) for batch, noise in batches]
        inputs, squares = [], []
        with torch.no_grad():
            for batch, noise in batches:
                inputs.append(self._inputs(batch, noise))
                latents = self._generate(batch, inputs[-1].conditions, noise, inputs[-1].lq)
                squares.append(squared_distances(latents, inputs[-1].target, self.settings.reduction))
        controls = self._controls(squares, torch.is_grad_enabled())
        parts = zip(batches, inputs, controls, strict=True)
        return [self._phases(batch, noise, part, control) for (batch, noise), part, control in parts]

    def _control_needs_all(self) -> bool:
        """Whether T_max and alpha of a micro-batch depend on the other micro-batches."""
        settings = self.settings
        return settings.dynamic and (
            not settings.per_sample or (not settings.t_high and "t_start" not in self.progress)
        )

    def _phases(
        self, batch: Batch, noise: Noise, inputs: Inputs | None, control: Control | None
    ) -> Iterator[tuple[str, Loss]]:
        """`phases`; without `inputs` and `control` they are computed for this batch alone."""
        settings, training = self.settings, torch.is_grad_enabled()
        inputs = inputs or self._inputs(batch, noise)
        conditions, target = inputs.conditions, inputs.target
        latents = self._generate(batch, conditions, noise, inputs.lq)
        if control is None:
            (control,) = self._controls([squared_distances(latents, target, settings.reduction)], training)
        regression, metrics = latents.new_zeros(len(batch)), dict[str, Tensor]()
        if settings.regression == "none":
            control = replace(control, alpha=torch.zeros_like(control.alpha))
        else:
            regression, metrics = self._regression(latents, target, batch)
        value = regression
        if settings.score:
            score_conditions, empty = self._score_conditions(batch, conditions)
            matching = self._score_loss(latents, score_conditions, empty, control.t_max, noise)
            value = control.alpha * regression + (1 - control.alpha) * settings.weight * matching
            metrics["loss_dsm"] = matching
        values = {"t_max": control.t_max.float(), "alpha": control.alpha, "distance": control.distance, **metrics}
        # a phase's graph is freed after its optimiser step, so the next phase needs detached latents
        detached = latents.detach()
        yield "generator", Loss(value=value.mean(), metrics={k: v.detach().mean() for k, v in values.items()})
        steps = settings.fake_steps if training else 1  # held-out losses of a phase add up
        for step in range(steps if settings.score else 0):
            fake_loss = self._fake_loss(detached, conditions, control.t_max, noise, f" {step}" if step else "")
            yield "fake_score", Loss(value=fake_loss, metrics={"loss_fake": fake_loss.detach() / steps})

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

    @torch.no_grad()
    def _controls(self, squares: Sequence[Tensor], training: bool) -> list[Control]:
        """T_max and alpha of each micro-batch.

        In training the distance is the mean over all micro-batches of all workers: Eq. 7 sums over the batch, which
        they share. One worker alone computes held-out losses, so waiting for the others would never end.

        Args:
            squares: squared distances of each micro-batch's samples, [B] each.
        """
        settings = self.settings
        if not settings.per_sample:
            squares = [_over_workers(torch.cat(list(squares)).mean(), training)] * len(squares)
        distances = [value.sqrt() for value in squares]
        if not settings.dynamic:
            last = self.schedule.num_train_timesteps - 1
            return [
                Control(
                    distance=distance,
                    t_max=torch.full_like(distance, last, dtype=torch.int64),
                    alpha=torch.full_like(distance, settings.fixed_alpha),
                )
                for distance in distances
            ]
        t_max = [largest_timesteps(self.schedule, settings.kappa * d, settings.t_floor) for d in distances]
        high = settings.t_high or self._t_start(t_max, training)
        return [
            Control(distance=distance, t_max=t, alpha=regression_share(t, settings.t_low, high))
            for distance, t in zip(distances, t_max, strict=True)
        ]

    def _t_start(self, t_max: Sequence[Tensor], training: bool) -> float:
        """T_max of the first training step, a mean over its samples; before that step, of these micro-batches."""
        if "t_start" in self.progress:
            return self.progress["t_start"]
        mean = torch.cat([value.float().reshape(-1) for value in t_max]).mean()
        start = max(float(_over_workers(mean, training)), self.settings.t_low + 1)
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

    def _score_loss(
        self, latents: Tensor, conditions: Conditions, empty: Conditions, t_max: Tensor, noise: Noise
    ) -> Tensor:
        """L_dsm per sample [B]: the real score with guidance, the fake one without (section 5.2)."""
        assert self.fake is not None
        settings = self.settings
        t = draw_timesteps(noise.uniform("score_timestep"), t_max, settings.t_share)
        with torch.no_grad():
            clean = latents.detach()
            noisy = self.schedule.add_noise(clean, noise.normal("score_noise", tuple(clean.shape[1:])).to(clean), t)
            if settings.cfg_scale == 1 or not settings.prompt:
                eps_real = self.real.predict_eps(noisy, t, conditions)
            else:
                both = self.real.predict_eps(noisy.repeat(2, 1, 1, 1), t.repeat(2), join([empty, conditions]))
                negative, positive = both.chunk(2)
                eps_real = guide(negative, positive, settings.cfg_scale)
            eps_fake = self.fake.predict_eps(noisy, t, conditions)
        return score_matching_loss(latents, score_gap(self.schedule, clean, noisy, t, eps_real, eps_fake))

    def _fake_loss(
        self, latents: Tensor, conditions: Conditions, t_max: Tensor, noise: Noise, suffix: str = ""
    ) -> Tensor:
        """The fake score's loss on detached latents [B, C, h, w] (section 5.3), a scalar.

        `suffix` makes the noise names of several steps on one batch different.
        """
        assert self.fake is not None
        if self.settings.fake_range == "same":
            t = draw_timesteps(noise.uniform(f"fake_timestep{suffix}"), t_max, self.settings.t_share)
        else:  # a flow-matching prior has no noise at step 0
            t = noise.integers(f"fake_timestep{suffix}", 1, self.schedule.num_train_timesteps)
        eps = noise.normal(f"fake_noise{suffix}", tuple(latents.shape[1:])).to(latents)
        noisy = self.schedule.add_noise(latents, eps, t)
        return epsilon_loss(self.fake.predict_eps(noisy, t, conditions), eps).mean()


def _over_workers(value: Tensor, training: bool) -> Tensor:
    return average({"value": value})["value"] if training else value
