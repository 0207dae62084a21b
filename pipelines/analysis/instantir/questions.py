"""`restoray analyze time` and `restoray analyze crowded`: two questions that the paper leaves open.

time: the effect of the perceptor's time input. At inference the perceptor gets one fixed time step instead of the true
one. Previews and results are compared with the ordinary run of the same noise.

crowded: how restoration depends on the complexity of a picture. Every restorer's error rises with detail. The study
therefore also measures the input's own error, and the Aggregator's share (the same run without it).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from components.complexity import MEASURES, complexity, joint_complexity
from components.evaluation.statistics import Correlation, mean_band, psnr, rank_correlation, rms_levels
from components.types import Image
from pipelines.analysis import levels as lv
from pipelines.analysis.bands import (
    band_document,
    band_line,
    band_text,
    correlation_document,
    correlation_text,
    correlation_verdict,
    interval_text,
    verdict,
)
from pipelines.analysis.instantir import runs
from pipelines.analysis.instantir.previews import over_steps
from pipelines.analysis.instantir.subject import Subject, facts_of, run_settings
from pipelines.analysis.page import Page, Section
from pipelines.analysis.strips import sheet_keys, strip_files, strip_name, strip_sheet, tile
from pipelines.analysis.study import (
    Measurements,
    StudyResult,
    column,
    finish,
    list_study_pictures,
    measure_pictures,
    numbers,
    study_folder,
    write_csv,
)
from pipelines.core.console import Progress, no_progress
from pipelines.pages.figures import Panel, draw
from pipelines.pages.page import evenly

OUTCOMES = {
    "lq_error": "error of the input, levels",
    "error": "error of the result, levels",
    "gain": "PSNR gained over the input, dB",
    "preview_error": "error of the previews, RMS in latents",
    "delta": "delta (Eq. 7, mean logarithm)",
    "aggregator": "PSNR gained by the Aggregator, dB",
}

TIME, CROWDED = "time", "crowded"
PLACES = ("first", "middle", "last")
"""The fixed time steps of the perceptor, as places in the sampler's own time steps."""
SHEET_ROWS = 8
"""Rows on the sheet of `crowded`."""


