"""Settings of a prior's folder and the precision of its networks: what a file says has an effect, or is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from helper_modules import load_helper
from torch import Tensor

from components.models import ModelError
from components.negatives import image_to_image_sigmas
from components.priors.scheduler_config import read_sampling, read_schedule
from components.priors.sdxl import Prior
from components.randomness import seeded_init
from components.samplers.ddim import sample_ddim, sample_ddpm
from components.samplers.schedules import FlowSchedule, Sampling, Schedule
from components.systems.instantir.fast import FastInstantIR, Speed
from components.systems.instantir.insight import record
from components.systems.instantir.network import InstantIR
from components.systems.instantir.options import Options
from components.systems.instantir.restorer import InstantIRRestorer
from components.systems.instarevive.fast import FastOneStep
from components.systems.instarevive.fast import Speed as OneStepSpeed

fast_tests = load_helper("components/test_fast_instantir.py")
SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHIFTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shift": {"shift_factor": 0.3},
    "mean": {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 1.5, 2.0]},
    "all": {"shift_factor": -0.3, "latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 1.5, 2.0]},
}


def autoencoder(**more: Any) -> AutoencoderKL:
    with seeded_init(1, "kl"):
        kl = AutoencoderKL(
            block_out_channels=(4, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.5,
            **more,
        )
    return kl.eval().requires_grad_(False)  # type: ignore[no-any-return]


@pytest.fixture
def network() -> InstantIR:
    built: InstantIR = fast_tests.build()
    return built


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compile` takes the compiled path, without code generation."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def with_autoencoder(network: InstantIR, kl: AutoencoderKL) -> Prior:
    network.prior.autoencoder = kl
    return network.prior


# ------------------------------------------------------------------------------------------------------- autoencoder


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_latents_have_the_folders_scale_and_shift(
    name: str, compiled: bool, network: InstantIR, uncompiled: None
) -> None:
    """(x - shift) scaling / deviation, the convention of diffusers' pipelines, and its inverse."""
    numbers, kl = SHIFTS[name], autoencoder(**SHIFTS[name])
    prior = with_autoencoder(network, kl)
    paths: Any = FastInstantIR(network, Speed(compile="autoencoder")) if compiled else prior
    images = fast_tests.tensor(2, 3, 16, 24).clamp(-1, 1)
    mean, deviation = (
        torch.tensor(numbers.get(key) or [default] * 4).view(1, 4, 1, 1)
        for key, default in (("latents_mean", 0.0), ("latents_std", 1.0))
    )
    shift = mean + numbers.get("shift_factor", 0.0)
    latents = (kl.encode(images).latent_dist.mode() - shift) * 0.5 / deviation
    torch.testing.assert_close(paths.encode(images), latents, atol=1e-5, rtol=1e-5)
    decoded = kl.decode(latents * deviation / 0.5 + shift).sample
    torch.testing.assert_close(paths.decode(latents), decoded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("half", "compile_", "autocast"),
    [
        (torch.bfloat16, "off", False),
        (torch.bfloat16, "autoencoder", False),
        (torch.float16, "autoencoder", True),
        (torch.bfloat16, "blocks", True),
    ],
)
@torch.no_grad()
def test_a_half_autoencoder_meets_float32_latents(
    half: torch.dtype, compile_: Any, autocast: bool, network: InstantIR, uncompiled: None
) -> None:
    """Pictures and latents stay in float32 at both borders, with compile on or off, and under autocast too."""
    exact, kl = autoencoder(), autoencoder().to(half)
    with_autoencoder(network, kl)
    fast = FastInstantIR(network, Speed(compile=compile_))
    images = fast_tests.tensor(1, 3, 16, 16).clamp(-1, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        latents, pictures = fast.encode(images), fast.decode(fast_tests.tensor(1, 4, 4, 4))
        plain = network.prior.encode(images), network.prior.decode(fast_tests.tensor(1, 4, 4, 4))
    assert latents.dtype == pictures.dtype == torch.float32
    assert torch.equal(latents, plain[0]) and torch.equal(pictures, plain[1])
    expected = exact.encode(images).latent_dist.mode() * 0.5
    assert float((latents - expected).abs().max()) < 0.03 * float(expected.abs().max())


@pytest.mark.parametrize("parts", ["all", "autoencoder", "text", "images", "unet", "aggregator"])
def test_any_network_may_be_in_half_precision(parts: str, network: InstantIR, uncompiled: None) -> None:
    """A picture is restored, and near the one of float32 networks."""
    prior = with_autoencoder(network, autoencoder())
    request = replace(fast_tests.request(), options={"steps": 2})
    expected = InstantIRRestorer(network).restore([request])[0].image.astype(int)
    modules = {**prior.modules, "aggregator": network.aggregator}
    names = {"text": ("text_encoder", "text_encoder_2"), "images": ("image_encoder",), "all": tuple(modules)}
    for name in names.get(parts, (parts,)):
        torch.nn.Module.to(modules[name], dtype=torch.bfloat16)  # type: ignore[arg-type]
    restored = InstantIRRestorer(network, speed=Speed(compile="autoencoder")).restore([request])[0].image.astype(int)
    assert restored.shape == expected.shape and abs(restored - expected).mean() < 12


@torch.no_grad()
def test_the_one_step_path_takes_a_half_autoencoder(network: InstantIR) -> None:
    prior = with_autoencoder(network, autoencoder(shift_factor=0.3))
    exact = prior.encode(torch.ones(1, 3, 16, 16)), prior.decode(torch.ones(1, 4, 4, 4))
    fast: Any = FastOneStep(torch.nn.Identity(), prior, OneStepSpeed(autoencoder="bf16"))  # type: ignore[arg-type]
    rough = fast.encode(torch.ones(1, 3, 16, 16)), fast.decode(torch.ones(1, 4, 4, 4))
    for one, other in zip(rough, exact, strict=True):
        assert one.dtype == torch.float32 and float((one - other).abs().max()) < 0.05


# --------------------------------------------------------------------------------------------------------- scheduler


def folder_with(path: Path, **config: Any) -> Path:
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SDXL, **config}))
    return path


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Sampling()),
        ({"set_alpha_to_one": False}, Sampling(final_clean=False)),
        ({"set_alpha_to_one": True, "steps_offset": 0}, Sampling(offset=0)),
        ({"timestep_spacing": "trailing"}, Sampling(spacing="trailing")),
        ({"timestep_spacing": "linspace", "clip_sample": False}, Sampling(spacing="linspace")),
    ],
)
def test_settings_of_the_sampler_are_read(config: dict[str, Any], expected: Sampling, tmp_path: Path) -> None:
    assert read_sampling(folder_with(tmp_path, **config)) == expected


