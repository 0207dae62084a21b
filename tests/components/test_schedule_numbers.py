"""Noise schedules in numbers worked out by hand: tables, mixes, their inverses, time steps and limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from components.samplers.guidance import distillation_guide, guide
from components.samplers.schedules import FlowSchedule, Schedule, schedule_from

SHORT = Schedule(4, 0.1, 0.4, "linear")
"""Betas of 0.1, 0.2, 0.3, 0.4: alphas of 0.9, 0.72, 0.504, 0.3024."""

ALPHAS = (0.9, 0.72, 0.504, 0.3024)
FLOW = FlowSchedule(num_train_timesteps=4, shift=3.0)
"""Times of 0, 1/4, 1/2, 3/4, shifted: 0, 0.75 / 1.5 = 1/2, 1.5 / 2 = 3/4, 2.25 / 2.5 = 9/10."""

TIMES = (0.0, 0.5, 0.75, 0.9)


def column(*values: float) -> torch.Tensor:
    """Latents [B, 1, 1, 2] with one value in each row."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 1, 2).clone()


def test_the_tables_of_a_short_schedule() -> None:
    torch.testing.assert_close(SHORT.alphas_cumprod, torch.tensor(ALPHAS))
    torch.testing.assert_close(SHORT.sigmas, torch.tensor([math.sqrt((1 - a) / a) for a in ALPHAS]))
    roots = Schedule(3, 0.01, 0.25)  # roots of the betas: 0.1, 0.3, 0.5
    torch.testing.assert_close(roots.alphas_cumprod, torch.tensor([0.99, 0.99 * 0.91, 0.99 * 0.91 * 0.75]))
    assert (Schedule().num_train_timesteps, Schedule().beta_start, Schedule().beta_end) == (1000, 0.00085, 0.012)
    assert SHORT.shares(2) == (pytest.approx(math.sqrt(0.504)), pytest.approx(math.sqrt(0.496)))
    t = torch.tensor([3, 0])
    assert SHORT.network_times(t) is t
    assert SHORT.alpha(t, 3).shape == (2, 1, 1) and SHORT.alpha(t).tolist() == pytest.approx([0.3024, 0.9])


