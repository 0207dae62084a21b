"""Packed training states: sizes, the factored moments by hand, and a training that goes on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from components.models import ModelError
from components.packed_states import pack_state, unpack_state
from components.randomness import Noise, generator
from components.recipes import Optimizer
from components.systems.unetres.config import config_from
from components.systems.unetres.network import build_unetres
from components.systems.unetres.objective import RegressionObjective
from components.training import Ema, build_optimizers, train_step, training_state
from components.types import Batch

SETTINGS = Optimizer(lr=1e-3, weight_decay=0.0)


def objective_of(seed: int) -> RegressionObjective:
    return RegressionObjective(
        build_unetres(config_from({"widths": [8, 12], "blocks": [1, 1, 1], "factor": 2}), seed, "n")
    )


def batch(step: int) -> tuple[Batch, Noise]:
    positions = np.arange(4) + 4 * step
    draw = generator(1, "pictures", step)
    hq = torch.from_numpy(draw.uniform(-1, 1, (4, 3, 8, 8)).astype(np.float32))
    data = Batch(keys=["k"] * 4, positions=positions, hq=hq, lq=hq * 0.5, prompts=[""] * 4, sizes=torch.zeros(4, 6))
    return data, Noise(0, positions)


def trained(steps: int) -> dict[str, Any]:
    objective = objective_of(0)
    optimizers, ema = build_optimizers(objective, SETTINGS), Ema(objective.trainables, 0.9)
    losses = []
    for step in range(steps):
        losses.append(train_step(objective, [batch(step)], optimizers, lr=1e-3, clip_norm=1.0)["loss"])
        ema.update(step)
    state = training_state(objective, optimizers, ema, steps, 4 * steps)
    with ema.swap_in():
        parts = {name: {k: v.clone() for k, v in part.items()} for name, part in objective.parts().items()}
    return {"objective": objective, "state": state, "parts": parts, "losses": losses, "optimizers": optimizers}


def test_weights_come_from_the_model_and_moments_are_factored() -> None:
    run = trained(20)
    packed = pack_state(run["state"], run["parts"])
    assert not any(key.startswith("weights/") for key in packed)
    full = sum(p.numel() for p in run["objective"].network.parameters())
    assert sum(tensor.numel() for tensor in packed.values()) < 0.15 * full
    other = objective_of(7)
    optimizers, ema = build_optimizers(other, SETTINGS), Ema(other.trainables, 0.9)
    unpack_state(packed, run["parts"], 20, other, optimizers, ema)
    before = {id(p): run["optimizers"]["regression"].state[p] for p in run["objective"].network.parameters()}
    for (key, parameter), old in zip(
        other.network.named_parameters(), run["objective"].network.parameters(), strict=True
    ):
        assert torch.equal(parameter, run["parts"]["regression"][key])
        assert torch.equal(ema.shadow[f"regression.{key}"], parameter)
        state, moment = optimizers["regression"].state[parameter], before[id(old)]["exp_avg_sq"]
        assert float(state["step"]) == 20 and float(state["exp_avg"].abs().max()) == 0
        if moment.ndim < 2:
            assert torch.equal(state["exp_avg_sq"], moment)
            continue
        matrix = moment.flatten(1).double()
        expected = matrix.mean(1)[:, None] * matrix.mean(0)[None] / matrix.mean()
        torch.testing.assert_close(state["exp_avg_sq"].flatten(1).double(), expected, rtol=1e-4, atol=1e-14)
        assert float(state["exp_avg_sq"].sum()) == pytest.approx(float(moment.sum()), rel=1e-4)


def test_a_training_goes_on_with_its_losses() -> None:
    """The next losses are those of the run without a break, nearly; a start without moments jumps."""
    whole = trained(60)
    run = trained(40)
    other = objective_of(7)
    optimizers, ema = build_optimizers(other, SETTINGS), Ema(other.trainables, 0.9)
    packed = pack_state(run["state"], run["parts"])
    unpack_state(packed, run["parts"], 40, other, optimizers, ema)
    losses = [train_step(other, [batch(step)], optimizers, lr=1e-3, clip_norm=1.0)["loss"] for step in range(40, 60)]
    assert losses == pytest.approx(whole["losses"][40:], rel=0.15)
    assert np.mean(losses) == pytest.approx(np.mean(whole["losses"][40:]), rel=0.05)


def test_a_trainable_outside_the_model_is_stored_in_half_precision() -> None:
    run = trained(3)
    packed = pack_state(run["state"], {})
    weights = {key: value for key, value in packed.items() if key.startswith("weights/regression/")}
    assert {value.dtype for value in weights.values()} == {torch.float16}
    other = objective_of(7)
    unpack_state(packed, {}, 3, other, build_optimizers(other, SETTINGS), None)
    for key, parameter in other.network.named_parameters():
        torch.testing.assert_close(parameter, run["parts"]["regression"][key], rtol=1e-3, atol=1e-6)


def test_weights_that_do_not_fit_are_named() -> None:
    run = trained(1)
    packed = pack_state(run["state"], run["parts"])
    del run["parts"]["regression"]["head.weight"]
    other = objective_of(7)
    with pytest.raises(ModelError, match=r"does not fit 'regression': \['head.weight'\]"):
        unpack_state(packed, run["parts"], 1, other, build_optimizers(other, SETTINGS), None)
