"""Flow matching by hand: levels, the algebra of the straight paths, Euler steps, guidance, times and loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from components.objectives.flow_matching import flow_matching_loss, logit_normal_times
from components.randomness import Noise
from components.samplers.flow import (
    clean_from_velocity,
    flow_sigmas,
    guided_velocity,
    noise_from_velocity,
    noisy_latents,
    path_velocity,
    sample_flow,
    shift_times,
    velocity_from_clean,
)
from components.samplers.schedules import FlowSchedule
from components.types import Cancellation, StepEvent


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_levels_are_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)  # type: ignore[attr-defined]
    sigmas = flow_sigmas(FlowSchedule(shift=shift), steps)
    assert sigmas.dtype == torch.float32 and len(sigmas) == steps + 1
    assert (float(sigmas[0]), float(sigmas[-1])) == (1.0, 0.0)
    torch.testing.assert_close(sigmas, scheduler.sigmas, atol=1e-6, rtol=0)  # type: ignore[attr-defined]


def test_levels_by_hand() -> None:
    """Shift 3 and three steps: 1/1000 is shifted, and even times from 1 to it are shifted once more."""
    first = 3 * 0.001 / (1 + 2 * 0.001)
    even = [1.0, (1 + first) / 2, first]
    expected = [3 * t / (1 + 2 * t) for t in even] + [0.0]
    assert flow_sigmas(FlowSchedule(shift=3.0), 3).tolist() == pytest.approx(expected, abs=1e-7)
    assert shift_times(torch.tensor([0.0, 0.25, 0.5, 1.0]), 3.0).tolist() == pytest.approx([0, 0.5, 0.75, 1])
    # of a schedule of ten times the first is 1/10
    assert flow_sigmas(FlowSchedule(num_train_timesteps=10), 2).tolist() == pytest.approx([1.0, 0.1, 0.0])
    with pytest.raises(ValueError, match="at least 1"):
        flow_sigmas(FlowSchedule(), 0)


def test_the_straight_path_by_hand() -> None:
    clean, noise = torch.tensor([[2.0], [4.0]]), torch.tensor([[6.0], [-4.0]])
    sigma = torch.tensor([0.25, 0.75])
    latents = noisy_latents(clean, noise, sigma)
    assert latents.tolist() == [[3.0], [-2.0]]  # 0.75 * 2 + 0.25 * 6 and 0.25 * 4 - 0.75 * 4
    velocity = path_velocity(clean, noise)
    assert velocity.tolist() == [[4.0], [-8.0]]
    assert clean_from_velocity(latents, velocity, sigma).tolist() == clean.tolist()
    assert noise_from_velocity(latents, velocity, sigma).tolist() == noise.tolist()
    assert velocity_from_clean(latents, clean, sigma).tolist() == velocity.tolist()


def test_the_path_agrees_with_the_schedule_of_discrete_times() -> None:
    """FlowSchedule has the same noisy latents and the same estimates at its own times."""
    schedule, timesteps = FlowSchedule(shift=3.0), torch.tensor([1, 400, 999])
    times = schedule.times[timesteps]
    clean, noise, velocity = (normal(3, 2, 2, 2, seed=n).float() for n in range(3))
    torch.testing.assert_close(noisy_latents(clean, noise, times), schedule.add_noise(clean, noise, timesteps))
    eps = schedule.eps_from_velocity(clean, velocity, timesteps)
    torch.testing.assert_close(noise_from_velocity(clean, velocity, times), eps)
    back = schedule.x0_from_eps(clean, eps, timesteps)
    torch.testing.assert_close(clean_from_velocity(clean, velocity, times), back, atol=1e-3, rtol=1e-3)


def test_euler_steps_of_the_exact_velocity_reach_the_clean_latents() -> None:
    clean, noise = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    calls: list[Tensor] = []

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma)
        torch.testing.assert_close(latents, noisy_latents(clean, noise, sigma))
        return noise - clean

    sigmas = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(sample_flow(velocity, noise, sigmas), clean)
    assert [sigma.tolist() for sigma in calls] == [[1.0, 1.0], [0.7, 0.7], [0.2, 0.2]]


def test_a_steps_numbers_by_hand() -> None:
    """v = 2 x + sigma: from 1 at 1, a step to 0.5 gives 1 - 0.5 * 3, and one to 0.25 gives -0.5 - 0.25 * (-0.5)."""
    events: list[StepEvent] = []

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return 2 * latents + sigma.view(-1, 1, 1, 1)

    start, sigmas = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.5, 0.25])
    assert float(sample_flow(velocity, start, sigmas, events.append)) == pytest.approx(-0.375)
    assert [(event.step, event.of) for event in events] == [(1, 2), (2, 2)]
    previews = [float(event.preview) for event in events]  # type: ignore[arg-type]
    assert previews == pytest.approx([1 - 1 * 3, -0.5 - 0.5 * (2 * -0.5 + 0.5)])


def test_levels_that_do_not_fall_and_cancellation() -> None:
    start = torch.zeros(1, 1, 1, 1)
    for sigmas in ([1.0], [1.0, 1.0], [0.2, 0.5], [0.5, -0.1]):
        with pytest.raises(ValueError, match="fall strictly"):
            sample_flow(lambda x, s: x, start, torch.tensor(sigmas))
    answers = iter([False, True])
    with pytest.raises(Cancellation, match="before step 2 of 3"):
        sample_flow(lambda x, s: x, start, torch.tensor([1.0, 0.5, 0.2, 0.0]), cancelled=lambda: next(answers))


def test_guidance_by_hand() -> None:
    """negative + scale (positive - negative); the first half of the rows is negative."""
    seen: list[tuple[list[float], list[float]]] = []

    def predict(latents: Tensor, sigma: Tensor) -> Tensor:
        seen.append((latents.flatten().tolist(), sigma.tolist()))
        return torch.tensor([1.0, 2.0, 4.0, 8.0]).view(4, 1, 1, 1)

    latents, sigma = torch.tensor([5.0, 6.0]).view(2, 1, 1, 1), torch.tensor([0.3, 0.4])
    for scale, expected in ((1.0, [4.0, 8.0]), (0.0, [1.0, 2.0]), (3.0, [10.0, 20.0])):
        assert guided_velocity(predict, scale)(latents, sigma).flatten().tolist() == expected
    assert seen[0][0] == [5.0, 6.0, 5.0, 6.0] and seen[0][1] == pytest.approx([0.3, 0.4, 0.3, 0.4])


def test_a_pictures_bits_do_not_depend_on_its_company() -> None:
    noise = Noise(3, np.array([5, 9])).normal("start", (2, 3, 3))

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(latents) * sigma.view(-1, 1, 1, 1)

    sigmas = flow_sigmas(FlowSchedule(shift=3.0), 6)
    both = sample_flow(velocity, noise, sigmas)
    for row, position in enumerate((5, 9)):
        alone = Noise(3, np.array([position])).normal("start", (2, 3, 3))
        assert torch.equal(sample_flow(velocity, alone, sigmas)[0], both[row])


def test_a_gaussians_flow_has_a_closed_form() -> None:
    """Data N(m, d^2): the exact velocity carries standard normal noise to m + d noise, the more steps the nearer."""
    mean, deviation = 0.7, 0.3

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        variance = (1 - s) ** 2 * deviation**2 + s**2
        clean = mean + (1 - s) * deviation**2 / variance * (latents - (1 - s) * mean)
        return velocity_from_clean(latents, clean, sigma)

    noise = normal(1, 1, 8, 8)
    errors = []
    for steps in (10, 100, 1000):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        errors.append(float((sample_flow(velocity, noise, sigmas) - (mean + deviation * noise)).abs().max()))
    assert errors[0] < 0.2 and errors[1] < 0.2 * errors[0] and errors[2] < 0.2 * errors[1]


# -- times and loss ----------------------------------------------------------------------------------------------------


def test_times_by_hand() -> None:
    normals = torch.tensor([-1.37, 0.0, 2.21])
    times = logit_normal_times(normals, mean=0.5, deviation=2.0)
    assert times.tolist() == pytest.approx([1 / (1 + math.exp(-(0.5 + 2 * n))) for n in (-1.37, 0.0, 2.21)])
    shifted = logit_normal_times(normals, 0.5, 2.0, shift=3.0)
    assert shifted.tolist() == pytest.approx([3 * t / (1 + 2 * t) for t in times.tolist()])
    for wrong in ({"deviation": 0.0}, {"shift": -1.0}):
        with pytest.raises(ValueError, match="above 0"):
            logit_normal_times(normals, **wrong)


def test_times_have_the_logit_normal_distribution() -> None:
    """Half of them below 1/2; quartiles at sigmoid(+-0.6745)."""
    draws = torch.from_numpy(np.random.default_rng(0).standard_normal(20_000).astype("float32"))
    times = logit_normal_times(draws)
    quartiles = torch.quantile(times, torch.tensor([0.25, 0.5, 0.75])).tolist()
    expected = [1 / (1 + math.exp(-x)) for x in (-0.67449, 0.0, 0.67449)]
    assert quartiles == pytest.approx(expected, abs=0.01)


def test_the_loss_by_hand() -> None:
    """(v - (noise - clean))^2, the mean of each sample alone."""
    prediction = torch.tensor([[1.0, 2.0], [0.0, 0.5]])
    clean, noise = torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[3.0, 1.0], [1.0, 3.5]])
    expected = [((1 - 3) ** 2 + (2 - 0) ** 2) / 2, ((0 + 1) ** 2 + (0.5 - 1.5) ** 2) / 2]
    assert flow_matching_loss(prediction, clean, noise).tolist() == pytest.approx(expected)
    # in float32 also for bfloat16, which holds 100 and 1 + 1/128, but neither their difference nor that of 3 and 2^-9
    half = [torch.tensor([[values]], dtype=torch.bfloat16) for values in (3.0, 100.0, 1 + 1 / 128)]
    assert flow_matching_loss(*half).dtype == torch.float32
    assert flow_matching_loss(*half).tolist() == pytest.approx([(3 - (1 + 1 / 128 - 100)) ** 2], rel=1e-6)
    half = [torch.tensor([[values]], dtype=torch.bfloat16) for values in (3.0, 0.0, 2**-9)]
    assert flow_matching_loss(*half).tolist() == pytest.approx([(3 - 2**-9) ** 2], rel=1e-6)
