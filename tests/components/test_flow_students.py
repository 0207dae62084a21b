"""Students of one step on flow-matching priors, by hand: exact velocities of normal latents, in float64.

A network gives the exact velocity for latents of mean m and deviation s. Then the student's clean latents, the gap of
two scores and the fake score's loss have closed forms. Each is also computed with wrong conversions, which must differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.objectives.distillation import Distillation
from components.objectives.score_matching import draw_timesteps, largest_timesteps
from components.priors.conditions import Conditions
from components.randomness import Noise, generator
from components.samplers.schedules import FlowSchedule, Schedule
from components.systems.instarevive.network import ONE_STEP_ALPHA, EpsPredictor, OneStep, OneStepGenerator
from components.systems.instarevive.objective import InstaReviveObjective
from components.types import Batch

SHIFT = 3.0
SCHEDULE = FlowSchedule(shift=SHIFT)
SHAPE = (2, 4, 4)
TEXT = Conditions(text=torch.zeros(3, 1, 1))


def normal(*shape: int, name: str = "x") -> Tensor:
    return torch.from_numpy(generator(23, name).standard_normal(shape))


def shares(t: float, deviation: float) -> tuple[float, float]:
    """How far E[clean] and E[noise] follow x_t = (1 - t) clean + t noise: covariance over variance."""
    variance = ((1 - t) * deviation) ** 2 + t**2
    return (1 - t) * deviation**2 / variance, t / variance


class Exact(nn.Module):
    """The velocity E[noise - clean | x_t] of latents N(mean, deviation^2), at the network's time 1000 t."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = nn.Parameter(torch.tensor(mean, dtype=torch.float64)), deviation
        self.config = {"in_channels": SHAPE[0], "patch_size": 2}

    def forward(self, latents: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        rows = []
        for x, time in zip(latents, timestep.tolist(), strict=True):
            t = time / 1000
            clean, noise = shares(t, self.deviation)
            offset = x - (1 - t) * self.mean
            rows.append(noise * offset - (self.mean + clean * offset))
        return (torch.stack(rows),)


def predictor(mean: float, deviation: float) -> EpsPredictor:
    return EpsPredictor(Exact(mean, deviation), SCHEDULE, "flow_prediction", inputs=lambda *_: {})


def clean_by_hand(x: Tensor, step: int, mean: float, deviation: float) -> Tensor:
    """E[clean | x_t] of N(mean, deviation^2) at a time step, with the shift written out."""
    t = SHIFT * (step / 1000) / (1 + (SHIFT - 1) * step / 1000)
    return mean + shares(t, deviation)[0] * (x - (1 - t) * mean)


class Pixels:
    """An autoencoder without a code, and texts without words."""

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def conditions(self, batch: Batch, dropped: Tensor) -> Conditions:
        return TEXT

    def unconditional(self, batch: Batch) -> Conditions:
        return TEXT


def batch() -> Batch:
    return Batch(
        keys=["a", "b", "c"],
        positions=np.arange(3),
        hq=normal(3, *SHAPE, name="hq"),
        lq=normal(3, *SHAPE, name="lq"),
        prompts=[""] * 3,
        sizes=torch.zeros(3, 6, dtype=torch.int64),
    )


REAL, FAKE = (0.5, 0.3), (-1.0, 0.6)
"""Mean and deviation of the latents that each score knows exactly."""


def objective(**settings: Any) -> InstaReviveObjective:
    student = OneStepGenerator(predictor(*REAL)).requires_grad_(True)
    settings = {"regression": "l2", "dynamic": False, "cfg_scale": 1.0, "text_dropout": 0.0, **settings}
    pixels = Pixels()
    real, fake = predictor(*REAL), predictor(*FAKE)
    return InstaReviveObjective(student, real, fake, pixels, pixels, Distillation(**settings))


WRONG: dict[str, Callable[[FlowSchedule, Tensor, Tensor, Tensor], Tensor]] = {
    "sign": lambda self, x, v, steps: x - (1 - self._time(steps, x)) * v,
    "operand": lambda self, x, v, steps: x + self._time(steps, x) * v,
    "v is the noise": lambda self, x, v, steps: v,
    "v from noise to clean": lambda self, x, v, steps: x - self._time(steps, x) * v,
    "time without its shift": lambda self, x, v, steps: x + (1 - steps.view(-1, 1, 1, 1) / 1000) * v,
}


def student_error() -> float:
    """How far the student's clean latents are from E[clean | z] at the step's time."""
    student = OneStepGenerator(predictor(*REAL), OneStep(timestep=400))
    lq = normal(3, *SHAPE, name="lq")
    with torch.no_grad():
        return float((student(lq, TEXT) - clean_by_hand(lq, 400, *REAL)).abs().max())


def gap_error() -> float:
    """How far the gradient of the score matching is from that of the hand-written clean latents."""
    subject, rows = objective(fixed_alpha=0.0), batch()
    latents = normal(3, *SHAPE, name="generated").requires_grad_(True)
    subject._generate = lambda *_: latents  # type: ignore[method-assign]
    _, loss = next(iter(subject.phases(rows, Noise(5, rows.positions))))
    (gradient,) = torch.autograd.grad(loss.value, latents)
    noise = Noise(5, rows.positions)
    steps = draw_timesteps(noise.uniform("score_timestep"), torch.tensor(999))
    eps = noise.normal("score_noise", SHAPE).double()
    errors = []
    for n, step in enumerate(steps.tolist()):
        t = SHIFT * step / 1000 / (1 + (SHIFT - 1) * step / 1000)
        x = (1 - t) * latents[n].detach() + t * eps[n]
        real, fake = (clean_by_hand(x, step, *each) for each in (REAL, FAKE))
        weight = 1 / ((latents[n].detach() - real).abs().mean() + 1e-5)
        expected = 2 / latents.numel() * weight * (fake - real)
        errors.append(float((gradient[n] - expected).abs().max() / expected.abs().max()))
    return max(errors)


def fake_error() -> float:
    """How far the fake score's loss is from the mean square of its velocities' errors, as a share of it."""
    subject, latents, rows = objective(), normal(3, *SHAPE, name="generated"), batch()
    loss = subject._fake_loss(latents, TEXT, torch.tensor(999), Noise(5, rows.positions))
    noise = Noise(5, rows.positions)
    steps, eps = noise.integers("fake_timestep", 1, 1000), noise.normal("fake_noise", SHAPE).double()
    total = 0.0
    for n, step in enumerate(steps.tolist()):
        t = SHIFT * step / 1000 / (1 + (SHIFT - 1) * step / 1000)
        x = (1 - t) * latents[n] + t * eps[n]
        clean, on_noise = shares(t, FAKE[1])
        offset = x - (1 - t) * FAKE[0]
        velocity = on_noise * offset - (FAKE[0] + clean * offset)
        total += float((velocity - (eps[n] - latents[n])).square().mean()) / 3
    return abs(float(loss.detach()) / total - 1)


@pytest.mark.parametrize("error", [student_error, gap_error, fake_error])
def test_the_closed_forms_hold_and_no_wrong_conversion_has_them(
    error: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert error() < 1e-3  # the schedule's tables are float32
    for name, conversion in WRONG.items():
        monkeypatch.setattr(FlowSchedule, "eps_from_velocity", conversion)
        assert error() > 0.02, name


def test_the_gap_is_the_gradient_of_the_divergence() -> None:
    """Of normal latents with one deviation: d KL / d mean = (1 - t)^2 (mean - real mean) / variance of x_t."""
    step = 300
    t = SHIFT * 0.3 / (1 + (SHIFT - 1) * 0.3)
    x = (1 - t) * (0.4 * normal(4000, *SHAPE, name="clean") - 1) + t * normal(4000, *SHAPE, name="eps")
    gap = (clean_by_hand(x, step, -1.0, 0.4) - clean_by_hand(x, step, 0.5, 0.4)).mean()
    kl = (1 - t) ** 2 * (-1.0 - 0.5) / (((1 - t) * 0.4) ** 2 + t**2)
    assert float(gap) == pytest.approx(t**2 / (1 - t) ** 2 * kl, rel=1e-6)  # the weight that omega(t) leaves open


def test_the_loss_of_noise_is_weighed_for_flows_only() -> None:
    steps = torch.tensor([0, 250, 999])
    assert Schedule().noise_loss_weights(steps).tolist() == [1, 1, 1]
    times = [0.0, 3 * 0.25 / 1.5, 3 * 0.999 / 2.998]
    expected = [1 / (1 - t) ** 2 for t in times]
    torch.testing.assert_close(SCHEDULE.noise_loss_weights(steps), torch.tensor(expected), rtol=1e-3, atol=0)


def test_a_flow_student_starts_at_the_same_noise_over_signal() -> None:
    """The released share of signal, and T_max of Eq. 6, are the same noise over signal on every schedule."""
    for shift in (1.0, 3.0):
        schedule = FlowSchedule(shift=shift)
        step = OneStepGenerator(EpsPredictor(Exact(0, 1), schedule, "flow_prediction")).timestep
        t = shift * step / 1000 / (1 + (shift - 1) * step / 1000)
        assert (1 - t) ** 2 / ((1 - t) ** 2 + t**2) == pytest.approx(ONE_STEP_ALPHA, abs=2e-3)
        t_max = int(largest_timesteps(schedule, torch.tensor(0.6)))
        t = shift * t_max / 1000 / (1 + (shift - 1) * t_max / 1000)
        assert t / (1 - t) == pytest.approx(0.75, abs=0.01)
