"""A run's conditions and steps, for each shape of prior; the restorer around them is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from components.batches import request_noise
from components.priors.conditions import Conditions
from components.priors.fast_unet import FastAutoencoder, Speed
from components.samplers.ddim import sample_ddim, sample_ddpm
from components.samplers.edm import Churn, edm_sigmas, level_table, sample_edm
from components.samplers.flow import flow_sigmas, sample_flow
from components.samplers.restoration_pull import RestorationPull
from components.samplers.schedules import Schedule
from components.samplers.tiles import tiled
from components.systems.dra.adapters import TokenAdapters, UnetAdapters
from components.systems.dra.bundle import Bundle
from components.systems.dra.config import Shape
from components.systems.dra.denoiser import DraDenoiser, FlowDenoiser
from components.systems.dra.fast import FastDra, FastTokenDra
from components.systems.dra.network import Dra
from components.systems.dra.options import Options
from components.systems.dra.tokens import TokenDra
from components.types import Box, Cancelled, OnStep, Request


@dataclass(frozen=True, kw_only=True)
class Run:
    """A batch in the sampler.

    Attributes:
        options: of all its pictures.
        requests: one for each picture; the noise is theirs.
        lq: scaled latents of the LQ pictures [B, C, h, w].
        pictures: the LQ pictures [B, 3, H, W] in [-1, 1], on the CPU, for adapters that see them; else None.
        conditions: of B rows, or with guidance of 2 B rows, the negative ones first.
        boxes: tiles of the steps.
        on_step, cancelled: see types.Restorer.
    """

    options: Options
    requests: Sequence[Request]
    lq: Tensor
    pictures: Tensor | None
    conditions: Any
    boxes: Sequence[Box]
    on_step: OnStep
    cancelled: Cancelled | None

    @property
    def cfg_scale(self) -> float | None:
        """Weight of guidance; None for none."""
        return self.options.cfg_scale if self.options.guided else None

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of the latents."""
        return self.lq.shape[-2], self.lq.shape[-1]

    def noise(self, name: str) -> Tensor:
        """Standard normal numbers of that name, of the latents' shape."""
        return request_noise(self.requests, name, tuple(self.lq.shape[1:]), self.lq.device)

    def seen(self, features_of: Callable[[Tensor], Any], network: Bundle[Any, Any]) -> dict[str, Any]:
        """The fields of denoiser.Adapted that say what the adapters see of LQ; pictures go to the device by tiles."""
        if self.pictures is None:
            return {"features_of": features_of, "lq": self.lq}
        device = self.lq.device
        factor = network.adapters.factor
        return {"features_of": lambda part: features_of(part.to(device)), "lq": self.pictures, "factor": factor}

    def pull(self, start: Tensor) -> RestorationPull | None:
        """The restoration sampling strategy; None for none. `start` is the run's start noise."""
        options = self.options
        if not options.pull_weight:
            return None
        return RestorationPull(
            target=self.lq,
            weight=options.pull_weight,
            threshold=options.rss_threshold,
            mode=options.rss_mode,
            noise=start,
        )


class Steps(Protocol):
    """The part of a restorer that depends on the prior's shape.

    Attributes:
        autoencoder: the prior's, perhaps compiled.
        fast: the fast path; None for a form of adapters that has none.
    """

    autoencoder: FastAutoencoder
    fast: FastDra | FastTokenDra | None

    def chunks(self, texts: Sequence[str]) -> int:
        """Pieces of the text encoders' length that the longest text needs."""

    def conditions(
        self, prompts: Sequence[str], size: tuple[int, int], device: torch.device, chunks: int
    ) -> Conditions:
        """Conditions of prompts for tiles of (height, width) `size` in pixels."""

    def sample(self, run: Run) -> Tensor:
        """Clean latents [B, C, h, w]."""


