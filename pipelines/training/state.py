"""The state of one rank: built from the recipe and the inputs, and restored from a checkpoint."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from ray import train as ray_train
from ray.train.torch import get_device

from components.models import Model, load_model
from components.packed_states import unpack_state
from components.places import on_this_machine
from components.recipes import Recipe
from components.systems import SYSTEMS
from components.tensors import collate_rows, images_to_tensor
from components.training import Ema, averaged_trainables, build_optimizers, build_scaler, restore_state
from components.types import Batch, Objective, Plan
from pipelines.core.environment import cores
from pipelines.stream.config import StreamConfig
from pipelines.stream.rows import heldout_rows, load_row, target_plan
from pipelines.stream.texts import Captioning
from pipelines.training.inputs import TrainInputs, stream_config
from pipelines.training.packing import read_packed
from pipelines.training.stage_files import Log

EXAMPLES = 64  # pictures that an objective may use while it is built, for example for principal components
EXAMPLES_FROM = 2**40  # first position of these pictures, far beyond the positions of the run


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a run, which the driver sends to every rank.

    Attributes:
        recipe, inputs: of the stage, with the driver's folders.
        addresses: of the corpora in stores by name.
        out: the stage's folder.
        cwd: the driver's current folder; relative model paths in a recipe start there.
        captioning: captioner actors for missing captions; None: missing captions stay empty.
        cpus_per_task: logical CPUs of one data task. Each rank can run at least one at any time.
        until: time in seconds since 1970 after which the run ends at its next checkpoint; 0 for no limit.
        start: folder of a packed state, with which a run without a checkpoint starts; None for none.
    """

    recipe: Recipe
    inputs: TrainInputs
    out: Path
    cwd: Path
    addresses: Mapping[str, str] = field(default_factory=dict)
    captioning: Captioning | None = None
    cpus_per_task: float = 1.0
    until: float = 0.0
    start: Path | None = None


@dataclass(kw_only=True)
class State:
    """The state of one rank.

    Attributes:
        run: settings from the driver.
        rank, world, device: of this process.
        stream: configuration of the training rows; target: plan for the training target if the device degrades.
        heldout: fixed batches of held-out pictures.
        parents: parent models by stage.
        objective, optimizers, ema, scaler: the trainable state; ema and scaler are None if the recipe has none.
        log: writer of metrics.jsonl, active on rank 0 only.
        step: number of finished steps.
        bad_steps: number of steps in a row without a finite gradient.
    """

    run: Run
    rank: int
    world: int
    device: str
    stream: StreamConfig
    target: Plan | None
    heldout: Sequence[Batch]
    parents: Mapping[str, Model]
    objective: Objective
    optimizers: Mapping[str, torch.optim.Optimizer]
    ema: Ema | None
    scaler: torch.amp.GradScaler | None
    log: Log
    step: int = 0
    bad_steps: int = 0

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    def average_weights(self) -> contextlib.AbstractContextManager[None]:
        """Put the averaged weights into the modules inside a `with` block, if the recipe has an average."""
        return self.ema.swap_in() if self.ema else contextlib.nullcontext()


def build_state(run: Run) -> State:
    """Build networks, optimisers and held-out batches of a rank, without a checkpoint."""
    context = ray_train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    with contextlib.suppress(OSError):
        os.chdir(run.cwd)
    recipe, device = run.recipe, str(get_device())
    torch.set_num_threads(_threads(recipe, world))
    stream = stream_config(recipe, run.inputs.on_this_node(run.addresses), run.captioning)
    target = target_plan(stream)
    rows = heldout_rows(stream, recipe.heldout_triples)
    size = recipe.batch_size // (recipe.accumulation * world)  # a micro-batch fits into memory
    heldout = [collate_rows(rows[n : n + size], device, target) for n in range(0, len(rows), size)]
    parents = {stage: load_model(on_this_machine(folder)) for stage, folder in run.inputs.parents.items()}
    objective = SYSTEMS[recipe.system].build_objective(recipe, parents, lambda: _examples(stream), device)
    return State(
        run=run,
        rank=rank,
        world=world,
        device=device,
        stream=stream,
        target=target,
        heldout=heldout,
        parents=parents,
        objective=objective,
        optimizers=build_optimizers(objective, recipe.optimizer),
        ema=Ema(averaged_trainables(objective), recipe.ema_decay) if recipe.ema_decay else None,
        scaler=build_scaler(recipe.precision, device),
        log=Log(run.out, active=rank == 0),
    )


def _threads(recipe: Recipe, world: int) -> int:
    """Number of torch threads of a rank; one core stays free for the data tasks.

    With more threads than cores, steps took 3.5 times as long: threads waited for a preempted thread.
    """
    return recipe.placement.threads or max(1, (cores() - 1) // world)


def _examples(stream: StreamConfig) -> torch.Tensor:
    """Pictures [EXAMPLES, 3, H, W] in [-1, 1] for an objective that needs some while it is built."""
    without_captions = replace(stream, captioning=None)
    return images_to_tensor([load_row(without_captions, EXAMPLES_FROM + n)["hq"] for n in range(EXAMPLES)])


def resume(state: State) -> None:
    """Load the newest checkpoint, or the packed state to start from, if there is one."""
    checkpoint = ray_train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            tensors = torch.load(Path(folder) / "state.pt", weights_only=True, map_location=state.device)
        state.step = restore_state(tensors, state.objective, state.optimizers, state.ema, state.scaler)
    elif state.run.start is not None:
        packed = read_packed(on_this_machine(state.run.start))
        unpack_state(packed.tensors(), packed.model.parts(), packed.step, state.objective, state.optimizers, state.ema)
        state.objective.progress.update(packed.progress)
        state.step = packed.step