def fixed_timesteps(timesteps: Any) -> dict[str, int]:
    """The first, middle and last of the sampler's time steps, int64 [n] in falling order."""
    indices = {"first": 0, "middle": len(timesteps) // 2, "last": len(timesteps) - 1}
    return {name: int(timesteps[indices[name]]) for name in PLACES}


def analyze_time(subject: Subject, mixed: str = "realesrgan", progress: Progress = no_progress) -> StudyResult:
    """Run the study of the time input; arguments and errors as in analyze_previews."""
    job = subject.job
    level = lv.quality_levels(mixed)[-1]
    pictures = list_study_pictures(job.images, job.out, job.limit)
    settings = {**run_settings(subject), "level": level.document()}
    prior = subject.network.prior
    fixed_steps = fixed_timesteps(prior.sampling.timesteps(prior.schedule, subject.options.steps))
    keys_on_sheet = sheet_keys(list(pictures.by_key))

    def measure(key: str, picture: Image) -> dict[str, Any]:
        from components.systems.instantir.insight import rms, time_blind

        hq = runs.encode(subject, picture)
        lq = lv.degrade(level, picture, job.seed, key)
        trajectories = {"true": runs.record_picture(subject, key, lq)}
        for name, timestep in fixed_steps.items():
            with time_blind(subject.network, timestep):
                trajectories[name] = runs.record_picture(subject, key, lq)
        by_timestep: dict[str, Any] = {}
        strip = []
        for name, run in trajectories.items():
            values = runs.run_values(run, hq)
            distances = numbers(rms(run.previews, trajectories["true"].previews)[:, 0].cpu())
            restored = runs.decode(subject, run.latents)[0]
            by_timestep[name] = {**values, "moved": distances, "psnr": numbers([psnr(restored, picture)])[0]}
            if key in keys_on_sheet:
                strip.append(runs.strip_row(subject, run, [picture, lq]))
        return {
            "timesteps": trajectories["true"].timesteps.tolist(),
            "told": by_timestep,
            "files": strip_files(key, strip),
        }

    strips = {key: strip_name(key) for key in keys_on_sheet}
    with study_folder(job.out, TIME, settings):
        measurements = measure_pictures(pictures, job.out, settings, job.side_px, measure, progress, strips)
        return report_time(subject, measurements, fixed_steps)


def report_time(subject: Subject, measurements: Measurements, fixed_steps: dict[str, int]) -> StudyResult:
    """Write the table, the sheet and the report of the rows; `fixed_steps` comes from fixed_timesteps."""
    job, rows = subject.job, measurements.rows
    timesteps = np.asarray(rows[0]["timesteps"])
    names = ("true", *PLACES)
    labels = {"true": "true time step", **{name: f"always {fixed_steps[name]}" for name in PLACES}}
    curves = {
        curve: {name: column(rows, "told", name, curve) for name in names}
        for curve in ("preview_error", "denoised_error", "moved")
    }
    psnrs = {name: column(rows, "told", name, "psnr") for name in names}
    write_csv(
        job.out / "values.csv",
        ["key", "timestep_input", "step", "timestep", *curves],
        [
            (row["key"], name, step + 1, int(timesteps[step]), *(row["told"][name][c][step] for c in curves))
            for row in rows
            for name in names
            for step in range(len(timesteps))
        ],
    )
    panels = []
    titles = {
        "preview_error": "preview to the clean latents",
        "denoised_error": "denoising mean to the clean latents",
        "moved": "preview to the ordinary one",
    }
    for curve, by in curves.items():
        curve_names = names if curve != "moved" else PLACES
        lines = [band_line(labels[name], mean_band(by[name])) for name in curve_names]
        panels.append(
            Panel(
                title=titles[curve],
                x_label="time step",
                y_label="RMS in latents",
                x=timesteps,
                lines=lines,
                reverse=True,
            )
        )
    true_error = float(np.nanmean(over_steps(curves["preview_error"]["true"], "preview_error")))
    table, findings, effects = [], [], {}
    for name in PLACES:
        preview = mean_band(
            over_steps(curves["preview_error"][name], "preview_error")
            - over_steps(curves["preview_error"]["true"], "preview_error"),
        )
        result = mean_band(psnrs[name] - psnrs["true"])
        distance = mean_band(over_steps(curves["moved"][name], "moved"))
        effects[name] = {"preview_error": preview, "psnr": result, "moved": distance}
        cells = [band_text(band) for band in (preview, result)]
        share = 100 * float(distance.mean) / true_error if true_error else float("nan")
        table.append([labels[name], band_text(distance, sign=False), *cells])
        findings.append(
            f"With the fixed time step {fixed_steps[name]}, previews move by {share:.1f} % of their error; "
            f"their error: {verdict(preview)} ({cells[0]}); PSNR of the result: {verdict(result)} ({cells[1]} dB)."
        )
    captions = {row["key"]: [f"{row['key'][:40]}: {labels[name]}" for name in names] for row in rows}
    sheet = strip_sheet(job.out, rows, captions)
    sections = [
        Section(
            title="The time input, fixed at inference",
            words="The perceptor's modulation gets one time step in all steps; the other networks get the true one. A "
            "perceptor trained without the input could do better than this.",
            findings=findings,
            figure=("time.png", draw(panels, columns=3)),
            head=["Time step", "Previews moved, RMS", "Preview error, change", "PSNR of the result, change in dB"],
            rows=table,
        ),
        Section(
            title="Side by side",
            words="Left to right: original, input, previews over the steps, result.",
            sheet=("time.jpg", sheet) if sheet else None,
        ),
    ]
    page = Page(
        title="What the perceptor's time input does",
        subtitle="restoray analyze time: the modulation of the perceptor's keys and values at a fixed time step",
        facts=facts_of(subject, measurements),
        sections=sections,
        quarantine=measurements.quarantine,
    )
    summary = {
        "fixed": fixed_steps,
        "effects": {name: {k: band_document(band) for k, band in by.items()} for name, by in effects.items()},
    }
    return finish(job.out, measurements, page, summary)


# -- crowded scenes ----------------------------------------------------------------------------------------------------


def analyze_crowded(subject: Subject, mixed: str = "realesrgan", progress: Progress = no_progress) -> StudyResult:
    """Run the study of complexity; arguments and errors as in analyze_previews."""
    job = subject.job
    level = lv.quality_levels(mixed)[-1]
    pictures = list_study_pictures(job.images, job.out, job.limit)
    settings = {**run_settings(subject), "level": level.document()}

    def measure(key: str, picture: Image) -> dict[str, Any]:
        hq = runs.encode(subject, picture)
        lq = lv.degrade(level, picture, job.seed, key)
        run = runs.record_picture(subject, key, lq)
        without = runs.record_picture(subject, key, lq, aggregator_scale=0.0)
        restored, plain = (runs.decode(subject, each.latents)[0] for each in (run, without))
        values = runs.run_values(run, hq)
        preview, delta = (
            float(over_steps(np.array([values[n]], dtype=np.float64), n)[0]) for n in ("preview_error", "delta")
        )
        outcome = {
            "lq_error": rms_levels(lq, picture),
            "error": rms_levels(restored, picture),
            "gain": psnr(restored, picture) - psnr(lq, picture),
            "preview_error": preview,
            "delta": delta,
            "aggregator": psnr(restored, picture) - psnr(plain, picture),
        }
        return {
            "complexity": complexity(picture),
            "outcome": dict(zip(outcome, numbers(list(outcome.values())), strict=True)),
            "files": strip_files(key, [[tile(p) for p in (picture, lq, restored, plain)]]),
        }

    strips = {key: strip_name(key) for key in pictures.by_key}
    with study_folder(job.out, CROWDED, settings):
        measurements = measure_pictures(pictures, job.out, settings, job.side_px, measure, progress, strips)
        return report_crowded(subject, measurements)


def report_crowded(subject: Subject, measurements: Measurements) -> StudyResult:
    """Write the table, the sheet and the report of the rows."""
    job, rows = subject.job, measurements.rows
    joint = joint_complexity([row["complexity"] for row in rows])
    scores = {"joint": joint, **{name: column(rows, "complexity", name) for name in MEASURES}}
    outcomes = {name: column(rows, "outcome", name) for name in OUTCOMES}
    correlations: dict[str, dict[str, Correlation]] = {
        name: {score: rank_correlation(x, y) for score, x in scores.items()} for name, y in outcomes.items()
    }
    write_csv(
        job.out / "values.csv",
        ["key", "joint", *MEASURES, *OUTCOMES],
        [
            (row["key"], float(c), *(row["complexity"][m] for m in MEASURES), *(row["outcome"][o] for o in OUTCOMES))
            for row, c in zip(rows, joint, strict=True)
        ],
    )
    findings = []
    for name, by in correlations.items():
        word = correlation_verdict(by["joint"], "rises with complexity", "falls with complexity")
        findings.append(f"{OUTCOMES[name]}: {word} ({correlation_text(by['joint'])}).")
    panels = [
        Panel(title=OUTCOMES[name], x_label="complexity (joint rank)", y_label="", points=(joint, y))
        for name, y in outcomes.items()
    ]
    order = np.argsort(joint, kind="stable")
    rows_on_sheet = [rows[i] for i in evenly(order.tolist(), SHEET_ROWS)]
    captions = {
        row["key"]: [
            f"{row['key'][:36]}\ncomplexity {joint[rows.index(row)]:.2f}, gain {row['outcome']['gain'] or 0:+.1f} dB"
        ]
        for row in rows_on_sheet
    }
    sheet = strip_sheet(job.out, rows_on_sheet, captions)
    rhos = [
        [OUTCOMES[name], *(interval_text(by[s].rho, by[s].low, by[s].high) for s in scores)]
        for name, by in correlations.items()
    ]
    sections = [
        Section(
            title="Crowded scenes",
            words="Complexity: mean rank of edge share, number of segments and entropy of hues. The input's error "
            "rises with detail by itself, so look at the gains too.",
            findings=findings,
            figure=("crowded.png", draw(panels, columns=3)),
            head=["Spearman's rho with", *scores],
            rows=rhos,
        ),
        Section(
            title="From plain to crowded",
            words="Left to right: original, input, restored, restored without Aggregator.",
            sheet=("crowded.jpg", sheet) if sheet else None,
        ),
    ]
    page = Page(
        title="Does a crowded scene restore worse?",
        subtitle="restoray analyze crowded: errors, previews and delta by the complexity of a picture",
        facts=facts_of(subject, measurements),
        sections=sections,
        quarantine=measurements.quarantine,
    )
    summary = {
        "correlations": {
            name: {score: correlation_document(correlation) for score, correlation in by.items()}
            for name, by in correlations.items()
        }
    }
    return finish(job.out, measurements, page, summary)
