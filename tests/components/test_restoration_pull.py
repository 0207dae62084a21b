"""Restoration sampling in every sampler, against formulas written out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from components.randomness import generator
from components.samplers.ddim import sample_ddim, sample_ddpm
from components.samplers.edm import Churn, Pull, sample_dpmpp_2m, sample_edm, sample_euler_ancestral
from components.samplers.flow import sample_flow
from components.samplers.restoration_pull import PullMode, RestorationPull, pull_share, pull_towards, steps_left
from components.types import StepEvent

MODES: tuple[PullMode, ...] = ("latent", "x0", "renoised")
SIGMAS = torch.tensor([9.0, 5.0, 2.5, 1.0, 0.0], dtype=torch.float64)
W, A = 0.4, 0.2
"""With four steps left 3, 2, 1 and 0 remain; the shares above 0.2 are 0.75, 0.5 and 0.25."""
STRENGTHS = (W * (0.75 - 0.2) / 0.8, W * (0.5 - 0.2) / 0.8, W * (0.25 - 0.2) / 0.8, 0.0)


def tensor(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(generator(3, name).standard_normal(shape or (2, 4, 3, 3)))


def pull_of(mode: PullMode) -> RestorationPull:
    return RestorationPull(target=tensor("lq"), weight=W, threshold=A, mode=mode, noise=tensor("start"))


def denoise(latents: Tensor, sigma: Tensor, level: Tensor | None = None) -> Tensor:
    """A denoiser that depends on latents and level."""
    return torch.tanh(latents) / (1 + sigma.view(-1, 1, 1, 1))


def noise(step: int) -> Tensor:
    return tensor(f"step {step}")


def test_the_share_is_of_steps_that_remain() -> None:
    assert [steps_left(step, 4) for step in range(4)] == [3, 2, 1, 0]
    assert [pull_share(left, 100, 0.8) for left in (99, 90, 81, 80, 0)] == pytest.approx([0.95, 0.5, 0.05, 0, 0])
    assert [pull_of("latent").strength(step, 4) for step in range(4)] == pytest.approx(STRENGTHS)
    assert pull_towards(torch.tensor(1.0), torch.tensor(5.0), 0.25) == 2
    pull = RestorationPull(target=tensor("lq"))
    assert (pull.weight, pull.threshold, pull.mode) == (0.05, 0.8, "latent")  # section 4.1


def ddim_by_hand(mode: PullMode, ancestral: bool) -> Tensor:
    """Variance-preserving latents x = s clean + n eps, as Eq. 1 is printed for DDPM and DDIM."""
    lq, start = tensor("lq"), tensor("start")
    signal, spread = (1 / (1 + SIGMAS**2).sqrt(), SIGMAS / (1 + SIGMAS**2).sqrt())
    x = tensor("z") * signal[0]
    for i in range(4):
        clean = denoise(x / signal[i], SIGMAS[i].expand(2))
        if mode == "x0":
            clean = clean + STRENGTHS[i] * (lq - clean)
        eps = (x - signal[i] * clean) / spread[i]
        if not ancestral:
            x = signal[i + 1] * clean + spread[i + 1] * eps
        else:  # Ho et al. 2020, Eqs. 6-7 with alpha_bar = signal squared
            before, after = signal[i] ** 2, signal[i + 1] ** 2
            beta = 1 - before / after
            mean = (after.sqrt() * beta * clean + (before / after).sqrt() * (1 - after) * x) / (1 - before)
            x = mean + (beta * (1 - after) / (1 - before)).sqrt() * noise(i)
        if mode == "latent":
            x = x + STRENGTHS[i] * (lq - x)
        if mode == "renoised":
            x = x + STRENGTHS[i] * (signal[i + 1] * lq + spread[i + 1] * start - x)
    return x / signal[-1]


@pytest.mark.parametrize("mode", MODES)
def test_ddim_and_ddpm_by_hand(mode: PullMode) -> None:
    z, pull = tensor("z"), pull_of(mode)
    torch.testing.assert_close(sample_ddim(denoise, z, SIGMAS, restoration=pull), ddim_by_hand(mode, False))
    torch.testing.assert_close(sample_ddpm(denoise, z, SIGMAS, noise, restoration=pull), ddim_by_hand(mode, True))


@pytest.mark.parametrize("mode", MODES)
def test_edm_by_hand(mode: PullMode) -> None:
    """Variance-exploding latents; the printed pull there goes to the unscaled LQ latents (dra.md, section 5)."""
    lq, start, z = tensor("lq"), tensor("start"), tensor("z")
    for i in range(4):
        sigma = SIGMAS[i] * (1 + min(0.6 / 4, math.sqrt(2) - 1))
        z = z + (sigma**2 - SIGMAS[i] ** 2).sqrt() * 1.1 * noise(i)
        clean = denoise(z, sigma.expand(2))
        if i < 3:  # the other pull comes first
            clean = clean - (clean - tensor("first")) * (SIGMAS[i] / 9) ** 2
        if mode == "x0":
            clean = clean + STRENGTHS[i] * (lq - clean)
        z = z + (z - clean) / sigma * (SIGMAS[i + 1] - sigma)
        if mode == "latent":
            z = z + STRENGTHS[i] * (lq - z)
        if mode == "renoised":
            z = z + STRENGTHS[i] * (lq + SIGMAS[i + 1] * start - z)
    churn, other = Churn(amount=0.6, noise_scale=1.1), Pull(target=tensor("first"), tau=2.0, sigma_max=9.0)
    own = sample_edm(denoise, tensor("z"), SIGMAS, noise, churn, other, restoration=pull_of(mode))
    torch.testing.assert_close(own, z)


@pytest.mark.parametrize("mode", MODES)
def test_flow_matching_steps_by_hand(mode: PullMode) -> None:
    """The pseudo-steps of dra.md, section 5: the pull needs only the shares of clean latents and of noise."""
    lq, start, times = tensor("lq"), tensor("start"), torch.tensor([1.0, 0.7, 0.5, 0.2, 0.0], dtype=torch.float64)
    z, previews = tensor("z"), list[Tensor]()
    for i in range(4):
        now, after = times[i], times[i + 1]
        velocity = torch.tanh(z) * (1 + now)
        clean, eps = z - now * velocity, z + (1 - now) * velocity
        if mode == "x0":
            clean = clean + STRENGTHS[i] * (lq - clean)
        previews.append(clean)
        z = (1 - after) * clean + after * eps
        if mode == "latent":
            z = z + STRENGTHS[i] * (lq - z)
        if mode == "renoised":
            z = z + STRENGTHS[i] * ((1 - after) * lq + after * start - z)

    def velocity_of(latents: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(latents) * (1 + sigma.view(-1, 1, 1, 1))

    events: list[StepEvent] = []
    own = sample_flow(velocity_of, tensor("z"), times, events.append, restoration=pull_of(mode))
    torch.testing.assert_close(own, z)
    for event, preview in zip(events, previews, strict=True):
        torch.testing.assert_close(event.preview, preview)
    plain = sample_flow(velocity_of, tensor("z"), times)
    none = RestorationPull(target=lq, weight=0.0, mode=mode, noise=start)
    assert torch.equal(sample_flow(velocity_of, tensor("z"), times, restoration=none), plain)
    assert not torch.allclose(own, plain)


@pytest.mark.parametrize("sampler", [sample_dpmpp_2m, sample_euler_ancestral])
def test_other_samplers_pull_too(sampler: Callable[..., Tensor]) -> None:
    """A pull of the clean estimate equals a denoiser that pulls; one of the latents equals single steps with it."""
    z, lq, start = tensor("z"), tensor("lq"), tensor("start")

    def pulling(latents: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        clean = denoise(latents, sigma)
        step = int((level == SIGMAS).nonzero()[0])
        return clean + STRENGTHS[step] * (lq - clean)

    own = sampler(denoise, z, SIGMAS, noise, restoration=pull_of("x0"))
    torch.testing.assert_close(own, sampler(pulling, z, SIGMAS, noise))
    for mode in ("latent", "renoised"):
        first = sampler(denoise, z, SIGMAS[:2], noise)
        target = lq if mode == "latent" else lq + SIGMAS[1] * start
        inputs = _inputs_of(sampler, z, pull_of(mode))  # type: ignore[arg-type]
        torch.testing.assert_close(inputs[1], first + STRENGTHS[0] * (target - first))


def _inputs_of(sampler: Callable[..., Tensor], z: Tensor, pull: RestorationPull) -> list[Tensor]:
    """The latents that the denoiser gets in each step."""
    inputs: list[Tensor] = []

    def record(latents: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        inputs.append(latents)
        return denoise(latents, sigma)

    sampler(record, z, SIGMAS, noise, restoration=pull)
    return inputs


def test_no_pull_changes_no_bit() -> None:
    z = tensor("z")
    none = RestorationPull(target=tensor("lq"), weight=0.0)
    late = RestorationPull(target=tensor("lq"), weight=1.0, threshold=0.9)  # 0.75 of the steps are left after the first
    for pull in (none, late):
        assert torch.equal(sample_ddim(denoise, z, SIGMAS, restoration=pull), sample_ddim(denoise, z, SIGMAS))
        assert torch.equal(sample_edm(denoise, z, SIGMAS, restoration=pull), sample_edm(denoise, z, SIGMAS))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"weight": 1.1}, "weight"),
        ({"weight": -0.1}, "weight"),
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": -0.1}, "threshold"),
        ({"mode": "noise"}, "latent, x0, renoised"),
        ({"mode": "renoised"}, "start noise"),
    ],
)
def test_wrong_pulls_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RestorationPull(target=tensor("lq"), **settings)
