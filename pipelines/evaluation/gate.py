"""The gate of a distillation: a student is registered only if its pictures are nearly as good as its teacher's.

    <out>/gate/hq, lq              held-out pictures of the student's corpus, degraded with a fixed seed
    <out>/gate/teacher, student    both restorations
    <out>/gate/gate.json           the verdict: per metric the mean paired difference, its interval, the allowed loss

The teacher may be a model of any system that restores. Fewer than MIN_PICTURES pictures pass no student: a mean over
them says too little about others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from components.evaluation import MIN_PICTURES, TOO_FEW
from components.evaluation.metrics import MetricError, Metrics, metric_info
from components.evaluation.statistics import mean_interval
from components.recipes import Gate, Recipe
from components.writing import replace_file
from pipelines.core.console import Progress
from pipelines.core.errors import Failure, GateFailed
from pipelines.core.pool import Pool
from pipelines.core.rows import read_lines
from pipelines.corpus.shards import SPLIT, open_corpus
from pipelines.evaluation.evaluate import check_metrics, evaluate
from pipelines.evaluation.heldout import prepare_heldout
from pipelines.restoration.batch import RestoreJob, restore_folder
from pipelines.restoration.models import open_model

FOLDER, VERDICT = "gate", "gate.json"
ARMS = ("teacher", "student")
SEED = 20260102  # of degradation and restoration; differs from the seeds of the training and of the held-out losses
PSNR = "psnr"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One metric of the gate.

    Attributes:
        metric: its name.
        pictures: number of pictures with a score of both.
        teacher, student: means over the pictures.
        loss: mean over the pictures of how much worse the student is, in the metric's unit; negative if it is better.
        low, high: 95 % interval of the loss, see mean_interval; None with fewer than MIN_PICTURES pictures.
        allowed: largest loss that passes.
        passed: whether loss <= allowed, over at least MIN_PICTURES pictures.
    """

    metric: str
    pictures: int
    teacher: float
    student: float
    loss: float
    low: float | None
    high: float | None
    allowed: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The gate's result; gate.json holds it as JSON.

    Attributes:
        pictures: keys of the pictures on which teacher and student both have a score.
        judgements: one for each metric.
        lost: keys on which the student lacks a score that the teacher has; the gate fails if there are any.
    """

    pictures: list[str]
    judgements: list[Judgement]
    lost: list[str]

    @property
    def passed(self) -> bool:
        return not self.lost and all(one.passed for one in self.judgements)

    def sentence(self) -> str:
        """The verdict in one sentence."""
        clauses = [
            f"{one.metric} {one.student:.4g} against {one.teacher:.4g} (worse by {one.loss:+.4g}, "
            f"{'within' if one.loss <= one.allowed else 'above'} the allowed {one.allowed:.4g}{_doubt(one.pictures)})"
            for one in self.judgements
        ]
        failures = f"; it could not restore {', '.join(self.lost[:5])}" if self.lost else ""
        return f"on {len(self.pictures)} held-out pictures the student has {' and '.join(clauses)}{failures}"


def check_gate(recipe: Recipe) -> None:
    """Check the gate's metric before the training, and fetch its weights.

    Raises:
        UsageError: the metric is unknown, or cannot score a picture alone.
        Failure: its weights are missing.
    """
    if recipe.student_gate is not None:
        check_metrics((PSNR, recipe.student_gate.metric))
        try:
            Metrics((recipe.student_gate.metric,)).load()
        except MetricError as error:
            raise Failure(f"{recipe.name}: {error}.") from error


def pass_gate(
    recipe: Recipe,
    corpora: Mapping[str, Path],
    out: Path,
    *,
    on_ray: bool = True,
    progress: Progress | None = None,
) -> GateResult:
    """Compare a trained student with its teacher on held-out pictures.

    Args:
        recipe: has a `teacher` and a `gate`; its degradation makes the inputs.
        corpora: corpus folder by the name in recipe.sources; the first one with MIN_PICTURES held-out pictures is used.
        out: the training's folder, which holds the student's model.
        on_ray: False restores in this process, without Ray.
        progress: shows both restorations.

    Returns:
        The result, which is also written to gate.json.

    Raises:
        GateFailed: the student is worse than the margins allow; gate.json has the numbers.
        UsageError, Failure: see prepare_heldout, open_model, restore_folder and compare.
    """
    gate = recipe.student_gate
    assert gate is not None, "only a recipe with a teacher has a gate"
    folder, student = out / FOLDER, out / "model"
    (folder / VERDICT).unlink(missing_ok=True)  # an earlier student's verdict
    prepare_heldout(
        _heldout_corpus(recipe, corpora),
        folder,
        recipe.degradation.preset,
        recipe.degradation.options,
        seed=SEED,
        short_side=recipe.short_side,
        limit=gate.pictures,
        pairs=recipe.pairs,
    )
    gpu = recipe.placement.gpus_per_worker > 0 and on_ray
    models: tuple[str | Path, ...] = (recipe.teacher, student)
    for arm, model, options in zip(ARMS, models, (gate.teacher_options, gate.student_options), strict=True):
        opened = open_model(model, {"device": "cuda"} if gpu else {})
        job = RestoreJob(ask=opened.request_options(options), seed=SEED)
        pool = Pool(workers=int(on_ray), num_gpus=float(gpu))
        answers = restore_folder(opened, folder / "lq", folder / arm, job, pool, progress)
        if answers.quarantined and not answers.restored + answers.skipped:
            reason = read_lines(answers.quarantine)[0]
            kind = Failure if arm == ARMS[0] else GateFailed
            raise kind(f"{recipe.name}: the {arm} restored none of {answers.quarantined} pictures: {reason['detail']}.")
    result = compare(folder, gate)
    document = {**asdict(result), "passed": result.passed, "teacher": str(recipe.teacher), "verdict": result.sentence()}
    replace_file(folder / VERDICT, (json.dumps(document, indent=1) + "\n").encode())
    if not result.passed:
        raise GateFailed(f"{recipe.name}: {result.sentence()}: it is not registered; see {folder / VERDICT}.")
    return result


def compare(folder: Path, gate: Gate) -> GateResult:
    """Compare the pictures of student and teacher in `folder`, which also holds hq and lq.

    A picture that this run quarantined has no scores, even if an earlier model's result of it is still in the folder.

    Raises:
        Failure: the teacher lacks a picture, or no picture has a score of both in some metric.
    """
    names = (PSNR, gate.metric)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for arm in ARMS:
        scores_folder = folder / f"scores-{arm}"
        evaluate(folder / arm, folder / "lq", folder / "hq", scores_folder, metrics=names, baselines=())
        quarantined = {row["key"] for row in read_lines(folder / arm / "quarantine.jsonl")}
        rows = {row["key"]: row["scores"]["restored"] for row in read_lines(scores_folder / "scores.jsonl")}
        scores[arm] = {key: row for key, row in rows.items() if key not in quarantined}
    inputs = {path.stem for path in (folder / "lq").glob("*.png")}
    teacher_lacks = sorted(inputs - set(scores["teacher"]))
    if teacher_lacks:
        raise Failure(
            f"{folder}: the teacher has no result of {', '.join(teacher_lacks[:5])}; the student cannot be compared."
        )
    student_lacks = sorted(k for k, row in scores["teacher"].items() if set(row) - set(scores["student"].get(k, {})))
    judgements, pictures = [], set[str]()
    for name in names:
        keys = [k for k, row in scores["teacher"].items() if name in row and name in scores["student"].get(k, {})]
        if not keys:
            raise Failure(f"{folder}: no picture has a {name} of both teacher and student; choose another gate.metric.")
        pictures.update(keys)
        by_arm = {arm: np.array([scores[arm][key][name] for key in keys]) for arm in ARMS}
        sign = 1 if metric_info(name).higher_is_better else -1
        losses = sign * (by_arm["teacher"] - by_arm["student"])
        teacher, student, loss = (float(v.mean()) for v in (by_arm["teacher"], by_arm["student"], losses))
        interval = mean_interval(losses) or (None, None)
        allowed = gate.psnr_db if name == PSNR else gate.perceptual * abs(teacher)
        judgements.append(
            Judgement(
                metric=name,
                pictures=len(keys),
                teacher=teacher,
                student=student,
                loss=loss,
                low=interval[0],
                high=interval[1],
                allowed=allowed,
                passed=bool(loss <= allowed) and len(keys) >= MIN_PICTURES,  # False for NaN
            )
        )
    return GateResult(pictures=sorted(pictures), judgements=judgements, lost=student_lacks)


def _doubt(pictures: int) -> str:
    return f"; {pictures} {'picture is' if pictures == 1 else 'pictures are'} {TOO_FEW}" * (pictures < MIN_PICTURES)


def _heldout_corpus(recipe: Recipe, corpora: Mapping[str, Path]) -> Path:
    for name in recipe.sources:
        if name in corpora:
            splits = open_corpus(corpora[name]).splits
            if SPLIT in splits and len(splits[SPLIT]) >= MIN_PICTURES:
                return corpora[name]
    raise Failure(f"{recipe.name}: the gate needs a corpus with at least {MIN_PICTURES} held-out pictures.")