OF_SAMPLING = ("clip_sample", "thresholding", "timestep_spacing", "steps_offset")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"clip_sample": True}, "clip_sample"),
        ({"thresholding": True}, "thresholding"),
        ({"timestep_spacing": "log"}, "timestep_spacing"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"prediction_type": "sample"}, "prediction_type"),
        ({"prediction_type": "flow_prediction", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ],
)
def test_settings_without_an_effect_here_are_refused_by_name(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, **config)
    read = read_sampling if name in OF_SAMPLING else read_schedule
    with pytest.raises(ModelError, match=name):
        read(folder)


def test_settings_of_the_schedule_have_an_effect(tmp_path: Path) -> None:
    config = {"num_train_timesteps": 500, "beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}
    schedule, kind = read_schedule(folder_with(tmp_path, **config, prediction_type="v_prediction"))
    assert (schedule, kind) == (Schedule(**config), "v_prediction")  # type: ignore[arg-type]
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    )
    assert read_schedule(tmp_path) == (FlowSchedule(shift=3.0), "flow_prediction")


@pytest.mark.parametrize("final_clean", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_ends_where_diffusers_does(spacing: Any, offset: int, final_clean: bool) -> None:
    """With set_alpha_to_one false a little of the predicted noise stays: latents at the level of time step 0."""
    sampling, schedule = Sampling(spacing=spacing, offset=offset, final_clean=final_clean), Schedule()
    scheduler: Any = DDIMScheduler(
        **SDXL, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=final_clean, clip_sample=False
    )
    scheduler.set_timesteps(5)
    timesteps = sampling.timesteps(schedule, 5)
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    sigmas = sampling.sigmas(schedule, timesteps)
    x = start = fast_tests.tensor(2, 4, 3, 3)

    def denoise(latents: Tensor, sigma: Tensor) -> Tensor:
        return latents / (1 + sigma.view(-1, 1, 1, 1).square())  # data with mean 0 and deviation 1

    ours = sample_ddim(denoise, Schedule.exploding(start, sigmas[0].expand(2)), sigmas)
    ours = Schedule.preserving(ours, sigmas[-1].expand(2))
    for t in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[t]
        clean = denoise(x / alpha.sqrt(), ((1 - alpha) / alpha).sqrt().expand(2))
        x = scheduler.step((x - alpha.sqrt() * clean) / (1 - alpha).sqrt(), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    if not final_clean:
        clean_end = sample_ddim(
            denoise, Schedule.exploding(start, sigmas[0].expand(2)), schedule.sampling_sigmas(timesteps)
        )
        assert float((ours - clean_end).abs().max()) > (1e-3 if timesteps[-1] else -1)


def test_linspace_is_diffusers_and_ddpm_always_ends_at_zero() -> None:
    schedule, sampling = Schedule(), Sampling(spacing="linspace", final_clean=False)
    scheduler: Any = DDIMScheduler(**SDXL, timestep_spacing="linspace")
    for steps in (1, 4, 30):
        scheduler.set_timesteps(steps)
        assert sampling.timesteps(schedule, steps).tolist() == scheduler.timesteps.tolist()
    timesteps = sampling.timesteps(schedule, 4)
    assert float(sampling.sigmas(schedule, timesteps, ancestral=True)[-1]) == 0
    assert float(sampling.sigmas(schedule, timesteps)[-1]) == float(schedule.sigmas[0])
    assert (
        image_to_image_sigmas(schedule, 4, 0.5, sampling).tolist() == sampling.sigmas(schedule, timesteps)[2:].tolist()
    )


def test_the_restorer_and_the_record_use_the_folders_sampling(
    network: InstantIR, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.systems.instantir import insight, restorer

    levels: list[Tensor] = []
    for module in (restorer, insight):
        for name, sample in (("sample_ddim", sample_ddim), ("sample_ddpm", sample_ddpm)):
            spy: Any = lambda *a, _sample=sample: (levels.append(a[2]), _sample(*a))[1]  # noqa: E731
            monkeypatch.setattr(module, name, spy)
    sampling = Sampling(spacing="trailing", offset=0, final_clean=False)
    network.prior.sampling = sampling
    schedule = network.prior.schedule
    expected = sampling.sigmas(schedule, sampling.timesteps(schedule, 3)).tolist()
    request = fast_tests.request()
    for sampler, last in (("ddim", expected[-1]), ("ddpm", 0.0)):
        options = {"steps": 3, "sampler": sampler, "cfg_scale": 1.0}
        InstantIRRestorer(network).restore([replace(request, options=options)])
        with torch.no_grad():
            record(network, torch.zeros(1, 3, 16, 16), Options(**options), [1])  # type: ignore[arg-type]
        assert [level.tolist() for level in levels] == [[*expected[:-1], last]] * 2
        levels.clear()
