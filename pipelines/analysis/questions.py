"""`restoray analyze time` and `restoray analyze crowded`: two questions that the paper leaves open.

time: what the perceptor's time input is good for. The perceptor is told one fixed time step instead of the true one,
at inference; previews and results are compared with the ordinary run of the same noise.

crowded: how restoration depends on how much goes on in a picture. Errors rise with detail whatever restores it, so the
input's own error and the Aggregator's share (the same run without it) stand beside them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from components.complexity import MEASURES, complexity, joint_complexity
from components.evaluation.statistics import Correlation, mean_band, psnr, rank_correlation
from components.types import Image
from pipelines.analysis import levels as lv
from pipelines.analysis import runs
from pipelines.analysis.figures import Line, Panel, draw
from pipelines.analysis.page import Page, Section, interval, told, told_tie, verdict
from pipelines.analysis.previews import StudyResult, facts_of, finish, over_steps
from pipelines.analysis.study import (
    Rows,
    Subject,
    column,
    measure_pictures,
    numbers,
    picture_files,
    study_folder,
    write_csv,
)
from pipelines.console import Progress, no_progress

TIME, CROWDED = "time", "crowded"
FIXED = ("first", "middle", "last")
"""Which of the sampler's own time steps the perceptor is told throughout."""


def fixed_timesteps(timesteps: Any) -> dict[str, int]:
    """The sampler's first, middle and last time step, int64 [n] falling."""
    places = {"first": 0, "middle": len(timesteps) // 2, "last": len(timesteps) - 1}
    return {name: int(timesteps[places[name]]) for name in FIXED}


def analyze_time(subject: Subject, mixed: str = "realesrgan", progress: Progress = no_progress) -> StudyResult:
    """Run the study of the time input; arguments and errors as analyze_previews."""
    level = lv.quality_levels(mixed)[-1]
    files, ignored = picture_files(subject.images, subject.out, subject.limit)
    settings = {**runs.settings_of(subject), "level": level.document()}
    fixed = fixed_timesteps(subject.network.prior.schedule.timesteps(subject.options.steps))
    chosen = runs.sheet_keys(list(files))

    def measure(key: str, picture: Image) -> dict[str, Any]:
        from components.systems.instantir.insight import rms, time_blind

        hq = runs.latents_of(subject, picture)
        lq = lv.degraded(level, picture, subject.seed, key)
        made = {"true": runs.record_picture(subject, key, lq)}
        for name, timestep in fixed.items():
            with time_blind(subject.network, timestep):
                made[name] = runs.record_picture(subject, key, lq)
        answer: dict[str, Any] = {"timesteps": made["true"].timesteps.tolist(), "told": {}}
        strip = []
        for name, run in made.items():
            values = runs.run_values(run, hq)
            moved = numbers(rms(run.previews, made["true"].previews)[:, 0].cpu())
            restored = runs.decoded(subject, run.latents)[0]
            answer["told"][name] = {**values, "moved": moved, "psnr": numbers([psnr(restored, picture)])[0]}
            if key in chosen:
                strip.append(runs.strip_row(subject, run, [picture, lq]))
        return {**answer, "files": {runs.strip_name(key): runs.strip_png(strip)} if strip else {}}

    wanted = {key: runs.strip_name(key) for key in chosen}
    with study_folder(subject.out, TIME, settings):
        base = subject.images if subject.images.is_dir() else subject.images.parent
        found = measure_pictures(
            files, base.absolute(), subject.out, settings, subject.side_px, measure, progress, ignored, wanted
        )
        return report_time(subject, found, fixed)


def report_time(subject: Subject, found: Rows, fixed: dict[str, int]) -> StudyResult:
    """Bands, paired differences, plots, sheet and page of measured rows."""
    rows, seed = found.rows, subject.seed
    timesteps = np.asarray(rows[0]["timesteps"])
    kinds = ("true", *FIXED)
    words = {"true": "true time step", **{name: f"always {fixed[name]}" for name in FIXED}}
    curves = {
        curve: {name: column(rows, "told", name, curve) for name in kinds}
        for curve in ("preview_error", "denoised_error", "moved")
    }
    psnrs = {name: column(rows, "told", name, "psnr") for name in kinds}
    write_csv(
        subject.out / "values.csv",
        ["key", "told", "step", "timestep", *curves],
        [
            (row["key"], name, step + 1, int(timesteps[step]), *(row["told"][name][c][step] for c in curves))
            for row in rows
            for name in kinds
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
        names = kinds if curve != "moved" else FIXED
        bands = {name: mean_band(by[name], seed, "time") for name in names}
        lines = [Line(label=words[n], y=bands[n].mean, low=bands[n].low, high=bands[n].high) for n in names]
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
    size = float(np.nanmean(over_steps(curves["preview_error"]["true"], "preview_error")))
    table, seen, effects = [], [], {}
    for name in FIXED:
        preview = mean_band(
            over_steps(curves["preview_error"][name], "preview_error")
            - over_steps(curves["preview_error"]["true"], "preview_error"),
            seed,
            "time",
        )
        result = mean_band(psnrs[name] - psnrs["true"], seed, "time")
        moved = mean_band(over_steps(curves["moved"][name], "moved"), seed, "time")
        effects[name] = {"preview_error": preview, "psnr": result, "moved": moved}
        cells = [told(b) for b in (preview, result)]
        share = 100 * float(moved.mean) / size if size else float("nan")
        table.append([words[name], told(moved, sign=False), *cells])
        seen.append(
            f"Told {fixed[name]} throughout, previews move by {share:.1f} % of their error; their error: "
            f"{verdict(float(preview.low), float(preview.high))} ({cells[0]}); PSNR of the result: "
            f"{verdict(float(result.low), float(result.high))} ({cells[1]} dB)."
        )
    captions = {row["key"]: [f"{row['key'][:40]}: {words[name]}" for name in kinds] for row in rows}
    sheet = runs.strip_sheet(subject.out, rows, captions)
    sections = [
        Section(
            title="The time input, taken away at inference",
            words="The perceptor's modulation is told one time step in all steps; the rest of the networks keeps "
            "the true one. A perceptor trained without the input could do better than this.",
            seen=seen,
            figure=("time.png", draw(panels, columns=3)),
            head=["Told", "Previews moved, RMS", "Preview error, change", "PSNR of the result, change in dB"],
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
        subtitle="restoray analyze time: the modulation of the perceptor's keys and values made time-blind",
        facts=facts_of(subject, found),
        sections=sections,
        quarantined=found.quarantined,
    )
    summary = {
        "fixed": fixed,
        "effects": {
            name: {k: {"mean": b.mean, "low": b.low, "high": b.high} for k, b in by.items()}
            for name, by in effects.items()
        },
    }
    return finish(subject.out, found, page, summary)


# -- crowded scenes ----------------------------------------------------------------------------------------------------

OUTCOMES = {
    "lq_error": "error of the input, levels",
    "error": "error of the result, levels",
    "gain": "PSNR gained over the input, dB",
    "preview_error": "error of the previews, RMS in latents",
    "delta": "delta (Eq. 7, mean logarithm)",
    "aggregator": "PSNR gained by the Aggregator, dB",
}


def analyze_crowded(subject: Subject, mixed: str = "realesrgan", progress: Progress = no_progress) -> StudyResult:
    """Run the study of complexity; arguments and errors as analyze_previews."""
    from components.evaluation.statistics import rms_levels

    level = lv.quality_levels(mixed)[-1]
    files, ignored = picture_files(subject.images, subject.out, subject.limit)
    settings = {**runs.settings_of(subject), "level": level.document()}

    def measure(key: str, picture: Image) -> dict[str, Any]:
        hq = runs.latents_of(subject, picture)
        lq = lv.degraded(level, picture, subject.seed, key)
        run = runs.record_picture(subject, key, lq)
        without = runs.record_picture(subject, key, lq, aggregator_scale=0.0)
        restored, plain = (runs.decoded(subject, made.latents)[0] for made in (run, without))
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
            "files": {runs.strip_name(key): runs.strip_png([[runs.small(p) for p in (picture, lq, restored, plain)]])},
        }

    wanted = {key: runs.strip_name(key) for key in files}
    with study_folder(subject.out, CROWDED, settings):
        base = subject.images if subject.images.is_dir() else subject.images.parent
        found = measure_pictures(
            files, base.absolute(), subject.out, settings, subject.side_px, measure, progress, ignored, wanted
        )
        return report_crowded(subject, found)


def report_crowded(subject: Subject, found: Rows) -> StudyResult:
    """Correlations, plots, sheet and page of measured rows."""
    rows, seed = found.rows, subject.seed
    joint = joint_complexity([row["complexity"] for row in rows])
    scores = {"joint": joint, **{name: column(rows, "complexity", name) for name in MEASURES}}
    outcomes = {name: column(rows, "outcome", name) for name in OUTCOMES}
    ties: dict[str, dict[str, Correlation]] = {
        name: {score: rank_correlation(x, y, seed, "crowded") for score, x in scores.items()}
        for name, y in outcomes.items()
    }
    write_csv(
        subject.out / "values.csv",
        ["key", "joint", *MEASURES, *OUTCOMES],
        [
            (row["key"], float(c), *(row["complexity"][m] for m in MEASURES), *(row["outcome"][o] for o in OUTCOMES))
            for row, c in zip(rows, joint, strict=True)
        ],
    )
    seen = []
    for name, by in ties.items():
        tie = by["joint"]
        word = "no effect seen" if not tie.seen else "rises with complexity" if tie.rho > 0 else "falls with complexity"
        seen.append(f"{OUTCOMES[name]}: {word} ({told_tie(tie)}).")
    panels = [
        Panel(title=OUTCOMES[name], x_label="complexity (joint rank)", y_label="", points=(joint, y))
        for name, y in outcomes.items()
    ]
    order = np.argsort(joint, kind="stable")
    chosen = [rows[order[i]] for i in np.unique(np.linspace(0, len(rows) - 1, 8).round().astype(int))]
    captions = {
        row["key"]: [
            f"{row['key'][:36]}\ncomplexity {joint[rows.index(row)]:.2f}, gain {row['outcome']['gain'] or 0:+.1f} dB"
        ]
        for row in chosen
    }
    sheet = runs.strip_sheet(subject.out, chosen, captions)
    rhos = [
        [OUTCOMES[name], *(interval(by[s].rho, by[s].low, by[s].high) for s in scores)] for name, by in ties.items()
    ]
    sections = [
        Section(
            title="Crowded scenes",
            words="Complexity: mean rank of edge share, number of segments and entropy of hues. The input's error "
            "rises with detail by itself, so look at the gains too.",
            seen=seen,
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
        subtitle="restoray analyze crowded: errors, previews and delta by how much goes on in a picture",
        facts=facts_of(subject, found),
        sections=sections,
        quarantined=found.quarantined,
    )
    summary = {
        "correlations": {
            name: {s: {"rho": c.rho, "low": c.low, "high": c.high, "n": c.n} for s, c in by.items()}
            for name, by in ties.items()
        }
    }
    return finish(subject.out, found, page, summary)
