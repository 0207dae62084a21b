"""`restoray train`: one training stage of any system under Ray Train.

Every worker opens its own Ray Data pipeline at the position that the checkpoint names, so a resumed run, on any number
of workers, sees the samples in the order that an undisturbed one would have seen. Rank 0 writes metrics.jsonl and
sample pictures into the stage's folder; the driver tails the file into the progress bar and the tracker.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.recipes import Recipe, as_dict, identity, resolve
from pipelines.errors import Failure, UsageError
from pipelines.rows import end_torn_line, read_lines
from pipelines.tracking import tail_metrics

if TYPE_CHECKING:
    from components.types import Batch, Objective

MODEL, METRICS, SAMPLES, ORDER = "model", "metrics.jsonl", "samples", "order.jsonl"
HELDOUT_SEED = 20260101  # of the fixed held-out triples: never the run's own seed
EXAMPLES = 64  # pictures that an objective may look at while it is built (principal components)

Seen = tuple[int, str, str, str]
"""Position, key, what the sample replaced, and why it has no caption, of a row that was trained on."""
OnMetrics = Callable[[Sequence[tuple[int, str, float, float]]], None]


@dataclass(frozen=True, kw_only=True)
class TrainInputs:
    """What a stage is trained on.

    Attributes:
        corpora: corpus folder by the name that recipe.sources uses.
        parents: model folder by the stage that made it.
        data_digests: manifest digest by corpus name.
    """

    corpora: Mapping[str, Path] = field(default_factory=dict)
    parents: Mapping[str, Path] = field(default_factory=dict)
    data_digests: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Model folder, held-out losses by step, seconds."""

    model: Path
    heldout: Mapping[str, Mapping[int, float]]
    seconds: float


def stream_config(recipe: Recipe, inputs: TrainInputs, captioning: Any = None) -> Any:
    """What the data workers need to know of a recipe; UsageError for a source that is no input."""
    from pipelines.stream_config import DEAD_LEAVES, StreamConfig

    named = {*recipe.sources, *([recipe.unpaired] if recipe.unpaired else [])}
    unknown = sorted(named - set(inputs.corpora) - {DEAD_LEAVES})
    if unknown:
        raise UsageError(f"{recipe.name}: {missing_corpora(unknown, sorted(inputs.corpora))}")
    sources = [
        (name if name == DEAD_LEAVES else str(inputs.corpora[name]), weight) for name, weight in recipe.sources.items()
    ]
    return StreamConfig(
        sources=tuple(sources),
        seed=recipe.seed,
        resolution=recipe.resolution,
        short_side=recipe.short_side,
        scale=(float(recipe.scale[0]), float(recipe.scale[1])),
        small=recipe.small,
        buckets=tuple((int(height), int(width)) for height, width in recipe.buckets),
        batch_size=recipe.batch_size,
        window_samples=recipe.window_samples,
        crop=recipe.crop,
        flip=recipe.flip,
        captioner=recipe.captioner,
        captioners=tuple(recipe.captioners.get(name, recipe.captioner) for name in recipe.sources),
        captioning=captioning,
        latents=recipe.latents,
        embeddings=recipe.embeddings,
        degradation="" if recipe.pairs or recipe.unpaired else recipe.degradation.preset,
        pairs=recipe.pairs,
        unpaired=str(inputs.corpora[recipe.unpaired]) if recipe.unpaired else "",
        prompt=recipe.prompt,
        degradation_options=dict(recipe.degradation.options),
        degrade_on=recipe.degradation.degrade_on,
    )


def missing_corpora(missing: Sequence[str], given: Sequence[str]) -> str:
    """One sentence for each corpus that a recipe's sources name and no input brings: how to get it.

    A name of the catalogue tells its own command; what lies under a name is the user's choice, any corpus will do.
    """
    from pipelines.catalogue import entry_of, load_spec
    from pipelines.home import shipped

    told = [f"sources names {', '.join(missing)}, and the inputs bring {', '.join(given) or 'no corpus'}."]
    for name in missing:
        if name in shipped("datasets"):
            entry = entry_of(load_spec(name))
            wanted = "; ".join(f"{need.key} takes {need.what}" for need in entry.needs if need.what)
            told.append(
                f"{name}: {entry.description} ({entry.homepage or 'no homepage'}). Curate it with: {entry.command}"
                f"{f' ({wanted})' if wanted else ''}; then add --input {name}=CORPUS."
            )
        else:
            told.append(f"{name}: add --input {name}=CORPUS, any curated corpus (restoray curate).")
    return " ".join(told)


