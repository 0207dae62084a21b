"""`restoray analyze creative`: Appendix A. How far prompts move restorations, by what the tokens know of a picture.

Each picture is made poor, its tokens are scored by retrieval (the margin to the nearest other original), and it is
restored with the Aggregator stopped late: without a prompt, with its own tags (semantically close) and with the tags of
the picture that shares fewest words with it (far). The paper says that prompts move what scores low, and hardly what
scores high.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from components.captions.tags import Tags, hue_share
from components.evaluation.statistics import mean_band, rank_correlation, rms_levels
from components.randomness import generator
from components.types import Image, SampleError
from pipelines.analysis import levels as lv
from pipelines.analysis import runs
from pipelines.analysis.figures import Line, Panel, draw
from pipelines.analysis.page import Page, Section, shown, told, told_tie
from pipelines.analysis.previews import StudyResult, facts_of, finish
from pipelines.analysis.study import (
    Rows,
    Subject,
    column,
    measure_pictures,
    numbers,
    prepared,
    read_picture,
    study_folder,
    write_csv,
)
from pipelines.analysis.tokens import Gallery, gallery_files
from pipelines.console import Progress, no_progress
from pipelines.errors import UsageError

NAME = "creative"
PROMPTS = ("close", "far")
GROUPS = ("low score", "middle score", "high score")
STOP = 0.7  # of the steps; the paper's tools suggest 0.6 to 0.8
SCORE_VIEW = "pooled"


def far_captions(captions: Mapping[str, str], seed: int) -> dict[str, str]:
    """For each picture the caption of another that shares fewest words with its own; ties are drawn by (seed, key)."""
    words = {key: set(text.replace(",", "").split()) for key, text in captions.items()}
    far = {}
    for key, own in words.items():
        others = [other for other in sorted(words) if other != key]
        shared = [len(own & words[other]) for other in others]
        least = [other for other, n in zip(others, shared, strict=True) if n == min(shared)]
        far[key] = captions[least[int(generator(seed, "far", key).integers(len(least)))]]
    return far


def groups_of(scores: np.ndarray) -> np.ndarray:
    """Index into GROUPS for each picture [n]: thirds by rank of the score."""
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    return np.asarray(ranks * len(GROUPS) // max(len(scores), 1))


def analyze_creative(
    subject: Subject, mixed: str = "realesrgan", stop: float = STOP, progress: Progress = no_progress
) -> StudyResult:
    """Run the study; arguments and errors as analyze_previews.

    Args:
        mixed: preset that makes the pictures poor.
        stop: share of the steps after which Previewer and Aggregator stop.
    """
    if not 0 < stop <= 1:
        raise UsageError(f"--stop must lie above 0 and be at most 1, got {stop}")
    if 1 / subject.options.steps > stop:
        raise UsageError(
            f"--stop {stop:g} of {subject.options.steps} steps leaves no step with a preview; ask for more"
        )
    level = lv.quality_levels(mixed)[-1]
    files, ignored = gallery_files(subject)
    gallery = Gallery(subject, files)
    captions = _captions(subject, files)
    far = far_captions(captions, subject.seed)
    settings = {**runs.settings_of(subject), "level": level.document(), "stop": stop, "gallery": gallery.digest}

    def measure(key: str, picture: Image) -> dict[str, Any]:
        return _measure(subject, gallery, level, stop, key, picture, {"close": captions[key], "far": far[key]})

    wanted = {key: runs.strip_name(key) for key in gallery.keys}
    with study_folder(subject.out, NAME, settings):
        base = subject.images if subject.images.is_dir() else subject.images.parent
        found = measure_pictures(
            files, base.absolute(), subject.out, settings, subject.side_px, measure, progress, ignored, wanted
        )
        return report_creative(subject, found, stop)


def _captions(subject: Subject, files: Mapping[str, Path]) -> dict[str, str]:
    """Tags of every clean picture that can be read."""
    captions = {}
    for key, path in files.items():
        try:
            captions[key] = Tags().caption([prepared(read_picture(path, key), key, subject.side_px)])[0]
        except SampleError:
            continue
    return captions


def _measure(
    subject: Subject,
    gallery: Gallery,
    level: lv.Level,
    stop: float,
    key: str,
    picture: Image,
    prompts: Mapping[str, str],
) -> dict[str, Any]:
    """Three runs of one picture with the same noise, and how far apart they are."""
    from components.systems.instantir.insight import rms

    lq = lv.degraded(level, picture, subject.seed, key)
    texts = {"none": "", **prompts}
    made = {name: runs.record_picture(subject, key, lq, text, aggregator_stop=stop) for name, text in texts.items()}
    results = {name: runs.decoded(subject, run.latents)[0] for name, run in made.items()}
    plain = made["none"]
    fresh = plain.renewed.tolist()
    answer: dict[str, Any] = {"score": gallery.find(key, subject, lq)[SCORE_VIEW], "prompts": dict(prompts)}
    answer["timesteps"] = plain.timesteps.tolist()
    for name in PROMPTS:
        moved = rms(made[name].previews, plain.previews)[:, 0].tolist()
        steps = [value if there else float("nan") for value, there in zip(moved, fresh, strict=True)]
        hue = prompts[name].split(",")[0].split()[0]
        answer[name] = {
            "preview": numbers(steps),
            "preview_mean": numbers([float(np.mean([v for v, t in zip(moved, fresh, strict=True) if t] or [np.nan]))])[
                0
            ],
            "result": numbers([float(rms(made[name].latents, plain.latents)[0])])[0],
            "levels": numbers([rms_levels(results[name], results["none"])])[0],
            "hue_gain": numbers([hue_share(results[name], hue) - hue_share(results["none"], hue)])[0],
        }
    strip = [runs.strip_row(subject, made[name], [picture, lq]) for name in texts]
    return {**answer, "files": {runs.strip_name(key): runs.strip_png(strip)}}


MOVES = {
    "preview_mean": "previews, RMS in latents",
    "result": "result, RMS in latents",
    "levels": "result, 8-bit levels",
    "hue_gain": "share of the prompted hue",
}


def report_creative(subject: Subject, found: Rows, stop: float) -> StudyResult:
    """Groups, correlations, plots, sheet and page of measured rows."""
    rows, seed = found.rows, subject.seed
    scores = column(rows, "score", "margin")
    groups = groups_of(scores)
    timesteps = np.asarray(rows[0]["timesteps"])
    write_csv(
        subject.out / "values.csv",
        ["key", "group", "margin", "rank", "prompt", *MOVES, "text"],
        [
            (
                row["key"],
                GROUPS[g],
                row["score"]["margin"],
                row["score"]["rank"],
                name,
                *(row[name][m] for m in MOVES),
                row["prompts"][name],
            )
            for row, g in zip(rows, groups, strict=True)
            for name in PROMPTS
        ],
    )
    correlations = {
        name: {move: rank_correlation(scores, column(rows, name, move), seed, "creative") for move in MOVES}
        for name in PROMPTS
    }
    seen = []
    for name in PROMPTS:
        tie = correlations[name]["preview_mean"]
        if not tie.seen:
            word = "no effect of the score seen"
        else:
            word = (
                "as the paper says, low scores are moved more"
                if tie.rho < 0
                else "against the paper, high scores are moved more"
            )
        seen.append(f"{name} prompts, previews: {word} ({told_tie(tie)}).")
        gain = mean_band(column(rows, name, "hue_gain"), seed, "creative")
        obeyed = (
            "the prompted hue grows"
            if gain.low > 0
            else "the prompted hue shrinks"
            if gain.high < 0
            else "no effect on the prompted hue seen"
        )
        seen.append(f"{name} prompts, result: {obeyed} ({told(gain)} of the pixels).")
    farther = mean_band(column(rows, "far", "preview_mean") - column(rows, "close", "preview_mean"), seed, "creative")
    seen.append(f"Far prompts move previews by {told(farther)} more than close ones (RMS in latents).")
    panels, table = [], []
    for name in PROMPTS:
        by_step = column(rows, name, "preview")
        lines = []
        for number, group in enumerate(GROUPS):
            if not (groups == number).any():
                continue
            band = mean_band(by_step[groups == number], seed, "creative")
            lines.append(Line(label=group, y=band.mean, low=band.low, high=band.high))
            cells = []
            for move in MOVES:
                moved = mean_band(column(rows, name, move)[groups == number], seed, "creative")
                cells.append(told(moved, sign=move == "hue_gain"))
            table.append(
                [f"{name}, {group} (margin {shown(float(scores[groups == number].mean()), sign=True)})", *cells]
            )
        panels.append(
            Panel(
                title=f"{name} prompt: previews moved",
                x_label="time step",
                y_label="RMS in latents",
                x=timesteps,
                lines=lines,
                reverse=True,
            )
        )
    for name in PROMPTS:
        panels.append(
            Panel(
                title=f"{name} prompt: each picture",
                x_label="score (retrieval margin)",
                y_label="previews moved, RMS",
                points=(scores, column(rows, name, "preview_mean")),
            )
        )
    order = np.argsort(scores, kind="stable")
    chosen = [rows[order[i]] for i in np.unique(np.linspace(0, len(rows) - 1, 6).round().astype(int))]
    captions = {
        row["key"]: [
            f"{row['key'][:32]} (margin {row['score']['margin'] or 0:+.3f})\n{text or 'no prompt'}"
            for text in ("", *(row["prompts"][name] for name in PROMPTS))
        ]
        for row in chosen
    }
    sheet = runs.strip_sheet(subject.out, chosen, captions)
    sections = [
        Section(
            title="How far a prompt moves a restoration, by score",
            words="Score: the margin by which a degraded picture's mean patch token is nearer to its own original than "
            "to any other. Thirds of the pictures by score; same noise with and without prompt.",
            seen=seen,
            figure=("creative.png", draw(panels, columns=2)),
            head=["Prompt and group", *MOVES.values()],
            rows=table,
        ),
        Section(
            title="From low to high score",
            words="Left to right: original, input, previews over the steps while there are "
            "any, result. Lines: without prompt, close, far.",
            sheet=("creative.jpg", sheet) if sheet else None,
        ),
    ]
    page = Page(
        title="Creative restoration by what the tokens know",
        subtitle="restoray analyze creative: text-guided previews with the Aggregator stopped late (Appendix A)",
        facts=[*facts_of(subject, found), ("Aggregator stops after", f"{100 * stop:.0f} % of the steps")],
        sections=sections,
        quarantined=found.quarantined,
    )
    summary = {
        "stop": stop,
        "correlations": {
            name: {m: {"rho": c.rho, "low": c.low, "high": c.high, "n": c.n} for m, c in by.items()}
            for name, by in correlations.items()
        },
        "groups": dict(zip((row["key"] for row in rows), (GROUPS[g] for g in groups), strict=True)),
    }
    return finish(subject.out, found, page, summary)
