"""Dynamic score matching of a one-step generator, for any networks (Zhu et al. 2025, InstaRevive, section 3.2).

Each step has two phases on the same generated latents, each with its own optimiser (instarevive.md section 5.1):

    generator    alpha L_reg + (1 - alpha) lambda L_dsm
    fake_score   the prior's own loss on the generator's latents: mean square error of the predicted noise, or of the
                 velocity if the prior was trained by flow matching (score_matching has the derivation)

All randomness comes from the Noise argument of `phases`, by these names: "text_dropout", "generator" (if the generator
takes noise), "score_timestep", "score_noise", "score_window", "fake_timestep", "fake_noise" and "fake_window" (the last
three with the suffix " 1" and so on in further steps of the fake score).

A system derives its objective from ScoreDistillation. Its conditions, latents and score networks may be of any kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from components.objectives.diffusion import epsilon_loss
from components.objectives.distillation import Distillation
from components.objectives.score_matching import (
    NoiseMap,
    draw_timesteps,
    largest_timesteps,
    matching_share,
    regression_share,
    score_gap,
    score_matching_loss,
    squared_distances,
)
from components.randomness import Noise
from components.training import average
from components.types import Batch, Loss, Objective

Conditions = Any
"""What the networks of a system take besides latents."""


class ScoreNetwork(Protocol):
    """A noise predictor: the interface of real and fake score.

    `latents` have the noise of `schedule` at int64 `timesteps` [B]. The result is the predicted standard normal noise
    of the same shape [B, C, h, w], in the latents' dtype, for every kind of prediction of the network.
    """

    @property
    def schedule(self) -> NoiseMap: ...

    def predict_eps(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor: ...


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


class ScoreDistillation(Objective):
    """See the module's docstring. A derived class says what goes into the networks, by the methods of the last part.

    Args:
        generator: its parameters that require gradients train; `takes_noise` says whether it takes noise.
        real: the frozen score.
        fake: the trained score, a module; None with `settings.score` off.
        settings: see Distillation.

    Attributes:
        averaged: the generator alone: only the training uses the fake score, and its average would cost as much.
        progress: "t_start" after the first training step: its T_max, which a resumed run needs.

    Raises:
        ValueError: a fake score is missing or not wanted; the scores' schedules differ.
    """

    averaged = ("generator",)

    def __init__(
        self, generator: nn.Module, real: ScoreNetwork, fake: Any, settings: Distillation | None = None
    ) -> None:
        self.settings = settings or Distillation()
        if self.settings.score != (fake is not None):
            raise ValueError("score=true needs a fake score, and score=false takes none")
        if fake is not None and fake.schedule != real.schedule:
            raise ValueError(f"real and fake score have different schedules: {real.schedule} and {fake.schedule}")
        self.generator, self.real, self.fake = generator, real, fake
        self.schedule = real.schedule
        self.trainables: Mapping[str, nn.Module] = {"generator": generator}
        if fake is not None:
            self.trainables = {**self.trainables, "fake_score": fake}
        self.progress: MutableMapping[str, float] = {}

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
            regression, metrics = self._regression(latents, target, batch, noise)
        value = regression
        if settings.score:
            matching = self._score_loss(latents, self._score_conditions(batch, conditions), control.t_max, noise)
            if settings.matching_distance:
                matching = matching * matching_share(squared_distances(latents, target), settings.matching_distance)
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

    def _score_loss(self, latents: Tensor, conditions: Conditions, t_max: Tensor, noise: Noise) -> Tensor:
        """L_dsm per sample [B]: real and fake score on the same noisy latents (section 5.2)."""
        t = draw_timesteps(noise.uniform("score_timestep"), t_max, self.settings.t_share)
        (latents,) = self.windows("score_window", noise, latents)
        with torch.no_grad():
            clean = latents.detach()
            noisy = self.schedule.add_noise(clean, noise.normal("score_noise", tuple(clean.shape[1:])).to(clean), t)
            eps_real = self._real_eps(noisy, t, conditions)
            eps_fake = self._fake_eps(noisy, t, conditions)
        return score_matching_loss(latents, score_gap(self.schedule, clean, noisy, t, eps_real, eps_fake))

    def _fake_loss(
        self, latents: Tensor, conditions: Conditions, t_max: Tensor, noise: Noise, suffix: str = ""
    ) -> Tensor:
        """The fake score's loss on detached latents [B, C, h, w] (section 5.3), a scalar.

        `suffix` makes the noise names of several steps on one batch different.
        """
        if self.settings.fake_range == "same":
            t = draw_timesteps(noise.uniform(f"fake_timestep{suffix}"), t_max, self.settings.t_share)
        else:  # a flow-matching prior has no noise at step 0
            t = noise.integers(f"fake_timestep{suffix}", 1, self.schedule.num_train_timesteps)
        (latents,) = self.windows(f"fake_window{suffix}", noise, latents)
        eps = noise.normal(f"fake_noise{suffix}", tuple(latents.shape[1:])).to(latents)
        noisy = self.schedule.add_noise(latents, eps, t)
        losses = epsilon_loss(self.fake.predict_eps(noisy, t, conditions), eps)
        return (self.schedule.noise_loss_weights(t) * losses).mean()

    def windows(self, name: str, noise: Noise, *pictures: Tensor) -> tuple[Tensor, ...]:
        """The same random window of each sample of all pictures [B, C, h, w], see Distillation.window.

        Raises:
            ValueError: the window is larger than the pictures.
        """
        side, (height, width) = self.settings.window, pictures[0].shape[-2:]
        if not side:
            return pictures
        if side > min(height, width):
            raise ValueError(f"distillation.window is {side}, larger than {height} x {width}")
        tops, lefts = (
            noise.integers(f"{name} {n}", 0, room + 1) for n, room in enumerate((height - side, width - side))
        )
        places = list(zip(tops.tolist(), lefts.tolist(), strict=True))
        return tuple(
            torch.stack(
                [one[:, top : top + side, left : left + side] for one, (top, left) in zip(batch, places, strict=True)]
            )
            for batch in pictures
        )

    # --- what a system says ---------------------------------------------------------------------------------------

    def _inputs(self, batch: Batch, noise: Noise) -> Inputs:
        """Conditions and latents of a batch, without gradients."""
        raise AssertionError("each system has its own")

    def _generate(self, batch: Batch, conditions: Conditions, noise: Noise, lq: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] with gradients; `lq` as in Inputs."""
        raise AssertionError("each system has its own")

    def _regression(
        self, latents: Tensor, target: Tensor, batch: Batch, noise: Noise
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """L_reg per sample [B], and its terms by name, "loss_regression" among them."""
        raise AssertionError("each system has its own")

    def _score_conditions(self, batch: Batch, conditions: Conditions) -> Conditions:
        """Conditions of the scores; those of the generator, unless the system has others."""
        return conditions

    def _real_eps(self, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The real score's noise; `conditions` as in _score_conditions."""
        return self.real.predict_eps(noisy, t, conditions)

    def _fake_eps(self, noisy: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The fake score's noise; `conditions` as in _score_conditions."""
        return self.fake.predict_eps(noisy, t, conditions)  # type: ignore[no-any-return]


def _over_workers(value: Tensor, training: bool) -> Tensor:
    return average({"value": value})["value"] if training else value
