"""Measurements of InstantIR's previews during a restoration: recorded runs, Fig. 4's distances, token retrieval.

A recorder wraps the run's InstantIRDenoiser, so the measurements come from the sampling loop itself. Distances are root
mean squares over latent elements. These are the paper's L2 norms divided by sqrt(C h w), so that pictures of any size
share one scale. Eq. 7's delta is a ratio of squared norms, where this factor cancels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from components.randomness import generator
from components.samplers.ddim import sample_ddim, sample_ddpm
from components.samplers.schedules import Schedule
from components.systems.instantir.denoiser import InstantIRDenoiser
from components.systems.instantir.network import Conditions, InstantIR
from components.systems.instantir.options import Options
from components.systems.instantir.preprocess import Fit, view_pixels
from components.systems.instantir.previewer import previewer_enabled
from components.systems.instantir.references import REFERENCE_NOISE
from components.tensors import tensor_to_images
from components.types import OnStep

UNSUPPORTED_DEFAULTS = {"resize": "native", "min_side_px": 0, "tile_px": 0}
"""Defaults of the restorer's options; a recorded run supports no other values of these. It ends with the last
latents, before the colour transfer."""

TOKEN_VIEWS = ("pooled", "whole", "class", "perceptor")
"""Ways to turn a picture's tokens into one vector: "pooled" is the mean of the patch tokens, "whole" concatenates all
tokens, "class" is the class token, "perceptor" concatenates the Resampler's queries, which the UNet attends to."""


class Previewing(Protocol):
    """A denoiser's interface to a recorder; InstantIRDenoiser implements it."""

    preview: Tensor | None
    renewed: bool

    @property
    def factor(self) -> Tensor: ...

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor: ...


class Recorder:
    """A types.Denoiser that records the previews, clean latents and factors of an inner denoiser in each step.

    Args:
        denoiser: the inner denoiser; with guidance, only the previews of its positive half are recorded.

    Attributes:
        previews, denoised: latents [B, C, h, w] of each step so far; the preview is zero before the first one.
        renewed: whether the Previewer ran in the step; False for repeated previews and for LQ latents as the reference.
        factors: the adaptive factor after each step [B].
    """

    def __init__(self, denoiser: Previewing) -> None:
        self.denoiser = denoiser
        self.previews: list[Tensor] = []
        self.denoised: list[Tensor] = []
        self.renewed: list[bool] = []
        self.factors: list[Tensor] = []

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        clean = self.denoiser(latents, sigma)
        preview = self.denoiser.preview
        self.renewed.append(self.denoiser.renewed)
        self.previews.append(torch.zeros_like(clean) if preview is None else preview[-len(latents) :].clone())
        self.denoised.append(clean)
        self.factors.append(self.denoiser.factor.clone())
        return clean


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A recorded run of n steps over B pictures.

    Attributes:
        timesteps: int64 [n], descending.
        previews, denoised: [n, B, C, h, w].
        renewed: bool [n]; False where the Previewer did not run in the step.
        factors: adaptive factors after each step [n, B].
        latents: the result [B, C, h, w].
    """

    timesteps: Tensor
    previews: Tensor
    denoised: Tensor
    renewed: Tensor
    factors: Tensor
    latents: Tensor


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Fig. 4's curves of one run, float64 [n, B] each; NaN where the Previewer did not run in a step of the distance.

    Attributes:
        to_denoised: (a) distance between preview and denoising mean.
        change: (b) distance between this step's preview and the one before; NaN at the first step.
        delta: (c) Eq. 7, (to_denoised / change)^2.
    """

    to_denoised: Tensor
    change: Tensor
    delta: Tensor