class MapSteps:
    """Steps of an SDXL-shaped prior."""

    def __init__(self, network: Dra, speed: Speed, like: MapSteps | None = None, resident: bool = False) -> None:
        self.network, self.prior = network, network.prior
        self.fast: FastDra | None = None
        if isinstance(network.adapters, UnetAdapters):
            self.fast = FastDra(network, speed, like.fast if like is not None else None, resident)
        self.autoencoder = self.fast or FastAutoencoder(network.prior, speed)

    def chunks(self, texts: Sequence[str]) -> int:
        return max(self.prior.prompt_chunks(text) for text in texts)

    def conditions(
        self, prompts: Sequence[str], size: tuple[int, int], device: torch.device, chunks: int
    ) -> Conditions:
        return self.prior.sized_conditions(prompts, size, device, chunks)

    def sample(self, run: Run) -> Tensor:
        options, prior, rows, device = run.options, self.prior, len(run.lq), run.lq.device
        table = level_table(prior.schedule) if options.sampler == "edm" else prior.schedule.sigmas
        fast: Any = self.fast.run() if self.fast is not None else self.network  # a ControlNet has no fast path
        denoiser = DraDenoiser(
            predict=fast.predict_eps,
            table=table.to(device),
            **run.seen(fast.features, self.network),
            conditions=run.conditions,
            cfg_scale=run.cfg_scale,
        )
        denoise = tiled(denoiser, *run.sides, run.boxes, run.cancelled)
        start, step_noise = run.noise("start"), lambda step: run.noise(f"step {step}")
        pull = run.pull(start)
        if options.sampler == "edm":
            sigmas = edm_sigmas(table, options.steps).to(device)
        else:
            timesteps = prior.sampling.timesteps(prior.schedule, options.steps)
            sigmas = prior.sampling.sigmas(prior.schedule, timesteps, options.sampler == "ddpm").to(device)
        latents = Schedule.exploding(start, sigmas[0].expand(rows))
        if options.sampler == "edm":
            churn = Churn(amount=options.churn, noise_scale=options.noise_scale)
            return sample_edm(denoise, latents, sigmas, step_noise, churn, None, run.on_step, run.cancelled, pull)
        if options.sampler == "ddpm":
            clean = sample_ddpm(denoise, latents, sigmas, step_noise, run.on_step, run.cancelled, pull)
        else:
            clean = sample_ddim(denoise, latents, sigmas, run.on_step, run.cancelled, pull)
        return Schedule.preserving(clean, sigmas[-1].expand(rows))


class TokenSteps:
    """Steps of an MM-DiT: Euler steps of its flow."""

    def __init__(self, network: TokenDra, speed: Speed, like: TokenSteps | None = None, resident: bool = False) -> None:
        self.network, self.prior = network, network.prior
        self.fast: FastTokenDra | None = None
        if isinstance(network.adapters, TokenAdapters):
            self.fast = FastTokenDra(network, speed, like.fast if like is not None else None, resident)
        else:
            network.blocks = speed.blocks(network.blocks)
        self.autoencoder = self.fast or FastAutoencoder(network.prior, speed)

    def chunks(self, texts: Sequence[str]) -> int:
        return 1  # the text encoders cut a longer prompt off

    def conditions(
        self, prompts: Sequence[str], size: tuple[int, int], device: torch.device, chunks: int
    ) -> Conditions:
        return self.prior.conditions(prompts).to(device)

    def sample(self, run: Run) -> Tensor:
        fast: Any = self.fast.run() if self.fast is not None else self.network
        denoiser = FlowDenoiser(
            predict=fast.predict_velocity,
            **run.seen(fast.features, self.network),
            conditions=run.conditions,
            cfg_scale=run.cfg_scale,
        )
        velocity = tiled(denoiser, *run.sides, run.boxes, run.cancelled)
        start = run.noise("start")
        sigmas = flow_sigmas(self.prior.schedule, run.options.steps)
        return sample_flow(velocity, start, sigmas, run.on_step, run.cancelled, run.pull(start))


_STEPS: Mapping[Shape, Any] = {"maps": MapSteps, "tokens": TokenSteps}


def steps_of(network: Bundle[Any, Any], speed: Speed, like: Steps | None = None, resident: bool = False) -> Steps:
    """The steps of a bundle by its shape.

    Args:
        network: the bundle.
        speed: settings of the fast path.
        like: steps of another bundle on the same prior with the same settings, whose derived weights it shares.
        resident: whether other bundles will share them.
    """
    steps: Steps = _STEPS[network.shape](network, speed, like, resident)
    return steps


def text_encoders_of(network: Bundle[Any, Any]) -> tuple[nn.Module, ...]:
    """The text encoders that the prior has."""
    return tuple(encoder for encoder in network.prior.text_encoders if encoder is not None)
