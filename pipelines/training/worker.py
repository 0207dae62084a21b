"""The training loop of one rank. Ray Train calls `worker` in one process per rank.

A rank opens its stream at the checkpoint's position. So a resumed run sees the samples in the same order as a run
without interruption, on any number of ranks. Only rank 0 writes metrics, sample pictures, checkpoints and the model.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from ray import train as ray_train

from components.images import encode_png
from components.models import ModelCard, save_model
from components.randomness import Noise
from components.recipes import identity
from components.systems import SYSTEMS
from components.tensors import collate, tensor_to_images
from components.training import (
    average,
    evaluate_loss,
    train_step,
    training_state,
)
from components.types import Batch, SampleError
from components.writing import replace_file
from pipelines.core.metrics import CPU_SECONDS, PEAK_MEMORY, TRAINED_PARAMETERS, heldout_losses
from pipelines.stream.ahead import choose_reads
from pipelines.stream.feed import rank_batches
from pipelines.training.stage_files import METRICS, MODEL, SAMPLES, Sample, is_whole, log_order
from pipelines.training.state import Run, State, build_state, resume

log = logging.getLogger(__name__)

HELDOUT_SEED = 20260101  # seed of the fixed held-out triples, independent of the run's seed


def worker(config: Mapping[str, Run]) -> None:
    """Train one rank. Ray Train passes the Run as config["run"]."""
    state = build_state(config["run"])
    resume(state)
    if state.step == 0:
        evaluate(state)
    if state.step == state.recipe.steps and not is_whole(state.run.out):  # a finished run lost files
        evaluate(state)
        write_model(state)
    for micro_batches in micro_batches_of(state):
        take_step(state, micro_batches)
        last = state.step == state.recipe.steps
        if last or state.step % state.recipe.evaluate_every == 0:
            evaluate(state)
        if last:
            write_model(state)
        if last or state.step % state.recipe.checkpoint_every == 0:
            write_checkpoint(state)
            if not last and is_late(state):
                return


def is_late(state: State) -> bool:
    """Whether the run's time is up; all ranks agree."""
    late = float(0 < state.run.until <= time.time())
    return float(average({"late": torch.tensor(late, device=state.device)})["late"]) > 0


