"""`restoray analyze creative`: how far prompts move restorations, by the retrieval score of the tokens (Appendix A).

The study degrades each picture and scores its tokens by retrieval (the margin to the nearest other original). It then
restores the picture with the Aggregator stopped late: without a prompt, with the picture's own tags (semantically
close) and with the tags of the picture that shares the fewest words with it (far). The paper says that prompts move
pictures with low scores, and hardly move pictures with high scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from components.captions.tags import Tags, hue_share
from components.evaluation.statistics import mean_band, rank_correlation, rms_levels
from components.randomness import generator
from components.types import Image, SampleError
from pipelines.analysis import levels as lv
from pipelines.analysis.bands import (
    band_line,
    band_text,
    correlation_document,
    correlation_text,
    correlation_verdict,
    verdict,
)
from pipelines.analysis.instantir import runs
from pipelines.analysis.instantir.subject import Subject, facts_of, run_settings
from pipelines.analysis.instantir.tokens import Gallery, gallery_pictures
from pipelines.analysis.page import Page, Section
from pipelines.analysis.strips import strip_files, strip_name, strip_sheet
from pipelines.analysis.study import (
    Measurements,
    Pictures,
    StudyResult,
    column,
    finish,
    measure_pictures,
    middle_square,
    numbers,
    study_folder,
    write_csv,
)
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import UsageError
from pipelines.core.pictures import read_picture
from pipelines.pages.figures import Panel, draw
from pipelines.pages.numbers import digits_text
from pipelines.pages.page import evenly

MOVES = {
    "preview_mean": "previews, RMS in latents",
    "result": "result, RMS in latents",
    "levels": "result, 8-bit levels",
    "hue_gain": "share of the prompted hue",
}

NAME = "creative"
PROMPTS = ("close", "far")
GROUPS = ("low score", "middle score", "high score")
STOP = 0.7  # share of the steps; the paper's tools suggest 0.6 to 0.8
SCORE_VIEW = "pooled"
SHEET_ROWS = 6


def far_captions(captions: Mapping[str, str], seed: int) -> dict[str, str]:
    """For each picture the caption of another picture that shares the fewest words with its own.

    (seed, key) selects among captions that share equally few words.
    """
    words = {key: set(text.replace(",", "").split()) for key, text in captions.items()}
    far = {}
    for key, own in words.items():
        others = [other for other in sorted(words) if other != key]
        counts = [len(own & words[other]) for other in others]
        farthest = [other for other, count in zip(others, counts, strict=True) if count == min(counts)]
        far[key] = captions[farthest[int(generator(seed, "far", key).integers(len(farthest)))]]
    return far


def groups_of(scores: np.ndarray) -> np.ndarray:
    """Index into GROUPS for each picture [n]: thirds by rank of the score."""
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    return np.asarray(ranks * len(GROUPS) // max(len(scores), 1))


def analyze_creative(
    subject: Subject, mixed: str = "realesrgan", stop: float = STOP, progress: Progress = no_progress
) -> StudyResult:
    """Run the study; arguments and errors as in analyze_previews.

    Args:
        mixed: preset of the degradation.
        stop: share of the steps after which Previewer and Aggregator stop.
    """
    if not 0 < stop <= 1:
        raise UsageError(f"--stop must lie above 0 and be at most 1, got {stop}")
    steps = subject.options.steps
    if 1 / steps > stop:
        raise UsageError(f"--stop {stop:g} of {steps} steps leaves no step with a preview; ask for more steps")
    job = subject.job
    level = lv.quality_levels(mixed)[-1]
    pictures = gallery_pictures(subject)
    gallery = Gallery(subject, pictures)
    captions = _captions(pictures, job.side_px)
    far = far_captions(captions, job.seed)
    settings = {**run_settings(subject), "level": level.document(), "stop": stop, "gallery": gallery.digest}

    def measure(key: str, picture: Image) -> dict[str, Any]:
        lq = lv.degrade(level, picture, job.seed, key)
        prompts = {"close": captions[key], "far": far[key]}
        score = gallery.find(key, subject, lq)[SCORE_VIEW]
        return {"score": score, "prompts": prompts, **_prompt_effects(subject, stop, key, picture, lq, prompts)}

    strips = {key: strip_name(key) for key in gallery.keys}
    with study_folder(job.out, NAME, settings):
        measurements = measure_pictures(pictures, job.out, settings, job.side_px, measure, progress, strips)
        return report_creative(subject, measurements, stop)


def _captions(pictures: Pictures, side_px: int) -> dict[str, str]:
    """Tags of every clean picture that can be read."""
    captions = {}
    for key, path in pictures.by_key.items():
        try:
            captions[key] = Tags().caption([middle_square(read_picture(path, key), key, side_px)])[0]
        except SampleError:
            continue
    return captions


def _prompt_effects(
    subject: Subject, stop: float, key: str, picture: Image, lq: Image, prompts: Mapping[str, str]
) -> dict[str, Any]:
    """Distances between the runs with and without prompt; all runs of a picture have the same noise."""
    from components.systems.instantir.insight import rms

    trajectories = {
        name: runs.record_picture(subject, key, lq, text, aggregator_stop=stop)
        for name, text in {"none": "", **prompts}.items()
    }
    results = {name: runs.decode(subject, run.latents)[0] for name, run in trajectories.items()}
    plain = trajectories["none"]
    renewed = plain.renewed.tolist()
    values: dict[str, Any] = {"timesteps": plain.timesteps.tolist()}
    for name in PROMPTS:
        distances = rms(trajectories[name].previews, plain.previews)[:, 0].tolist()
        steps = [value if is_new else float("nan") for value, is_new in zip(distances, renewed, strict=True)]
        fresh = [value for value, is_new in zip(distances, renewed, strict=True) if is_new]
        hue = prompts[name].split(",")[0].split()[0]
        scalars = {
            "preview_mean": float(np.mean(fresh or [np.nan])),
            "result": float(rms(trajectories[name].latents, plain.latents)[0]),
            "levels": rms_levels(results[name], results["none"]),
            "hue_gain": hue_share(results[name], hue) - hue_share(results["none"], hue),
        }
        rounded = zip(scalars, numbers(list(scalars.values())), strict=True)
        values[name] = {"preview": numbers(steps), **dict(rounded)}
    strip = [runs.strip_row(subject, run, [picture, lq]) for run in trajectories.values()]
    return {**values, "files": strip_files(key, strip)}


def report_creative(subject: Subject, measurements: Measurements, stop: float) -> StudyResult:
    """Write the table, the sheet and the report of the rows."""
    job, rows = subject.job, measurements.rows
    scores = column(rows, "score", "margin")
    groups = groups_of(scores)
    timesteps = np.asarray(rows[0]["timesteps"])
    write_csv(
        job.out / "values.csv",
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
        name: {move: rank_correlation(scores, column(rows, name, move)) for move in MOVES} for name in PROMPTS
    }
    findings = []
    for name in PROMPTS:
        correlation = correlations[name]["preview_mean"]
        word = correlation_verdict(
            correlation,
            rises="against the paper, high scores are moved more",
            falls="as the paper says, low scores are moved more",
        )
        findings.append(f"{name} prompts, previews: {word} ({correlation_text(correlation)}).")
        gain = mean_band(column(rows, name, "hue_gain"))
        findings.append(f"{name} prompts, share of the prompted hue: {verdict(gain)} ({band_text(gain)} of pixels).")
    farther = mean_band(column(rows, "far", "preview_mean") - column(rows, "close", "preview_mean"))
    findings.append(
        f"Previews moved by far prompts against close ones: {verdict(farther)} ({band_text(farther)}, RMS in latents)."
    )
    panels, table = [], []
    for name in PROMPTS:
        by_step = column(rows, name, "preview")
        lines = []
        for number, group in enumerate(GROUPS):
            if not (groups == number).any():
                continue
            band = mean_band(by_step[groups == number])
            lines.append(band_line(group, band))
            cells = []
            for move in MOVES:
                distance = mean_band(column(rows, name, move)[groups == number])
                cells.append(band_text(distance, sign=move == "hue_gain"))
            margin = digits_text(float(scores[groups == number].mean()), sign=True)
            table.append([f"{name}, {group} (margin {margin})", *cells])
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
    rows_on_sheet = [rows[i] for i in evenly(order.tolist(), SHEET_ROWS)]
    captions = {
        row["key"]: [
            f"{row['key'][:32]} (margin {row['score']['margin'] or 0:+.3f})\n{text or 'no prompt'}"
            for text in ("", *(row["prompts"][name] for name in PROMPTS))
        ]
        for row in rows_on_sheet
    }
    sheet = strip_sheet(job.out, rows_on_sheet, captions)
    sections = [
        Section(
            title="How far a prompt moves a restoration, by score",
            words="Score: the margin by which a degraded picture's mean patch token is nearer to its own original than "
            "to any other. Thirds of the pictures by score; same noise with and without prompt.",
            findings=findings,
            figure=("creative.png", draw(panels, columns=2)),
            head=["Prompt and group", *MOVES.values()],
            rows=table,
        ),
        Section(
            title="From low to high score",
            words="Left to right: original, input, previews over the steps until they stop, result. "
            "Lines: without prompt, close, far.",
            sheet=("creative.jpg", sheet) if sheet else None,
        ),
    ]
    page = Page(
        title="Creative restoration by the score of the tokens",
        subtitle="restoray analyze creative: text-guided previews with the Aggregator stopped late (Appendix A)",
        facts=[*facts_of(subject, measurements), ("Aggregator stops after", f"{100 * stop:.0f} % of the steps")],
        sections=sections,
        quarantine=measurements.quarantine,
    )
    summary = {
        "stop": stop,
        "correlations": {
            name: {move: correlation_document(correlation) for move, correlation in by.items()}
            for name, by in correlations.items()
        },
        "groups": dict(zip((row["key"] for row in rows), (GROUPS[g] for g in groups), strict=True)),
    }
    return finish(job.out, measurements, page, summary)
