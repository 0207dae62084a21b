"""The gate: a model is handed on only if its pictures are nearly as good as another's.

    <out>/gate/hq, lq              held-out pictures of the student's corpus, degraded with a fixed seed
    <out>/gate/teacher, student    both restorations
    <out>/gate/gate.json           the verdict: per metric the mean paired difference, its interval, the allowed loss

A distillation compares its student with its teacher; evaluation.choice compares a fine-tuned model with the one that
would restore without it. Both may be models of any system that restores. Fewer than MIN_PICTURES pictures pass no
model: a mean over them says too little about others.
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
from pipelines.core.errors import Failure, GateFailed, RestorayError
from pipelines.core.placement import Needs
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
        reference, candidate: means over the pictures; of teacher and student in a distillation.
        loss: mean over the pictures of how much worse the candidate is, in the metric's unit; negative if it is better.
        low, high: 95 % interval of the loss, see mean_interval; None with fewer than MIN_PICTURES pictures.
        allowed: largest loss that passes.
        passed: whether loss <= allowed, over at least MIN_PICTURES pictures.
    """

    metric: str
    pictures: int
    reference: float
    candidate: float
    loss: float
    low: float | None
    high: float | None
    allowed: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """The gate's result; gate.json holds it as JSON.

    Attributes:
        pictures: keys of the pictures on which both have a score.
        judgements: one for each metric.
        lost: keys on which the candidate lacks a score that the reference has; the gate fails if there are any.
    """

    pictures: list[str]
    judgements: list[Judgement]
    lost: list[str]

    @property
    def passed(self) -> bool:
        return not self.lost and all(one.passed for one in self.judgements)

    def sentence(self, candidate: str = "student") -> str:
        """The verdict in one sentence, with what the candidate is called."""
        clauses = [
            f"{one.metric} {one.candidate:.4g} against {one.reference:.4g} (worse by {one.loss:+.4g}, "
            f"{'within' if one.loss <= one.allowed else 'above'} the allowed {one.allowed:.4g}{_doubt(one.pictures)})"
            for one in self.judgements
        ]
        failures = f"; it could not restore {', '.join(self.lost[:5])}" if self.lost else ""
        return f"on {len(self.pictures)} held-out pictures the {candidate} has {' and '.join(clauses)}{failures}"


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
    placement = recipe.placement
    needs = Needs(
        memory_gib=placement.memory_gib_per_worker,
        resources=placement.resources_per_worker,
        labels=placement.labels,
        wait_minutes=placement.wait_minutes,
    )
    pool = Pool(workers=int(on_ray), num_gpus=float(gpu)).placed(needs)
    models: tuple[str | Path, ...] = (recipe.teacher, student)
    for arm, model, options in zip(ARMS, models, (gate.teacher_options, gate.student_options), strict=True):
        failure = Failure if arm == ARMS[0] else GateFailed
        restore_arm(recipe.name, folder, arm, model, options, pool, failure, progress)
    result = compare(folder, gate)
    document = {**asdict(result), "passed": result.passed, "teacher": str(recipe.teacher), "verdict": result.sentence()}
    replace_file(folder / VERDICT, (json.dumps(document, indent=1) + "\n").encode())
    if not result.passed:
        raise GateFailed(f"{recipe.name}: {result.sentence()}: it is not registered; see {folder / VERDICT}.")
    return result


def restore_arm(
    name: str,
    folder: Path,
    arm: str,
    model: str | Path,
    options: Mapping[str, object],
    pool: Pool,
    failure: type[RestorayError] = Failure,
    progress: Progress | None = None,
) -> None:
    """Restore the pictures of <folder>/lq into <folder>/<arm>.

    Args:
        name: of the training, for the message.
        options: of the restorer.
        pool: its processes; with GPUs the model runs on them.
        failure: what to raise if the model restores no picture at all.
    """
    opened = open_model(model, {"device": "cuda"} if pool.num_gpus else {})
    job = RestoreJob(ask=opened.request_options(options), seed=SEED)
    answers = restore_folder(opened, folder / "lq", folder / arm, job, pool, progress)
    if answers.quarantined and not answers.restored + answers.skipped:
        reason = read_lines(answers.quarantine)[0]
        raise failure(f"{name}: the {arm} restored none of {answers.quarantined} pictures: {reason['detail']}.")


def compare(folder: Path, gate: Gate, arms: tuple[str, str] = ARMS) -> GateResult:
    """Compare the pictures of reference and candidate, in that order in `arms`; `folder` also holds hq and lq.

    A picture that this run quarantined has no scores, even if an earlier model's result of it is still in the folder.

    Raises:
        Failure: the reference lacks a picture, or no picture has a score of both in some metric.
    """
    names, (first, second) = (PSNR, gate.metric), arms
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for arm in arms:
        scores_folder = folder / f"scores-{arm}"
        evaluate(folder / arm, folder / "lq", folder / "hq", scores_folder, metrics=names, baselines=())
        quarantined = {row["key"] for row in read_lines(folder / arm / "quarantine.jsonl")}
        rows = {row["key"]: row["scores"]["restored"] for row in read_lines(scores_folder / "scores.jsonl")}
        scores[arm] = {key: row for key, row in rows.items() if key not in quarantined}
    inputs = {path.stem for path in (folder / "lq").glob("*.png")}
    lacking = sorted(inputs - set(scores[first]))
    if lacking:
        raise Failure(
            f"{folder}: the {first} has no result of {', '.join(lacking[:5])}; the {second} cannot be compared."
        )
    lost = sorted(k for k, row in scores[first].items() if set(row) - set(scores[second].get(k, {})))
    judgements, pictures = [], set[str]()
    for name in names:
        keys = [k for k, row in scores[first].items() if name in row and name in scores[second].get(k, {})]
        if not keys:
            raise Failure(f"{folder}: no picture has a {name} of both {first} and {second}; choose another metric.")
        pictures.update(keys)
        by_arm = {arm: np.array([scores[arm][key][name] for key in keys]) for arm in arms}
        sign = 1 if metric_info(name).higher_is_better else -1
        losses = sign * (by_arm[first] - by_arm[second])
        reference, candidate, loss = (float(v.mean()) for v in (by_arm[first], by_arm[second], losses))
        interval = mean_interval(losses) or (None, None)
        allowed = gate.psnr_db if name == PSNR else gate.perceptual * abs(reference)
        judgements.append(
            Judgement(
                metric=name,
                pictures=len(keys),
                reference=reference,
                candidate=candidate,
                loss=loss,
                low=interval[0],
                high=interval[1],
                allowed=allowed,
                passed=bool(loss <= allowed) and len(keys) >= MIN_PICTURES,  # False for NaN
            )
        )
    return GateResult(pictures=sorted(pictures), judgements=judgements, lost=lost)


def _doubt(pictures: int) -> str:
    return f"; {pictures} {'picture is' if pictures == 1 else 'pictures are'} {TOO_FEW}" * (pictures < MIN_PICTURES)


def _heldout_corpus(recipe: Recipe, corpora: Mapping[str, Path]) -> Path:
    for name in recipe.sources:
        if name in corpora:
            splits = open_corpus(corpora[name]).splits
            if SPLIT in splits and len(splits[SPLIT]) >= MIN_PICTURES:
                return corpora[name]
    raise Failure(f"{recipe.name}: the gate needs a corpus with at least {MIN_PICTURES} held-out pictures.")
