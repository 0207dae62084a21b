"""One optimiser step for any objective, and the other functions of a training loop.

Gradients are averaged over workers explicitly, with one flat all-reduce per trainable, and without a module wrapper.
So phases that run a network several times, toggled adapters and several optimisers need no special case.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.randomness import Noise
from components.recipes import Optimizer
from components.types import Batch, Objective

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Autocast dtype of the forward passes by the recipe's precision; "fp32" has none."""


def build_optimizers(objective: Objective, settings: Optimizer) -> dict[str, torch.optim.Optimizer]:
    """Build one AdamW for each trainable, over its parameters that require gradients."""
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, module in objective.trainables.items():
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"trainable {name!r} has no parameter that requires a gradient")
        optimizers[name] = torch.optim.AdamW(
            parameters,
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            # one pass over weights, gradients and both moments instead of a dozen
            fused=all(p.device.type == "cuda" for p in parameters),
        )
    return optimizers


def train_step(
    objective: Objective,
    batches: Sequence[tuple[Batch, Noise]],
    optimizers: Mapping[str, torch.optim.Optimizer],
    *,
    lr: float,
    clip_norm: float,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, float]:
    """Run all phases of one step over the micro-batches, which advance in lockstep.

    Args:
        objective: objective to minimise.
        batches: (batch, noise) of each micro-batch.
        optimizers: one optimiser for each trainable.
        lr: learning rate of this step.
        clip_norm: largest gradient norm of a trainable.
        precision: "bf16" or "fp16" run the forward passes under autocast.
        scaler: result of build_scaler for this precision; the same object for all steps.

    Returns:
        The losses' metrics, averaged over micro-batches and workers; `<trainable>/grad_norm`; and `bad_steps`, the
        number of trainables that were not updated because their gradient was not finite. Gradients are averaged, so it
        is the same on every worker. With a scaler there is also `loss_scale`, and `bad_steps` counts at a scale of 1 or
        less only: at larger scales, overflows are normal while the scaler searches its scale.

    Raises:
        RuntimeError: micro-batches are in different phases; the message names them.
        ValueError: "fp16" without a scaler, since most gradients would be zero.
    """
    if precision == "fp16" and scaler is None:
        raise ValueError("fp16 needs a gradient scaler: see build_scaler")
    metrics: dict[str, Tensor] = {}
    report: dict[str, float] = {"bad_steps": 0.0} | ({"loss_scale": scaler.get_scale()} if scaler else {})
    scaled: set[str] = set()  # trainables that stepped since the scaler's last update
    device = batches[0][0].hq.device.type
    with _autocast(precision, device):
        phases = objective.step_phases(batches)
    while True:
        names: list[str] = []
        for phase in phases:
            with _autocast(precision, device):
                item = next(phase, None)
            if item is None:
                names.append("")
                continue
            name, loss = item
            names.append(name)
            if scaler and name in scaled:  # a scaler takes one step of an optimiser between two updates
                scaler.update()
                scaled.clear()
            value = loss.value / len(phases)
            (scaler.scale(value) if scaler else value).backward()  # type: ignore[no-untyped-call]
            for key, value in loss.metrics.items():
                metrics[key] = metrics.get(key, torch.zeros((), device=value.device)) + value.detach() / len(phases)
        if len(set(names)) > 1:
            raise RuntimeError(f"micro-batches are in different phases: {names}")
        if not names[0]:
            break
        scaled |= _step(names[0], optimizers[names[0]], lr, clip_norm, report, scaler)
        # a phase's loss also gives gradients to other trainables (a score that judges a generator): drop them
        for optimizer in optimizers.values():
            optimizer.zero_grad(set_to_none=True)
    if scaler and scaled:
        scaler.update()
    return {**{k: float(v) for k, v in average(metrics).items()}, **report}


def _step(
    name: str,
    optimizer: torch.optim.Optimizer,
    lr: float,
    clip_norm: float,
    report: dict[str, float],
    scaler: torch.amp.GradScaler | None,
) -> set[str]:
    """Step one trainable and add to `report`; returns its name if its gradients went through the scaler."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average_gradients(parameters)
    uses_scaler = scaler is not None and any(p.grad is not None for p in parameters)  # without gradients it raises
    if scaler and uses_scaler:
        scaler.unscale_(optimizer)
    norm = float(nn.utils.clip_grad_norm_(parameters, clip_norm))
    bad = not math.isfinite(norm)
    if not bad:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if scaler and uses_scaler:
            scaler.step(optimizer)
        else:
            optimizer.step()
    report[f"{name}/grad_norm"] = norm
    report["bad_steps"] += bad and (scaler is None or scaler.get_scale() <= 1)
    return {name} if uses_scaler else set()


def _autocast(precision: str, device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, dtype=AUTOCAST.get(precision, torch.bfloat16), enabled=precision in AUTOCAST)


def build_scaler(precision: str, device: str) -> torch.amp.GradScaler | None:
    """Build the scaler for fp16 gradients with torch's defaults (it starts at 65,536); None for other precisions."""
    return torch.amp.GradScaler(torch.device(device).type) if precision == "fp16" else None


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over the workers.

    A missing gradient counts as zero. A parameter without a gradient on all workers keeps None, as on one worker, so
    that weight decay does not change it.
    """
    if not _distributed():
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    has_gradient = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    flat = torch.cat([has_gradient, *(g.reshape(-1).to(torch.float32) for g in gradients)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    any_gradient = (flat[: len(parameters)] > 0).tolist()
    offset = len(parameters)
    for parameter, gradient, is_any in zip(parameters, gradients, any_gradient, strict=True):
        count = gradient.numel()
        parameter.grad = flat[offset : offset + count].view_as(gradient).to(gradient.dtype) if is_any else None
        offset += count


def average(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average scalars over the workers."""
    if not _distributed() or not metrics:
        return dict(metrics)
    names = sorted(metrics)
    flat = torch.stack([metrics[n].to(torch.float32) for n in names])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    return dict(zip(names, flat, strict=True))


