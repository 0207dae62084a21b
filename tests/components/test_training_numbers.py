"""The train step, the loss on fixed batches and the averaged weights, in numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components.randomness import Noise
from components.recipes import Optimizer
from components.training import (
    Ema,
    average,
    average_gradients,
    averaged_trainables,
    build_optimizers,
    build_scaler,
    evaluate_loss,
    restore_state,
    train_step,
    training_state,
)
from components.types import Batch, Loss, Objective

SETTINGS = Optimizer(lr=0.1, betas=(0.8, 0.95), weight_decay=0.25, eps=1e-3)


class Line(Objective):
    """The loss slope * weight + weight^2 / 2 with the batch's mean as slope, in one phase or several."""

    config: Mapping[str, Any] = {}

    def __init__(self, weight: float = 2.0, names: tuple[str, ...] = ("line",)) -> None:
        self.trainables = {name: nn.Linear(1, 1, bias=False) for name in names}
        for module in self.trainables.values():
            nn.init.constant_(module.weight, weight)
        self.progress: dict[str, float] = {}
        self.dtypes: list[torch.dtype] = []

    def parts(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        for name, module in self.trainables.items():
            slope = batch.hq.mean()
            self.dtypes.append(module(torch.ones(1, 1)).dtype)
            value = (slope * module.weight + module.weight.square() / 2).sum()
            yield name, Loss(value=value, metrics={"slope": slope, f"{name}/weight": module.weight.detach().sum()})


def weight_of(module: nn.Module) -> float:
    """The only weight."""
    return float(next(module.parameters()).detach())


def batch(value: float, positions: tuple[int, ...] = (0,)) -> Batch:
    """Pictures of one value."""
    image = torch.full((len(positions), 3, 4, 4), value)
    return Batch(
        keys=["k"] * len(positions),
        positions=np.array(positions),
        hq=image,
        lq=image,
        prompts=[""] * len(positions),
        sizes=torch.zeros(len(positions), 6),
    )


def with_noise(*values: float) -> list[tuple[Batch, Noise]]:
    """One micro-batch for each value."""
    return [(batch(value), Noise(0, np.array([0]))) for value in values]


def test_two_steps_of_adamw_by_hand() -> None:
    """Decay, moments, bias correction and epsilon with the recipe's numbers and the step's own learning rate."""
    objective = Line(2.0)
    optimizers = build_optimizers(objective, SETTINGS)
    weight, first, second = 2.0, 0.0, 0.0
    for step, (slope, lr) in enumerate([(1.0, 0.1), (-4.0, 0.05)], 1):
        gradient = slope + weight
        report = train_step(objective, with_noise(slope), optimizers, lr=lr, clip_norm=100)
        assert report["line/grad_norm"] == pytest.approx(abs(gradient), rel=1e-5)
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
        weight -= lr * 0.25 * weight
        weight -= lr * (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)) ** 0.5 + 1e-3)
        assert weight_of(objective.trainables["line"]) == pytest.approx(weight, rel=1e-5)
        assert report["bad_steps"] == 0 and "loss_scale" not in report


def test_micro_batches_are_averaged_in_gradient_and_metrics() -> None:
    objective = Line(0.5)
    report = train_step(
        objective, with_noise(1.0, 2.0, 6.0), build_optimizers(objective, SETTINGS), lr=0.1, clip_norm=100
    )
    assert report["line/grad_norm"] == pytest.approx(3.5, rel=1e-6)  # mean slope 3, and the weight
    assert report["slope"] == pytest.approx(3.0, rel=1e-6)
    assert report["line/weight"] == pytest.approx(0.5, rel=1e-6)


def test_the_gradient_is_clipped_and_its_own_norm_reported() -> None:
    """With a large epsilon Adam's step grows with the gradient, so that clipping shows."""
    settings = Optimizer(lr=1.0, betas=(0.0, 0.0), weight_decay=0.0, eps=1000.0)
    moves = {}
    for clip in (100.0, 1.0):
        objective = Line(1.0)
        report = train_step(objective, with_noise(3.0), build_optimizers(objective, settings), lr=1.0, clip_norm=clip)
        assert report["line/grad_norm"] == pytest.approx(4.0, rel=1e-5)
        moves[clip] = 1.0 - weight_of(objective.trainables["line"])
    assert moves[100.0] == pytest.approx(4 / 1004, rel=1e-3)
    assert moves[1.0] == pytest.approx(1 / 1001, rel=1e-3)


