"""Gradients and metrics over two workers: their mean, on both workers, as one worker has it for the whole batch.

The workers are threads of this process. Each has its own gloo group, so the sums are the real ones; only
torch.distributed's functions for the default group are replaced by those of the thread's group.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.randomness import Noise
from components.recipes import Optimizer
from components.training import average, average_gradients, build_optimizers, build_scaler, train_step
from components.types import Batch, Loss, Objective

WORKERS = 2
TIMEOUT = timedelta(seconds=60)

Workers = Callable[[Callable[[int], Any]], list[Any]]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """Run a function of the rank on two workers at once and return both results."""
    current = threading.local()

    def all_reduce(tensor: Tensor, *rest: Any, **options: Any) -> None:
        assert not rest and not options, "a sum over the default group"
        current.group.allreduce([tensor]).wait()

    monkeypatch.setattr(dist, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: hasattr(current, "group"))
    monkeypatch.setattr(dist, "get_world_size", lambda *_: WORKERS)
    monkeypatch.setattr(dist, "get_rank", lambda *_: current.rank)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)

    def run(function: Callable[[int], Any]) -> list[Any]:
        store = dist.HashStore()

        def one(rank: int) -> Any:
            current.group = dist.ProcessGroupGloo(store, rank, WORKERS, TIMEOUT)
            current.rank = rank
            try:
                return function(rank)
            finally:
                del current.group

        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(one, range(WORKERS)))

    return run


def parameters_of(*gradients: Sequence[float] | None, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Parameters with these gradients; one without a gradient has two elements."""
    parameters = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.ones(2 if gradient is None else len(gradient), dtype=dtype))
        parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=dtype)
        parameters.append(parameter)
    return parameters


def averaged(workers: Workers, *of_ranks: list[nn.Parameter]) -> list[list[Tensor | None]]:
    def average_of(rank: int) -> list[Tensor | None]:
        average_gradients(of_ranks[rank])
        return [p.grad for p in of_ranks[rank]]

    return workers(average_of)


def test_gradients_are_the_mean_and_not_the_sum(workers: Workers) -> None:
    one, two = parameters_of([1.0, -2.0], [5.0, 6.0, 7.0]), parameters_of([3.0, 4.0], [-1.0, 0.0, 1.0])
    for gradients in averaged(workers, one, two):
        assert [g.tolist() for g in gradients if g is not None] == [[2.0, 1.0], [2.0, 3.0, 4.0]]


def test_a_gradient_that_one_worker_lacks_counts_as_zero(workers: Workers) -> None:
    """Half the other worker's gradient, on both; the parameters behind it stay in their places."""
    one, two = parameters_of([4.0, 8.0], [1.0, 1.0], [0.0, 2.0]), parameters_of(None, [3.0, 3.0], None)
    for gradients in averaged(workers, one, two):
        assert [g.tolist() for g in gradients if g is not None] == [[2.0, 4.0], [2.0, 2.0], [0.0, 1.0]]


def test_a_parameter_without_a_gradient_on_all_workers_has_none(workers: Workers) -> None:
    """With zeros in place of None weight decay would shrink an unused weight."""
    one, two = parameters_of(None, [1.0, 1.0]), parameters_of(None, [3.0, 5.0])
    for unused, gradient in averaged(workers, one, two):
        assert unused is None and gradient is not None and gradient.tolist() == [2.0, 3.0]


def test_half_precision_gradients_are_summed_in_float32_and_shapes_stay(workers: Workers) -> None:
    """60,000 + 60,000 overflows float16, and its mean does not."""

    def parameter(value: float) -> list[nn.Parameter]:
        parameter = nn.Parameter(torch.ones(2, 3, dtype=torch.float16))
        parameter.grad = torch.full((2, 3), value, dtype=torch.float16)
        return [parameter]

    for (gradient,) in averaged(workers, parameter(60000.0), parameter(60000.0)):
        assert gradient is not None and gradient.dtype == torch.float16 and gradient.shape == (2, 3)
        assert gradient.unique().tolist() == [60000.0]


def test_a_gradient_that_is_not_finite_reaches_all_workers(workers: Workers) -> None:
    for (gradient,) in averaged(workers, parameters_of([math.nan, 1.0]), parameters_of([1.0, 1.0])):
        assert gradient is not None and math.isnan(float(gradient[0])) and float(gradient[1]) == 1.0


