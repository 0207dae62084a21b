"""A step depends on its pictures alone, and not on their split into micro-batches and workers, for every objective."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helper_modules import load_helper
from torch import Tensor

from components import training
from components.objectives.distillation import Distillation
from components.priors.nano import build_prior, build_tokenizer_json
from components.randomness import Noise
from components.systems.instantir.objectives import AggregatorObjective, PerceptorObjective, PreviewerObjective
from components.systems.prior.training import AutoencoderObjective, DenoiserObjective, ImageEncoderObjective
from components.systems.swinir.config import SwinIRConfig
from components.systems.swinir.network import build_swinir
from components.systems.swinir.objective import SwinIRObjective
from components.training import average_gradients, evaluate_loss, train_step
from components.types import Batch, Loss, Objective

tiny = load_helper("components/test_instantir.py")
stages = load_helper("components/test_instantir_training.py")
distillation = load_helper("components/test_instarevive_objective.py")
swinir = load_helper("components/test_swinir.py")

PICTURES = 8
SPLITS = {"instarevive": ((2, 1), (4, 1), (1, 2))}
"""(micro-batches, workers) by objective; the reference is (1, 1), and the others have only the last."""


class Workers:
    """Stands in for torch.distributed: the workers are threads, and a collective waits for all of them."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.values = count, threading.Barrier(count, timeout=120), [torch.zeros(0)] * count
        self.local = threading.local()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.count

    def get_rank(self) -> int:
        return int(self.local.rank)

    def _all(self, value: Tensor) -> list[Tensor]:
        self.values[self.get_rank()] = value.detach().clone()
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values

    def all_reduce(self, value: Tensor) -> None:
        value.copy_(torch.stack(self._all(value)).sum(dim=0))

    def all_gather(self, parts: list[Tensor], value: Tensor) -> None:
        for part, other in zip(parts, self._all(value), strict=True):
            part.copy_(other)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Results of `work(rank)` on all workers; the first error is raised."""
        results: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = work(rank)
            except Exception as error:  # noqa: BLE001  the main thread raises it
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [result for result in results if isinstance(result, Exception)]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return results


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients of each step and changes no weight."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.steps: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.steps.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])


def tiny_prior(**more: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_prior(
            {**tiny.TINY, **more}, build_tokenizer_json(["red", "blue", "sky"], tiny.TINY["text_length"])
        )


def one_step(**settings: Any) -> Objective:
    prior = tiny_prior()
    distillation.awake(prior.autoencoder, "autoencoder")
    objective: Objective = distillation.make(prior.freeze(), Distillation(**settings))
    return objective


def of_prior(kind: Any, *arguments: Any) -> Objective:
    objective: Objective = kind(tiny_prior(), {}, "", *arguments)
    return objective


def coarse() -> Objective:
    config = SwinIRConfig(**{**swinir.TINY, "window_size": 4})
    return SwinIRObjective(build_swinir(config, 0), drop_rate=0.3, pictures=PICTURES)


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "instarevive": lambda: one_step(regression="both", fake_range="same", fake_steps=2, t_high=0.0, kappa=0.4),
    "instarevive alone": lambda: one_step(per_sample=True, t_high=0.0, kappa=0.4),
    "instarevive unpaired": lambda: one_step(regression="none", reduction="sum", kappa=0.05),
    "instarevive fixed": lambda: one_step(dynamic=False, fake="lora", lora_rank=2),
    "perceptor": lambda: PerceptorObjective(stages.make_network("perceptor")),
    "previewer": lambda: PreviewerObjective(stages.make_network("previewer"), image_dropout=0.3),
    "aggregator": lambda: AggregatorObjective(stages.make_network(), preview_cfg_scale=2.0),
    "swinir": coarse,
    "autoencoder": lambda: of_prior(AutoencoderObjective, 0.1),
    "encoder": lambda: of_prior(ImageEncoderObjective, 0.1, 0),
    "denoiser": lambda: of_prior(DenoiserObjective, 0.3, 0.3),
}
QUICK = ("instarevive", "instarevive alone", "encoder", "swinir")
"""Objectives with a number of the whole batch. The others are here for one that gets such a number later."""


def pictures(first: int = 0, count: int = PICTURES) -> Batch:
    """Pictures whose contrast rises with their position, so that distances differ between micro-batches."""
    rows: Batch = tiny.batch(count, first)
    contrast = (0.1 + 0.25 * torch.arange(first, first + count)).view(-1, 1, 1, 1)
    return replace(rows, hq=rows.hq * contrast, lq=rows.lq * (0.5 * contrast))


def step(
    build: Callable[[], Objective], micro: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[dict[str, float]], list[list[list[Tensor]]]]:
    """(metrics of each worker, gradients by trainable and phase of worker 0) of one step over the same pictures."""
    size = PICTURES // (micro * workers)
    objectives = [build() for _ in range(workers)]
    recorders: list[dict[str, Any]] = [
        {name: Recorder([p for p in m.parameters() if p.requires_grad]) for name, m in o.trainables.items()}
        for o in objectives
    ]

    def work(rank: int) -> dict[str, float]:
        first = rank * micro * size
        rows = [pictures(first + n * size, size) for n in range(micro)]
        batches = [(b, Noise(0, b.positions)) for b in rows]
        return train_step(objectives[rank], batches, recorders[rank], lr=0.0, clip_norm=1e9)

    if workers == 1:
        metrics = [work(0)]
    else:
        group = Workers(workers)
        with monkeypatch.context() as patch:
            patch.setattr(training, "dist", group)
            metrics = group.run(work)
    for recorder in recorders[1:]:  # gradients are averaged, so all workers have the same
        for name, steps in ((n, r.steps) for n, r in recorder.items()):
            for mine, theirs in zip(steps, recorders[0][name].steps, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    return metrics, [recorder.steps for recorder in recorders[0].values()]


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in OBJECTIVES])
def test_a_step_does_not_depend_on_the_split_of_its_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = OBJECTIVES[name]
    (expected,), gradients = step(build, 1, 1, monkeypatch)
    assert any(bool(g.any()) for phases in gradients for phase in phases for g in phase)
    for micro, workers in SPLITS.get(name, ((2, 2),)):
        every, others = step(build, micro, workers, monkeypatch)
        for metrics in every:
            skip = {"distance"} if name == "instarevive fixed" else set()  # a mean of roots there, and it has no effect
            for key in expected.keys() - skip:
                assert metrics[key] == pytest.approx(expected[key], rel=2e-3, abs=1e-5), (key, micro, workers)
            for key in {"t_max", "alpha"} & expected.keys():
                assert metrics[key] == pytest.approx(expected[key], rel=1e-6), (key, micro, workers)
        for mine, theirs in zip(others, gradients, strict=True):
            assert len(mine) == len(theirs)
            for phase, phase_expected in zip(mine, theirs, strict=True):
                flat, flat_expected = (torch.cat([g.flatten() for g in p]) for p in (phase, phase_expected))
                error = float((flat - flat_expected).norm() / flat_expected.norm())
                assert error < 2e-4, (name, micro, workers, error)


@pytest.mark.parametrize("name", ["instarevive", "encoder", "swinir"])
def test_held_out_losses_do_not_depend_on_the_accumulation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A held-out batch has the size of a micro-batch; together they are measured like a step's whole batch."""
    objective = OBJECTIVES[name]()
    whole = evaluate_loss(objective, [pictures()], 0)
    parts = evaluate_loss(objective, [pictures(n, 2) for n in range(0, PICTURES, 2)], 0, together=4)
    assert parts == pytest.approx(whole, rel=1e-4)
    assert objective.progress == {}


