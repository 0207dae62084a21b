"""train_step: phases in turn, accumulation in lockstep, bad gradients, EMA, resume."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.randomness import Noise, seeded_init
from components.recipes import Optimizer
from components.training import Ema, build_optimizers, build_scaler, restore_state, train_step, training_state
from components.types import Batch, Loss, Objective

SETTINGS = Optimizer(lr=0.1, weight_decay=0.0)


class TwoPlayers(Objective):
    """A generator moves towards hq's mean, then a critic moves towards the updated generator."""

    config: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.a.weight)
        nn.init.zeros_(self.b.weight)
        self.trainables = {"generator": self.a, "critic": self.b}
        self.progress: dict[str, float] = {}
        self.weights: list[float] = []

    def parts(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        target = batch.hq.mean()
        loss = (self.a.weight - target).square().sum()
        yield "generator", Loss(value=loss, metrics={"loss": loss})
        self.weights.append(float(self.a.weight.detach()))
        yield "critic", Loss(value=(self.b.weight - self.a.weight.detach()).square().sum())


def batch(value: float, position: int = 0) -> tuple[Batch, Noise]:
    image = torch.full((1, 3, 4, 4), value)
    positions = np.array([position])
    return (
        Batch(keys=["k"], positions=positions, hq=image, lq=image, prompts=[""], sizes=torch.zeros(1, 6)),
        Noise(0, positions),
    )


def test_the_second_phase_uses_the_first_phases_update() -> None:
    objective = TwoPlayers()
    train_step(objective, [batch(1.0)], build_optimizers(objective, SETTINGS), lr=0.1, clip_norm=10)
    assert objective.weights[0] == pytest.approx(0.1, abs=1e-4)  # Adam's first step has the size of the learning rate
    assert float(objective.b.weight.detach()) != 0


def test_a_phase_leaves_no_gradient_in_another_phases_weights() -> None:
    """The generator's loss goes through the critic, which must not learn from it."""

    class CoupledPlayers(TwoPlayers):
        def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
            yield "generator", Loss(value=(self.a.weight + self.b.weight - 1).square().sum())
            yield "critic", Loss(value=0 * self.b.weight.sum())

    objective = CoupledPlayers()
    metrics = train_step(objective, [batch(1.0)], build_optimizers(objective, SETTINGS), lr=0.1, clip_norm=10)
    assert metrics["critic/grad_norm"] == 0 and float(objective.b.weight.detach()) == 0
    assert float(objective.a.weight.detach()) != 0


def test_accumulation_equals_one_large_batch_and_advances_in_lockstep() -> None:
    one, two = TwoPlayers(), TwoPlayers()
    train_step(one, [batch(0.5)], build_optimizers(one, SETTINGS), lr=0.1, clip_norm=1e9)
    train_step(two, [batch(0.0), batch(1.0, 1)], build_optimizers(two, SETTINGS), lr=0.1, clip_norm=1e9)
    assert torch.equal(one.a.weight, two.a.weight)
    assert (
        two.weights == [pytest.approx(0.1, abs=1e-4)] * 2
    )  # the critic phase of both micro-batches starts after the generator's step


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_reported() -> None:
    objective = TwoPlayers()
    metrics = train_step(objective, [batch(float("nan"))], build_optimizers(objective, SETTINGS), lr=0.1, clip_norm=1)
    assert metrics["bad_steps"] == 1 and float(objective.a.weight.detach()) == 0


def half(objective: TwoPlayers, value: float, scaler: Any, optimizers: Any = None) -> dict[str, float]:
    """Run a step with fp16's loss scaling; weights and loss are float32, so that only the scaling differs."""
    optimizers = optimizers or build_optimizers(objective, SETTINGS)
    return train_step(objective, [batch(value)], optimizers, lr=0.1, clip_norm=1e9, precision="fp16", scaler=scaler)


def test_scaled_gradients_give_the_step_of_plain_ones() -> None:
    """The scale is a power of two, so unscaled float32 gradients have the same bits."""
    plain, scaled = TwoPlayers(), TwoPlayers()
    train_step(plain, [batch(0.5)], build_optimizers(plain, SETTINGS), lr=0.1, clip_norm=1e9)
    metrics = half(scaled, 0.5, build_scaler("fp16", "cpu"))
    assert metrics["loss_scale"] == 65536 and metrics["generator/grad_norm"] == 1.0
    assert torch.equal(plain.a.weight, scaled.a.weight) and torch.equal(plain.b.weight, scaled.b.weight)


def test_an_overflow_halves_the_scale_and_is_bad_only_at_scale_one() -> None:
    objective, scaler = TwoPlayers(), build_scaler("fp16", "cpu")
    assert scaler is not None
    steps = []
    for _ in range(18):
        metrics = half(objective, float("inf"), scaler)
        steps.append((metrics["loss_scale"], metrics["bad_steps"] > 0))
    assert steps == [(2.0 ** (16 - n), n >= 16) for n in range(18)]
    assert float(objective.a.weight.detach()) == 0


def test_a_trainable_without_a_gradient_passes_the_scaler() -> None:
    """A phase may give its trainable no gradient, and the scaler refuses an optimiser without one."""

    class OneIdle(TwoPlayers):
        def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
            yield "critic", Loss(value=(self.a.weight - 1).square().sum())
            yield "generator", Loss(value=(self.a.weight - 1).square().sum())

    objective, scaler = OneIdle(), build_scaler("fp16", "cpu")
    metrics = half(objective, 0.5, scaler)
    assert metrics["bad_steps"] == 0 and metrics["critic/grad_norm"] == 0
    assert float(objective.b.weight.detach()) == 0 and float(objective.a.weight.detach()) == pytest.approx(
        0.1, abs=1e-4
    )


def test_the_loss_scale_is_part_of_a_checkpoint() -> None:
    objective, scaler = TwoPlayers(), build_scaler("fp16", "cpu")
    optimizers = build_optimizers(objective, SETTINGS)
    half(objective, float("inf"), scaler, optimizers)
    buffer = io.BytesIO()
    torch.save(training_state(objective, optimizers, None, 1, 1, scaler), buffer)
    buffer.seek(0)
    state, fresh = torch.load(buffer, weights_only=True), build_scaler("fp16", "cpu")
    assert fresh is not None
    restore_state(state, objective, optimizers, None, fresh)
    assert fresh.get_scale() == 32768
    del state["scaler"]  # checkpoints of earlier versions have none
    assert restore_state(state, objective, optimizers, None, fresh) == 1


def test_fp16_needs_a_scaler_and_other_precisions_have_none() -> None:
    with pytest.raises(ValueError, match="gradient scaler"):
        half(TwoPlayers(), 1.0, None)
    assert build_scaler("bf16", "cpu") is None and build_scaler("fp32", "cpu") is None


def test_micro_batches_in_different_phases_raise_an_error() -> None:
    class Uneven(TwoPlayers):
        def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
            yield from list(super().phases(batch, noise))[: 1 + int(batch.hq.mean() > 0)]

    objective = Uneven()
    with pytest.raises(RuntimeError, match="different phases"):
        train_step(objective, [batch(0.0), batch(1.0)], build_optimizers(objective, SETTINGS), lr=0.1, clip_norm=1)


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    def run(objective: TwoPlayers, optimizers: Any, ema: Ema, start: int, stop: int) -> None:
        for step in range(start, stop):
            train_step(objective, [batch(1.0 + step)], optimizers, lr=SETTINGS.lr_at(step, 6), clip_norm=1)
            ema.update(step)

    straight = TwoPlayers()
    optimizers, ema = build_optimizers(straight, SETTINGS), Ema(straight.trainables, 0.9)
    run(straight, optimizers, ema, 0, 3)
    state = training_state(straight, optimizers, ema, 3, 3)
    state = {**state, "trainables": {k: {n: t.clone() for n, t in v.items()} for k, v in state["trainables"].items()}}
    import copy

    state = copy.deepcopy(state)
    run(straight, optimizers, ema, 3, 6)

    resumed = TwoPlayers()
    optimizers2, ema2 = build_optimizers(resumed, SETTINGS), Ema(resumed.trainables, 0.9)
    assert restore_state(state, resumed, optimizers2, ema2) == 3
    run(resumed, optimizers2, ema2, 3, 6)
    assert torch.equal(straight.a.weight, resumed.a.weight) and torch.equal(straight.b.weight, resumed.b.weight)
    assert all(torch.equal(ema.shadow[k], ema2.shadow[k]) for k in ema.shadow)


def test_a_checkpoint_with_other_keys_is_refused() -> None:
    objective = TwoPlayers()
    with pytest.raises(ValueError, match="does not fit 'generator'"):
        restore_state({"trainables": {"generator": {"other": torch.zeros(1)}}}, objective, {}, None)


def test_a_checkpoint_without_ema_is_refused_by_a_run_with_ema() -> None:
    objective = TwoPlayers()
    optimizers = build_optimizers(objective, SETTINGS)
    state = training_state(objective, optimizers, None, 3, 3)
    with pytest.raises(ValueError, match="average of the weights"):
        restore_state(state, objective, optimizers, Ema(objective.trainables, 0.9))


def test_ema_weights_are_in_the_modules_only_inside_the_context() -> None:
    objective = TwoPlayers()
    ema = Ema(objective.trainables, 0.5)
    with torch.no_grad():
        objective.a.weight.fill_(8.0)
    ema.update(1000)
    with ema.swap_in():
        assert float(objective.a.weight.detach()) == 4.0
    assert float(objective.a.weight.detach()) == 8.0


def test_seeded_init_is_reproducible_and_restores_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with seeded_init(1, "x"):
        first = nn.Linear(4, 4).weight
    assert torch.equal(torch.rand(1), expected)
    with seeded_init(1, "x"):
        assert torch.equal(nn.Linear(4, 4).weight, first)
    with seeded_init(1, "y"):
        assert not torch.equal(nn.Linear(4, 4).weight, first)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.25), (3, 1.0), (52, 0.5), (99, 0.0)])
def test_cosine_schedule_after_warm_up(step: int, expected: float) -> None:
    settings = Optimizer(lr=1.0, warmup_steps=4, schedule="cosine")
    assert settings.lr_at(step, 100) == pytest.approx(expected, abs=2e-3)
