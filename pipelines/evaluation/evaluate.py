"""Scores restored pictures and two baselines against the same targets, and states the outcome in words.

Arms:
    restored         the pictures under test.
    lq               the degraded input, resized bicubically to its target's size if it is smaller.
    bicubic_median   a 3 x 3 median filter on the input, then the same resize: a baseline without a model.

Pictures are paired by key: the path below the folder without its suffix. If a folder has other names, one affix for all
may turn them into those of the restored pictures (pipelines/core/pairing.py). A picture without its counterparts, or of
another shape than these, is reported by name. Each row is appended to scores.jsonl at once. A rerun reuses every row
whose pictures' sha256 and metric versions are unchanged, so a killed job loses at most one picture's work.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from components.evaluation import TOO_FEW
from components.evaluation.metrics import MetricError, MetricInfo, Metrics, Origin, has_pyiqa, usable, without_target
from components.evaluation.statistics import mean_interval
from components.images import ANY_SHAPE, Limits, decode
from components.naming import printable
from components.types import Image, Plan, SampleError
from components.writing import replace_file
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import Failure, UsageError, unknown
from pipelines.core.pairing import NoPairs, pair_names
from pipelines.core.pictures import pictures_by_key, read_picture
from pipelines.core.rows import end_torn_line, read_lines, write_lines

RESTORED = "restored"
BASELINES = ("lq", "bicubic_median")
PLAN_RECORDS = {"records.jsonl": ("", "output_sha256"), "heldout.jsonl": ("..", "lq_sha256")}
"""Records of degradations: where they lie as seen from the inputs, and the entry with an input's sha256."""

STATISTICS = "2"
"""Version of intervals and verdicts in summary.json. Before 2 the intervals of few pictures were too narrow."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Restored against one opponent in one metric, over the pictures on which both have a score.

    Attributes:
        mean_difference: mean of restored minus opponent, in the metric's unit.
        low, high: 95 % interval of the mean, see mean_interval; None with fewer than MIN_PICTURES pictures.
        wins, losses, ties: number of pictures on which restored is better, worse, equal.
        outcome: "beats" or "loses" if the interval excludes 0, "even" if it holds 0, "too few" without an interval.
    """

    metric: str
    opponent: str
    pictures: int
    mean_difference: float
    low: float | None
    high: float | None
    wins: int
    losses: int
    ties: int
    outcome: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The result of an evaluation; `summary.json` holds it as JSON.

    Attributes:
        pictures: keys of the pictures that were scored.
        metrics: metric -> {"higher_is_better", "full_reference", "unit"}.
        means: arm -> metric -> {"mean", "pictures"}.
        comparisons: restored against each baseline, per metric.
        verdict: the outcome over all metrics, one sentence per baseline.
        verdicts: one sentence per metric, against the input.
        missing: pictures and scores that are missing: {"key", "where", perhaps "metric", "reason"}.
        quarantined: number of pictures without any score; `missing` has the reasons.
        folders: role -> folder relative to the evaluation's own, for the report.
        versions: of pyiqa, of the rows' format, and of the statistics.
        reused: number of rows from an earlier scores.jsonl.
    """

    pictures: list[str]
    metrics: dict[str, dict[str, Any]]
    means: dict[str, dict[str, dict[str, float]]]
    comparisons: list[Comparison]
    verdict: str
    verdicts: dict[str, str]
    missing: list[dict[str, str]] = field(default_factory=list)
    quarantined: int = 0
    folders: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    reused: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain mappings and lists, ready for json.dumps."""
        return asdict(self)


def fit(picture: Image, height: int, width: int) -> Image:
    """Bicubic resize of uint8 [h, w, 3] to [height, width, 3]; a picture of that size is returned as it is."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def median_baseline(lq: Image, height: int, width: int) -> Image:
    """3 x 3 median at the input's size, then a bicubic resize: the median removes impulses before they spread."""
    return fit(np.asarray(cv2.medianBlur(np.ascontiguousarray(lq), 3), dtype=np.uint8), height, width)