def test_each_trainable_without_a_finite_gradient_counts_and_keeps_its_weight() -> None:
    objective = Line(1.0, ("a", "b", "c"))
    report = train_step(objective, with_noise(float("nan")), build_optimizers(objective, SETTINGS), lr=0.1, clip_norm=1)
    assert report["bad_steps"] == 3
    assert [weight_of(module) for module in objective.trainables.values()] == [1.0, 1.0, 1.0]


def test_a_step_leaves_no_gradient_behind() -> None:
    """None, not zeros: AdamW moves a weight with a zero gradient by its decay and its moments."""
    objective = Line(1.0, ("a", "b"))
    optimizers = build_optimizers(objective, SETTINGS)
    train_step(objective, with_noise(1.0), optimizers, lr=0.1, clip_norm=9)
    assert [module.weight.grad for module in objective.trainables.values()] == [None, None]


def test_a_scaler_is_updated_once_between_two_steps_of_one_trainable() -> None:
    """The steps a, b, a, b, a: an update goes before each second a, and one ends the step."""

    class Repeated(Line):
        def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
            for name in ("a", "b", "a", "b", "a"):
                value = self.trainables[name].weight.square().sum()
                yield name, Loss(value=value, metrics={})

    calls: list[str] = []

    class Scaler(torch.amp.GradScaler):  # type: ignore[misc]
        def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
            calls.append("step")
            return super().step(optimizer, *args, **kwargs)  # type: ignore[no-any-return]

        def update(self, new_scale: float | Tensor | None = None) -> None:
            calls.append("update")
            super().update(new_scale)

    objective = Repeated(1.0, ("a", "b"))
    train_step(
        objective,
        with_noise(1.0),
        build_optimizers(objective, SETTINGS),
        lr=0.1,
        clip_norm=9,
        precision="fp16",
        scaler=Scaler("cpu"),
    )
    assert calls == ["step", "step", "update", "step", "step", "update", "step", "update"]


def test_a_trainable_without_gradients_passes_the_scaler_by() -> None:
    """A phase whose loss does not reach its trainable: torch's scaler would refuse the step."""

    class Idle(Line):
        def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
            yield "a", Loss(value=self.trainables["b"].weight.square().sum(), metrics={})

    objective, scaler = Idle(1.0, ("a", "b")), build_scaler("fp16", "cpu")
    report = train_step(
        objective,
        with_noise(1.0),
        build_optimizers(objective, SETTINGS),
        lr=0.1,
        clip_norm=9,
        precision="fp16",
        scaler=scaler,
    )
    assert report["a/grad_norm"] == 0 and report["bad_steps"] == 0
    assert [weight_of(module) for module in objective.trainables.values()] == [1.0, 1.0]


def test_the_forward_pass_is_in_single_precision_unless_told() -> None:
    objective = Line(1.0)
    train_step(objective, with_noise(1.0), build_optimizers(objective, SETTINGS), lr=0.1, clip_norm=1)
    assert objective.dtypes == [torch.float32]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_forward_pass_has_the_precision(precision: str, dtype: torch.dtype) -> None:
    objective = Line(1.0)
    optimizers = build_optimizers(objective, SETTINGS)
    train_step(objective, with_noise(1.0), optimizers, lr=0.1, clip_norm=1, precision=precision)
    assert objective.dtypes == [dtype]


def test_half_precision_scales_and_leaves_the_step_alone() -> None:
    objective, scaler = Line(1.0), build_scaler("fp16", "cpu")
    assert scaler is not None
    optimizers = build_optimizers(objective, SETTINGS)
    for _ in range(2):
        report = train_step(
            objective, with_noise(1.0), optimizers, lr=0.1, clip_norm=9, precision="fp16", scaler=scaler
        )
    assert objective.dtypes == [torch.float16] * 2
    assert report["loss_scale"] == 65536 and report["bad_steps"] == 0


def test_without_other_workers_nothing_is_averaged() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 3.0])
    idle = nn.Parameter(torch.ones(1))
    average_gradients([parameter, idle])
    assert parameter.grad.tolist() == [1.0, 3.0] and idle.grad is None
    assert average({"a": torch.tensor(2.0)}) == {"a": torch.tensor(2.0)} and average({}) == {}


def test_a_trainable_without_weights_is_refused() -> None:
    objective = Line()
    objective.trainables["line"].requires_grad_(False)
    with pytest.raises(ValueError, match="'line' has no parameter that requires a gradient"):
        build_optimizers(objective, SETTINGS)


