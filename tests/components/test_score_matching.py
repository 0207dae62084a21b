"""Score matching with exact scores, T_max and its range on every prior's noise map, and the flow-matching times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from components.objectives.score_matching import (
    draw_timesteps,
    largest_timesteps,
    noise_levels,
    regression_share,
    score_gap,
    score_matching_loss,
    smallest_timesteps,
    squared_distances,
)
from components.randomness import generator
from components.samplers.schedules import FlowSchedule, Schedule

PIXART = Schedule(1000, 1e-4, 2e-2, "linear")
FLOW = FlowSchedule(shift=3.0)


def normal(*shape: int, name: str = "x") -> Tensor:
    return torch.from_numpy(generator(11, name).standard_normal(shape, dtype=np.float32))


class GaussianScore:
    """The exact noise prediction for clean latents of mean m and deviation s."""

    def __init__(self, schedule: Schedule | FlowSchedule, mean: float, deviation: float) -> None:
        self.schedule, self.mean, self.deviation = schedule, mean, deviation

    def predict_eps(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        ratio = self.schedule.sigma(timesteps).view(-1, 1, 1, 1)
        exploding = self.schedule.x0_from_eps(noisy, torch.zeros_like(noisy), timesteps)  # noisy over signal
        return ratio * (exploding - self.mean) / (self.deviation**2 + ratio**2)


@pytest.mark.parametrize("schedule", [PIXART, Schedule(), FLOW], ids=["pixart", "sdxl", "flow"])
def test_particles_move_to_the_real_distribution(schedule: Schedule | FlowSchedule) -> None:
    """Gradient steps along exact scores move samples of N(-1, 0.5) to the mean and deviation of N(0.5, 0.3)."""
    particles = (0.5 * normal(64, 1, 8, 8) - 1).requires_grad_(True)
    real = GaussianScore(schedule, 0.5, 0.3)
    for step in range(150):
        with torch.no_grad():
            fake = GaussianScore(schedule, float(particles.mean()), float(particles.std()))
            t = draw_timesteps(torch.from_numpy(generator(0, step, "t").random(64)), torch.tensor(600))
            noisy = schedule.add_noise(particles, normal(64, 1, 8, 8, name=f"noise {step}"), t)
            gap = score_gap(schedule, particles, noisy, t, real.predict_eps(noisy, t), fake.predict_eps(noisy, t))
        loss = score_matching_loss(particles, gap).mean()
        (gradient,) = torch.autograd.grad(loss, particles)
        torch.testing.assert_close(gradient, 2 / particles.numel() * gap.weight * gap.coeff)
        with torch.no_grad():
            particles -= 0.02 * particles.numel() / 2 * gradient
    assert float(particles.detach().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(particles.detach().std()) == pytest.approx(0.3, abs=0.08)


def test_coeff_is_the_difference_of_the_clean_latents() -> None:
    noisy, real, fake = (normal(3, 2, 4, 4, name=n) for n in "abc")
    for schedule in (PIXART, FLOW):
        t = torch.tensor([5, 300, 800])
        gap = score_gap(schedule, noisy, noisy, t, real, fake)
        clean = [schedule.x0_from_eps(noisy, eps, t) for eps in (real, fake)]
        torch.testing.assert_close(gap.clean_real, clean[0])
        torch.testing.assert_close(gap.coeff, clean[1] - clean[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gap.weight.flatten(), 1 / ((noisy - clean[0]).abs().mean((1, 2, 3)) + 1e-5))


def test_equal_scores_leave_the_latents_alone() -> None:
    latents, eps = normal(2, 4, 4, 4).requires_grad_(True), normal(2, 4, 4, 4, name="eps")
    gap = score_gap(PIXART, latents, normal(2, 4, 4, 4, name="noisy"), torch.tensor([10, 900]), eps, eps)
    loss = score_matching_loss(latents, gap)
    assert loss.shape == (2,) and float(loss.abs().max()) == 0
    (gradient,) = torch.autograd.grad(loss.sum(), latents)
    assert float(gradient.abs().max()) == 0


# ---------------------------------------------------------------------------------------------------------- T_max


def test_t_max_of_the_reference_sheet() -> None:
    """instarevive.md section 5.4: noise level -> the first step that reaches it."""
    expected = {0.3: 92, 0.45: 146, 0.6: 207, 0.75: 283, 0.9: 403, 0.99: 621}
    steps = largest_timesteps(PIXART, torch.tensor(list(expected)))
    assert (steps - torch.tensor(list(expected.values()))).abs().max() <= 1
    assert largest_timesteps(PIXART, torch.tensor([0.0, 5.0]), floor=20).tolist() == [20, 999]


@given(level=st.floats(0, 1.2), shift=st.sampled_from([0.5, 1.0, 3.0]))
@settings(deadline=None, max_examples=60)
def test_every_prior_reaches_the_same_noise_over_signal(level: float, shift: float) -> None:
    """Eq. 6 inverts the prior's noise map: on every prior T_max is the first step that reaches the noise."""
    for schedule in (PIXART, Schedule(), FlowSchedule(shift=shift)):
        table = noise_levels(schedule)
        t = int(largest_timesteps(schedule, torch.tensor(level)))
        assert 1 <= t <= schedule.num_train_timesteps - 1
        if t < schedule.num_train_timesteps - 1:
            assert float(table[t]) >= np.float32(level)
        if t > 1:
            assert float(table[t - 1]) < np.float32(level)