def rms(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square of a - b over C, h and w: [n, B, C, h, w] -> [n, B], or [B, C, h, w] -> [B], in float64."""
    difference = (a - b).to(torch.float64)
    return difference.square().flatten(-3).mean(dim=-1).sqrt()


def distances(run: Trajectory) -> Distances:
    """The three curves of Fig. 4."""
    fresh = run.renewed[:, None]
    unknown = torch.full(run.previews.shape[:2], float("nan"), dtype=torch.float64, device=run.previews.device)
    to_denoised = torch.where(fresh, rms(run.previews, run.denoised), unknown)
    change = unknown.clone()
    both = fresh[1:] & fresh[:-1]
    change[1:] = torch.where(both, rms(run.previews[1:], run.previews[:-1]), unknown[1:])
    return Distances(to_denoised=to_denoised, change=change, delta=(to_denoised / change).square())


def errors(run: Trajectory, hq: Tensor) -> dict[str, Tensor]:
    """Distances of previews and denoising means from the HQ latents [B, C, h, w]: float64 [n, B] each.

    The preview's distance is NaN in steps where the Previewer did not run.
    """
    previews = rms(run.previews, hq[None].expand_as(run.previews))
    previews = torch.where(run.renewed[:, None], previews, torch.full_like(previews, float("nan")))
    return {"preview": previews, "denoised": rms(run.denoised, hq[None].expand_as(run.denoised))}


@torch.inference_mode()
def record(
    network: InstantIR,
    images: Tensor,
    options: Options,
    seeds: Sequence[int],
    prompts: Sequence[str] | None = None,
    negative_prompts: Sequence[str] | None = None,
    on_step: OnStep | None = None,
) -> Trajectory:
    """Restore a batch as InstantIRRestorer does, and record each step.

    Args:
        network: network with previewer and aggregator.
        images: LQ pictures [B, 3, H, W] in [-1, 1]; sides are multiples of the prior's `multiple_px`.
        options: options of a restoration at the picture's size, in one tile and without an HQ reference.
        seeds: one for each picture; the noise equals that of a request with this seed.
        prompts, negative_prompts: B each; None for empty ones.

    Raises:
        ValueError: a side is not such a multiple, a list has not B items, or a recorded run does not support an option.
    """
    prior, batch = network.prior, len(images)
    height, width = images.shape[-2:]
    if height % prior.multiple_px or width % prior.multiple_px:
        raise ValueError(f"sides must be multiples of {prior.multiple_px} px, got {height} x {width}")
    prompts, negative_prompts = list(prompts or [""] * batch), list(negative_prompts or [""] * batch)
    if not len(seeds) == len(prompts) == len(negative_prompts) == batch:
        raise ValueError(f"{batch} pictures need as many seeds and prompts")
    check_recordable(options)
    images = images.to(prior.device)
    shape = (prior.latent_channels, height // prior.factor, width // prior.factor)

    def noise(name: str) -> Tensor:
        rows = [generator(seed, name).standard_normal(shape, dtype=np.float32) for seed in seeds]
        return torch.from_numpy(np.stack(rows)).to(prior.device)

    lq = prior.encode(images, noise=noise("encode") if options.encoding == "sample" else None)
    positive = conditions_of(network, images, prompts, options.view)
    negative = network.unconditional(positive, negative_prompts) if options.loop.guided else None
    timesteps = prior.sampling.timesteps(prior.schedule, options.steps)
    sigmas = prior.sampling.sigmas(prior.schedule, timesteps, options.sampler == "ddpm").to(prior.device)

    start = noise("start")
    latents = (
        lq + sigmas[0] * start if options.start == "lq" else Schedule.exploding(start, sigmas[0].expand(len(start)))
    )
    fresh = lambda step: noise(f"{REFERENCE_NOISE} {step}")  # noqa: E731
    recorder = Recorder(InstantIRDenoiser(network, lq, positive, negative, options.steps, options.loop, noise=fresh))
    if options.sampler == "ddim":
        result = sample_ddim(recorder, latents, sigmas, on_step)
    else:
        result = sample_ddpm(recorder, latents, sigmas, lambda step: noise(f"step {step}"), on_step)
    return Trajectory(
        timesteps=timesteps,
        previews=torch.stack(recorder.previews),
        denoised=torch.stack(recorder.denoised),
        renewed=torch.tensor(recorder.renewed, device=lq.device),
        factors=torch.stack(recorder.factors),
        latents=Schedule.preserving(result, sigmas[-1].expand(batch)),
    )


def check_recordable(options: Options) -> None:
    """Raises ValueError that names the options which a recorded run does not support."""
    unsupported = [
        f"{name}={getattr(options, name)}"
        for name, default in UNSUPPORTED_DEFAULTS.items()
        if getattr(options, name) != default
    ]
    unsupported += ["reference=hq"] if options.loop.reference == "hq" else []
    if unsupported:
        raise ValueError(
            f"a recorded run restores at the picture's size, without {', '.join(unsupported)}: use the default"
        )


def conditions_of(network: InstantIR, images: Tensor, prompts: Sequence[str], view: Fit | None = None) -> Conditions:
    """The UNet's conditions for pictures [B, 3, H, W] in [-1, 1] and prompts; see view_pixels for `view`."""
    text, pooled = network.prior.embed_prompts(prompts)
    height, width = images.shape[-2:]
    sizes = torch.tensor([[height, width, 0, 0, height, width]]).expand(len(images), -1)
    return Conditions(
        text=text,
        pooled=pooled,
        time_ids=network.prior.time_ids(sizes),
        image_tokens=_tokens(network, images, view),
    )


def _tokens(network: InstantIR, images: Tensor, view: Fit | None) -> Tensor:
    """Tokens [B, N, D] of the training's view (`view` is None), or [B, V, N, D] of the restorer's V views."""
    if view is None:
        return network.prior.embed_images(images)
    views = torch.stack([view_pixels(picture, network.prior.view, view) for picture in tensor_to_images(images)])
    encoder = network.prior.image_encoder
    pixels = views.flatten(0, 1).to(network.prior.device, next(encoder.parameters()).dtype)
    tokens: Tensor = encoder(pixel_values=pixels).last_hidden_state
    return tokens.unflatten(0, views.shape[:2])


@contextmanager
def time_blind(network: InstantIR, timestep: int) -> Iterator[None]:
    """Inside the context the perceptor gets the fixed `timestep`, whatever the true time step is.

    It replaces the time term in the embedding of the perceptor's processors, and keeps the text and size terms. The
    UNet's residual blocks and the Aggregator get the true time step. This is an ablation at inference: a network
    trained without the time input could do better.

    Args:
        timestep: 0 .. T - 1.

    Raises:
        ValueError: `timestep` is outside the schedule.
    """
    unet = network.unet
    if not 0 <= timestep < network.prior.schedule.num_train_timesteps:
        last = network.prior.schedule.num_train_timesteps - 1
        raise ValueError(f"timestep must be between 0 and {last}, got {timestep}")

    def term(latents: Tensor, timesteps: Tensor) -> Tensor:
        return unet.time_embedding(unet.get_time_embed(sample=latents, timestep=timesteps))

    def exchange(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        latents, timesteps = args[0], args[1]
        attention_kwargs = dict(kwargs["cross_attention_kwargs"])
        replacement = torch.full_like(timesteps, timestep)
        attention_kwargs["temb"] = attention_kwargs["temb"] - term(latents, timesteps) + term(latents, replacement)
        return args, {**kwargs, "cross_attention_kwargs": attention_kwargs}

    handle = unet.register_forward_pre_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# -- tokens ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def token_vectors(network: InstantIR, images: Tensor, views: Sequence[str] = TOKEN_VIEWS) -> dict[str, Tensor]:
    """Unit vectors [B, D] of pictures [B, 3, H, W] in [-1, 1], by view of TOKEN_VIEWS.

    Raises:
        ValueError: a view is unknown.
    """
    unknown = [name for name in views if name not in TOKEN_VIEWS]
    if unknown:
        raise ValueError(f"unknown token view {unknown[0]!r}; there are {', '.join(TOKEN_VIEWS)}")
    tokens = network.prior.embed_images(images.to(network.prior.device))
    vectors: dict[str, Tensor] = {}
    for name in views:
        if name == "pooled":
            vector = tokens[:, 1:].mean(dim=1)
        elif name == "class":
            vector = tokens[:, 0]
        elif name == "whole":
            vector = tokens.flatten(1)
        else:
            vector = _resampler_queries(network, tokens).flatten(1)
        vectors[name] = F.normalize(vector.to(torch.float64), dim=-1)
    return vectors


def _resampler_queries(network: InstantIR, tokens: Tensor) -> Tensor:
    """The Resampler's queries [B, Q, D] with the LoRA off."""
    if not network.has_previewer:
        return network.perceptor.image_proj(tokens)
    with previewer_enabled(network.unet, False):
        return network.perceptor.image_proj(tokens)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Retrieval of n query pictures in a gallery; each query has one matching picture.

    Attributes:
        rank: int64 [n], rank of the match; 1 is a hit. Ties count against the query.
        similarity: cosine between query and match, [n].
        margin: similarity minus the largest cosine with another picture; positive is a hit. NaN in a gallery of one.
    """

    rank: Tensor
    similarity: Tensor
    margin: Tensor


def retrieve(queries: Tensor, gallery: Tensor, own: Tensor) -> Retrieval:
    """Cosine retrieval.

    Args:
        queries, gallery: unit vectors [n, D] and [m, D].
        own: int64 [n], the gallery row that matches each query.

    Raises:
        ValueError: shapes do not fit, or a row of `own` is outside the gallery.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1] or own.shape != queries.shape[:1]:
        shapes = f"{tuple(queries.shape)}, {tuple(gallery.shape)} and {tuple(own.shape)}"
        raise ValueError(f"queries [n, D], gallery [m, D] and own [n] do not fit: {shapes}")
    if len(own) and not bool(((own >= 0) & (own < len(gallery))).all()):
        raise ValueError(f"own rows must lie in 0..{len(gallery) - 1}, got {own.tolist()}")
    cosines = queries @ gallery.T
    mine = cosines.gather(1, own[:, None]).squeeze(1)
    others = cosines.scatter(1, own[:, None], float("-inf"))
    best = others.max(dim=1).values if len(gallery) > 1 else torch.full_like(mine, float("nan"))
    return Retrieval(rank=1 + (others >= mine[:, None]).sum(dim=1), similarity=mine, margin=mine - best)