def test_the_loss_of_fixed_batches_is_the_mean_over_pictures() -> None:
    """Batches of 3 and 1 pictures with slopes 1 and 5 and a weight of 2: (3 (2 + 2) + (10 + 2)) / 4 = 6."""
    objective = Line(2.0, ("a", "b"))
    losses = evaluate_loss(objective, [batch(1.0, (0, 1, 2)), batch(5.0, (3,))], seed=3)
    assert losses == {"a": pytest.approx(6.0, rel=1e-6), "b": pytest.approx(6.0, rel=1e-6)}


def test_the_loss_of_fixed_batches_has_the_noise_of_their_positions() -> None:
    class Noisy(Line):
        def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
            yield "line", Loss(value=noise.normal("x", (1,)).mean(), metrics={})

    own = Noise(3, np.array([5, 9]), "cpu").normal("x", (1,)).mean()
    assert evaluate_loss(Noisy(), [batch(0.0, (5, 9))], seed=3) == {"line": pytest.approx(float(own), rel=1e-6)}


def test_the_decay_of_the_average_warms_up() -> None:
    """Decays of 1/10, 2/11, 3/12 and then the recipe's; 0 to the weight's own path by hand."""
    objective = Line(0.0)
    ema = Ema(objective.trainables, 0.24)
    expected = 0.0
    for step, decay in enumerate([1 / 10, 2 / 11, 0.24, 0.24]):
        with torch.no_grad():
            next(objective.trainables["line"].parameters()).fill_(float(step + 1))
        ema.update(step)
        expected = decay * expected + (1 - decay) * (step + 1)
        assert float(ema.shadow["line.weight"]) == pytest.approx(expected, rel=1e-5)


def test_only_trained_weights_are_averaged_and_kept() -> None:
    objective = Line(1.0, ("a", "b"))
    objective.trainables["b"].requires_grad_(False)
    ema = Ema(objective.trainables, 0.5)
    assert set(ema.shadow) == {"a.weight"}
    state = training_state(objective, {}, ema, 4, 64)
    assert {name: set(tensors) for name, tensors in state["trainables"].items()} == {"a": {"weight"}, "b": set()}
    assert (state["step"], state["position"], state["scaler"]) == (4, 64, {})
    assert set(averaged_trainables(objective)) == {"a", "b"}
    objective.averaged = ("a",)
    assert averaged_trainables(objective) == {"a": objective.trainables["a"]}


def test_a_restored_state_has_all_its_numbers() -> None:
    """Weights, moments, average, progress and step come back; the state of an older version has no progress."""
    objective = Line(1.0)
    objective.progress = {"t_max": 7.0}
    optimizers, ema = build_optimizers(objective, SETTINGS), Ema(objective.trainables, 0.5)
    train_step(objective, with_noise(1.0), optimizers, lr=0.1, clip_norm=9)
    ema.update(0)
    state = training_state(objective, optimizers, ema, 1, 8)
    other = Line(9.0)
    fresh, fresh_ema = build_optimizers(other, SETTINGS), Ema(other.trainables, 0.5)
    assert restore_state(state, other, fresh, fresh_ema) == 1
    assert weight_of(other.trainables["line"]) == weight_of(objective.trainables["line"]) != 9.0
    assert torch.equal(fresh_ema.shadow["line.weight"], ema.shadow["line.weight"])
    assert other.progress == {"t_max": 7.0}
    (moments,) = fresh["line"].state_dict()["state"].values()
    assert float(moments["exp_avg"]) == pytest.approx(0.2 * 2.0)  # (1 - 0.8) times the gradient
    del state["progress"]
    assert restore_state(state, Line(9.0), {}, None) == 1


def test_a_state_that_does_not_fit_names_the_keys() -> None:
    objective = Line()
    state = training_state(objective, {}, Ema(objective.trainables, 0.5), 1, 1)
    state["trainables"] = {"line": {f"w{n}": torch.zeros(1) for n in range(9)}}
    with pytest.raises(ValueError, match=r"keys \['w0', .* 'w7'\] differ"):
        restore_state(state, objective, {}, None)
    state = training_state(objective, {}, None, 1, 1) | {"ema": {f"line.w{n}": torch.zeros(1) for n in range(9)}}
    with pytest.raises(ValueError, match=r"average of the weights: keys \['line.w0', .* 'line.w7'\] differ"):
        restore_state(state, objective, {}, Ema(objective.trainables, 0.5))