def test_the_first_steps_t_max_is_that_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a T_max for each sample only the first step needs the others; it is kept for a resumed run."""
    objective = one_step(per_sample=True, t_high=0.0, kappa=0.4)
    batches = [(b, Noise(0, b.positions)) for b in (pictures(0, 4), pictures(4, 4))]
    first = [next(phases)[1].metrics for phases in objective.step_phases(batches)]
    mean = sum(float(m["t_max"]) for m in first) / 2
    assert float(first[0]["t_max"]) != float(first[1]["t_max"])
    assert objective.progress == {"t_start": pytest.approx(mean)}


def test_no_graph_waits_for_the_other_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring pass keeps no gradients: a graph kept for each micro-batch would take the whole batch's memory."""
    objective: Any = one_step()
    modes: list[bool] = []
    generate = objective.generator.forward
    monkeypatch.setattr(
        objective.generator, "forward", lambda *a, **k: (modes.append(torch.is_grad_enabled()), generate(*a, **k))[1]
    )
    batches = [(b, Noise(0, b.positions)) for b in (pictures(0, 2), pictures(2, 2))]
    phases = objective.step_phases(batches)
    assert modes == [False, False]
    next(phases[0])
    assert modes == [False, False, True]
    modes.clear()
    next(objective.step_phases(batches[:1])[0])
    assert modes == [True]  # a batch alone is measured in its own pass


def test_each_micro_batch_is_measured_with_its_own_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    objective: Any = one_step()
    calls: list[Any] = []
    generate = objective.generator.forward
    monkeypatch.setattr(objective.generator, "forward", lambda *inputs: calls.append(inputs) or generate(*inputs))
    batches = [(b, Noise(0, b.positions)) for b in (pictures(0, 2), pictures(2, 2))]
    for phases in objective.step_phases(batches):
        next(phases)
    measured, trained = calls[:2], calls[2:]
    assert len(trained) == 2 and not torch.equal(measured[0][0], measured[1][0])
    for (lq, conditions, *_), (own_lq, own_conditions, *_) in zip(measured, trained, strict=True):
        assert torch.equal(lq, own_lq) and conditions is own_conditions
    assert measured[0][1] is not measured[1][1]