def compare(metric: str, info: MetricInfo, opponent: str, pairs: Sequence[tuple[float, float]]) -> Comparison:
    """Compare restored with one opponent.

    Args:
        pairs: (restored, opponent) scores of each picture; at least one pair.
    """
    differences = np.array([restored - other for restored, other in pairs], dtype=np.float64)
    gains = differences if info.higher_is_better else -differences
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    mean = float(differences.mean())
    interval = mean_interval(differences)
    if interval is None:
        outcome = "too few"
    elif interval[0] > 0 or interval[1] < 0:
        outcome = "beats" if float(gains.mean()) > 0 else "loses"
    else:
        outcome = "even"
    name = _opponent_name(opponent)
    claim = {
        "beats": f"restored beats {name}",
        "loses": f"restored loses to {name}",
        "even": f"restored shows no clear difference from {name}",
        "too few": f"{_count(len(pairs))} {TOO_FEW} whether restored beats {name}",
    }[outcome]
    unit = f" {info.unit}" if info.unit else ""
    digits = 2 if info.unit == "dB" or abs(mean) >= 10 else 4
    spread = f" [{interval[0]:+.{digits}f}, {interval[1]:+.{digits}f}]" if interval else ""
    direction = "" if info.higher_is_better else " (lower is better)"
    sentence = (
        f"In {metric} {claim}: better on {wins} of {len(pairs)} pictures, "
        f"mean {mean:+.{digits}f}{unit}{spread}{direction}."
    )
    return Comparison(
        metric=metric,
        opponent=opponent,
        pictures=len(pairs),
        mean_difference=mean,
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        wins=wins,
        losses=losses,
        ties=len(pairs) - wins - losses,
        outcome=outcome,
        sentence=sentence,
    )


def overall_verdict(comparisons: Sequence[Comparison], opponent: str, metrics: Mapping[str, MetricInfo]) -> str:
    """One sentence over all metrics against one opponent, with the numbers of the first metric."""
    own = [c for c in comparisons if c.opponent == opponent]
    if not own:
        return "Nothing could be compared with the input." if opponent == "lq" else ""
    first = own[0]
    clauses: list[str] = []
    for outcome, words in (
        ("beats", "beats {} in"),
        ("loses", "loses to {} in"),
        ("even", "shows no clear difference from {} in"),
    ):
        names = [c.metric for c in own if c.outcome == outcome]
        if names:
            clauses.append(f"{words.format('it' if clauses else _opponent_name(opponent))} {', '.join(names)}")
    few = [c.metric for c in own if c.outcome == "too few"]
    if few:
        pictures = _count(max(c.pictures for c in own if c.outcome == "too few"))
        name = "it" if clauses else _opponent_name(opponent)
        sentence = f"{pictures} {TOO_FEW} whether {'it' if clauses else 'restored'} beats {name} in {', '.join(few)}"
        clauses.append(sentence)
    unit = f" {metrics[first.metric].unit}" if metrics[first.metric].unit else ""
    digits = 2 if unit else 4
    spread = "" if first.low is None else f" [{first.low:+.{digits}f}, {first.high:+.{digits}f}]"
    numbers = (
        f"{first.metric} better on {first.wins} of {first.pictures} pictures, "
        f"mean {first.mean_difference:+.{digits}f}{unit}{spread}"
    )
    text = "; ".join(clauses)
    return f"{text if few and len(clauses) == 1 else f'Restored {text}'} ({numbers})."


def _opponent_name(opponent: str) -> str:
    return "its input" if opponent == "lq" else f"the {opponent} baseline"


def _count(pictures: int) -> str:
    return "1 picture is" if pictures == 1 else f"{pictures} pictures are"