def check_inputs(recipe: Recipe, inputs: TrainInputs) -> None:
    """Find on the driver what would else end the workers, which restart and blame the run.

    Raises:
        UsageError: the model that the stage goes on from is missing or of another stage, a source is no input or no
            corpus, no source holds a picture out, or precomputed columns are not what the stage would compute.
    """
    from components.systems import SYSTEMS, parent_stage
    from pipelines.heldout import SPLIT
    from pipelines.shards import open_corpus
    from pipelines.stream_config import DEAD_LEAVES, captioner_of
    from pipelines.stream_texts import NEGATIVE

    wanted, given = parent_stage(recipe), sorted(inputs.parents)
    starts = SYSTEMS[recipe.system].continues.get(recipe.stage, ())
    if given != ([wanted] if wanted else []) and given not in [[start] for start in starts]:
        others = f" (or, to train on what is there, from one of stage {' or '.join(starts)})" if starts else ""
        raise UsageError(
            f"{recipe.name}: stage {recipe.stage} goes on from "
            f"{f'the model of stage {wanted}' if wanted else 'no model'}{others}, "
            f"and its inputs hold {' and '.join(f'one of stage {stage}' for stage in given) or 'none'}."
        )
    stream = stream_config(recipe, inputs)
    folders = [folder for folder, _ in stream.sources if folder != DEAD_LEAVES]
    corpora = [open_corpus(folder).splits for folder in folders if captioner_of(stream, folder) != NEGATIVE]
    if not any(len(splits[SPLIT]) for splits in corpora if SPLIT in splits):
        named = ", ".join(folders) or "no corpus"
        raise UsageError(
            f"{recipe.name}: there is no held-out picture to measure with ({named}): "
            "a corpus needs at least 2 usable pictures."
        )
    if recipe.unpaired:
        splits = open_corpus(stream.unpaired).splits
        if SPLIT not in splits or not len(splits[SPLIT]):
            raise UsageError(f"{recipe.name}: {stream.unpaired} holds no picture out, and its inputs are measured too.")
    if recipe.latents or recipe.embeddings:
        _check_precomputed(recipe, inputs, stream)


def _check_precomputed(recipe: Recipe, inputs: TrainInputs, stream: Any) -> None:
    """Raises UsageError where the stage would not use, or not compute, what the columns hold."""
    from components.models import ModelError
    from components.negatives import prior_digest
    from components.systems import SYSTEMS
    from pipelines.stream import check_stream

    system = SYSTEMS[recipe.system]
    usable = system.precomputed.get(recipe.stage, ())
    for what in ("latents", "embeddings"):
        if getattr(recipe, what) and what not in usable:
            raise UsageError(f"{recipe.name}: stage {recipe.stage} cannot train on precomputed {what}.")
    try:
        digest = prior_digest(system.encoded_with(recipe, inputs.parents))
    except ModelError as error:
        raise UsageError(str(error)) from error
    check_stream(stream, digest)


