"""InstaRevive's objective: gradients by formula, both phases, dynamic control, ablations, LoRA, and training."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helper_modules import load_helper
from torch import Tensor, nn

from components.objectives import score_distillation as module
from components.objectives.diffusion import epsilon_loss
from components.objectives.distillation import Distillation
from components.objectives.regression import pyramid_distance
from components.objectives.score_matching import (
    draw_timesteps,
    largest_timesteps,
    score_gap,
    squared_distances,
)
from components.priors.nano import build_prior, build_tokenizer_json
from components.priors.opening import load_prior
from components.priors.sdxl import Prior
from components.randomness import Noise, generator
from components.recipes import Optimizer
from components.samplers.schedules import FlowSchedule, Schedule
from components.systems.instarevive.network import EpsPredictor, OneStep, OneStepGenerator
from components.systems.instarevive.objective import InstaReviveObjective, PriorTexts
from components.systems.instarevive.scores import build_scores
from components.training import (
    Ema,
    averaged_trainables,
    build_optimizers,
    evaluate_loss,
    restore_state,
    train_step,
    training_state,
)
from components.types import Batch, Loss

tiny = load_helper("components/test_instantir.py")
FLOW = FlowSchedule()


@torch.no_grad()
def awake(network: nn.Module, name: str) -> nn.Module:
    """Add noise to every parameter, so that real, fake and generator differ and no parameter stays zero."""
    for key, parameter in network.named_parameters():
        values = generator(7, name, key).standard_normal(tuple(parameter.shape), dtype=np.float32)
        parameter.add_(0.1 * torch.from_numpy(values))
    return network


@pytest.fixture(scope="module")
def prior() -> Prior:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny_prior = build_prior(tiny.TINY, build_tokenizer_json(["red", "blue", "sky"], tiny.TINY["text_length"]))
    awake(tiny_prior.autoencoder, "autoencoder")
    return tiny_prior.freeze()


def make(
    prior: Prior, settings: Distillation | None = None, mode: str = "lq", same: bool = False, **arguments: Any
) -> InstaReviveObjective:
    """Three different networks on the prior; with `same` the fake score starts as the real one."""
    settings = settings or Distillation()
    networks = {}
    for role in ("generator", "real", "fake"):
        network = copy.deepcopy(prior.unet)
        networks[role] = EpsPredictor(awake(network, "real" if same else role), prior.schedule)
    generator_ = OneStepGenerator(networks["generator"], OneStep(input=mode)).requires_grad_(True)  # type: ignore[arg-type]
    real, fake = build_scores(networks["real"], settings.fake, rank=2)
    if settings.fake == "full" and not same:
        fake = networks["fake"].requires_grad_(True)
    texts = PriorTexts(prior)
    return InstaReviveObjective(generator_, real, fake if settings.score else None, prior, texts, settings, **arguments)


def run(objective: InstaReviveObjective, rows: Batch, seed: int = 0) -> dict[str, Loss]:
    return dict(objective.phases(rows, Noise(seed, rows.positions)))


# ------------------------------------------------------------------------------------------------- the score's gradient


class FixedGenerator(nn.Module):
    """A generator whose latents are its parameter."""

    takes_noise = False

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = nn.Parameter(latents)

    def forward(self, lq: Tensor, conditions: Any, noise: Tensor | None = None) -> Tensor:
        return self.latents


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_the_generators_gradient_is_the_formula(prior: Prior, cfg_scale: float) -> None:
    """Section 5.2 with separate calls of the scores: at alpha 0 the gradient is (2 / N) weight coeff."""
    settings = Distillation(dynamic=False, fixed_alpha=0.0, cfg_scale=cfg_scale, weight=0.7, text_dropout=0.0)
    objective, rows = make(prior, settings), tiny.batch()
    latents = tiny.tensor(3, 4, 4, 4, name="held")
    fixed = FixedGenerator(latents)
    objective.generator = fixed
    phases = objective.phases(rows, Noise(0, rows.positions))
    name, loss = next(phases)
    loss.value.backward()
    noise = Noise(0, rows.positions)
    t = draw_timesteps(noise.uniform("score_timestep"), torch.tensor(999))
    noisy = prior.schedule.add_noise(latents, noise.normal("score_noise", (4, 4, 4)), t)
    conditions = objective.texts.conditions(rows, torch.zeros(3, dtype=torch.bool))
    empty_conditions = objective.texts.unconditional(rows)
    assert objective.fake is not None
    with torch.no_grad():
        real, empty = (objective.real.predict_eps(noisy, t, c) for c in (conditions, empty_conditions))
        fake = objective.fake.predict_eps(noisy, t, conditions)
    gap = score_gap(prior.schedule, latents, noisy, t, empty + cfg_scale * (real - empty), fake)
    expected = 0.7 * 2 / latents.numel() * gap.weight * gap.coeff
    assert name == "generator" and fixed.latents.grad is not None and float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(fixed.latents.grad, expected, atol=1e-7, rtol=1e-4)
    assert all(p.grad is None for p in objective.fake.parameters())


def test_the_loss_is_the_mixture_and_its_terms_are_logged(prior: Prior) -> None:
    settings = Distillation(regression="both", l2_weight=2.0, perceptual_weight=0.5, weight=3.0)
    objective, rows = make(prior, settings), tiny.batch()
    losses = run(objective, rows)
    metrics = {k: float(v) for k, v in losses["generator"].metrics.items()}
    alpha, regression, matching = (metrics[k] for k in ("alpha", "loss_regression", "loss_dsm"))
    assert 0 < alpha < 1
    assert float(losses["generator"].value.detach()) == pytest.approx(
        alpha * regression + (1 - alpha) * 3.0 * matching, rel=1e-5
    )
    with torch.no_grad():
        dropped = Noise(0, rows.positions).uniform("text_dropout") < settings.text_dropout
        latents = objective.generator(prior.encode(rows.lq), objective.texts.conditions(rows, dropped))
    target = prior.encode(rows.hq)
    distance = (latents - target).square().mean().sqrt()
    assert metrics["distance"] == pytest.approx(float(distance), rel=1e-5)
    assert metrics["t_max"] == int(largest_timesteps(prior.schedule, 1.5 * distance, 20))
    assert alpha == pytest.approx(metrics["t_max"] / 1000)
    perceptual = 0.5 * pyramid_distance(prior.decode(latents), rows.hq).mean()
    l2 = 2.0 * (latents - target).square().mean()
    assert metrics["loss_perceptual"] == pytest.approx(float(perceptual), rel=1e-5)
    assert metrics["loss_l2"] == pytest.approx(float(l2), rel=1e-5)
    assert regression == pytest.approx(metrics["loss_perceptual"] + metrics["loss_l2"], rel=1e-5)


def test_the_fake_score_learns_the_noise_on_the_same_detached_latents(prior: Prior) -> None:
    settings = Distillation(text_dropout=0.0)
    objective, rows = make(prior, settings), tiny.batch()
    phases = objective.phases(rows, Noise(0, rows.positions))
    next(phases)
    conditions = objective.texts.conditions(rows, torch.zeros(3, dtype=torch.bool))
    with torch.no_grad():
        latents = objective.generator(prior.encode(rows.lq), conditions)
        for parameter in objective.generator.parameters():
            parameter.add_(0.5)  # the generator's step between the phases has no effect
    name, loss = next(phases)
    noise = Noise(0, rows.positions)
    t, eps = noise.integers("fake_timestep", 1, 1000), noise.normal("fake_noise", (4, 4, 4))
    assert objective.fake is not None
    expected = epsilon_loss(
        objective.fake.predict_eps(prior.schedule.add_noise(latents, eps, t), t, conditions), eps
    ).mean()
    assert name == "fake_score"
    torch.testing.assert_close(loss.value, expected)
    loss.value.backward()
    assert all(p.grad is None for p in objective.generator.parameters())
    assert all(p.grad is not None for n, p in objective.fake.named_parameters() if "time_emb" in n)
    with pytest.raises(StopIteration):
        next(phases)


def test_further_steps_of_the_fake_score_have_their_own_noise(prior: Prior) -> None:
    objective, rows = make(prior, Distillation(fake_steps=3)), tiny.batch()
    phases = list(objective.phases(rows, Noise(0, rows.positions)))
    assert [name for name, _ in phases] == ["generator"] + ["fake_score"] * 3
    values = [float(loss.value.detach()) for _, loss in phases[1:]]
    assert len(set(values)) == 3
    optimizers = build_optimizers(objective, Optimizer())
    metrics = train_step(objective, [(rows, Noise(0, rows.positions))], optimizers, lr=1e-9, clip_norm=1.0)
    assert metrics["loss_fake"] == pytest.approx(sum(values) / 3, rel=1e-3)
    assert evaluate_loss(objective, [rows], 0)["fake_score"] == pytest.approx(values[0], rel=1e-3)


def test_same_range_keeps_the_fake_scores_times_below_t_max(prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, rows = make(prior, Distillation(fake_range="same")), tiny.batch(8)
    times = []
    assert objective.fake is not None
    predict = objective.fake.predict_eps
    monkeypatch.setattr(objective.fake, "predict_eps", lambda x, t, c: (times.append(t), predict(x, t, c))[1])
    losses = run(objective, rows)
    assert len(times) == 2 and all(int(t.max()) <= float(losses["generator"].metrics["t_max"]) for t in times)


# ----------------------------------------------------------------------------------------------------- dynamic control


def test_a_smaller_distance_gives_a_smaller_range_and_less_regression(prior: Prior) -> None:
    rows, metrics = tiny.batch(), []
    target = prior.encode(rows.hq)
    for error in (0.05, 0.2, 0.4):
        objective = make(prior)
        objective.generator = FixedGenerator(target + error * tiny.tensor(3, 4, 4, 4, name="error"))
        metrics.append(run(objective, rows)["generator"].metrics)
    for name in ("distance", "t_max", "alpha"):
        values = [float(m[name]) for m in metrics]
        assert values == sorted(values) and len(set(values)) == 3


def test_each_sample_may_have_its_own_range(prior: Prior) -> None:
    rows = tiny.batch()
    error = torch.tensor([0.02, 0.2, 0.5]).view(3, 1, 1, 1)
    latents = prior.encode(rows.hq) + error * tiny.tensor(3, 4, 4, 4, name="error")
    objective = make(prior, Distillation(per_sample=True))
    objective.generator = FixedGenerator(latents)
    (control,) = objective._controls([squared_distances(latents, prior.encode(rows.hq))], False)
    assert control.t_max.shape == (3,) and bool((control.t_max.diff() > 0).all())
    losses = run(objective, rows)
    assert float(losses["generator"].metrics["t_max"]) == pytest.approx(float(control.t_max.float().mean()))
    losses["generator"].value.backward()
    assert latents.grad is None and objective.generator.latents.grad is not None  # type: ignore[union-attr]


def test_the_literal_sum_saturates(prior: Prior) -> None:
    """instarevive.md section 5.4: why the mean is the default."""
    rows, values = tiny.batch(), []
    for reduction in ("mean", "sum"):
        objective = make(prior, Distillation(reduction=reduction))  # type: ignore[arg-type]
        objective.generator = FixedGenerator(prior.encode(rows.hq) + 0.1 * tiny.tensor(3, 4, 4, 4, name="error"))
        values.append(float(run(objective, rows)["generator"].metrics["t_max"]))
    assert values[0] < 300 and values[1] > 700  # 64 elements: the distance is eight times as large


def test_alpha_may_start_at_one_and_is_resumed(prior: Prior) -> None:
    """t_high 0: alpha is 1 at T_max of the first training step, which held-out losses do not set and a resume keeps."""
    rows = tiny.batch()
    objective = make(prior, Distillation(t_high=0.0))
    evaluate_loss(objective, [rows], 0)
    assert objective.progress == {}
    first = run(objective, rows)["generator"].metrics
    assert float(first["alpha"]) == pytest.approx(1.0) and objective.progress == {"t_start": float(first["t_max"])}
    half = prior.encode(rows.hq)
    nearer = replace_generator(objective, half + 0.02 * tiny.tensor(3, 4, 4, 4, name="error"))
    later = run(nearer, rows)["generator"].metrics
    assert float(later["alpha"]) == pytest.approx(float(later["t_max"]) / float(first["t_max"]), rel=1e-5)
    resumed = make(prior, Distillation(t_high=0.0))
    optimizers = build_optimizers(resumed, Optimizer())
    stream = io.BytesIO()
    torch.save(training_state(objective, build_optimizers(objective, Optimizer()), None, 3, 0), stream)
    stream.seek(0)
    assert restore_state(torch.load(stream, weights_only=True), resumed, optimizers, None) == 3
    assert resumed.progress == objective.progress


def replace_generator(objective: InstaReviveObjective, latents: Tensor) -> InstaReviveObjective:
    other = copy.copy(objective)
    other.generator = FixedGenerator(latents)
    return other


def test_workers_share_the_distance_while_training_only(prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out losses run on one worker, where a collective would never return."""
    calls = []

    def average(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(sorted(metrics))
        return {k: v * 4 for k, v in metrics.items()}  # as if other workers had larger distances

    objective, rows = make(prior), tiny.batch()
    alone = float(run(objective, rows)["generator"].metrics["distance"])
    monkeypatch.setattr(module, "average", average)
    evaluate_loss(objective, [rows], 0)
    assert calls == []
    together = float(run(objective, rows)["generator"].metrics["distance"])
    assert calls == [["value"]] and together == pytest.approx(2 * alone, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- ablations


def test_without_regression_the_loss_is_the_weighted_score_matching_alone(prior: Prior) -> None:
    objective = make(prior, Distillation(regression="none", weight=3.0))
    loss = run(objective, tiny.batch())["generator"]
    assert "loss_regression" not in loss.metrics and float(loss.metrics["alpha"]) == 0
    assert float(loss.value.detach()) == pytest.approx(3 * float(loss.metrics["loss_dsm"]), rel=1e-6)


def test_a_step_of_one_batch_runs_the_generator_once(prior: Prior, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, rows = make(prior), tiny.batch()
    calls, generate = [], objective._generate
    monkeypatch.setattr(objective, "_generate", lambda *inputs: calls.append(1) or generate(*inputs))
    (phases,) = objective.step_phases([(rows, Noise(0, rows.positions))])
    next(phases)
    assert len(calls) == 1


def test_without_score_there_is_one_phase_and_one_network(prior: Prior) -> None:
    objective, rows = make(prior, Distillation(score=False)), tiny.batch()
    losses = run(objective, rows)
    assert list(losses) == ["generator"] == list(objective.trainables)
    loss = losses["generator"]
    torch.testing.assert_close(loss.value.detach(), loss.metrics["loss_regression"])
    assert "loss_dsm" not in loss.metrics


def test_without_dynamic_control_the_range_is_whole_and_alpha_fixed(prior: Prior) -> None:
    metrics = run(make(prior, Distillation(dynamic=False, fixed_alpha=0.3)), tiny.batch())["generator"].metrics
    assert (float(metrics["t_max"]), float(metrics["alpha"])) == (999.0, pytest.approx(0.3))


def test_without_prompt_captions_do_not_matter(prior: Prior) -> None:
    rows = tiny.batch()
    other = replace(rows, prompts=["blue"] * 3)
    for prompt, equal in ((True, False), (False, True)):
        objective = make(prior, Distillation(prompt=prompt, text_dropout=0.0))
        values = [float(run(objective, r)["generator"].value.detach()) for r in (rows, other)]
        assert (values[0] == values[1]) == equal


def test_text_dropout_reaches_the_generator(prior: Prior) -> None:
    rows = tiny.batch()
    values = [
        float(run(make(prior, s), rows)["generator"].metrics["loss_regression"])
        for s in (Distillation(text_dropout=1.0), Distillation(prompt=False), Distillation(text_dropout=0.0))
    ]
    assert values[0] == values[1] != values[2]


# --------------------------------------------------------------------------------------------- inputs of the generator


def test_noise_reaches_a_generator_that_takes_it(prior: Prior) -> None:
    rows = tiny.batch()
    objective = make(prior, mode="noise")
    align = objective.generator.align
    assert isinstance(align, nn.Conv2d)
    with torch.no_grad():
        align.weight.add_(0.3)
    values = [float(run(objective, rows, seed)["generator"].metrics["distance"]) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_the_coarse_restorer_sees_unit_range(prior: Prior) -> None:
    rows, inputs = tiny.batch(), []

    def coarse(images: Tensor) -> Tensor:
        inputs.append(images)
        return (rows.hq + 1) / 2

    objective = make(prior, coarse=coarse)
    torch.testing.assert_close(objective.lq_latents(rows), prior.encode(rows.hq), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inputs[0], (rows.lq + 1) / 2)


def test_precomputed_embeddings_and_latents_are_used(prior: Prior) -> None:
    rows = tiny.batch()
    text, pooled = prior.embed_prompts(rows.prompts)
    precomputed = replace(rows, embeddings={"text": text, "pooled": pooled}, latents=prior.encode(rows.hq))
    plain, other = (run(make(prior), r)["generator"] for r in (rows, precomputed))
    torch.testing.assert_close(plain.value, other.value, atol=1e-6, rtol=1e-5)
    shifted = replace(precomputed, latents=precomputed.latents + 1)  # type: ignore[operator]
    assert float(run(make(prior), shifted)["generator"].metrics["distance"]) != float(other.metrics["distance"])


def test_a_checkpointed_decoder_has_the_same_gradient(prior: Prior) -> None:
    rows, gradients = tiny.batch(), []
    for checkpointed in (False, True):
        objective = make(prior, Distillation(score=False, checkpoint_decoder=checkpointed))
        run(objective, rows)["generator"].value.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.generator.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


# -------------------------------------------------------------------------------------------------------- LoRA


def test_a_lora_starts_as_the_real_score_and_leaves_it_alone(prior: Prior) -> None:
    settings, rows = Distillation(fake="lora", text_dropout=0.0), tiny.batch()
    objective = make(prior, settings, same=True)
    full = make(prior, replace(settings, fake="full"), same=True)
    assert objective.fake is not None and full.fake is not None
    for lora_loss, full_loss in zip(run(objective, rows).values(), run(full, rows).values(), strict=True):
        torch.testing.assert_close(lora_loss.value, full_loss.value, atol=1e-6, rtol=1e-5)
    counts = [sum(p.numel() for p in f.parameters() if p.requires_grad) for f in (objective.fake, full.fake)]
    assert 0 < counts[0] < counts[1] / 5
    noisy, t = tiny.tensor(3, 4, 4, 4), torch.tensor([10, 300, 900])
    conditions = objective.texts.unconditional(rows)
    before = objective.real.predict_eps(noisy, t, conditions)
    optimizers = build_optimizers(objective, Optimizer(lr=1e-2))
    for _ in range(3):
        train_step(objective, [(rows, Noise(0, rows.positions))], optimizers, lr=1e-2, clip_norm=10)
    assert torch.equal(objective.real.predict_eps(noisy, t, conditions), before)
    with torch.no_grad():
        assert float((objective.fake.predict_eps(noisy, t, conditions) - before).abs().max()) > 1e-3
    assert not before.requires_grad


def test_the_lora_is_on_in_a_repeated_forward_pass(prior: Prior) -> None:
    """Gradient checkpointing runs the network again in the backward pass, after a call of the real score."""
    rows, gradients = tiny.batch(), []
    for checkpointed in (False, True):
        objective = make(prior, Distillation(fake="lora", text_dropout=0.0), same=True)
        assert objective.fake is not None
        if checkpointed:
            objective.fake.network.train()
            objective.fake.network.enable_gradient_checkpointing()  # type: ignore[operator]
        with torch.no_grad():
            for name, parameter in objective.fake.named_parameters():
                if ".lora_B" in name:
                    parameter.add_(0.1)
        loss = run(objective, rows)["fake_score"].value
        objective.real.predict_eps(
            tiny.tensor(3, 4, 4, 4), torch.tensor([5, 6, 7]), objective.texts.unconditional(rows)
        )
        loss.backward()
        parameters = [p for p in objective.fake.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_wrong_scores_are_refused(prior: Prior) -> None:
    predictor = EpsPredictor(copy.deepcopy(prior.unet), prior.schedule)
    with pytest.raises(ValueError, match="full or lora"):
        build_scores(predictor, "half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing_like_it"):
        build_scores(predictor, "lora", targets=["nothing_like_it"])
    texts = PriorTexts(prior)
    with pytest.raises(ValueError, match="needs a fake score"):
        InstaReviveObjective(OneStepGenerator(predictor), predictor, None, prior, texts)
    with pytest.raises(ValueError, match="score=false takes none"):
        InstaReviveObjective(OneStepGenerator(predictor), predictor, predictor, prior, texts, Distillation(score=False))
    other = EpsPredictor(copy.deepcopy(prior.unet), replace(prior.schedule, beta_end=0.02))
    with pytest.raises(ValueError, match="different schedules"):
        InstaReviveObjective(OneStepGenerator(predictor), predictor, other, prior, texts)
    with pytest.raises(ValueError, match="load_lpips"):
        InstaReviveObjective(OneStepGenerator(predictor), predictor, predictor, prior, texts, Distillation(lpips="x"))


# ------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def nano() -> Prior:
    return load_prior("nano")


def toy(size: int, first: int, side: int = 32) -> Batch:
    """Pictures of two colours with an edge; LQ is blurred and noisy."""
    pictures = []
    for i in range(first, first + size):
        draw = generator(9, "toy", i)
        a, b, place = draw.uniform(-0.8, 0.8, 3), draw.uniform(-0.8, 0.8, 3), draw.uniform(0.2, 0.8)
        edge = torch.arange(side)[None, None] < place * side
        one, two = (torch.tensor(c, dtype=torch.float32).view(3, 1, 1) for c in (a, b))
        pictures.append(torch.where(edge, one, two).expand(3, side, side))
    hq = torch.stack(pictures)
    noise = torch.from_numpy(generator(9, "noise", first).standard_normal(tuple(hq.shape), dtype=np.float32))
    return Batch(
        keys=[f"toy {i}" for i in range(first, first + size)],
        positions=np.arange(first, first + size),
        hq=hq,
        lq=nn.functional.avg_pool2d(hq + 0.3 * noise, 5, 1, 2, count_include_pad=False),
        prompts=["red"] * size,
        sizes=torch.tensor([[side, side, 0, 0, side, side]]).expand(size, -1),
    )


class AsFlow(nn.Module):
    """A variance-preserving noise predictor as a velocity predictor: the flow has the same noise over signal."""

    def __init__(self, unet: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.unet, self.schedule = unet, schedule

    @property
    def config(self) -> Any:
        return self.unet.config

    def forward(self, latents: Tensor, timestep: Tensor, **arguments: Any) -> tuple[Tensor]:
        time = (timestep / FLOW.num_train_timesteps).view(-1, 1, 1, 1)
        length = ((1 - time).square() + time.square()).sqrt()
        steps = self.schedule.timestep_of((time / (1 - time)).flatten())
        eps = self.unet(latents / length, timestep=steps, **arguments)[0]
        return (eps - (latents - time * eps) / (1 - time),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fake", "kind"),
    [
        pytest.param("full", "vp", marks=pytest.mark.full),
        ("lora", "vp"),
        pytest.param("full", "flow", marks=pytest.mark.full),
        ("lora", "flow"),
    ],
)
def test_training_the_nano_prior_to_one_step_works(nano: Prior, fake: Any, kind: str) -> None:
    """Held-out regression, distance and T_max fall; the fake score trains; the EMA holds the generator."""

    def predictor() -> EpsPredictor:
        unet = copy.deepcopy(nano.unet)
        if kind == "vp":
            return EpsPredictor(unet, nano.schedule)
        return EpsPredictor(AsFlow(unet, nano.schedule), FLOW, "flow_prediction")

    settings = Distillation(fake=fake, lora_rank=4, regression="both", l2_weight=0.5, weight=0.1, fake_steps=2)
    teacher, student = predictor(), OneStepGenerator(predictor()).requires_grad_(True)
    real, fake_score = build_scores(teacher, settings.fake, settings.lora_rank)
    frozen = {k: v.clone() for k, v in nano.unet.state_dict().items()}
    objective = InstaReviveObjective(student, real, fake_score, nano, PriorTexts(nano), settings)
    optimizers, ema = build_optimizers(objective, Optimizer()), Ema(averaged_trainables(objective), 0.9)
    heldout = toy(8, 1000)

    def heldout_metrics() -> dict[str, float]:
        with torch.no_grad():
            losses = run(objective, heldout)
        return {k: float(v) for loss in losses.values() for k, v in loss.metrics.items()}

    before, metrics = heldout_metrics(), []
    for step in range(12):
        rows = toy(4, 4 * step)
        metrics.append(train_step(objective, [(rows, Noise(0, rows.positions))], optimizers, lr=1e-4, clip_norm=1.0))
        ema.update(step)
    after = heldout_metrics()
    schedule = objective.schedule  # Eq. 6 on the prior's schedule
    assert before["t_max"] == int(largest_timesteps(schedule, torch.tensor(1.5 * before["distance"]), 20))
    for name in ("loss_regression", "loss_l2", "distance", "t_max", "alpha"):
        assert after[name] < 0.9 * before[name], (name, before[name], after[name])
    expected = {"t_max", "alpha", "distance", "loss_regression", "loss_dsm", "loss_fake"}
    assert expected | {"generator/grad_norm", "fake_score/grad_norm"} <= set(metrics[-1])
    assert all(np.isfinite(v) for row in metrics for v in row.values()) and metrics[-1]["bad_steps"] == 0
    names = {key.split(".")[0] for key in ema.shadow}
    assert names == {"generator"}
    assert all(torch.equal(v, nano.unet.state_dict()[k]) for k, v in frozen.items())
    assert set(objective.parts()) == {"generator"}


@pytest.mark.parametrize("fake", ["full", "lora"])
def test_a_resumed_distillation_has_the_same_bits(prior: Prior, fake: Any) -> None:
    """Generator, fake score, both optimisers, EMA and the start of alpha are resumed; frozen weights do not change."""
    settings = Distillation(fake=fake, t_high=0.0, fake_steps=2)

    def start() -> tuple[InstaReviveObjective, dict[str, torch.optim.Optimizer], Ema]:
        objective = make(prior, settings, same=True)
        return objective, build_optimizers(objective, Optimizer()), Ema(averaged_trainables(objective), 0.9)

    def train(run: tuple[InstaReviveObjective, dict[str, torch.optim.Optimizer], Ema], first: int, last: int) -> None:
        objective, optimizers, ema = run
        for step in range(first, last):
            rows = replace(tiny.batch(), positions=np.arange(3 * step, 3 * step + 3))
            train_step(objective, [(rows, Noise(0, rows.positions))], optimizers, lr=1e-2, clip_norm=1.0)
            ema.update(step)

    def bits(run: tuple[InstaReviveObjective, dict[str, torch.optim.Optimizer], Ema]) -> dict[str, Tensor]:
        objective, _, ema = run
        weights = {f"{n}.{k}": v for n, m in objective.trainables.items() for k, v in m.state_dict().items()}
        return {k: v.clone() for k, v in {**weights, **{f"ema.{k}": v for k, v in ema.shadow.items()}}.items()}

    straight = start()
    begin = bits(straight)
    train(straight, 0, 4)
    interrupted = start()
    train(interrupted, 0, 2)
    stream = io.BytesIO()
    torch.save(training_state(*interrupted, step=2, position=6), stream)
    stream.seek(0)
    resumed = start()
    assert restore_state(torch.load(stream, weights_only=True), *resumed) == 2
    train(resumed, 2, 4)
    expected, bits_after_resume = bits(straight), bits(resumed)
    assert set(expected) == set(bits_after_resume) and all(
        torch.equal(bits_after_resume[key], value) for key, value in expected.items()
    )
    changed = {key for key, value in expected.items() if not torch.equal(value, begin[key])}
    assert any(key.startswith("generator.") for key in changed) and any(key.startswith("ema.") for key in changed)
    fake_keys = [key for key in changed if key.startswith("fake_score.")]
    assert fake_keys and (fake == "full" or all(".lora_" in key for key in fake_keys))
    assert resumed[0].progress == straight[0].progress != {}
