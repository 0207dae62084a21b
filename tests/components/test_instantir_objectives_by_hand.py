"""InstantIR's three losses, written out from plain network calls: `phases` must have the same values and gradients.

The formulas are those of the paper (Eqs. 1, 5, 6) and of instantir.md section 7, with numpy's float64 noise schedule,
and one sample at a time where a sample may lose a condition. All weights are random, and `test_every_operand_matters`
shows that each input of a loss changes it. tests/mutation/named.py lists wrong versions that these tests refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import Tensor, nn

from components.priors.nano import build_prior, build_tokenizer_json
from components.priors.sdxl import Prior
from components.randomness import Noise, generator
from components.systems.instantir.network import Conditions, InstantIR, predict_noise
from components.systems.instantir.objectives import AggregatorObjective, PerceptorObjective, PreviewerObjective
from components.systems.instantir.previewer import previewer_enabled, previewer_of
from components.types import Batch

tiny = load_helper("components/test_instantir.py")
ROWS = 8
DROPOUT = {"image_dropout": 0.25, "text_dropout": 0.25, "both_dropout": 0.25}
STEPS = 1000
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2  # SDXL's scaled-linear schedule
ALPHAS = torch.from_numpy(np.cumprod(1 - BETAS))
SHAPE = (4, 4, 4)


@torch.no_grad()
def awake(module: nn.Module, name: str) -> None:
    """Add noise to every weight, so that no condition is without effect and no layer starts at zero."""
    for key, parameter in module.named_parameters():
        values = generator(11, name, key).standard_normal(tuple(parameter.shape), dtype=np.float32)
        parameter.add_(0.25 * torch.from_numpy(values))


def build_prior_awake() -> Prior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = build_prior(tiny.TINY, build_tokenizer_json(["red", "blue", "sky"], tiny.TINY["text_length"]))
    for name, module in prior.modules.items():
        awake(module, name)
    return prior


def build(previewer: bool) -> InstantIR:
    prior = build_prior_awake()
    network = InstantIR(prior, tiny.RESAMPLER, tiny.LORA if previewer else None, aggregator=previewer)
    awake(network.perceptor, "perceptor")
    if network.aggregator is not None:
        awake(previewer_of(network.unet), "previewer")
        awake(network.aggregator, "aggregator")
    return network


@pytest.fixture(scope="module")
def bare() -> InstantIR:
    """Stage 1's network: without previewer and aggregator."""
    return build(previewer=False)


@pytest.fixture(scope="module")
def whole() -> InstantIR:
    """A network with all parts."""
    return build(previewer=True)


def rows(first: int = 0) -> Batch:
    """Eight samples with different pictures, prompts and sizes."""
    plain = tiny.batch(ROWS, first)
    prompts = ["red sky", "blue", "sky", "red", "blue sky", "red red", "sky blue", "blue blue"]
    sizes = [[16 + i, 24 - i, i, 2 * i, 16, 16] for i in range(ROWS)]
    lq = 0.5 * plain.lq + 0.5 * tiny.tensor(ROWS, 3, 16, 16, name="lq").clamp(-1, 1)
    return replace(plain, prompts=prompts, sizes=torch.tensor(sizes), lq=lq)


# ------------------------------------------------------------------------------------------- the formulas' operands