def train(recipe: Recipe, inputs: TrainInputs, out: Path, on_metrics: OnMetrics | None = None) -> TrainResult:
    """Train one stage; goes on from the last checkpoint in `out`. Needs an initialised Ray.

    Args:
        recipe: resolved recipe.
        inputs: corpora and parent models.
        out: the stage's folder; receives model/, metrics.jsonl, samples/, order.jsonl, ray/.
        on_metrics: called now and then with new (step, name, value, time) rows.

    Raises:
        UsageError: see check_inputs.
        Failure: the run ended without a model; the message says why and that a rerun resumes.
        GateFailed: the model is there, and worse than its teacher.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipelines.stream_texts import running_captioners

    started = time.time()
    check_inputs(recipe, inputs)
    out.mkdir(parents=True, exist_ok=True)
    placement = recipe.placement
    use_gpu = placement.gpus_per_worker > 0
    if use_gpu and not ray.cluster_resources().get("GPU"):
        raise UsageError(
            f"{recipe.name} asks for {placement.gpus_per_worker:g} GPU for each worker, and Ray sees none: "
            "placement.gpus_per_worker=0 trains on the CPU."
        )
    resources = {"CPU": placement.cpus_per_worker} | ({"GPU": placement.gpus_per_worker} if use_gpu else {})
    scaling = ScalingConfig(num_workers=placement.workers, use_gpu=use_gpu, resources_per_worker=resources)
    loop: dict[str, Any] = {
        "recipe": as_dict(recipe),
        "corpora": {k: str(v) for k, v in inputs.corpora.items()},
        "parents": {k: str(v) for k, v in inputs.parents.items()},
        "data_digests": dict(inputs.data_digests),
        "out": str(out),
        "folder": os.getcwd(),
    }
    with running_captioners(recipe) as captioning, Tail(out / METRICS, on_metrics), _own_interrupts():
        trainer = TorchTrainer(
            worker,
            train_loop_config={**loop, "captioning": captioning},
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
    if result.error is not None or not (out / MODEL / "model.json").is_file():
        raise _ended_early(recipe, result.error)
    if getattr(recipe, "teacher", ""):
        from pipelines.gate import pass_gate

        pass_gate(recipe, inputs, out)
    return TrainResult(model=out / MODEL, heldout=heldout_losses(out / METRICS), seconds=time.time() - started)


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Ctrl-C stays ours: Ray Train's handler would end the process with a code of its own and then stay registered."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGINT, before)


def _ended_early(recipe: Recipe, error: object) -> Failure:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[-1] if lines else "no reason given"  # the last line of a worker's traceback
    return Failure(f"{recipe.name}: training ended early ({reason}); run it again to resume.")


def read_metrics(path: Path) -> dict[str, dict[int, float]]:
    """metrics.jsonl as name -> step -> value; after a resume the later value of a step stands."""
    series: dict[str, dict[int, float]] = {}
    for step, name, value, _ in tail_metrics(path)[0]:
        series.setdefault(name, {})[step] = value
    return series


def is_whole(out: Path) -> bool:
    """Whether a stage's folder has its metrics, and its model with every file as model.json names it."""
    from components.models import file_sha256, load_model

    try:
        model = load_model(out / MODEL)
        for name in model.info["files"]:
            model.file(name)
        parts = model.info["parts"].values()
        return (out / METRICS).is_file() and all(file_sha256(model.path / p["file"]) == p["sha256"] for p in parts)
    except (OSError, ValueError):
        return False


def heldout_losses(path: Path) -> dict[str, dict[int, float]]:
    """Held-out loss by trainable, by step."""
    return {
        name.removeprefix("heldout/"): values
        for name, values in read_metrics(path).items()
        if name.startswith("heldout/")
    }


class Tail:
    """Context manager: a thread that hands new lines of a metrics file to a callback, the last ones at exit."""

    def __init__(self, path: Path, callback: OnMetrics | None, every_s: float = 0.5) -> None:
        self.path, self.callback, self.every_s = path, callback, every_s
        self.offset = path.stat().st_size if path.is_file() else 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Tail:
        if self.callback:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        if self.callback:
            self.thread.join()
            self._read()

    def _run(self) -> None:
        while not self.stop.wait(self.every_s):
            self._read()

    def _read(self) -> None:
        rows, self.offset = tail_metrics(self.path, self.offset)
        if rows and self.callback:
            self.callback(rows)


# ---------------------------------------------------------------- on the workers


