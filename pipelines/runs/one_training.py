"""One training in a folder, for `restoray train` and for plans: trains the stage and runs a student's gate."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from components.recipes import Recipe
from components.writing import replace_file
from pipelines.core.console import Progress
from pipelines.core.errors import UsageError
from pipelines.core.folders import check_output, job_lock
from pipelines.core.metrics import OnMetrics
from pipelines.evaluation.gate import check_gate, pass_gate
from pipelines.runs.identity import stage_digest, train_identity
from pipelines.training.inputs import TrainInputs
from pipelines.training.recipes import recipe_documents, recipe_version
from pipelines.training.train import TrainResult, train


def train_one(
    recipe: Recipe,
    inputs: TrainInputs,
    out: Path,
    progress: Progress,
    minutes: float = 0.0,
    start: Path | None = None,
    on_metrics: OnMetrics | None = None,
) -> TrainResult:
    """Train one stage in `out`. A recipe with a teacher must then pass its gate.

    Args:
        minutes, start: see training.train.train.
        on_metrics: also called with the new rows while the stage trains.

    Raises:
        Unfinished: the minutes are over.
        UsageError, Failure: see training.train.train and evaluation.gate.check_gate and pass_gate.
        GateFailed: the trained model is worse than its teacher; it stays in `out`.
    """
    check_gate(recipe)
    shown = step_progress(progress, recipe.steps)

    def pass_on(rows: Sequence[tuple[int, str, float, float]]) -> None:
        shown(rows)
        if on_metrics is not None:
            on_metrics(rows)

    result = train(recipe, inputs, out, on_metrics=pass_on, minutes=minutes, start=start)
    if recipe.teacher:
        begin = time.monotonic()
        pass_gate(recipe, inputs.corpora, out)
        result = replace(result, seconds=result.seconds + time.monotonic() - begin)
    return result


def train_inputs(folders: Mapping[str, Path]) -> TrainInputs:
    """Sort folders into corpora, by their names in `folders`, and models, by the training stage that made them.

    Raises:
        UsageError: a folder is neither a corpus nor a model.
    """
    corpora: dict[str, Path] = {}
    parents: dict[str, Path] = {}
    digests: dict[str, str] = {}
    for name, folder in folders.items():
        model = folder if (folder / "model.json").is_file() else folder / "model"
        if (folder / "index.json").is_file():
            corpora[name], digests[name] = folder, str(json.loads((folder / "index.json").read_text())["digest"])
        elif (model / "model.json").is_file():
            recipe = json.loads((model / "model.json").read_text()).get("recipe") or {}
            parents[str(recipe.get("stage") or name)] = model
        else:
            raise UsageError(f"input {name} is neither a corpus (index.json) nor a model (model.json): {folder}.")
    return TrainInputs(corpora=corpora, parents=parents, data_digests=digests)


@contextmanager
def train_folder(recipe: Recipe, inputs: TrainInputs, out: Path) -> Iterator[None]:
    """Lock a folder for one training, and check that it does not hold another training.

    Raises:
        UsageError: the folder belongs to another recipe or other inputs.
        RetryLater: another process works in the folder.
        Failure: the folder cannot be made or written.
    """
    models = {k: hashlib.sha256((v / "model.json").read_bytes()).hexdigest() for k, v in inputs.parents.items()}
    own = {"settings": recipe_documents(recipe)[1], **train_identity(recipe)}
    digest = stage_digest(own, {**inputs.data_digests, **models}, recipe_version(recipe))
    check_output(out, free_mib=0)
    with job_lock(out):
        stage_json, has_work = out / "stage.json", any((out / name).exists() for name in ("ray", "model", "done.json"))
        record = json.loads(stage_json.read_text()) if stage_json.is_file() else {}
        if record.get("digest", "" if has_work else digest) != digest:
            other = f"of {record['recipe']} with other settings or inputs" if record else "without a stage.json"
            raise UsageError(f"{out} holds a training {other}: choose another --out.")
        replace_file(stage_json, json.dumps({"recipe": recipe.name, "digest": digest}).encode())
        yield


def step_progress(progress: Progress, steps: int) -> Callable[[Sequence[tuple[int, str, float, float]]], None]:
    """A callback for metric rows: it moves a progress bar to the newest step and shows the newest loss."""

    def show(rows: Sequence[tuple[int, str, float, float]]) -> None:
        losses = [row for row in rows if row[1] == "loss"]
        note = f"{losses[-1][1]} {losses[-1][2]:.4g}" if losses else ""
        if rows:
            progress(max(row[0] for row in rows), steps, note)

    return show