def test_one_worker_keeps_its_gradients() -> None:
    parameters = parameters_of([1.0, 2.0], None)
    average_gradients(parameters)
    assert parameters[0].grad is not None and parameters[0].grad.tolist() == [1.0, 2.0] and parameters[1].grad is None


def test_metrics_are_the_mean_by_name(workers: Workers) -> None:
    """Also if the workers have logged them in different orders."""
    of_ranks = [{"loss": 1.0, "alpha": 10.0}, {"alpha": 30.0, "loss": 2.0}]
    results = workers(lambda rank: average({k: torch.tensor(v) for k, v in of_ranks[rank].items()}))
    for metrics in results:
        assert {name: float(value) for name, value in metrics.items()} == {"loss": 1.5, "alpha": 20.0}


# ---------------------------------------------------------------------------------------------- a step on two workers


class Line(Objective):
    """Least squares of w . x = y, where x is a sample's first three pixels and y its fourth; one weight is unused."""

    config: Mapping[str, Any] = {}

    def __init__(self) -> None:
        self.line = nn.Linear(3, 1, bias=False)
        self.line.register_parameter("unused", nn.Parameter(torch.full((2,), 3.0)))
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
        self.trainables = {"line": self.line}
        self.progress: dict[str, float] = {}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def phases(self, batch: Batch, noise: Noise) -> Iterator[tuple[str, Loss]]:
        pixels = batch.hq.flatten(1)
        loss = (self.line(pixels[:, :3]).squeeze(1) - pixels[:, 3]).square().mean()
        yield "line", Loss(value=loss, metrics={"loss": loss})


def samples(first: int, count: int) -> tuple[Batch, Noise]:
    positions = np.arange(first, first + count)
    hq = torch.stack([torch.sin(torch.arange(4.0) * (3 + i) + i).view(1, 2, 2) for i in positions.tolist()])
    batch = Batch(
        keys=[str(i) for i in positions],
        positions=positions,
        hq=hq,
        lq=hq,
        prompts=[""] * count,
        sizes=torch.zeros(count, 6),
    )
    return batch, Noise(0, positions)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip_norm", [1e9, 0.1])
def test_two_workers_take_the_step_of_one_with_the_whole_batch(
    precision: str, clip_norm: float, workers: Workers
) -> None:
    """Same loss, gradient norm and weights. AdamW hides a sum in place of the mean from the weights, not from the norm.

    The eighth of a batch is a micro-batch of one worker, so that accumulation and workers both take part.
    """

    def step(batches: Sequence[tuple[Batch, Noise]]) -> tuple[dict[str, float], list[Tensor]]:
        objective = Line()
        optimizers = build_optimizers(objective, Optimizer(lr=0.1, weight_decay=0.1))
        scaler = build_scaler(precision, "cpu")
        metrics = train_step(
            objective, batches, optimizers, lr=0.1, clip_norm=clip_norm, precision=precision, scaler=scaler
        )
        return metrics, [p.detach() for p in objective.line.parameters()]

    whole, weights = step([samples(0, 8)])
    if precision == "fp32":  # by hand: the mean gradient over the eight samples
        pixels = samples(0, 8)[0].hq.flatten(1)
        start = torch.tensor([0.5, -1.0, 2.0])
        gradient = 2 * ((pixels[:, :3] @ start - pixels[:, 3])[:, None] * pixels[:, :3]).mean(dim=0)
        assert whole["line/grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)
    results = workers(lambda rank: step([samples(4 * rank, 2), samples(4 * rank + 2, 2)]))
    tolerance = 1e-5 if precision == "fp32" else 2e-2  # the products are in half precision
    for metrics, parameters in results:
        for name in ("loss", "line/grad_norm"):
            assert metrics[name] == pytest.approx(whole[name], rel=tolerance), name
        assert metrics["bad_steps"] == 0
        for ours, expected in zip(parameters, weights, strict=True):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=1e-6)
        assert parameters[0].tolist() == [3.0, 3.0] or parameters[1].tolist() == [3.0, 3.0]  # no decay without gradient
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