def worker(config: dict[str, Any]) -> None:
    """The training loop of one rank."""
    import torch
    from ray import train as ray_train
    from ray.train.torch import get_device

    from components.models import load_model
    from components.randomness import Noise
    from components.systems import SYSTEMS
    from components.tensors import collate
    from components.training import (
        Ema,
        average,
        averaged,
        build_optimizers,
        build_scaler,
        evaluate_loss,
        restore_state,
        train_step,
    )
    from pipelines.feed import rank_batches
    from pipelines.stream import heldout_rows, target_plan

    context = ray_train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    recipe = resolve(SYSTEMS[config["recipe"]["system"]].recipe, config["recipe"], (), config["recipe"]["name"])
    inputs = TrainInputs(
        corpora={k: Path(v) for k, v in config["corpora"].items()},
        parents={k: Path(v) for k, v in config["parents"].items()},
        data_digests=config["data_digests"],
    )
    out = Path(config["out"])
    with contextlib.suppress(OSError):  # models that a recipe names by relative paths lie there
        os.chdir(config["folder"])
    # one core stays free for the data tasks: threads that wait for a preempted sibling made steps 3.5 times slower
    threads = recipe.placement.threads or max(1, (len(os.sched_getaffinity(0)) - 1) // world)
    torch.set_num_threads(threads)
    device = str(get_device())
    stream = stream_config(recipe, inputs, config["captioning"])

    target = target_plan(stream)
    # as many pictures at a time as a training step has: what fits there fits here
    at_once = recipe.batch_size // (recipe.accumulation * world)
    heldout = _batches(heldout_rows(stream, recipe.heldout_triples), at_once, device, target)
    parents = {k: load_model(v) for k, v in inputs.parents.items()}
    objective = SYSTEMS[recipe.system].build_objective(recipe, parents, _examples(stream), device=device)
    optimizers = build_optimizers(objective, recipe.optimizer)
    ema = Ema(averaged(objective), recipe.ema_decay) if recipe.ema_decay else None
    scaler = build_scaler(recipe.precision, device)
    start = 0
    checkpoint = ray_train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", weights_only=True, map_location=device)
        start = restore_state(state, objective, optimizers, ema, scaler)

    log = Log(out, active=rank == 0)
    local = recipe.batch_size // world
    micro = local // recipe.accumulation
    batches: Iterator[Mapping[str, Any]] = iter(())
    if start < recipe.steps:
        first, last = start * recipe.batch_size, recipe.steps * recipe.batch_size
        batches = rank_batches(stream, first, last, recipe.batch_size, rank, world, micro=micro)

    def evaluate(step: int) -> None:
        if rank == 0:
            with ema.applied() if ema else contextlib.nullcontext():
                losses = evaluate_loss(objective, heldout, HELDOUT_SEED, device)
                log.write(step, {f"heldout/{name}": loss for name, loss in losses.items()})
                _write_samples(objective, recipe, heldout, out / SAMPLES / f"step-{step:06d}.png")

    if start == 0:
        evaluate(0)
    if start == recipe.steps and not is_whole(out):  # done, and then some of it was lost
        evaluate(start)
        if rank == 0:
            _write_model(objective, recipe, inputs, parents, ema, out, heldout)
    bad_in_a_row = 0
    for step in range(start, recipe.steps):
        began = time.time()
        step_batches: list[tuple[Batch, Noise]] = []
        seen: list[Seen] = []
        for _ in range(recipe.accumulation):
            columns = next(batches)
            batch = collate(columns, device, target)
            records = ([str(record) for record in columns[name]] for name in ("replaced", "uncaptioned"))
            seen += zip(batch.positions.tolist(), batch.keys, *records, strict=True)
            step_batches.append((batch, Noise(recipe.seed, batch.positions, device)))
        waited = time.time() - began
        lr = recipe.optimizer.lr_at(step, recipe.steps)
        metrics = train_step(
            objective,
            step_batches,
            optimizers,
            lr=lr,
            clip_norm=recipe.optimizer.clip_norm,
            precision=recipe.precision,
            scaler=scaler,
        )
        if ema:
            ema.update(step)
        bad_in_a_row = bad_in_a_row + 1 if metrics["bad_steps"] else 0
        if bad_in_a_row >= recipe.optimizer.max_bad_steps:
            raise FloatingPointError(
                f"{recipe.name}: no finite gradient in {bad_in_a_row} steps, the last at step {step + 1} "
                f"with samples {[k for _, k, _, _ in seen]}"
            )
        done = step + 1
        if stream.captioning:
            lacking = torch.tensor(float(sum(bool(reason) for *_, reason in seen)), device=device)
            metrics["uncaptioned"] = float(average({"uncaptioned": lacking})["uncaptioned"]) * world
        speed = {"seconds_per_step": time.time() - began, "seconds_waiting_for_data": waited}
        log.write(done, metrics | speed | {"lr": lr})
        log_order(out, rank, done, seen)
        if done % recipe.evaluate_every == 0 or done == recipe.steps:
            evaluate(done)
        if done == recipe.steps and rank == 0:
            _write_model(objective, recipe, inputs, parents, ema, out, heldout)
        if done % recipe.checkpoint_every == 0 or done == recipe.steps:
            _checkpoint(objective, optimizers, ema, scaler, done, recipe.batch_size, rank)


class Log:
    """Appends scalar rows to the stage's metrics.jsonl; whole lines, so a reader never sees half a row."""

    def __init__(self, out: Path, active: bool) -> None:
        self.path, self.active = out / METRICS, active
        if active:
            for name in (METRICS, ORDER):
                end_torn_line(out / name)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self.active:
            return
        now = time.time()
        lines = [json.dumps({"step": step, "name": k, "value": v, "time": now}) + "\n" for k, v in values.items()]
        with self.path.open("a") as stream:
            stream.write("".join(lines))


def log_order(out: Path, rank: int, step: int, seen: Sequence[Seen]) -> None:
    """One line a step and rank: which samples were used, in order; which replaced a broken one, or got no caption."""
    row: dict[str, Any] = {"step": step, "rank": rank, "positions": [s[0] for s in seen], "keys": [s[1] for s in seen]}
    for name, place in (("replaced", 2), ("uncaptioned", 3)):
        if records := {s[1]: s[place] for s in seen if s[place]}:
            row[name] = records
    with (out / ORDER).open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_order(out: Path) -> dict[int, str]:
    """Global order of the samples of a finished stage: position -> key, over all ranks."""
    order: dict[int, str] = {}
    for row in read_lines(out / ORDER):
        order.update(zip(row["positions"], row["keys"], strict=True))
    return dict(sorted(order.items()))


def _batches(rows: Sequence[Mapping[str, Any]], size: int, device: str, target: Any) -> list[Batch]:
    from components.tensors import collate

    return [collate(rows[i : i + size], device, target) for i in range(0, len(rows), size)]


def _examples(stream: Any) -> Any:
    from components.tensors import images_to_tensor
    from pipelines.stream import load_row

    stream = replace(stream, captioning=None)  # nobody reads these
    # from far beyond the stream's own positions, so that building costs no sample of the order
    return lambda: images_to_tensor([load_row(stream, 2**40 + i)["hq"] for i in range(EXAMPLES)])


def _write_samples(objective: Objective, recipe: Recipe, heldout: Sequence[Batch], path: Path) -> None:
    """LQ | restored | HQ of the first held-out pictures, where the system has something to show."""
    from components.systems import SYSTEMS

    look = SYSTEMS[recipe.system].look
    if look is None:
        return
    import numpy as np
    import torch

    from components.images import encode_png
    from components.tensors import tensor_to_images

    count = min(3, len(heldout[0]))
    with torch.no_grad():
        restored = look(objective, recipe, heldout[0].lq[:count], heldout[0].prompts[:count], HELDOUT_SEED)
    columns = [tensor_to_images(t[:count]) for t in (heldout[0].lq, restored, heldout[0].hq)]
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in zip(*columns, strict=True)], axis=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(encode_png(sheet, {"columns": "lq, restored, hq"}))
    os.replace(temporary, path)


