"""`restoray train` on the driver: one training stage of any system under Ray Train.

The driver checks the inputs, starts the captioners, and runs worker.py on every rank. While the ranks train, it reads
new rows of metrics.jsonl for the progress bar and the tracker.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.recipes import Recipe
from pipelines.core.devices import check_gpus
from pipelines.core.errors import Failure, Unfinished, UsageError
from pipelines.core.joining import is_own_ray
from pipelines.core.metrics import OnMetrics, Tail, heldout_losses, last_step
from pipelines.core.placement import Needs, check_placement
from pipelines.core.pool import last_line
from pipelines.stream.feed import store_bytes
from pipelines.stream.texts import running_captioners
from pipelines.training.inputs import TrainInputs, check_inputs, stream_config
from pipelines.training.stage_files import METRICS, MODEL

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a training stage: model folder, held-out losses by trainable and step, duration in seconds."""

    model: Path
    heldout: Mapping[str, Mapping[int, float]]
    seconds: float


def train(
    recipe: Recipe,
    inputs: TrainInputs,
    out: Path,
    on_metrics: OnMetrics | None = None,
    minutes: float = 0.0,
    start: Path | None = None,
) -> TrainResult:
    """Train one stage, from the last checkpoint in `out` if there is one. Ray must be initialised.

    Args:
        recipe: resolved recipe.
        inputs: corpora and parent models.
        out: the stage's folder, for model/, metrics.jsonl, samples/, order.jsonl and ray/.
        on_metrics: called with new (step, name, value, time) rows while the stage trains.
        minutes: the training ends at its first checkpoint after this time; 0 for no limit.
        start: folder of a packed state (packing.py), with which a training without a checkpoint starts.

    Raises:
        UsageError: see check_inputs; or the recipe needs a GPU and Ray has none.
        Unfinished: the minutes are over; the same call continues.
        Failure: the run ended without a model; the message has the reason.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    from pipelines.training.state import Run
    from pipelines.training.worker import worker

    begin, cwd = time.time(), Path.cwd()
    out, inputs = out.absolute(), inputs.absolute()  # another node may not have this folder
    check_inputs(recipe, inputs)
    out.mkdir(parents=True, exist_ok=True)
    placement = recipe.placement
    use_gpu = placement.gpus_per_worker > 0
    if not placement.wait_minutes:  # an autoscaler may bring the GPUs
        if use_gpu and not ray.cluster_resources().get("GPU"):
            raise UsageError(
                f"{recipe.name} needs {placement.gpus_per_worker:g} GPU for each worker, and Ray has none: "
                "placement.gpus_per_worker=0 trains on the CPU."
            )
        check_gpus(recipe)
    needs = worker_needs(recipe)
    check_placement(f"a worker of {recipe.name}", needs, together=True)
    resources = {"CPU": placement.cpus_per_worker, **needs.bundle()}
    scaling = ScalingConfig(  # type: ignore[call-arg] # the class of Ray Train 2 has labels
        num_workers=placement.workers,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        label_selector=dict(needs.labels) or None,
    )
    cpus_per_task = data_cpus(recipe)
    with running_captioners(recipe) as captioning, Tail(out / METRICS, on_metrics), _own_interrupts():
        trainer = _trainer()(
            worker,
            train_loop_config={
                "run": Run(
                    recipe=recipe,
                    inputs=inputs,
                    addresses=inputs.addresses(),
                    out=out,
                    cwd=cwd,
                    captioning=captioning,
                    cpus_per_task=cpus_per_task,
                    until=begin + 60 * minutes if minutes else 0.0,
                    start=start,
                )
            },
            scaling_config=scaling,
            run_config=RunConfig(
                name="run",
                storage_path=str((out / "ray").resolve()),
                failure_config=FailureConfig(max_failures=placement.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
            ),
            torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=1800),
        )
        try:
            result = trainer.fit()
        except Exception as error:  # Ray wraps a worker's error in its own types
            raise _ended_early(recipe, error) from error
    if result.error is None and minutes and time.time() >= begin + 60 * minutes and not (out / MODEL).is_dir():
        raise Unfinished(
            f"{recipe.name}: {last_step(out / METRICS)} of {recipe.steps} steps are done after {minutes:g} minutes; "
            "the same command continues."
        )
    if result.error is not None or not (out / MODEL / "model.json").is_file():
        raise _ended_early(recipe, result.error)
    return TrainResult(model=out / MODEL, heldout=heldout_losses(out / METRICS), seconds=time.time() - begin)


def data_cpus(recipe: Recipe) -> float:
    """Logical CPUs of one data task: 1, or less if trainers and captioners leave less than 1 for each rank.

    A data task waits with its CPU until its rank takes the rows. If all ranks shared one CPU, a rank whose task waits
    could hold the CPU that another rank needs, and all would wait without end.

    Raises:
        UsageError: they leave no CPU, so that no step could start.
    """
    import ray

    placement = recipe.placement
    captioners = placement.captioners if recipe.missing_captions.model else 0
    in_use = placement.workers * placement.cpus_per_worker + captioners * placement.cpus_per_captioner
    total = float(ray.cluster_resources().get("CPU", 0.0))
    free = total - in_use
    if free <= 0:
        raise UsageError(
            f"{recipe.name}: trainers{' and captioners' if captioners else ''} take {in_use:g} CPUs, Ray has {total:g},"
            " and the data tasks need some too: lower placement.cpus_per_worker or placement.workers."
        )
    # Ray counts in units of 0.0001
    return min(1.0, math.floor(free / placement.workers * 1e4) / 1e4)


def worker_needs(recipe: Recipe) -> Needs:
    """Needs of the workers of a recipe."""
    placement = recipe.placement
    return Needs(
        workers=placement.workers,
        cpus=placement.cpus_per_worker,
        gpus=placement.gpus_per_worker,
        memory_gib=placement.memory_gib_per_worker,
        resources=placement.resources_per_worker,
        labels=placement.labels,
        wait_minutes=placement.wait_minutes,
    )


def store_mib(recipe: Recipe) -> float:
    """MiB of the object store for the pixels on their way to all workers of a recipe; precomputed columns come on top.

    Each worker's dataset may keep so much there, see feed.store_bytes.
    """
    corpora = {name: Path() for name in (*recipe.sources, *([recipe.unpaired] if recipe.unpaired else []))}
    plain = stream_config(recipe, TrainInputs(corpora=corpora))
    config = replace(plain, latents="", embeddings="")
    share = recipe.batch_size // recipe.placement.workers
    micro = max(1, share // recipe.accumulation)
    return recipe.placement.workers * store_bytes(config, micro, share, recipe.placement.data_tasks) / 2**20


def _trainer() -> type[TorchTrainer]:
    """The TorchTrainer; for a Ray of our own, without its watcher of dead controllers.

    That costs 12 s at the end of each training: it frees a placement group if the controller dies, asks Ray's
    dashboard, which a local Ray has not, and waits until its time-out. A local Ray ends with its command.
    """
    from ray.train.torch import TorchTrainer

    if not is_own_ray():
        return TorchTrainer

    class LocalTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

    return LocalTrainer


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Restore our handler of Ctrl-C: Ray Train's handler stays registered, and ends the process with its own code."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGINT, handler)


def _ended_early(recipe: Recipe, error: object) -> Failure:
    reason = last_line(error) if str(error).strip() else "no reason given"
    return Failure(f"{recipe.name}: training ended early ({reason}); run it again to resume.")