def evaluate(
    restored_dir: Path,
    lq_dir: Path,
    hq_dir: Path | None,
    out: Path,
    metrics: Sequence[str] | None = None,
    baselines: Sequence[str] = BASELINES,
    progress: Progress = no_progress,
    device: str = "cpu",
    limits: Limits = ANY_SHAPE,
) -> Summary:
    """Score every restored picture and its baselines; write scores.jsonl and summary.json below `out`.

    Args:
        restored_dir, lq_dir: folders of pictures, paired by key.
        hq_dir: folder of targets; without it only metrics that need no target can be scored.
        out: made if it does not exist; an existing scores.jsonl is continued.
        metrics: names; see components.evaluation.metrics. None takes its default set, or the part that needs no target.
        baselines: of "lq" and "bicubic_median".
        progress: called as (done, total, key) after each picture.
        device: of the metrics' networks.
        limits: larger pictures are not scored.

    Returns:
        The summary; `missing` names every picture and metric without a score, with the reason.

    Raises:
        UsageError: a folder does not exist, there is no restored picture, a metric or baseline is unknown, or a metric
            cannot be used here.
        Failure: a metric's weights are missing, `out` cannot be written, or no picture could be scored; summary.json
            then has the reasons.
    """
    for name in baselines:
        if name not in BASELINES:
            raise unknown("baseline", name, BASELINES)
    plans = recorded_plans(Path(lq_dir))
    scorer = _scorer(metrics, device, has_targets=hq_dir is not None, has_plans=bool(plans))
    missing: list[dict[str, str]] = []
    folders = {RESTORED: Path(restored_dir), "lq": Path(lq_dir), **({"hq": Path(hq_dir)} if hq_dir is not None else {})}
    paths = {role: pictures_by_key(folder, missing) for role, folder in folders.items()}
    if not paths[RESTORED]:
        raise UsageError(f"no pictures in {str(restored_dir)!r}")
    paths |= {role: _with_keys_of(paths[RESTORED], paths[role], folders[role]) for role in paths if role != RESTORED}
    keys = []
    for key in sorted(set().union(*paths.values())):
        missing_roles = [role for role in folders if key not in paths[role]]
        missing += [
            {"key": key, "where": role, "reason": f"no counterpart in the {role} folder"} for role in missing_roles
        ]
        if not missing_roles:
            keys.append(key)
    out = Path(out)
    arms = (RESTORED, *baselines)
    versions = {"pyiqa": version("pyiqa") if has_pyiqa() else "not installed", "rows": "1"}
    place = {role: printable(Path(os.path.relpath(folder, out)).as_posix()) for role, folder in folders.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = {key: {role: paths[role][key] for role in folders} for key in keys}
        rows, reused = _score_all(files, plans, out / "scores.jsonl", versions, arms, scorer, missing, progress, limits)
        summary = summarise(rows, scorer.info, arms, missing)
        summary = replace(summary, folders=place, versions={**versions, "statistics": STATISTICS}, reused=reused)
        replace_file(out / "summary.json", (json.dumps(summary.to_json(), indent=1) + "\n").encode())
    except MetricError as error:
        raise Failure(f"{error}.") from error
    except OSError as error:
        raise Failure(f"cannot write to {out}: {error.strerror or error}.") from error
    if not summary.means[RESTORED]:
        first = f"{summary.missing[0]['key']}: {summary.missing[0]['reason']}"
        raise Failure(f"not one picture of {restored_dir} could be scored ({first}); see {out / 'summary.json'}.")
    return summary


def check_metrics(names: Sequence[str], has_targets: bool = True) -> None:
    """Check the metrics of an evaluation before its work.

    Raises:
        UsageError: a name is unknown, or a metric cannot be used here.
    """
    _scorer(names or None, "cpu", has_targets)


def recorded_plans(lq_dir: Path) -> dict[str, Plan]:
    """Plans by the sha256 of the input that they made, from the records of `restoray degrade` or of a run."""
    plans: dict[str, Plan] = {}
    for name, (place, entry) in PLAN_RECORDS.items():
        for row in read_lines(lq_dir / place / name):
            if isinstance(row.get("plan"), Mapping) and entry in row:
                plans[str(row[entry])] = row["plan"]
    return plans


def _scorer(names: Sequence[str] | None, device: str, has_targets: bool, has_plans: bool = True) -> Metrics:
    """The metrics of an evaluation; None takes the default set, as far as there are targets and plans for it."""
    try:
        if names is None:
            default = usable() if has_targets else without_target()
            names = [name for name in default if has_plans or name != "consistency"]
        scorer = Metrics(names, device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    needy = [name for name, info in scorer.info.items() if info.full_reference and not has_targets]
    if needy:
        raise UsageError(
            f"{', '.join(needy)}: {'these metrics compare' if len(needy) > 1 else 'this metric compares'} with the "
            f"originals. Add --hq ORIGINALS, or take only metrics without originals: {', '.join(without_target())}, or "
            "those that download weights, such as niqe and musiq."
        )
    return scorer


def _with_keys_of(restored: Mapping[str, Path], others: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Pictures of another folder by the keys of the restored ones; those without a partner keep their key.

    Raises:
        UsageError: the names fit in several ways.
    """
    if not others or restored.keys() <= others.keys():
        return dict(others)
    names = [[f"{key}{path.suffix}" for key, path in side.items()] for side in (others, restored)]
    try:
        numbers = pair_names(names[0], names[1])
    except NoPairs as error:
        if restored.keys().isdisjoint(others):
            raise UsageError(f"{folder} does not fit the restored pictures: {error}.") from error
        return dict(others)
    keys = list(restored)
    return {
        other if number is None else keys[number]: path
        for (other, path), number in zip(others.items(), numbers, strict=True)
    }


def _score_all(
    files: Mapping[str, Mapping[str, Path]],
    plans: Mapping[str, Plan],
    scores_path: Path,
    versions: Mapping[str, str],
    arms: Sequence[str],
    scorer: Metrics,
    missing: list[dict[str, str]],
    progress: Progress,
    limits: Limits,
) -> tuple[list[dict[str, Any]], int]:
    """The rows of all pictures in the order of `files` (key -> role -> path), and the number of reused rows."""
    earlier = {row.get("key"): row for row in read_lines(scores_path)}
    rows: list[dict[str, Any]] = []
    reused = 0
    end_torn_line(scores_path)
    with scores_path.open("a", encoding="utf-8") as stream:
        for number, (key, paths) in enumerate(files.items(), start=1):
            try:
                data = {role: read_picture(path, key, limits) for role, path in paths.items()}
                digests = {role: hashlib.sha256(bytes_).hexdigest() for role, bytes_ in data.items()}
                row = earlier.get(key)
                if row is not None and _reusable(row, digests, versions, arms, scorer.names):
                    reused += 1
                else:
                    scorer.load()
                    plan = plans.get(digests["lq"])
                    row = _score_row(key, data, plan, digests, versions, arms, scorer, limits)
                    stream.write(json.dumps(row) + "\n")
                    stream.flush()
                rows.append(row)
            except SampleError as error:
                missing.append({"key": key, "where": "score", "reason": f"[{error.code}] {error.detail}"})
            progress(number, len(files), key)
    write_lines(scores_path, rows)  # removes stale rows of earlier runs and orders the rest by key
    return rows, reused


def _reusable(
    row: Mapping[str, Any],
    digests: Mapping[str, str],
    versions: Mapping[str, str],
    arms: Sequence[str],
    names: Sequence[str],
) -> bool:
    if row.get("sha256") != dict(digests) or row.get("versions") != dict(versions):
        return False
    scores, missing = row.get("scores", {}), row.get("missing", {})
    return all({*scores.get(arm, {}), *missing.get(arm, {})} >= set(names) for arm in arms)


def _score_row(
    key: str,
    data: Mapping[str, bytes],
    plan: Plan | None,
    digests: Mapping[str, str],
    versions: Mapping[str, str],
    arms: Sequence[str],
    scorer: Metrics,
    limits: Limits,
) -> dict[str, Any]:
    pictures = {role: decode(bytes_, limits, key) for role, bytes_ in data.items()}
    restored, hq = pictures[RESTORED], pictures.get("hq")
    height, width = (restored if hq is None else hq).shape[:2]
    _check_shapes(pictures["lq"], height, width, "restored picture" if hq is None else "target", key)
    lq, origin = pictures["lq"], Origin(lq=pictures["lq"], plan=plan)
    results = {a: scorer.measure(_arm_picture(a, restored, lq, height, width), hq, key, origin) for a in arms}
    return {
        "key": key,
        "sha256": dict(digests),
        "versions": dict(versions),
        "size": [height, width],
        "scores": {arm: {name: round(value, 6) for name, value in s.values.items()} for arm, s in results.items()},
        "missing": {arm: s.missing for arm, s in results.items()},
    }


def _check_shapes(lq: Image, height: int, width: int, role: str, key: str) -> None:
    """Check that one scale turns the input's sides into those of its target, up to the rounding of a side.

    Raises:
        SampleError: pair_size: none does.
    """
    own_height, own_width = lq.shape[:2]
    scale = width / own_width if width >= height else height / own_height  # the longer side is rounded least
    off = max(abs(own_height * scale - height), abs(own_width * scale - width))
    if off >= 2 * max(scale, 1.0):
        detail = f"the input has {own_width} x {own_height} pixels and the {role} {width} x {height}: no one scale fits"
        raise SampleError("pair_size", detail, key)


def _arm_picture(arm: str, restored: Image, lq: Image | None, height: int, width: int) -> Image:
    if arm == RESTORED:
        return restored
    assert lq is not None
    return fit(lq, height, width) if arm == "lq" else median_baseline(lq, height, width)


def summarise(
    rows: Sequence[Mapping[str, Any]],
    infos: Mapping[str, MetricInfo],
    arms: Sequence[str],
    missing: Sequence[Mapping[str, str]] = (),
) -> Summary:
    """Means, paired comparisons and the verdict of rows as in scores.jsonl."""
    all_missing = [dict(entry) for entry in missing]
    means: dict[str, dict[str, dict[str, float]]] = {}
    for arm in arms:
        means[arm] = {}
        for name in infos:
            values = [row["scores"][arm][name] for row in rows if name in row["scores"][arm]]
            if values:
                means[arm][name] = {"mean": float(np.mean(values)), "pictures": len(values)}
        for row in rows:
            all_missing += [
                {"key": row["key"], "where": arm, "metric": name, "reason": reason}
                for name, reason in row["missing"].get(arm, {}).items()
                if name in infos
            ]
    comparisons = []
    for opponent in arms[1:]:
        for name in infos:
            pairs = [
                (row["scores"][RESTORED][name], row["scores"][opponent][name])
                for row in rows
                if name in row["scores"][RESTORED] and name in row["scores"][opponent]
            ]
            if pairs:
                comparisons.append(compare(name, infos[name], opponent, pairs))
    opponents = arms[1:]
    verdicts = {c.metric: c.sentence for c in comparisons if opponents and c.opponent == opponents[0]}
    verdicts |= {name: _beside_input(name, means) for name in verdicts if infos[name].compares}
    judged = [c for c in comparisons if not infos[c.metric].compares]  # handing the input back scores best in these
    sentences = [overall_verdict(judged, opponent, infos) for opponent in opponents]
    verdict = " ".join(sentence for sentence in sentences if sentence)
    without_scores = len({entry["key"] for entry in all_missing if "metric" not in entry})
    if without_scores:
        verdict += (
            f" {without_scores} {'picture has' if without_scores == 1 else 'pictures have'} no score (see missing)."
        )
    return Summary(
        pictures=[row["key"] for row in rows],
        metrics={
            n: {
                "higher_is_better": i.higher_is_better,
                "full_reference": i.full_reference,
                "unit": i.unit,
                **({"compares": i.compares} if i.compares else {}),
            }
            for n, i in infos.items()
        },
        means=means,
        comparisons=comparisons,
        verdict=verdict.strip() or "No picture could be compared.",
        verdicts=verdicts,
        missing=all_missing,
        quarantined=without_scores,
    )


def _beside_input(name: str, means: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The sentence of a metric that compares with the input: the input's own score and the gain stand beside it."""

    def mean_of(arm: str, metric: str) -> float | None:
        entry = means.get(arm, {}).get(metric)
        return None if entry is None else entry["mean"]

    own, input_score = mean_of(RESTORED, name), mean_of(BASELINES[0], name)
    sentence = f"In {name} restored has {own:.2f}, the input itself {input_score:.2f}"
    restored, degraded = mean_of(RESTORED, "psnr"), mean_of(BASELINES[0], "psnr")
    gain = "" if restored is None or degraded is None else f", beside a gain of {restored - degraded:+.2f} dB in psnr"
    return f"{sentence}{gain}: handing the input back would score best, so this does not count in the verdict."


def restate(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A summary.json with today's intervals and verdicts of its scores.

    Args:
        document: summary.json; one with today's statistics is returned as it is.
        rows: the lines of its scores.jsonl.

    Raises:
        KeyError, TypeError: the document or a row lacks something.
    """
    if document["versions"].get("statistics") == STATISTICS:
        return dict(document)
    infos = {
        name: MetricInfo(
            higher_is_better=info["higher_is_better"], unit=info["unit"], compares=info.get("compares", "")
        )
        for name, info in document["metrics"].items()
    }
    missing = [entry for entry in document["missing"] if "metric" not in entry]
    today = summarise(rows, infos, list(document["means"]), missing).to_json()
    return {**document, **{name: today[name] for name in ("comparisons", "verdict", "verdicts")}}