def _write_model(
    objective: Objective,
    recipe: Recipe,
    inputs: TrainInputs,
    parents: Mapping[str, Any],
    ema: Any,
    out: Path,
    heldout: Sequence[Batch],
) -> None:
    from components.models import ModelCard, save_model
    from components.systems import SYSTEMS

    prior = getattr(objective, "prior", None)
    measure = SYSTEMS[recipe.system].measure
    metrics: dict[str, Any] = {}
    if measure is not None:
        with ema.applied() if ema else contextlib.nullcontext():
            metrics |= measure(objective, heldout)
    for name, values in heldout_losses(out / METRICS).items():
        metrics |= {f"heldout/{name}/start": values[min(values)], f"heldout/{name}/end": values[max(values)]}
    card = ModelCard(
        name=recipe.name,
        system=recipe.system,
        recipe=identity(recipe),
        prior=prior.source if prior is not None and recipe.system != "prior" else None,
        config=objective.config,
        parents={k: v.digest for k, v in parents.items()},
        data_manifest_digest=",".join(f"{k}:{v}" for k, v in sorted(inputs.data_digests.items())),
        licence="the weights follow the licences of the prior and of the corpus",
        permitted_use="see the prior's and the corpus' licences",
        metrics=metrics,
    )
    with ema.applied() if ema else contextlib.nullcontext():
        save_model(out / MODEL, card, objective.parts(), getattr(objective, "files", None))


def _checkpoint(
    objective: Objective, optimizers: Any, ema: Any, scaler: Any, step: int, batch_size: int, rank: int
) -> None:
    """Report step and position to Ray Train; rank 0 adds the state. All ranks must come here."""
    import torch
    from ray import train as ray_train

    from components.training import training_state

    report = {"step": step, "position": step * batch_size}
    if rank != 0:
        ray_train.report(report)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = training_state(objective, optimizers, ema, step, step * batch_size, scaler)
        torch.save(state, Path(folder) / "state.pt")
        ray_train.report(report, checkpoint=ray_train.Checkpoint.from_directory(folder))