def worker_place() -> tuple[int, int]:
    """(rank, number of workers); (0, 1) outside of a distributed training."""
    return (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [N, ...] of all workers, each with N rows, in the order of their ranks; no gradients."""
    if not _distributed():
        return rows.detach()
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def evaluate_loss(
    objective: Objective, batches: Sequence[Batch], seed: int, device: str = "cpu", together: int = 1
) -> dict[str, float]:
    """Mean loss of every phase over fixed batches. Positions key the noise, so values are comparable between steps.

    Args:
        together: number of consecutive batches that form the whole batch of one step (see Objective.step_phases); with
            the number of a step's micro-batches the losses do not depend on the accumulation.
    """
    totals: dict[str, float] = {}
    count = sum(len(batch) for batch in batches)
    for first in range(0, len(batches), together):
        group = [(batch, Noise(seed, batch.positions, device)) for batch in batches[first : first + together]]
        for (batch, _), phases in zip(group, objective.step_phases(group), strict=True):
            for name, loss in phases:
                totals[name] = totals.get(name, 0.0) + float(loss.value) * len(batch) / count
    return totals


def averaged_trainables(objective: Objective) -> dict[str, nn.Module]:
    """Return the trainables whose weights are averaged."""
    names = objective.trainables if objective.averaged is None else objective.averaged
    return {name: objective.trainables[name] for name in names}


class Ema:
    """Exponential moving average of the trainables' parameters."""

    def __init__(self, trainables: Mapping[str, nn.Module], decay: float) -> None:
        self.trainables, self.decay = trainables, decay
        self.shadow = {k: p.detach().clone() for k, p in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, module in self.trainables.items():
            for key, parameter in module.named_parameters():
                if parameter.requires_grad:
                    yield f"{name}.{key}", parameter

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update after step `step` (0-based); the decay warms up as (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, parameter in self._parameters():
            self.shadow[key].lerp_(parameter.detach(), 1 - decay)

    @contextlib.contextmanager
    def swap_in(self) -> Iterator[None]:
        """Put the averaged weights into the modules; restore the original weights on exit."""
        originals = {k: p.detach().clone() for k, p in self._parameters()}
        with torch.no_grad():
            for key, parameter in self._parameters():
                parameter.copy_(self.shadow[key])
        try:
            yield
        finally:
            with torch.no_grad():
                for key, parameter in self._parameters():
                    parameter.copy_(originals[key])


def training_state(
    objective: Objective,
    optimizers: Mapping[str, torch.optim.Optimizer],
    ema: Ema | None,
    step: int,
    position: int,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Any]:
    """Return the state for resume: tensors and plain numbers only, so torch.load can read it with weights_only.

    "trainables" are the trained weights. "ema" is their average, which goes to the model folder. "progress" are the
    objective's numbers that a resumed run needs.
    """
    return {
        "step": step,
        "position": position,
        "trainables": {
            name: {k: p.detach() for k, p in module.named_parameters() if p.requires_grad}
            for name, module in objective.trainables.items()
        },
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "ema": ema.shadow if ema else {},
        "scaler": scaler.state_dict() if scaler else {},
        "progress": dict(objective.progress),
    }


@torch.no_grad()
def restore_state(
    state: Mapping[str, Any],
    objective: Objective,
    optimizers: Mapping[str, torch.optim.Optimizer],
    ema: Ema | None,
    scaler: torch.amp.GradScaler | None = None,
) -> int:
    """Load a `training_state` and return its step. Raise ValueError that names the keys that do not fit."""
    for name, module in objective.trainables.items():
        own = {k: p for k, p in module.named_parameters() if p.requires_grad}
        tensors = state["trainables"].get(name, {})
        if set(own) != set(tensors):
            raise ValueError(f"checkpoint does not fit {name!r}: keys {sorted(set(own) ^ set(tensors))[:8]} differ")
        for key, parameter in own.items():
            parameter.copy_(tensors[key])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    if scaler and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    objective.progress.update(state.get("progress") or {})
    if ema:
        if set(state["ema"]) != set(ema.shadow):
            keys = sorted(set(state["ema"]) ^ set(ema.shadow))[:8]
            raise ValueError(f"checkpoint does not fit the average of the weights: keys {keys} differ")
        for key, value in state["ema"].items():
            ema.shadow[key].copy_(value)
    return int(state["step"])


@contextlib.contextmanager
def preserve_requires_grad(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore requires_grad of the modules' parameters afterwards, since a restorer freezes its network."""
    parameters = [p for module in modules for p in module.parameters()]
    flags = [p.requires_grad for p in parameters]
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
