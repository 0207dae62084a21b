"""Schedules and samplers against closed forms and diffusers' own schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from components.samplers.ddim import sample_ddim, sample_ddpm
from components.samplers.guidance import distillation_guide, guide
from components.samplers.schedules import Schedule
from components.types import Cancellation, StepEvent

SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(kind: Any, **config: Any) -> Any:
    """A scheduler of diffusers, as Any: its lazy imports hide its attributes from type checkers."""
    return kind(**config)


def gaussian_denoiser(mean: float, deviation: float):  # type: ignore[no-untyped-def]
    """The exact posterior mean for data distributed N(mean, deviation^2): a perfect denoiser without a network."""

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1).square()
        return (deviation**2 * latents + s * mean) / (deviation**2 + s)

    return denoise


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_alphas_are_diffusers(kind: str) -> None:
    config = {**SDXL, "beta_schedule": kind}
    torch.testing.assert_close(
        Schedule(**config).alphas_cumprod,  # type: ignore[arg-type]
        reference(DDIMScheduler, **config).alphas_cumprod,
        atol=1e-6,
        rtol=0,
    )


@pytest.mark.parametrize("steps", [1, 4, 30, 999])
def test_leading_timesteps_are_diffusers(steps: int) -> None:
    scheduler = reference(DDIMScheduler, **SDXL, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(steps)
    assert Schedule().timesteps(steps).tolist() == scheduler.timesteps.tolist()


def test_timesteps_stay_inside_the_table_and_start_at_the_top() -> None:
    assert Schedule().timesteps(1000).tolist()[:2] == [999, 999]
    assert Schedule().timesteps(4, "trailing").tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 1000, got {steps}"):
        Schedule().timesteps(steps)


@pytest.mark.parametrize("change", [{"beta_schedule": "cosine"}, {"beta_start": 0.5}, {"num_train_timesteps": 0}])
def test_impossible_schedules_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        Schedule(**{**SDXL, **change})  # type: ignore[arg-type]


def test_noise_can_be_removed_again() -> None:
    schedule, clean, noise = Schedule(), normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)
    timesteps = torch.tensor([0, 500, 999])
    noisy = schedule.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(schedule.x0_from_eps(noisy, noise, timesteps), clean, atol=1e-5, rtol=0)
    sigma = schedule.sigma(timesteps)
    exploding = clean + sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(Schedule.preserving(exploding, sigma), noisy, atol=1e-5, rtol=0)
    torch.testing.assert_close(Schedule.exploding(noisy, sigma), exploding, atol=1e-4, rtol=0)


def test_every_timestep_is_found_by_its_sigma() -> None:
    schedule = Schedule()
    everything = torch.arange(1000)
    assert torch.equal(schedule.timestep_of(schedule.sigma(everything)), everything)


@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_with_a_perfect_denoiser_gives_the_clean_picture(steps: int) -> None:
    clean, schedule = normal(2, 4, 3, 3), Schedule()
    sigmas = schedule.sampling_sigmas(schedule.timesteps(steps))
    start = clean + sigmas[0] * normal(2, 4, 3, 3, seed=1)
    assert torch.equal(sample_ddim(lambda latents, sigma: clean, start, sigmas), clean)


def test_ddim_and_ddpm_agree_with_diffusers_step_for_step() -> None:
    schedule, denoise = Schedule(), gaussian_denoiser(0.3, 0.8)
    steps = 6
    sigmas = schedule.sampling_sigmas(schedule.timesteps(steps))
    noises = [normal(2, 4, 3, 3, seed=10 + i) for i in range(steps)]
    start = normal(2, 4, 3, 3)
    exploding = Schedule.exploding(start, sigmas[0].expand(2))
    ours = {
        "ddim": sample_ddim(denoise, exploding, sigmas),
        "ddpm": sample_ddpm(denoise, exploding, sigmas, lambda i: noises[i]),
    }
    for kind, final in ours.items():
        options = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
        scheduler = reference(DDIMScheduler if kind == "ddim" else DDPMScheduler, **SDXL, **options)
        scheduler.set_timesteps(steps)
        x = start.double()
        for i, t in enumerate(scheduler.timesteps):
            alpha = scheduler.alphas_cumprod[t].double()
            sigma = ((1 - alpha) / alpha).sqrt().expand(2)
            clean = denoise(x / alpha.sqrt(), sigma)
            eps = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
            if kind == "ddim":
                x = scheduler.step(eps, t, x).prev_sample
            else:
                x = _ddpm_step(scheduler, int(t), x, clean, noises[i].double())
        torch.testing.assert_close(final.double(), x, atol=2e-4, rtol=0)


def _ddpm_step(scheduler: Any, t: int, x: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Ho et al. 2020, Eqs. 6-7 (diffusers' step draws its own noise)."""
    before = int(scheduler.previous_timestep(t))
    alpha = scheduler.alphas_cumprod[t].double()
    alpha_before = scheduler.alphas_cumprod[before].double() if before >= 0 else torch.tensor(1.0).double()
    step = alpha / alpha_before
    mean = alpha_before.sqrt() * (1 - step) / (1 - alpha) * clean + step.sqrt() * (1 - alpha_before) / (1 - alpha) * x
    return mean + ((1 - alpha_before) / (1 - alpha) * (1 - step)).sqrt() * noise


def test_ddpm_reaches_the_data_distribution() -> None:
    schedule = Schedule()
    sigmas = schedule.sampling_sigmas(schedule.timesteps(500))  # with few steps the distribution is too narrow
    start = Schedule.exploding(normal(1, 1, 100, 100), sigmas[:1])
    final = sample_ddpm(gaussian_denoiser(0.5, 0.7), start, sigmas, lambda i: normal(1, 1, 100, 100, seed=1000 + i))
    assert abs(float(final.mean()) - 0.5) < 0.02
    assert abs(float(final.std()) - 0.7) < 0.02


def test_steps_are_reported_and_cancelled() -> None:
    schedule, events = Schedule(), list[StepEvent]()
    sigmas = schedule.sampling_sigmas(schedule.timesteps(5))
    with pytest.raises(Cancellation, match="before step 3 of 5"):
        sample_ddim(lambda latents, sigma: latents, normal(1, 1, 2, 2), sigmas, events.append, lambda: len(events) == 2)
    assert [(e.step, e.of) for e in events] == [(1, 5), (2, 5)]
    assert events[0].preview is not None


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 2.0], [1.0, 1.0, 0.5], [1.0, -1.0], [2.0, 1.0, -1.0]])
def test_levels_that_do_not_fall_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="fall strictly"):
        sample_ddim(lambda latents, sigma: latents, normal(1, 1, 2, 2), torch.tensor(sigmas))


def test_guidance() -> None:
    negative, positive = torch.zeros(2, 1, 2, 2), normal(2, 1, 2, 2)
    assert torch.equal(guide(negative, positive, 1.0), positive)
    assert torch.equal(guide(negative, positive, 3.0), 3 * positive)
    # with rescale 1, guidance keeps the positive prediction's deviation
    torch.testing.assert_close(guide(negative, positive, 3.0, rescale=1.0), positive)
    torch.testing.assert_close(
        distillation_guide(negative, positive, torch.tensor([0.0, 2.0])),
        torch.stack([positive[0], 3 * positive[1]]),
    )