def test_flow_matching_needs_another_time_for_the_same_noise() -> None:
    level = torch.tensor(0.6)
    plain = FlowSchedule()
    t = int(largest_timesteps(plain, level))
    assert float(plain.sigmas[t]) == pytest.approx(0.6 / math.sqrt(1 - 0.36), rel=0.01)
    assert t == pytest.approx(429, abs=1)  # 0.75 / 1.75 of 1000: noise over signal 0.75
    assert int(largest_timesteps(FLOW, level)) < t  # a shift puts more noise into early steps


def test_the_summed_distance_saturates_and_the_mean_does_not() -> None:
    x = normal(2, 4, 16, 16)
    near = x + 0.1 * normal(2, 4, 16, 16, name="more")
    mean, total = (squared_distances(x, near, r).mean().sqrt() for r in ("mean", "sum"))
    assert float(total / mean) == pytest.approx(32, rel=1e-5)  # sqrt of 1,024 elements
    assert int(largest_timesteps(PIXART, 1.5 * mean)) < 60 and int(largest_timesteps(PIXART, 1.5 * total)) == 999
    with pytest.raises(ValueError, match="mean or sum"):
        squared_distances(x, near, "max")  # type: ignore[arg-type]


@given(t_max=st.integers(1, 999), share=st.sampled_from([0.0, 0.02, 0.07, 1.0]), uniform=st.floats(0, 1))
@settings(deadline=None, max_examples=200)
def test_times_stay_inside_their_range(t_max: int, share: float, uniform: float) -> None:
    low = int(smallest_timesteps(torch.tensor(t_max), share))
    assert low == max(1, math.ceil(round(share * t_max, 6)))
    times = draw_timesteps(torch.tensor([0.0, uniform, 1.0]), torch.tensor(t_max), share)
    assert times.dtype == torch.int64 and int(times[0]) == low and int(times[2]) == t_max
    assert low <= int(times[1]) <= t_max


def test_times_are_uniform_and_may_differ_by_sample() -> None:
    uniform = torch.from_numpy(generator(0, "u").random(60_000))
    times = draw_timesteps(uniform, torch.tensor([4, 50, 999]).repeat(20_000))
    for place, (low, high) in enumerate([(1, 4), (1, 50), (20, 999)]):
        values = times[place::3]
        assert (int(values.min()), int(values.max())) == (low, high)
        assert float(values.double().mean()) == pytest.approx((low + high) / 2, rel=0.02)
    counts = torch.bincount(times[0::3])[1:5].double()
    assert float((counts / counts.mean() - 1).abs().max()) < 0.05


def test_alpha_is_linear_and_clipped() -> None:
    t_max = torch.tensor([0, 50, 100, 200, 999])
    torch.testing.assert_close(regression_share(t_max), t_max / 1000)
    torch.testing.assert_close(regression_share(t_max, 50, 200), torch.tensor([0, 0, 1 / 3, 1, 1]))
    with pytest.raises(ValueError, match="low < high"):
        regression_share(t_max, 10, 10)


# ---------------------------------------------------------------------------------------------------- flow matching


def test_flow_times_mix_and_unmix() -> None:
    clean, noise, t = normal(3, 2, 4, 4), normal(3, 2, 4, 4, name="n"), torch.tensor([0, 400, 999])
    noisy = FLOW.add_noise(clean, noise, t)
    torch.testing.assert_close(noisy[0], clean[0])
    torch.testing.assert_close(FLOW.x0_from_eps(noisy, noise, t), clean, atol=1e-3, rtol=1e-3)  # 3e-4 of signal
    torch.testing.assert_close(FLOW.eps_from_velocity(noisy, noise - clean, t), noise, atol=1e-5, rtol=1e-5)
    assert bool((FLOW.sigmas.diff() > 0).all()) and bool(FLOW.sigmas.isfinite().all())
    torch.testing.assert_close(FLOW.sigma(t), FLOW.sigmas[t])
    for wrong in ({"num_train_timesteps": 0}, {"shift": 0.0}):
        with pytest.raises(ValueError, match="positive"):
            FlowSchedule(**wrong)  # type: ignore[arg-type]
