"""SUPIR's golden files without networks: schedule, samplers, tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from helper_modules import load_helper
from torch import Tensor

from components.priors.conditions import SizedConditions
from components.samplers.edm import (
    Churn,
    LevelDenoiser,
    Pull,
    between,
    edm_sigmas,
    karras_sigmas,
    level_indices,
    level_table,
    nearest_index,
    sample_dpmpp_2m,
    sample_edm,
    sample_euler_ancestral,
    substep_sigmas,
)
from components.samplers.schedules import Schedule
from components.samplers.tiles import released_weights, strided_boxes, tiled
from components.systems.supir.denoiser import Ramp, SupirDenoiser
from components.types import Box

files = load_helper("components/_golden_supir.py")
Golden, SIGMA_MAX = files.Golden, files.SIGMA_MAX


def check_schedule(golden: Golden) -> None:
    table = level_table(Schedule())
    golden.check("denoiser.sigmas", table)
    golden.check("alphas_cumprod", 1 / (1 + table.double().square()))
    for name in [n.removeprefix("output/") for n in golden.tensors if n.startswith("output/sigmas.T")]:
        steps = int(name.removeprefix("sigmas.T"))
        golden.check(name, edm_sigmas(table, steps))
        golden.check(f"indices.T{steps}", level_indices(steps).flip(0))
    sigmas = edm_sigmas(table, 50)
    churned = sigmas[:-1] * (1 + Churn(amount=5).gamma(1.0, 50))
    golden.check("sigma_to_idx.T50", nearest_index(table, sigmas[:-1]))
    golden.check("sigma_to_idx.T50_churn5", nearest_index(table, churned))
    golden.check("quantised.T50_churn5", table[nearest_index(table, churned)])
    golden.check("karras.T50", karras_sigmas(50, float(sigmas[-2]), float(sigmas[0])))
    golden.check("linear_cfg_1_to_4.T50", between(sigmas[:-1], SIGMA_MAX, 1.0, 4.0))
    pull = Pull(target=torch.zeros(1), tau=4.0, sigma_max=SIGMA_MAX)
    golden.check("restore_weight_tau4.T50", pull.weight(sigmas[:-1], sigmas[1:]))
    calls: list[Tensor] = []

    def network(x: Tensor, t: Tensor, lq: Tensor, conditions: SizedConditions, scale: float | Tensor) -> Tensor:
        calls.append(t)
        return 0.5 * x + 0.001 * t.view(-1, 1, 1, 1) * scale

    x, nothing = golden.input("x"), torch.zeros(3, 1)
    denoiser = SupirDenoiser(
        predict=network,
        table=table,
        lq=x,
        conditions=SizedConditions(text=nothing, pooled=nothing, time_ids=nothing),
        guided=False,
        cfg_scale=Ramp(start=1, end=1),
        control_scale=Ramp(start=0.8, end=0.8),
        sigma_max=SIGMA_MAX,
    )
    golden.check("denoiser.out", denoiser(x, golden.input("sigma"), golden.input("sigma")[0]))
    assert torch.equal(calls[0], nearest_index(table, golden.input("sigma")))


@dataclass(frozen=True)
class Toy:
    """The analytic denoiser of the sampler files, with guidance; a tile has a part of the control latents."""

    golden: Golden
    cfg: Ramp
    control: Ramp
    lq: Tensor

    def __call__(self, latents: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        s, clean = sigma.view(-1, 1, 1, 1), []
        for kind in ("_uc", ""):
            vector, text = self.golden.input(f"vector{kind}"), self.golden.input(f"crossattn{kind}")
            mean = 0.7 * self.control.at(level, SIGMA_MAX) * torch.tanh(self.lq)
            mean = mean + 0.3 * vector.mean(1).view(-1, 1, 1, 1) + 0.1 * text.mean((1, 2)).view(-1, 1, 1, 1)
            clean.append((0.25 * latents + s**2 * mean) / (0.25 + s**2) + 0.05 * torch.sin(latents / (1 + s)))
        return clean[0] + self.cfg.at(s, SIGMA_MAX) * (clean[1] - clean[0])

    def tile(self, box: Box) -> Toy:
        top, left, height, width = box
        return Toy(self.golden, self.cfg, self.control, self.lq[..., top : top + height, left : left + width])


def start(golden: Golden, sigma: Tensor) -> Tensor:
    return golden.input("z") * (1 + sigma.square()).sqrt()


def check_edm_sampler(golden: Golden) -> None:
    table = level_table(Schedule())
    for name, case in golden.config["cases"].items():
        call = case.get("call", {})
        scale = call.get("control_scale", 1.0)
        first = call["control_scale_start"] if call.get("use_linear_control_scale") else scale
        toy = Toy(
            golden,
            Ramp(start=case["scale"], end=case["scale_min"]),
            Ramp(start=first, end=scale),
            golden.input("control"),
        )
        sigmas = edm_sigmas(table, case["num_steps"])
        churn = Churn(
            amount=case["s_churn"],
            noise_scale=case["s_noise"],
            low=case.get("s_tmin", 0.0),
            high=case.get("s_tmax", math.inf),
        )
        pull = None
        if case["restore_cfg"] > 0:
            low = golden.config["restore_cfg_s_tmin"]
            pull = Pull(
                target=golden.input("x_center"),
                tau=case["restore_cfg"],
                sigma_max=golden.config["sigma_max_constant"],
                low=low,
            )
        draws = golden.tensors.get(f"input/noise.{name}", torch.zeros(0))
        latents, noise, steps = start(golden, sigmas[0]), iter(draws), list[Tensor]()
        share = replace(churn, amount=churn.amount / case["num_steps"])  # of one step alone
        for step in range(case["num_steps"]):
            latents = sample_edm(toy, latents, sigmas[step : step + 2], lambda _, n=noise: next(n), share, pull)
            steps.append(latents)
        golden.check(f"steps.{name}", torch.stack(steps))
        assert next(noise, None) is None, f"{name}: noise is left"
        noise = iter(draws)
        whole = sample_edm(toy, start(golden, sigmas[0]), sigmas, lambda _, n=noise: next(n), churn, pull)
        golden.check(f"final.{name}", whole)


def check_dpmpp2m_sampler(golden: Golden) -> None:
    table, control = level_table(Schedule()), golden.config["control_scale"]
    for name, case in golden.config["cases"].items():
        low = float(edm_sigmas(table, case["num_steps"])[-2])
        sigmas = karras_sigmas(case["num_steps"], low, float(table[-1]))
        golden.check(f"sigmas.{name}", sigmas)
        toy = Toy(
            golden,
            Ramp(start=case["scale"], end=case["scale_min"]),
            Ramp(start=control, end=control),
            golden.input("control"),
        )
        steps: list[Tensor] = []

        def denoise(latents: Tensor, sigma: Tensor, level: Tensor, toy: Toy = toy, steps: Any = steps) -> Tensor:
            steps.append(latents)
            return toy(latents, sigma, level)

        noise = golden.input(f"noise.{name}")
        final = sample_dpmpp_2m(
            denoise,
            start(golden, table[-1]),
            sigmas,
            lambda step, noise=noise: noise[step - 1],
            case["eta"],
            case["s_noise"],
        )
        golden.check(f"final.{name}", final)
        golden.check(f"steps.{name}", torch.stack([*steps[1:], final]))


def check_substep_sampler(golden: Golden) -> None:
    config, steps = golden.config, list[Tensor]()
    *places, _ = config["steps_subset"]
    sigmas = substep_sigmas(level_table(Schedule()), config["num_steps"], places)
    scale = Ramp(start=config["scale"], end=config["scale"])
    toy = Toy(golden, scale, Ramp(start=1.0, end=1.0), golden.input("control"))

    def denoise(latents: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        steps.append(latents)
        return toy(latents, sigma, level)

    noise = golden.input("noise")
    final = sample_euler_ancestral(
        denoise, start(golden, sigmas[0]), sigmas, noise.__getitem__, config["eta"], config["s_noise"]
    )
    golden.check("final", final)
    golden.check("steps", torch.stack([*steps[1:], final]))


def check_tile_weights(golden: Golden) -> None:
    for name in [n.removeprefix("output/") for n in golden.tensors if n.startswith("output/")]:
        if name.startswith("weights."):
            width, height = (int(side) for side in name.removeprefix("weights.w").split("h"))
            weights = released_weights(height, width, golden.config["var"])
            golden.check(name, weights.expand(1, 4, -1, -1))
        else:
            height, width, tile, stride = (int(n) for n in name.removeprefix("windows.").split("_"))
            golden.check(name, corners(strided_boxes(height, width, tile, stride)))


def corners(boxes: list[Box]) -> Tensor:
    """Boxes as rows (top, bottom, left, right)."""
    return torch.tensor([[top, top + height, left, left + width] for top, left, height, width in boxes])


def check_tiled_samplers(golden: Golden) -> None:
    table, size, stride = level_table(Schedule()), golden.config["tile_size"], golden.config["tile_stride"]
    height, width = golden.input("z").shape[-2:]
    boxes = strided_boxes(height, width, size, stride)
    golden.check("coords", corners(boxes))
    golden.check("tile_weights", released_weights(size, size).expand(1, 4, -1, -1))
    cases = golden.config["cases"]
    assert cases.startswith("edm: 6 steps, CFG 1.0->4.0, tau 4 churn 0 / tau -1 churn 5 s_noise 1.01; dpmpp2m: 6 steps")
    sigmas, whole = edm_sigmas(table, 6), Ramp(start=1.0, end=1.0)

    def denoiser(cfg: Ramp) -> LevelDenoiser:
        return tiled(Toy(golden, cfg, whole, golden.input("control")), height, width, boxes, weigh=released_weights)

    for name, churn, pull in (
        ("churn0", Churn(), Pull(target=golden.input("x_center"), tau=4.0, sigma_max=SIGMA_MAX)),
        ("churn5", Churn(amount=5, noise_scale=1.01), None),
    ):
        noise = golden.input(f"noise.edm_{name}")
        final = sample_edm(
            denoiser(Ramp(start=1.0, end=4.0)), start(golden, sigmas[0]), sigmas, noise.__getitem__, churn, pull
        )
        golden.check(f"final.edm_{name}", final)
    noise = golden.input("noise.dpmpp2m")
    karras = karras_sigmas(6, float(sigmas[-2]), float(table[-1]))
    final = sample_dpmpp_2m(
        denoiser(Ramp(start=2.0, end=2.0)), start(golden, table[-1]), karras, lambda s: noise[s - 1], 1.0, 1.003
    )
    golden.check("final.dpmpp2m", final)