def test_gradients_are_averaged_over_workers_with_missing_ones_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3)] for _ in range(2)]
    one, other = tiny.tensor(2, 3, name="one"), tiny.tensor(2, 3, name="other")
    rows[0][0].grad, rows[1][0].grad, rows[1][1].grad = one.clone(), other.clone(), other.clone()
    group = Workers(2)
    monkeypatch.setattr(training, "dist", group)
    group.run(lambda rank: average_gradients(rows[rank]))
    for parameters in rows:
        first, second, third = (p.grad for p in parameters)
        assert first is not None and second is not None and third is None
        torch.testing.assert_close(first, (one + other) / 2)
        torch.testing.assert_close(second, other / 2)


# ------------------------------------------------------------------------------- fp16: scaler and every optimiser


class Rounds(Objective):
    """A trainable a, then b, then further steps of b and a, as a fake score with several steps; c has no gradient."""

    def __init__(self, names: Sequence[str]) -> None:
        self.config = {}
        self.trainables = {name: torch.nn.Linear(1, 1, bias=False) for name in "abc"}
        for module in self.trainables.values():
            torch.nn.init.ones_(module.weight)  # type: ignore[arg-type]
        self.progress = {}
        self.names = names

    def parts(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def phases(self, batch: Batch, noise: Noise) -> Any:
        for number, name in enumerate(self.names):
            own = self.trainables["a" if name == "c" else name].weight  # type: ignore[attr-defined]
            yield name, Loss(value=(own * (number + 1) * batch.hq.mean()).square().sum())


@pytest.mark.parametrize("names", ["ab", "abb", "abbbab", "cab", "c"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_trainable_may_step_several_times_under_the_scaler(names: str, kind: Any) -> None:
    """Unscaled gradients have the bits of plain ones, since the scale is a power of two."""
    results = []
    for precision in ("fp32", "fp16"):
        objective, scaler = Rounds(names), training.build_scaler(precision, "cpu")
        optimizers = {n: kind(m.parameters(), lr=0.01) for n, m in objective.trainables.items()}
        for _ in range(2):
            metrics = train_step(
                objective,
                [(pictures(n, 2), Noise(0, pictures(n, 2).positions)) for n in (0, 2)],
                optimizers,
                lr=0.01,
                clip_norm=1e9,
                precision=precision,
                scaler=scaler,
            )
        assert metrics["bad_steps"] == 0 and (scaler is None or metrics["loss_scale"] == 65536)
        results.append([m.weight.detach().clone() for m in objective.trainables.values()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(float(results[1]["abc".index(n)]) != 1 for n in set(names) - {"c"})


def test_an_overflow_in_a_further_step_halves_the_scale_and_leaves_the_other_steps() -> None:
    """Each step of a trainable is judged by itself: the first steps, the second overflows, the third steps again."""

    class Overflow(Rounds):
        def phases(self, batch: Batch, noise: Noise) -> Any:
            for number, (name, loss) in enumerate(super().phases(batch, noise)):
                yield name, Loss(value=loss.value * (float("inf") if number == 1 else 1.0))

    objective, scaler = Overflow("bbb"), training.build_scaler("fp16", "cpu")
    assert scaler is not None
    optimizers: dict[str, Any] = {
        name: torch.optim.SGD(module.parameters(), lr=0.0) for name, module in objective.trainables.items()
    }
    steps: list[float] = []
    optimizers["b"].register_step_post_hook(lambda *_: steps.append(scaler.get_scale()))
    batches = [(pictures(0, 2), Noise(0, pictures(0, 2).positions))]
    arguments: dict[str, Any] = {"lr": 0.0, "clip_norm": 1e9, "precision": "fp16", "scaler": scaler}
    metrics = train_step(objective, batches, optimizers, **arguments)
    assert steps == [65536, 32768] and metrics["loss_scale"] == 65536 and metrics["bad_steps"] == 0
    assert scaler.get_scale() == 32768
    for _ in range(16):
        metrics = train_step(objective, batches, optimizers, **arguments)
    assert scaler.get_scale() <= 1 and metrics["bad_steps"] == 1


def test_several_steps_of_the_fake_score_train_in_fp16() -> None:
    objective = one_step(fake_steps=3)
    optimizers = {n: torch.optim.AdamW(m.parameters(), lr=1e-3) for n, m in objective.trainables.items()}
    scaler = training.build_scaler("fp16", "cpu")
    before = [p.detach().clone() for p in objective.trainables["fake_score"].parameters()]
    for _ in range(2):
        metrics = train_step(
            objective,
            [(pictures(0, 2), Noise(0, pictures(0, 2).positions))],
            optimizers,
            lr=1e-3,
            clip_norm=1.0,
            precision="fp16",
            scaler=scaler,
        )
    after = list(objective.trainables["fake_score"].parameters())
    assert metrics["bad_steps"] == 0
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
