"""Distribution matching between two scores, and InstaRevive's dynamic control of it (Zhu et al. 2025, section 3.2).

    x_t = signal_t x + noise_t eps                   x: latents that a generator made
    gradient of KL(generated, real) by x ~ weight (noise_t / signal_t) (eps_real - eps_fake)            (Eq. 5)
    T_max = sigma^-1[kappa d(x_hq, x)],  t ~ U[0.02 T_max, T_max]                                        (Eqs. 6, 7)
    loss = alpha L_reg + (1 - alpha) lambda L_dsm,  alpha linear in T_max

The gradient is that of DMD (Yin et al. 2023) in PixArt-sigma's one-step trainer: its factor noise / signal and its
weight replace omega(t), which the paper does not define (instarevive.md section 5.2).

A prior trained by flow matching has x_t = (1 - t) x + t eps and a velocity v = E[eps - x | x_t], from which follow

    E[x | x_t] = x_t - t v,   eps' = E[eps | x_t] = x_t + (1 - t) v,   score of x_t = -eps' / t

The gradient of the KL by x is (1 - t) (score_fake - score_real) = (1 - t) / t (eps'_real - eps'_fake). Ours, with
noise / signal = t / (1 - t) in front, is t (v_real - v_fake): the clean latents of the fake minus those of the real, as
for the other priors. So the same code takes both, and a network's velocity is turned into noise where it is called. A
guided velocity gives the guided noise, because both are linear. The fake score learns by the loss of its prior: for a
flow (v - (eps - x))^2, which is (eps' - eps)^2 / (1 - t)^2; without the weight it would hardly learn noisy times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

WEIGHT_EPS = 1e-5

Reduction = Literal["mean", "sum"]


class NoiseMap(Protocol):
    """The mix of latents and noise at a prior's discrete time steps: Schedule, FlowSchedule."""

    @property
    def num_train_timesteps(self) -> int: ...

    @property
    def sigmas(self) -> Tensor:
        """Noise over signal, float32 [T], rising."""

    def sigma(self, timesteps: Tensor) -> Tensor: ...

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor: ...

    def x0_from_eps(self, noisy: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor: ...

    def noise_loss_weights(self, timesteps: Tensor) -> Tensor:
        """Weights by which squared errors of the noise are the loss of the prior's own training, float32 [B]."""


@dataclass(frozen=True, kw_only=True)
class ScoreGap:
    """The difference of two scores on the same noisy latents.

    Attributes:
        coeff: (noise / signal) (eps_real - eps_fake) [B, C, h, w]: clean latents of the fake minus those of the real.
        weight: 1 over the mean distance between x and the real score's clean latents, [B, 1, 1, 1].
        clean_real: the real score's clean latents [B, C, h, w].
    """

    coeff: Tensor
    weight: Tensor
    clean_real: Tensor


@torch.no_grad()
def score_gap(
    schedule: NoiseMap, latents: Tensor, noisy: Tensor, timesteps: Tensor, eps_real: Tensor, eps_fake: Tensor
) -> ScoreGap:
    """Compares the noise predictions of two scores, in float32.

    Args:
        schedule: the schedule of both scores.
        latents: x [B, C, h, w].
        noisy: x_t, same shape.
        timesteps: int64 [B].
        eps_real: the frozen score's prediction, guided.
        eps_fake: the trained score's, unguided.
    """
    latents, noisy, eps_real, eps_fake = (t.detach().float() for t in (latents, noisy, eps_real, eps_fake))
    ratio = schedule.sigma(timesteps).view(-1, *[1] * (latents.ndim - 1))
    clean_real = schedule.x0_from_eps(noisy, eps_real, timesteps)
    dims = tuple(range(1, latents.ndim))
    weight = 1 / ((latents - clean_real).abs().mean(dim=dims, keepdim=True) + WEIGHT_EPS)
    return ScoreGap(coeff=ratio * (eps_real - eps_fake), weight=weight, clean_real=clean_real)


def score_matching_loss(latents: Tensor, gap: ScoreGap) -> Tensor:
    """Mean square of x minus a copy that is moved along the gap, per sample: [B, C, h, w] -> float32 [B].

    The mean over the batch has the gradient (2 / N) weight coeff with respect to x; N is the number of elements.
    """
    latents = latents.float()
    target = (latents - gap.weight * gap.coeff).detach()
    return (latents - target).square().flatten(1).mean(dim=1)


def squared_distances(prediction: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared distance of each sample, without gradient, [B, ...] -> float32 [B].

    Args:
        prediction, target: clean latents.
        reduction: over a sample's elements. "sum" is Eq. 7 as printed; with latents of thousands of elements T_max is
            then at its maximum from the first step on. "mean" follows the paper's argument about sigma^2 I.

    Raises:
        ValueError: the reduction is another word.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    squares = (prediction.detach().float() - target.detach().float()).square().flatten(1)
    return squares.mean(dim=1) if reduction == "mean" else squares.sum(dim=1)


def matching_share(squares: Tensor, distance: float) -> Tensor:
    """How much the score matching of each sample counts, in [0, 1): d^2 / (d^2 + distance^2), of its shape.

    Args:
        squares: d^2, mean squared distances of the results from their targets.
        distance: where the share is a half; above 0.
    """
    return squares / (squares + distance**2)


def noise_levels(schedule: NoiseMap) -> Tensor:
    """The share of noise at each time step, at unit total variance: float64 [T], rising.

    It is s / sqrt(1 + s^2) with s = noise / signal. For variance-preserving priors this is their sigma_t. A
    flow-matching prior has the same s at another time; the inversion in `largest_timesteps` finds it.
    """
    ratio = schedule.sigmas.double()
    return ratio / (1 + ratio.square()).sqrt()


def largest_timesteps(schedule: NoiseMap, level: Tensor, floor: int = 1) -> Tensor:
    """T_max: the smallest time step whose noise level reaches `level` (Eq. 6), int64 of level's shape.

    Args:
        schedule: the prior's.
        level: kappa d, at least 0; a level above all steps gives the last step.
        floor: the smallest T_max, so that the range of times is never empty.
    """
    table = noise_levels(schedule).to(level.device)
    steps = torch.searchsorted(table, level.detach().double().contiguous())
    last = schedule.num_train_timesteps - 1
    return steps.clamp(min(max(1, floor), last), last)


def smallest_timesteps(t_max: Tensor, share: float = 0.02) -> Tensor:
    """The lower end of the range of times, max(1, ceil(share T_max)), int64 of T_max's shape."""
    # 0.07 * 100 is slightly above 7 in floats, and must still give 7
    return torch.ceil(t_max.double() * share - 1e-9).long().clamp_min(1)


def draw_timesteps(uniform: Tensor, t_max: Tensor, share: float = 0.02) -> Tensor:
    """Draws whole time steps, uniform from smallest_timesteps to T_max, both included: int64 [B].

    Args:
        uniform: [B] in [0, 1].
        t_max: int64 [B], or [] for one value.
        share: lower end divided by upper end.
    """
    low = smallest_timesteps(t_max, share)
    timesteps = low + (uniform.double() * (t_max - low + 1)).floor().long()
    return torch.minimum(timesteps, t_max)  # a uniform number may be rounded up to 1


def regression_share(t_max: Tensor, low: float = 0.0, high: float = 1000.0) -> Tensor:
    """alpha, the weight of the regression: T_max mapped from [low, high] to [0, 1] and clipped; float32 of its shape.

    Raises:
        ValueError: the range is empty.
    """
    if not low < high:
        raise ValueError(f"the range of T_max must have low < high, got {low} and {high}")
    return ((t_max.double() - low) / (high - low)).clamp(0, 1).to(torch.float32)
