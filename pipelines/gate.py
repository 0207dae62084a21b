"""The gate of a distillation: a student is registered only if its pictures are as good as its teacher's, one by one.

    <out>/gate/hq, lq              held-out pictures of the student's own corpus, degraded with a fixed seed
    <out>/gate/teacher, student    both restorations
    <out>/gate/gate.json           the verdict: per metric the mean paired difference, its interval, what was allowed

Teachers of any system will do: all that is asked of one is that it restores.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.console import Progress
from pipelines.errors import Failure, GateFailed
from pipelines.rows import read_lines, replace_file

if TYPE_CHECKING:
    from components.systems.instarevive.settings import Gate
    from pipelines.train import TrainInputs

FOLDER, VERDICT = "gate", "gate.json"
ARMS = ("teacher", "student")
SEED = 20260102  # of degradation and restoration: neither the run's own nor that of the held-out losses
PSNR = "psnr"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One metric of the gate.

    Attributes:
        metric: its name.
        teacher, student: means over the pictures.
        loss: mean over pictures of how much worse the student is, in the metric's unit; negative where it is better.
        low, high: bootstrap 95 % interval of the loss; None with fewer than two pictures.
        allowed: largest loss.
        passed: whether the loss is no larger.
    """

    metric: str
    teacher: float
    student: float
    loss: float
    low: float | None
    high: float | None
    allowed: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What the gate found; gate.json is this as JSON.

    Attributes:
        pictures: keys that both were scored on.
        judgements: of each metric.
        lost: pictures that lack a score which the teacher's have: none is allowed.
    """

    pictures: list[str]
    judgements: list[Judgement]
    lost: list[str]

    @property
    def passed(self) -> bool:
        return not self.lost and all(one.passed for one in self.judgements)

    def sentence(self) -> str:
        """The verdict for people."""
        told = [
            f"{one.metric} {one.student:.4g} against {one.teacher:.4g} (worse by {one.loss:+.4g}, "
            f"{'within' if one.passed else 'above'} the allowed {one.allowed:.4g})"
            for one in self.judgements
        ]
        lost = f"; it could not restore {', '.join(self.lost[:5])}" if self.lost else ""
        return f"on {len(self.pictures)} held-out pictures the student has {' and '.join(told)}{lost}"


def pass_gate(
    recipe: Any, inputs: TrainInputs, out: Path, *, on_ray: bool = True, progress: Progress | None = None
) -> GateResult:
    """Compare a trained student with its teacher on held-out pictures.

    Args:
        recipe: with `teacher` and `gate`; pictures are degraded as its training has it.
        inputs: its corpora; the first that holds pictures out lends them.
        out: the training's folder, with the student's model below.
        on_ray: False works in this process.

    Returns:
        The result, which is also written to gate.json.

    Raises:
        GateFailed: the student is worse than the margins allow; gate.json says by how much.
        UsageError, Failure: see the steps' own modules.
    """
    from pipelines.heldout import prepare_heldout
    from pipelines.restore import restore_folder

    gate: Gate = recipe.gate
    folder, student = out / FOLDER, out / "model"
    (folder / VERDICT).unlink(missing_ok=True)  # the verdict on an earlier student
    prepare_heldout(
        _heldout_corpus(recipe, inputs),
        folder,
        recipe.degradation.preset,
        recipe.degradation.options,
        seed=SEED,
        short_side=recipe.short_side,
        limit=gate.pictures,
        pairs=recipe.pairs,
    )
    gpu = recipe.placement.gpus_per_worker > 0 and on_ray
    arms = ((recipe.teacher, gate.teacher_options), (student, gate.student_options))
    for arm, (model, options) in zip(ARMS, arms, strict=True):
        restore_folder(
            model,
            folder / "lq",
            folder / arm,
            options,
            seed=SEED,
            on_ray=on_ray,
            progress=progress,
            build_options={"device": "cuda"} if gpu else {},
            num_gpus=float(gpu),
        )
    result = compare(folder, gate)
    document = {**asdict(result), "passed": result.passed, "teacher": str(recipe.teacher), "verdict": result.sentence()}
    replace_file(folder / VERDICT, (json.dumps(document, indent=1) + "\n").encode())
    if not result.passed:
        raise GateFailed(f"{recipe.name}: {result.sentence()}: it is not registered; see {folder / VERDICT}.")
    return result


def compare(folder: Path, gate: Gate) -> GateResult:
    """Judge student against teacher, whose pictures lie in `folder` with hq and lq.

    A picture counts for whoever has all of its scores; one that was put into quarantine in this run has none, whatever
    an earlier model left in the folder.

    Raises:
        Failure: the teacher lacks a picture, or not one picture has both scores of a metric.
    """
    from components.evaluation.metrics import metric_info
    from pipelines.evaluate import bootstrap_interval, evaluate

    names = (PSNR, gate.metric)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for arm in ARMS:
        where = folder / f"scores-{arm}"
        evaluate(folder / arm, folder / "lq", folder / "hq", where, metrics=names, baselines=())
        refused = {row["key"] for row in read_lines(folder / arm / "quarantine.jsonl")}
        found = {row["key"]: row["scores"]["restored"] for row in read_lines(where / "scores.jsonl")}
        scores[arm] = {key: row for key, row in found.items() if key not in refused}
    asked = {path.stem for path in (folder / "lq").glob("*.png")}
    unjudged = sorted(asked - set(scores["teacher"]))
    if unjudged:
        raise Failure(
            f"{folder}: the teacher has no result of {', '.join(unjudged[:5])}: there is nothing to judge by."
        )
    lost = sorted(k for k, row in scores["teacher"].items() if set(row) - set(scores["student"].get(k, {})))
    judgements, used = [], set[str]()
    for name in names:
        keys = [k for k, row in scores["teacher"].items() if name in row and name in scores["student"].get(k, {})]
        if not keys:
            raise Failure(f"{folder}: no picture has a {name} of both teacher and student; choose another gate.metric.")
        used.update(keys)
        by_arm = {arm: np.array([scores[arm][key][name] for key in keys]) for arm in ARMS}
        sign = 1 if metric_info(name).higher_is_better else -1
        losses = sign * (by_arm["teacher"] - by_arm["student"])
        teacher, student, loss = (float(v.mean()) for v in (by_arm["teacher"], by_arm["student"], losses))
        interval = bootstrap_interval(losses, 0, "gate", name) or (None, None)
        allowed = gate.psnr_db if name == PSNR else gate.perceptual * abs(teacher)
        judgements.append(
            Judgement(
                metric=name,
                teacher=teacher,
                student=student,
                loss=loss,
                low=interval[0],
                high=interval[1],
                allowed=allowed,
                passed=bool(loss <= allowed),  # not for NaN
            )
        )
    return GateResult(pictures=sorted(used), judgements=judgements, lost=lost)


def register(recipe: Any, out: Path) -> int | None:
    """Register a student that has passed, in MLflow in the training's folder; the version, None while it is down."""
    from pipelines.tracking import Tracker

    tracker = Tracker(out, recipe.name)
    run = tracker.start_parent(recipe.name, {"teacher": str(recipe.teacher)})
    version = tracker.register_model(run, out / "model", recipe.name)
    tracker.finish(run)
    return version


def _heldout_corpus(recipe: Any, inputs: TrainInputs) -> Path:
    from pipelines.heldout import SPLIT
    from pipelines.shards import open_corpus

    for name in recipe.sources:
        if name in inputs.corpora:
            splits = open_corpus(inputs.corpora[name]).splits
            if SPLIT in splits and len(splits[SPLIT]):
                return inputs.corpora[name]
    raise Failure(f"{recipe.name}: no corpus holds a picture out to judge the student on.")