def test_mixes_of_a_short_schedule_and_their_inverses() -> None:
    t = torch.tensor([2, 0])
    noisy = SHORT.add_noise(column(2.0, -1.0), column(0.5, 3.0), t)
    values = [
        math.sqrt(0.504) * 2 + math.sqrt(0.496) * 0.5,
        -math.sqrt(0.9) + math.sqrt(0.1) * 3,
    ]
    torch.testing.assert_close(noisy, column(*values))
    torch.testing.assert_close(SHORT.x0_from_eps(noisy, column(0.5, 3.0), t), column(2.0, -1.0))
    # v = signal eps - noise clean
    velocity = column(
        math.sqrt(0.504) * 0.5 - math.sqrt(0.496) * 2,
        math.sqrt(0.9) * 3 + math.sqrt(0.1),
    )
    torch.testing.assert_close(SHORT.eps_from_velocity(noisy, velocity, t), column(0.5, 3.0))
    sigma = SHORT.sigma(t)
    torch.testing.assert_close(Schedule.exploding(noisy, sigma), noisy / SHORT.alpha(t, 4).sqrt())
    torch.testing.assert_close(Schedule.preserving(Schedule.exploding(noisy, sigma), sigma), noisy)
    assert SHORT.timestep_of(sigma + torch.tensor([0.05, -0.05])).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("n", "spacing", "offset", "steps"),
    [
        (4, "leading", 0, [9, 6, 3, 0]),  # 13 // 4 = 3
        (4, "leading", 1, [10, 7, 4, 1]),
        (13, "leading", 1, [12, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
        (4, "trailing", 1, [12, 9, 5, 2]),  # 13, 9.75, 6.5 (to even: 6), 3.25, less 1
        (1, "trailing", 1, [12]),
        (1, "leading", 1, [1]),
    ],
)
def test_time_steps_of_samplers(n: int, spacing: Any, offset: int, steps: list[int]) -> None:
    schedule = Schedule(13, 0.1, 0.2)
    assert schedule.timesteps(n, spacing, offset).tolist() == steps
    with pytest.raises(ValueError, match="spacing must be leading, trailing, linspace, got 'even'"):
        schedule.timesteps(n, "even", offset)  # type: ignore[arg-type]


def test_levels_of_a_sampler_end_at_zero() -> None:
    levels = SHORT.sampling_sigmas(torch.tensor([3, 1]))
    assert levels.tolist() == pytest.approx([math.sqrt(0.6976 / 0.3024), math.sqrt(0.28 / 0.72), 0.0])


def test_times_of_flow_matching() -> None:
    torch.testing.assert_close(FLOW.times, torch.tensor(TIMES))
    torch.testing.assert_close(FLOW.sigmas, torch.tensor([0.0, 1.0, 3.0, 9.0]))
    torch.testing.assert_close(FlowSchedule().times[:2], torch.tensor([0.0, 0.001]))
    assert FLOW.shares(3) == (pytest.approx(0.1), pytest.approx(0.9))
    t = torch.tensor([3, 1])
    torch.testing.assert_close(FLOW.network_times(t), torch.tensor([3.6, 2.0]))
    torch.testing.assert_close(FLOW.sigma(t), torch.tensor([9.0, 1.0]))
    noisy = FLOW.add_noise(column(2.0, -1.0), column(0.5, 3.0), t)
    torch.testing.assert_close(noisy, column(0.65, 1.0))  # 0.1 * 2 + 0.9 * 0.5, and -0.5 + 1.5
    torch.testing.assert_close(FLOW.x0_from_eps(noisy, column(0.5, 3.0), t), column(2.0, -1.0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(FLOW.eps_from_velocity(noisy, column(-1.5, 4.0), t), column(0.5, 3.0))


def test_a_schedule_from_its_fields() -> None:
    assert schedule_from({"shift": 3.0, "num_train_timesteps": 4}) == FLOW
    assert schedule_from({"num_train_timesteps": 4, "beta_start": 0.1, "beta_end": 0.4, "beta_schedule": "linear"}) == (
        SHORT
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta_start": 0.0}, "0 < start <= end < 1"),
        ({"beta_end": 1.0}, "0 < start <= end < 1"),
        ({"beta_start": 0.5, "beta_end": 0.4}, "0 < start <= end < 1"),
        ({"num_train_timesteps": 0}, "at least 1, got 0"),
        ({"shift": 0.0}, "shift positive"),
        ({"shift": 1.0, "num_train_timesteps": 0}, "num_train_timesteps must be at least 1"),
    ],
)
def test_limits_of_schedules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from(fields)


def test_the_smallest_schedules_are_allowed() -> None:
    assert Schedule(1, 0.5, 0.5).alphas_cumprod.tolist() == [0.5]
    assert FlowSchedule(1, 0.1).times.tolist() == [0.0]


def test_guidance_by_hand() -> None:
    """1 + 2.5 (4 - 1) = 8.5; with rescale, a part of the way to the positive half's deviation, picture by picture."""
    torch.testing.assert_close(guide(column(1.0), column(4.0), 2.5), column(8.5))
    negative = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    positive = torch.tensor([[2.0, 6.0], [1.0, 2.0]]).view(2, 1, 1, 2)
    # guided: (3, 9) with deviation 6 against 4 of the positive half; (2, 4) with 2 against 1
    expected = torch.tensor([[3.0, 9.0], [2.0, 4.0]]) * torch.tensor([[0.7 * 4 / 6 + 0.3], [0.7 * 1 / 2 + 0.3]])
    torch.testing.assert_close(guide(negative, positive, 2.0, rescale=0.7).view(2, 2), expected)
    # the distillation's scale counts from the guided half: 4 + 2.5 (4 - 1)
    torch.testing.assert_close(distillation_guide(column(1.0), column(4.0), torch.tensor([2.5])), column(11.5))
