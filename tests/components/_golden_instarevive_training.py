"""Checks of the building blocks of InstaRevive's training against golden tensors: SwinIR, score matching, T_max.

test_golden_instarevive.py passes each golden file to its check, which must compare every output in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from components.objectives.diffusion import epsilon_loss
from components.objectives.score_matching import (
    largest_timesteps,
    regression_share,
    score_gap,
    score_matching_loss,
    smallest_timesteps,
    squared_distances,
)
from components.priors.conditions import Conditions
from components.samplers.guidance import guide
from components.samplers.schedules import Schedule
from components.systems.instarevive.network import EpsPredictor, build_network
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.weights import load_swinir


class Golden(Protocol):
    """The part of a golden file that a check uses."""

    description: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    checked: set[str]


def of(golden: Golden, kind: str) -> dict[str, Tensor]:
    """Golden tensors of a kind ("input", "weights", "output") by the rest of their name, floats as float32."""
    prefix = f"{kind}/"
    tensors = {k.removeprefix(prefix): v for k, v in golden.tensors.items() if k.startswith(prefix)}
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def compare(golden: Golden, name: str, value: Tensor, atol: float, rtol: float) -> None:
    """Compare one output with the golden tensor, and mark it as checked."""
    expected = of(golden, "output")[name]
    assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)}, not {tuple(expected.shape)}"
    torch.testing.assert_close(
        value.detach().to(expected.dtype), expected, atol=atol, rtol=rtol, msg=lambda text: f"output {name}: {text}"
    )
    golden.checked.add(f"output/{name}")


def schedule_of(golden: Golden) -> Schedule:
    config = golden.description["scheduler"]
    assert (config["prediction_type"], config["clip_sample"]) == ("epsilon", False)
    return Schedule(**{k: config[k] for k in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")})


def check_swinir(golden: Golden) -> None:
    tolerance = golden.description["tolerance"]
    config = SwinIRConfig(**golden.description["config"])
    network = load_swinir(of(golden, "weights"), config, "golden")
    assert set(network.state_dict()) == set(of(golden, "weights"))  # with the tables
    for name, images in of(golden, "input").items():
        compare(golden, name, network(images), tolerance["atol"], tolerance["rtol"])


def check_dsm(golden: Golden) -> None:
    """The blocks of the score-matching step, one by one: guided real score, unguided fake score, gradient by autograd.

    This does not see how InstaReviveObjective combines the blocks; test_golden_compositions.py does, on the same file.
    """
    tolerance, schedule, inputs = golden.description["tolerance"], schedule_of(golden), of(golden, "input")
    networks = {}
    for role in ("real", "fake"):
        network = build_network("pixart", golden.description["config"])
        prefix = f"{role}."
        network.load_state_dict(
            {k.removeprefix(prefix): v for k, v in of(golden, "weights").items() if k.startswith(prefix)}
        )
        networks[role] = EpsPredictor(network.eval(), schedule)
    latents, t = inputs["latents"], inputs["t"]
    prompt = Conditions(text=inputs["prompt_embeds"], mask=inputs["prompt_mask"])
    negative = Conditions(text=inputs["negative_embeds"], mask=inputs["negative_mask"]).expand(len(latents))
    close = {"atol": tolerance["grad_atol"], "rtol": tolerance["grad_rtol"]}
    noisy = schedule.add_noise(latents, inputs["noise"], t)
    compare(golden, "noisy_latents", noisy, **close)
    with torch.no_grad():
        eps_prompt, eps_negative = (networks["real"].predict_eps(noisy, t, c) for c in (prompt, negative))
        eps_fake = networks["fake"].predict_eps(noisy, t, prompt)
    scales = golden.description["cfg_scales"]
    assert {f"cfg{s:g}" for s in scales} == {m[1] for n in of(golden, "output") if (m := re.match(r"(cfg[\d.]+)/", n))}
    for scale in scales:
        leaf = latents.clone().requires_grad_(True)
        eps_real = guide(eps_negative, eps_prompt, scale)
        gap = score_gap(schedule, leaf, noisy, t, eps_real, eps_fake)
        with torch.enable_grad():
            loss = score_matching_loss(leaf, gap).mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
        prefix = f"cfg{scale:g}"
        compare(golden, f"{prefix}/loss", loss[None], 0.0, tolerance["loss_rtol"])
        compare(golden, f"{prefix}/grad_latents", gradient, **close)
        torch.testing.assert_close(gradient, 2 / latents.numel() * gap.weight * gap.coeff, **close)  # section 5.2
        values = {
            "weight": gap.weight,
            "coeff": gap.coeff,
            "pred_x0_real": gap.clean_real,
            "score_real": -eps_real,  # in the official script, coeff holds the division by the noise level
            "score_fake": -eps_fake,
        }
        for name, value in values.items():
            # the file has no tolerance for these: the gradient's relative one, times the largest value, since guidance
            # and noise over signal take differences of large numbers
            largest = float(of(golden, "output")[f"{prefix}/{name}"].abs().max())
            compare(golden, f"{prefix}/{name}", value, tolerance["grad_rtol"] * largest, 0.0)
    fake_t = inputs["fake_t"]
    with torch.enable_grad():
        eps = networks["fake"].predict_eps(schedule.add_noise(latents, inputs["fake_noise"], fake_t), fake_t, prompt)
        loss = epsilon_loss(eps, inputs["fake_noise"]).mean()
        loss.backward()
    compare(golden, "fake/loss", loss[None], 0.0, tolerance["loss_rtol"])
    parameters = dict(networks["fake"].network.named_parameters())
    for name in [n for n in of(golden, "output") if n.startswith("fake/grad_")]:
        gradient = parameters[name.removeprefix("fake/grad_")].grad
        assert gradient is not None
        # grad_atol is for the latents' small gradient; these golden values differ by 4e-7 of 0.8 from a float64 run
        largest = float(of(golden, "output")[name].abs().max())
        compare(golden, name, gradient, tolerance["grad_rtol"] * largest, 0.0)


def check_tmax(golden: Golden) -> None:
    """The blocks of the dynamic control, one by one: distance, T_max, alpha, lowest time.

    test_golden_compositions.py checks the control of InstaReviveObjective itself on the same file.
    """
    schedule, kappa = schedule_of(golden), float(golden.description["kappa"])
    rtol, inputs = golden.description["tolerance"]["d_rtol"], of(golden, "input")
    levels = inputs["sigma_table"]
    assert len(levels) == schedule.num_train_timesteps
    torch.testing.assert_close((1 - schedule.alphas_cumprod).sqrt(), levels, atol=1e-6, rtol=1e-5)
    for pair in sorted({name.split("/")[0] for name in inputs if "/" in name}):
        x, target = inputs[f"{pair}/x"], inputs[f"{pair}/x_hq"]
        for name, reduction in (("literal", "sum"), ("rms", "mean")):
            d = squared_distances(x, target, reduction).mean().sqrt()  # type: ignore[arg-type]
            compare(golden, f"{pair}/{name}/d", d[None], 0.0, rtol)
            t_max = largest_timesteps(schedule, kappa * d)
            compare(golden, f"{pair}/{name}/T_max", t_max[None], 1.0, 0.0)
            golden_t_max = of(golden, "output")[f"{pair}/{name}/T_max"][0]
            # from the golden T_max, so that a difference of one step by rounding counts once
            compare(golden, f"{pair}/{name}/alpha", regression_share(golden_t_max)[None], 1e-6, 0.0)
            compare(golden, f"{pair}/{name}/t_lo", smallest_timesteps(golden_t_max)[None], 0.0, 0.0)
        t_max_per_sample = largest_timesteps(schedule, kappa * squared_distances(x, target).sqrt())
        compare(golden, f"{pair}/per_sample_rms/T_max", t_max_per_sample, 1.0, 0.0)


CHECKS: Mapping[str, Callable[[Golden], None]] = {"swinir": check_swinir, "dsm": check_dsm, "tmax": check_tmax}
"""Checks by module name in the golden files."""