def shares(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """(signal, noise) of the latents at time steps [B]: sqrt(a) and sqrt(1 - a), [B, 1, 1, 1]."""
    alpha = ALPHAS[timesteps].view(-1, 1, 1, 1)
    return alpha.sqrt().float(), (1 - alpha).sqrt().float()


def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    signal, level = shares(timesteps)
    return signal * clean + level * noise


def clean_from(noisy: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
    signal, level = shares(timesteps)
    return (noisy - level * eps) / signal


@dataclass(frozen=True)
class Inputs:
    """The prompt that a network sees for each sample, and whether it sees the sample's LQ picture."""

    prompts: Sequence[str]
    pictures: Sequence[bool]

    def textless(self) -> Inputs:
        return Inputs([""] * len(self.prompts), self.pictures)

    def neither(self) -> Inputs:
        return Inputs([""] * len(self.prompts), [False] * len(self.prompts))


def after_dropout(batch: Batch, draws: Sequence[float], image: float, text: float, both: float) -> Inputs:
    """One draw in [0, 1) decides: first the picture's share, then the text's, then that of both."""
    prompts, pictures = list(batch.prompts), [True] * len(batch)
    for i, draw in enumerate(draws):
        if draw < image:
            pictures[i] = False
        elif draw < image + text:
            prompts[i] = ""
        elif draw < image + text + both:
            prompts[i], pictures[i] = "", False
    return Inputs(prompts, pictures)


def clean_of(network: InstantIR, batch: Batch) -> Tensor:
    """Latents of the HQ pictures; a row with precomputed latents has those."""
    encoded = network.prior.encode(batch.hq)
    if batch.latents is None:
        return encoded
    return torch.stack([encoded[i] if i in batch.latents_missing else batch.latents[i] for i in range(len(batch))])


@torch.no_grad()
def conditions(network: InstantIR, batch: Batch, kept: Inputs) -> Conditions:
    prior = network.prior
    text, pooled = prior.embed_prompts(kept.prompts)
    if batch.embeddings:
        old = [prompt != "" and i not in batch.embeddings_missing for i, prompt in enumerate(kept.prompts)]
        text = torch.stack([batch.embeddings["text"][i] if o else text[i] for i, o in enumerate(old)])
        pooled = torch.stack([batch.embeddings["pooled"][i] if o else pooled[i] for i, o in enumerate(old)])
    tokens = prior.embed_images(batch.lq)
    null = prior.image_encoder(pixel_values=torch.zeros(1, 3, 16, 16)).last_hidden_state[0]
    return Conditions(
        text=text,
        pooled=pooled,
        time_ids=batch.sizes.float(),
        image_tokens=torch.stack([own if sees else null for own, sees in zip(tokens, kept.pictures, strict=True)]),
    )


def predict(network: InstantIR, batch: Batch, kept: Inputs, latents: Tensor, timesteps: Tensor, lora: bool) -> Tensor:
    inputs = conditions(network, batch, kept)
    with previewer_enabled(network.unet, lora):
        return predict_noise(network.unet, latents, timesteps, inputs)


def preview(network: InstantIR, batch: Batch, kept: Inputs, latents: Tensor, timesteps: Tensor) -> Tensor:
    """c_out x0 + c_skip x_t with s = 10 t, c_skip = 0.25 / (s^2 + 0.25), c_out = s / sqrt(s^2 + 0.25); LoRA on."""
    eps = predict(network, batch, kept, latents, timesteps, lora=True)
    s = 10.0 * timesteps.double().view(-1, 1, 1, 1)
    skip, out = 0.25 / (s**2 + 0.25), s / (s**2 + 0.25).sqrt()
    return out.float() * clean_from(latents, eps, timesteps) + skip.float() * latents


def time_weights(maximum: float, importance: float) -> Tensor:
    """Product of min(1 / a, maximum) and 1 - importance cos(pi t / T), divided by its mean: float64 [T]."""
    weights = (1 / ALPHAS).clamp(max=maximum) * (
        1 - importance * torch.cos(torch.pi * torch.arange(STEPS, dtype=torch.float64) / STEPS)
    )
    return weights / weights.mean()


def epsilon_error(prediction: Tensor, eps: Tensor, timesteps: Tensor, weights: Tensor) -> Tensor:
    """Eq. 1, weighted by the time step."""
    each = torch.stack([(p - e).pow(2).mean() for p, e in zip(prediction, eps, strict=True)])
    return (weights[timesteps].float() * each).mean()


# --------------------------------------------------------------------------------------------------- the three losses


def perceptor_loss(
    network: InstantIR,
    batch: Batch,
    noise: Noise,
    *,
    image_dropout: float = 0.05,
    text_dropout: float = 0.05,
    both_dropout: float = 0.05,
    max_clean_weight: float = 1.0,
    noise_offset: float = 0.0,
    timestep_importance: float = 0.0,
) -> Tensor:
    """Stage 1: the frozen UNet with the perceptor predicts the noise of the HQ latents; it sees LQ and prompt."""
    kept = after_dropout(batch, noise.uniform("conditions").tolist(), image_dropout, text_dropout, both_dropout)
    t, eps = noise.integers("timestep", 0, STEPS), noise.normal("noise", SHAPE)
    eps = eps + noise_offset * noise.normal("noise_offset", (4, 1, 1))
    noisy = add_noise(clean_of(network, batch), eps, t)
    prediction = predict_noise(network.unet, noisy, t, conditions(network, batch, kept))
    return epsilon_error(prediction, eps, t, time_weights(max_clean_weight, timestep_importance))


def previewer_loss(
    network: InstantIR,
    batch: Batch,
    noise: Noise,
    *,
    num_ddim_timesteps: int = 50,
    huber_c: float | None = 0.001,
    guidance_range: tuple[float, float] | None = (3.0, 15.0),
    image_dropout: float = 0.0,
    text_dropout: float = 0.0,
    both_dropout: float = 0.0,
) -> Tensor:
    """Eq. 5: || Psi(z_s, s, c_lq) - Psi(z_t, t, c_lq) ||, where one DDIM step of the guided teacher leads to z_t."""
    kept = after_dropout(batch, noise.uniform("conditions").tolist(), image_dropout, text_dropout, both_dropout)
    stride = STEPS // num_ddim_timesteps
    start = (noise.integers("index", 0, num_ddim_timesteps) + 1) * stride - 1
    end = torch.tensor([max(int(s) - stride, 0) for s in start])
    noisy = add_noise(clean_of(network, batch), noise.normal("noise", SHAPE), start)
    with torch.no_grad():
        eps = predict(network, batch, kept, noisy, start, lora=False)
        clean = clean_from(noisy, eps, start)
        if guidance_range is not None:
            w = noise.uniform("guidance", *guidance_range).view(-1, 1, 1, 1)
            eps_empty = predict(network, batch, kept.neither(), noisy, start, lora=False)
            clean = clean + w * (clean - clean_from(noisy, eps_empty, start))
            eps = eps + w * (eps - eps_empty)
        target = preview(network, batch, kept.textless(), add_noise(clean, eps, end), end)
    student = preview(network, batch, kept.textless(), noisy, start)
    difference = student - target
    distances = difference**2 if huber_c is None else (difference**2 + huber_c**2).sqrt() - huber_c
    return torch.stack([d.mean() for d in distances]).mean()


def aggregator_loss(
    network: InstantIR,
    batch: Batch,
    noise: Noise,
    *,
    image_dropout: float = 0.0,
    text_dropout: float = 0.85,
    both_dropout: float = 0.15,
    max_clean_weight: float = 1.0,
    noise_offset: float = 0.0,
    timestep_importance: float = 0.0,
    reference: str = "preview",
    reference_noise: bool = False,
    preview_cfg_scale: float = 1.0,
) -> Tensor:
    """Stage 2: Eq. 1 with the residuals of the Aggregator, which sees LQ latents and the preview (Eq. 6)."""
    kept = after_dropout(batch, noise.uniform("conditions").tolist(), image_dropout, text_dropout, both_dropout)
    t, eps = noise.integers("timestep", 0, STEPS), noise.normal("noise", SHAPE)
    eps = eps + noise_offset * noise.normal("noise_offset", (4, 1, 1))
    noisy = add_noise(clean_of(network, batch), eps, t)
    lq = network.prior.encode(batch.lq)
    with torch.no_grad():
        second = lq if reference == "lq" else preview(network, batch, kept, noisy, t)
        if preview_cfg_scale > 1:
            empty = preview(network, batch, kept.neither(), noisy, t)
            second = empty + noise.uniform("guidance", 1.0, preview_cfg_scale).view(-1, 1, 1, 1) * (second - empty)
        if reference_noise:
            second = add_noise(second, noise.normal("reference", SHAPE), t)
    inputs = conditions(network, batch, kept)
    assert network.aggregator is not None
    residuals = network.aggregator(lq, t, second, inputs.pooled, inputs.time_ids)
    with previewer_enabled(network.unet, False):
        prediction = predict_noise(network.unet, noisy, t, inputs, residuals)
    return epsilon_error(prediction, eps, t, time_weights(max_clean_weight, timestep_importance))


# ---------------------------------------------------------------------------------------------------- the comparison


def gradients(objective: Any, value: Tensor) -> dict[str, Tensor]:
    (module,) = objective.trainables.values()
    named = dict(module.named_parameters())
    values = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(named[name]) if v is None else v for name, v in zip(named, values, strict=True)}


def check(objective: Any, by_hand: Any, batch: Batch, seed: int, settings: dict[str, Any]) -> None:
    """Values within 1e-5 and the gradient of each weight within 1e-3 of its norm (float32 rounding)."""
    ((name, loss),) = objective.phases(batch, Noise(seed, batch.positions))
    assert [name] == list(objective.trainables)
    expected = by_hand(objective.network, batch, Noise(seed, batch.positions), **settings)
    assert float(loss.value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(loss.metrics["loss"]) == float(loss.value.detach())
    ours, theirs = gradients(objective, loss.value), gradients(objective, expected)
    largest = max(float(g.norm()) for g in theirs.values())
    assert largest > 0
    for key, gradient in theirs.items():
        error = float((ours[key] - gradient).norm())
        assert error <= 1e-3 * float(gradient.norm()) + 1e-5 * largest, (key, error, float(gradient.norm()))


@cache
def seed_of_all_kinds(image: float, text: float, both: float, points: int) -> int:
    """The first seed whose draws drop picture, text, both and neither, where a share is above 0, and the index 0."""
    batch = rows()
    kinds = {(True, False)} if image else set()
    kinds |= {(False, True)} if text else set()
    kinds |= {(False, False)} if both else set()
    kinds |= {(True, True)} if image + text + both < 0.999 else set()
    for seed in range(1000):
        noise = Noise(seed, batch.positions)
        kept = after_dropout(batch, noise.uniform("conditions").tolist(), image, text, both)
        kinds_here = {(prompt != "", sees) for prompt, sees in zip(kept.prompts, kept.pictures, strict=True)}
        if kinds_here == kinds and int(noise.integers("index", 0, points).min()) == 0:
            return seed
    raise AssertionError("no seed draws every kind")


def seed_for(settings: dict[str, Any]) -> int:
    shares = [settings.get(f"{name}_dropout", 0.0) for name in ("image", "text", "both")]
    return seed_of_all_kinds(*shares, settings.get("num_ddim_timesteps", 50))


WEIGHTS = {"max_clean_weight": 4.0, "noise_offset": 0.4, "timestep_importance": 0.5}
RELEASED = {"image_dropout": 0.0, "text_dropout": 0.85, "both_dropout": 0.15}
PERCEPTOR: dict[str, dict[str, Any]] = {"plain": DROPOUT, "weights": {**DROPOUT, **WEIGHTS}}
PREVIEWER: dict[str, dict[str, Any]] = {
    "released": DROPOUT,
    "paper": {"huber_c": None, "guidance_range": None, "num_ddim_timesteps": 10, **DROPOUT},
    "guided squares": {"huber_c": None, "guidance_range": (1.0, 4.0)},
}
AGGREGATOR: dict[str, dict[str, Any]] = {
    "released": RELEASED,
    "guided previews": {**DROPOUT, **WEIGHTS, "preview_cfg_scale": 5.0},
    "noisy previews": {**DROPOUT, "reference_noise": True},
    "LQ alone": {"image_dropout": 0.3, "text_dropout": 0.3, "both_dropout": 0.0, "reference": "lq"},
}


@pytest.mark.parametrize("settings", PERCEPTOR.values(), ids=PERCEPTOR)
def test_the_perceptors_loss_is_the_formula(settings: dict[str, Any], bare: InstantIR) -> None:
    check(PerceptorObjective(bare, **settings), perceptor_loss, rows(), seed_for(settings), settings)


@pytest.mark.parametrize("settings", PREVIEWER.values(), ids=PREVIEWER)
def test_the_previewers_loss_is_the_formula(settings: dict[str, Any], whole: InstantIR) -> None:
    check(PreviewerObjective(whole, **settings), previewer_loss, rows(), seed_for(settings), settings)


@pytest.mark.parametrize("settings", AGGREGATOR.values(), ids=AGGREGATOR)
def test_the_aggregators_loss_is_the_formula(settings: dict[str, Any], whole: InstantIR) -> None:
    check(AggregatorObjective(whole, **settings), aggregator_loss, rows(), seed_for(settings), settings)


CASES = {
    "perceptor": (PerceptorObjective, perceptor_loss, DROPOUT),
    "previewer": (PreviewerObjective, previewer_loss, DROPOUT),
    "aggregator": (AggregatorObjective, aggregator_loss, DROPOUT),
}


@pytest.mark.parametrize("stage", CASES)
def test_precomputed_latents_and_embeddings_enter_the_loss(stage: str, bare: InstantIR, whole: InstantIR) -> None:
    """They differ from the encoders' values here, and two rows of each are missing."""
    kind, by_hand, settings = CASES[stage]
    network, batch = bare if stage == "perceptor" else whole, rows()
    text, pooled = network.prior.embed_prompts(["sky"])
    precomputed = replace(
        batch,
        latents=0.5 * tiny.tensor(ROWS, *SHAPE, name="latents"),
        latents_missing=(1, 6),
        embeddings={
            "text": text + tiny.tensor(ROWS, *text.shape[1:], name="text"),
            "pooled": pooled + tiny.tensor(ROWS, *pooled.shape[1:], name="pooled"),
        },
        embeddings_missing=(0, 5),
    )
    check(kind(network, **settings), by_hand, precomputed, seed_for(settings), settings)


def test_the_teachers_scale_may_start_at_zero(whole: InstantIR) -> None:
    """At 0 the teacher's step is without the picture and the text."""
    assert PreviewerObjective(whole, guidance_range=(0.0, 4.0)).guidance_range == (0.0, 4.0)


def test_the_previewers_error_is_its_distance_from_the_hq_latents(whole: InstantIR) -> None:
    """The metric preview_error, which distillation lowers and a collapse raises."""
    batch, noise = rows(), Noise(3, rows().positions)
    ((_, loss),) = PreviewerObjective(whole).phases(batch, Noise(3, batch.positions))
    start = (noise.integers("index", 0, 50) + 1) * 20 - 1
    clean = whole.prior.encode(batch.hq)
    with torch.no_grad():
        noisy = add_noise(clean, noise.normal("noise", SHAPE), start)
        student = preview(whole, batch, Inputs([""] * ROWS, [True] * ROWS), noisy, start)
    assert float(loss.metrics["preview_error"]) == pytest.approx(float((student - clean).pow(2).mean()), rel=1e-5)


def test_the_plain_loss_has_no_weights(bare: InstantIR) -> None:
    settings = {**DROPOUT, **WEIGHTS}
    ((_, loss),) = PerceptorObjective(bare, **settings).phases(rows(), Noise(10, rows().positions))
    unweighted = perceptor_loss(bare, rows(), Noise(10, rows().positions), **DROPOUT, noise_offset=0.4)
    assert float(loss.metrics["plain_loss"]) == pytest.approx(float(unweighted.detach()), rel=1e-5)


@pytest.mark.parametrize("stage", CASES)
@torch.no_grad()
def test_every_operand_matters(stage: str, bare: InstantIR, whole: InstantIR) -> None:
    """Another picture, prompt or size in one row changes a loss by far more than the comparisons above allow."""
    _, by_hand, settings = CASES[stage]
    network, batch, seed = bare if stage == "perceptor" else whole, rows(), seed_for(CASES[stage][2])
    row = next(  # of a sample that keeps its picture and its prompt
        i for i, u in enumerate(Noise(seed, batch.positions).uniform("conditions").tolist()) if u >= 0.75
    )

    def loss(other: Batch) -> float:
        return float(by_hand(network, other, Noise(seed, other.positions), **settings))

    def with_row(values: Tensor, value: Tensor) -> Tensor:
        return values.index_copy(0, torch.tensor([row]), value[None].to(values.dtype))

    plain = loss(batch)
    others = [
        replace(batch, hq=with_row(batch.hq, -batch.hq[row])),
        replace(batch, lq=with_row(batch.lq, -batch.lq[row])),
        replace(batch, sizes=with_row(batch.sizes, batch.sizes[row] + 5)),
        replace(batch, prompts=["sky red blue" if i == row else p for i, p in enumerate(batch.prompts)]),
    ]
    for other in others:
        assert abs(loss(other) - plain) > 1e-4 * plain
