"""The score of sharp pictures: a UNetRes that predicts the noise of noisy pictures at a level.

It knows nothing of the input of a restoration. So it judges whether a result looks like a picture at all, which a
regression does not learn. Pictures are its latents. The noise reaches up to the contrast of the pictures only: coarser
errors are the regression's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from components.objectives.diffusion import epsilon_loss
from components.randomness import Noise
from components.samplers.schedules import Schedule
from components.systems.unetres.build import DENOISER, REGRESSION, parameters_of
from components.systems.unetres.network import UNetRes
from components.types import Batch, Loss, Objective

SCHEDULE: Mapping[str, Any] = {"beta_start": 1e-4, "beta_end": 1.56e-3}
"""Noise over signal from 0.01 to 1; ours."""


class PictureScore(nn.Module):
    """A UNetRes with a level as a ScoreNetwork of pictures in [-1, 1]; conditions are ignored.

    Args:
        network: takes one picture and a level; its change is the predicted noise.
        schedule: of the noise.
    """

    def __init__(self, network: UNetRes, schedule: Schedule) -> None:
        super().__init__()
        self.network, self._schedule = network, schedule

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    def predict_eps(self, latents: Tensor, timesteps: Tensor, conditions: Any = None) -> Tensor:
        """See ScoreNetwork. The network gets the logarithm of noise over signal, scaled to -1..1."""
        return self.network.change(latents, level=self._level(timesteps)).to(latents.dtype)

    def _level(self, timesteps: Tensor) -> Tensor:
        sigma = self.schedule.sigma(timesteps)
        low, high = self.schedule.sigmas[0].log(), self.schedule.sigmas[-1].log()
        return 2 * (sigma.log() - low) / (high - low) - 1

    def features(self, latents: Tensor, timesteps: Tensor) -> list[Tensor]:
        """What the network computes on its way down, see UNetRes.features; arguments as in predict_eps."""
        return self.network.features(latents, level=self._level(timesteps))


class NoScore:
    """The schedule of the scores without a network, for a generator that learns by regression alone."""

    schedule = Schedule(**SCHEDULE)

    def predict_eps(self, latents: Tensor, timesteps: Tensor, conditions: Any = None) -> Tensor:
        """Never called: score matching is off."""
        raise AssertionError("score matching is off")


class DenoiserObjective(Objective):
    """The plain diffusion loss (InstantIR Eq. 1) on sharp pictures.

    Args:
        score: all of its parameters train.
        regression: part of the model folder, unchanged; the next stage needs it.
    """

    def __init__(self, score: PictureScore, regression: UNetRes) -> None:
        self.score, self.regression = score.train().requires_grad_(True), regression
        self.trainables: Mapping[str, nn.Module] = {DENOISER: score.network}
        self.config: Mapping[str, Any] = {
            REGRESSION: regression.config.to_dict(),
            DENOISER: score.network.config.to_dict(),
        }
        self.progress: MutableMapping[str, float] = {}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Regression and denoiser."""
        return {REGRESSION: parameters_of(self.regression), DENOISER: parameters_of(self.score.network)}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        """One phase. Draws "timestep" and "noise"; metric: loss, mean square error of the predicted noise."""
        schedule = self.score.schedule
        timesteps = noise.integers("timestep", 0, schedule.num_train_timesteps)
        eps = noise.normal("noise", tuple(batch.hq.shape[1:]))
        noisy = schedule.add_noise(batch.hq, eps, timesteps)
        value = epsilon_loss(self.score.predict_eps(noisy, timesteps), eps).mean()
        yield DENOISER, Loss(value=value, metrics={"loss": value.detach()})


def score_of(network: UNetRes) -> PictureScore:
    """The score of a denoiser, with the schedule of its training."""
    return PictureScore(network, Schedule(**SCHEDULE))