# --- one step ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MicroBatches:
    """The data of one step.

    Attributes:
        batches: micro-batches, each with its noise.
        samples: the samples of all micro-batches, in order.
        start: time.time() at the start of the step; data_seconds: time until the data was there.
    """

    batches: list[tuple[Batch, Noise]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    start: float = 0.0
    data_seconds: float = 0.0


def micro_batches_of(state: State) -> Iterator[MicroBatches]:
    """Yield the data of each remaining step, in order."""
    recipe, steps = state.recipe, state.recipe.steps - state.step
    if steps <= 0:
        return
    first, last = state.step * recipe.batch_size, recipe.steps * recipe.batch_size
    micro = recipe.batch_size // (recipe.accumulation * state.world)
    placement, ranks_here = recipe.placement, ray_train.get_context().get_local_world_size()
    blocks = rank_batches(
        state.stream,
        first,
        last,
        recipe.batch_size,
        state.rank,
        state.world,
        micro=micro,
        tasks=placement.data_tasks,
        task_cpus=state.run.cpus_per_task,
        reads=choose_reads(
            state.stream,
            last - first,
            ranks_here / state.world,
            placement.shard_reads,
            placement.shard_fetches,
            int(placement.cache_gib * 2**30),
        ),
    )
    for _ in range(steps):
        data = MicroBatches(start=time.time())
        for _ in range(recipe.accumulation):
            columns = next(blocks)
            batch = collate(columns, state.device, state.target)
            data.batches.append((batch, Noise(recipe.seed, batch.positions, state.device)))
            texts = ([str(text) for text in columns[name]] for name in ("replaced", "uncaptioned"))
            data.samples += map(Sample, batch.positions.tolist(), batch.keys, *texts)
        data.data_seconds = time.time() - data.start
        yield data


def take_step(state: State, data: MicroBatches) -> None:
    """Take one optimiser step and write its rows of metrics.jsonl and order.jsonl.

    Raises:
        FloatingPointError: optimizer.max_bad_steps steps in a row had no finite gradient.
    """
    recipe = state.recipe
    lr = recipe.optimizer.lr_at(state.step, recipe.steps)
    cpu_start = time.process_time()
    metrics = train_step(
        state.objective,
        data.batches,
        state.optimizers,
        lr=lr,
        clip_norm=recipe.optimizer.clip_norm,
        precision=recipe.precision,
        scaler=state.scaler,
    )
    if state.ema:
        state.ema.update(state.step)
    costs = {CPU_SECONDS: time.process_time() - cpu_start, PEAK_MEMORY: peak_memory_mib(state.device)}
    if state.step == 0:
        costs[TRAINED_PARAMETERS] = float(trained_parameters(state))
    state.step += 1
    state.bad_steps = state.bad_steps + 1 if metrics["bad_steps"] else 0
    if state.bad_steps >= recipe.optimizer.max_bad_steps:
        raise FloatingPointError(
            f"{recipe.name}: no finite gradient in {state.bad_steps} steps, the last at step {state.step} "
            f"with samples {[sample.key for sample in data.samples]}"
        )
    if state.stream.captioning:
        count = torch.tensor(float(sum(bool(sample.uncaptioned) for sample in data.samples)), device=state.device)
        metrics["uncaptioned"] = float(average({"uncaptioned": count})["uncaptioned"]) * state.world
    speed = {"seconds_per_step": time.time() - data.start, "seconds_waiting_for_data": data.data_seconds}
    state.log.write(state.step, metrics | speed | costs | {"lr": lr})
    log_order(state.run.out, state.rank, state.step, data.samples)


def trained_parameters(state: State) -> int:
    """The number of parameters that the stage's optimisers change, each counted once."""
    groups = (group["params"] for optimizer in state.optimizers.values() for group in optimizer.param_groups)
    return sum({id(p): p.numel() for params in groups for p in params}.values())


def peak_memory_mib(device: str) -> float:
    """The largest memory so far of this process in MiB: of torch on a GPU, else of the process with its libraries.

    The kernel's VmHWM serves, because getrusage's number starts at the parent's size. NaN where there is none.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), float("nan"))


# --- files of the stage, written by rank 0 ----------------------------------------------------------------------------


def evaluate(state: State) -> None:
    """Write the held-out losses to metrics.jsonl, and a sheet of sample pictures."""
    if state.rank != 0:
        return
    with state.average_weights():
        parts = state.recipe.accumulation * state.world  # held-out batches have the size of a micro-batch
        losses = evaluate_loss(state.objective, state.heldout, HELDOUT_SEED, state.device, together=parts)
        state.log.write(state.step, {f"heldout/{name}": loss for name, loss in losses.items()})
        try:
            _write_samples(state, state.run.out / SAMPLES / f"step-{state.step:06d}.png")
        except SampleError as error:  # the training goes on: its bad steps have their own limit
            log.warning("no sample pictures at step %d: %s", state.step, error)
            state.log.write(state.step, {f"samples/{error.code}": 1.0})


def _write_samples(state: State, path: Path) -> None:
    """Write LQ | restored | HQ of the first held-out pictures, if the stage can restore.

    Raises:
        SampleError: "not_finite": the networks made values that are no picture.
    """
    heldout = state.heldout[0]
    count = min(3, len(heldout))
    lq, hq, prompts = heldout.lq[:count], heldout.hq[:count], heldout.prompts[:count]
    with torch.no_grad():
        restored = SYSTEMS[state.recipe.system].look(state.objective, state.recipe, lq, prompts, HELDOUT_SEED)
    if restored is None:
        return
    columns = [tensor_to_images(images[:count], heldout.keys[:count]) for images in (lq, restored, hq)]
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in zip(*columns, strict=True)], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, encode_png(sheet, {"columns": "lq, restored, hq"}))


def write_model(state: State) -> None:
    """Write the stage's model folder, with held-out losses in model.json."""
    if state.rank != 0:
        return
    recipe, objective, inputs, out = state.recipe, state.objective, state.run.inputs, state.run.out
    with state.average_weights():
        metrics = dict(SYSTEMS[recipe.system].measure(objective, state.heldout))
        for name, losses in heldout_losses(out / METRICS).items():
            metrics |= {f"heldout/{name}/start": losses[min(losses)], f"heldout/{name}/end": losses[max(losses)]}
        card = ModelCard(
            name=recipe.name,
            system=recipe.system,
            recipe=identity(recipe),
            prior=objective.prior.source if objective.prior is not None and recipe.opens_prior else None,
            config=objective.config,
            parents={stage: model.digest for stage, model in state.parents.items()},
            data_manifest_digest=",".join(f"{name}:{digest}" for name, digest in sorted(inputs.data_digests.items())),
            licence="the weights follow the licences of the prior and of the corpus",
            permitted_use="see the prior's and the corpus' licences",
            metrics=metrics,
        )
        save_model(out / MODEL, card, objective.parts(), objective.files)


def write_checkpoint(state: State) -> None:
    """Report step and position to Ray Train; rank 0 adds a checkpoint. Every rank must call this."""
    position = state.step * state.recipe.batch_size
    report = {"step": state.step, "position": position}
    if state.rank != 0:
        ray_train.report(report)
        return
    with tempfile.TemporaryDirectory() as folder:
        tensors = training_state(state.objective, state.optimizers, state.ema, state.step, position, state.scaler)
        torch.save(tensors, Path(folder) / "state.pt")
        ray_train.report(report, checkpoint=ray_train.Checkpoint.from_directory(folder))
