"""`restoray analyze previews`: the paper's Fig. 4 (and 3b) for four levels of quality and for single faults.

The study records a run with the same noise for each picture and level. It measures the distance between preview and
denoising mean (a), between adjacent previews (b), and Eq. 7's relative distance (c). The paper says that (a) and (c)
rise with the input's quality. The report compares adjacent levels by paired differences over pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.evaluation import TOO_FEW
from components.evaluation.statistics import Band, mean_band, psnr, rms_levels
from components.types import Image
from pipelines.analysis import levels as lv
from pipelines.analysis.bands import (
    HIGHER,
    LOWER,
    NO_EFFECT,
    band_document,
    band_line,
    band_text,
    interval_text,
    verdict,
)
from pipelines.analysis.instantir import runs
from pipelines.analysis.instantir.subject import Subject, facts_of, run_settings
from pipelines.analysis.page import Page, Section
from pipelines.analysis.strips import sheet_keys, strip_files, strip_name, strip_sheet
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

CURVES = {
    "to_denoised": "(a) preview to denoising mean",
    "change": "(b) preview to the one before",
    "delta": "(c) relative distance, Eq. 7",
    "preview_error": "preview to the clean latents",
}
Y_LABELS = {
    "to_denoised": "RMS in latents",
    "change": "RMS in latents",
    "delta": "delta",
    "preview_error": "RMS in latents",
}
RATIOS = frozenset({"delta"})  # averaged as logarithms: a few large values dominate a mean of ratios
NAME = "previews"


def analyze_previews(
    subject: Subject, mixed: str = "realesrgan", faults: bool = True, progress: Progress = no_progress
) -> StudyResult:
    """Run the study; it resumes picture by picture.

    Args:
        mixed: preset of the mixed degradation.
        faults: also measure every single fault at its strengths.

    Raises:
        UsageError: there are no pictures, the preset is unknown, or the folder holds another study.
        Failure: no picture could be measured, or the output folder cannot be written.
    """
    job = subject.job
    levels = lv.all_levels(mixed, faults)
    pictures = list_study_pictures(job.images, job.out, job.limit)
    settings = {**run_settings(subject), "levels": [level.document() for level in levels]}
    keys_on_sheet = sheet_keys(list(pictures.by_key))

    def measure(key: str, picture: Image) -> dict[str, Any]:
        hq = runs.encode(subject, picture)
        by_level: dict[str, Any] = {}
        strip = []
        for level in levels:
            lq = lv.degrade(level, picture, job.seed, key)
            run = runs.record_picture(subject, key, lq)
            values = runs.run_values(run, hq)
            restored = runs.decode(subject, run.latents)[0]
            by_level[level.name] = {
                **values,
                "psnr": numbers([psnr(restored, picture)])[0],
                "lq_rms": rms_levels(lq, picture),
            }
            if key in keys_on_sheet and level.name in lv.QUALITY:
                strip.append(runs.strip_row(subject, run, [picture, lq]))
        return {"timesteps": run.timesteps.tolist(), "levels": by_level, "files": strip_files(key, strip)}

    strips = {key: strip_name(key) for key in keys_on_sheet}
    with study_folder(job.out, NAME, settings):
        measurements = measure_pictures(pictures, job.out, settings, job.side_px, measure, progress, strips)
        return report_previews(subject, measurements, levels)


def report_previews(subject: Subject, measurements: Measurements, levels: Sequence[lv.Level]) -> StudyResult:
    """Write the table, the sheet and the report of the rows."""
    job, rows = subject.job, measurements.rows
    timesteps = np.asarray(rows[0]["timesteps"])
    curves = {
        name: {level.name: column(rows, "levels", level.name, name) for level in levels} for name in CURVES
    }  # [pictures, steps] each
    bands = {
        name: {level: mean_band(values, geometric=name in RATIOS) for level, values in by.items()}
        for name, by in curves.items()
    }
    table = [
        (row["key"], level.name, step + 1, int(timesteps[step]), *(row["levels"][level.name][c][step] for c in CURVES))
        for row in rows
        for level in levels
        for step in range(len(timesteps))
    ]
    write_csv(job.out / "values.csv", ["key", "level", "step", "timestep", *CURVES], table)
    order = [name for name in lv.QUALITY if name in curves["delta"]]
    pairs = list(zip(order[1:], order[:-1], strict=True))  # (worse, better)
    steps = quality_steps(curves, pairs)
    sections = [
        Section(
            title="Previews by input quality (the paper's Fig. 4)",
            words="Means over pictures with 95 % bands; time steps fall from left to right, in the order of sampling. "
            "(c) is averaged as logarithms.",
            findings=quality_sentences(steps),
            figure=("fig4.png", draw([_panel(c, timesteps, bands[c], order) for c in CURVES], columns=2)),
            head=["Better minus worse input", *CURVES.values()],
            rows=[
                [f"{better} − {worse}", *(_difference_text(steps[c][(worse, better)], c) for c in CURVES)]
                for worse, better in pairs
            ],
        )
    ]
    kinds = list(dict.fromkeys(level.kind for level in levels if level.kind))
    effects: dict[str, Any] = {}
    if kinds:
        effects = fault_effects(curves, levels, kinds)
        panels = []
        for kind in kinds:
            names = [lv.HQ, *(level.name for level in lv.levels_of_kind(levels, kind))]
            panels += [_panel(c, timesteps, bands[c], names, f"{kind}: ") for c in ("to_denoised", "change", "delta")]
        sections.append(
            Section(
                title="By type of degradation",
                words="Each fault alone, weak to strong, next to the clean input. The table holds strongest minus "
                "clean; for (c) the ratio.",
                findings=fault_sentences(effects),
                figure=("types.png", draw(panels, columns=3)),
                head=["Fault", *CURVES.values()],
                rows=[[kind, *(_difference_text(effects[kind][c], c) for c in CURVES)] for kind in kinds],
            )
        )
    captions = {row["key"]: [f"{row['key'][:40]}: {name}" for name in order] for row in rows}
    sheet = strip_sheet(job.out, rows, captions)
    renewed = [value is not None for value in rows[0]["levels"][order[0]]["preview_error"]]
    strip_times = ", ".join(f"t={timesteps[step]}" for step in runs.strip_steps(len(timesteps), renewed))
    if sheet is not None:
        sections.append(
            Section(
                title="Previews over the steps (Fig. 3b)",
                words=f"Left to right: original, input, previews at {strip_times}, result.",
                sheet=("previews.jpg", sheet),
            )
        )
    quality = {name: {c: band_document(bands[c][name]) for c in CURVES} for name in curves["delta"]}
    differences = {c: {f"{b} - {w}": band_document(band) for (w, b), band in by.items()} for c, by in steps.items()}
    summary = {
        "timesteps": timesteps,
        "levels": quality,
        "differences": differences,
        "faults": {kind: {c: band_document(band) for c, band in by.items()} for kind, by in effects.items()},
    }
    page = Page(
        title="What the previews do",
        subtitle="restoray analyze previews: InstantIR's Previewer over the sampling steps, by degradation",
        facts=facts_of(subject, measurements),
        sections=sections,
        quarantine=measurements.quarantine,
    )
    return finish(job.out, measurements, page, summary)


def over_steps(values: np.ndarray, name: str) -> np.ndarray:
    """The mean over the steps of each picture's curve: [n, steps] -> [n]; of the logarithms for a ratio."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(values) if name in RATIOS else values
    is_finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(is_finite, values, 0.0).sum(axis=1) / is_finite.sum(axis=1))


def difference(a: np.ndarray, b: np.ndarray, name: str) -> Band:
    """Paired difference of the step means of two curves, with its interval; of the logarithms for a ratio."""
    return mean_band(over_steps(a, name) - over_steps(b, name))


def quality_steps(
    curves: Mapping[str, Mapping[str, np.ndarray]], pairs: Sequence[tuple[str, str]]
) -> dict[str, dict[tuple[str, str], Band]]:
    """The curve of the better input minus that of the worse one, by curve and (worse, better) level."""
    return {name: {(w, b): difference(by[b], by[w], name) for w, b in pairs} for name, by in curves.items()}


def fault_effects(
    curves: Mapping[str, Mapping[str, np.ndarray]], levels: Sequence[lv.Level], kinds: Sequence[str]
) -> dict[str, dict[str, Band]]:
    """The curve of the strongest fault minus that of the clean input, by fault and curve."""
    strongest = {kind: lv.levels_of_kind(levels, kind)[-1].name for kind in kinds}
    return {
        kind: {name: difference(by[strongest[kind]], by[lv.HQ], name) for name, by in curves.items()} for kind in kinds
    }


def quality_sentences(steps: Mapping[str, Mapping[tuple[str, str], Band]]) -> list[str]:
    """Sentences on whether (a) and (c) rise with quality, as section 3.3 says."""
    sentences = []
    for name in ("to_denoised", "delta"):
        verdicts = {f"{b} over {w}": verdict(band) for (w, b), band in steps[name].items()}
        kinds = set(verdicts.values())
        if kinds == {HIGHER}:
            word = "rises with the input's quality at every level, as the paper says"
        elif kinds == {LOWER}:
            word = "falls with the input's quality at every level, against the paper"
        elif kinds == {NO_EFFECT}:
            word = "does not depend on the input's quality as far as these pictures can tell"
        elif kinds == {TOO_FEW}:
            word = f"and the input's quality: {TOO_FEW}"
        else:
            word = "is not ordered by quality throughout: " + ", ".join(
                f"{pair} {word}" for pair, word in verdicts.items()
            )
        sentences.append(f"{CURVES[name]} {word}.")
    return sentences


def fault_sentences(effects: Mapping[str, Mapping[str, Band]]) -> list[str]:
    """Sentences on the effect of each fault on (a) and (c) at its largest strength."""
    sentences = []
    for kind, by in effects.items():
        words = [f"{CURVES[c]}: {verdict(by[c])}" for c in ("to_denoised", "delta")]
        sentences.append(f"Strong {kind} against the clean input: {'; '.join(words)}.")
    return sentences


def _panel(
    name: str, timesteps: np.ndarray, bands: Mapping[str, Band], names: Sequence[str], prefix: str = ""
) -> Panel:
    return Panel(
        title=prefix + CURVES[name],
        x_label="time step",
        y_label=Y_LABELS[name],
        x=timesteps,
        lines=[band_line(n, bands[n]) for n in names],
        log=name in RATIOS,
        reverse=True,
    )


def _difference_text(band: Band, name: str) -> str:
    """A difference for a table; for a ratio, the factor."""
    if name not in RATIOS:
        return f"{band_text(band)} {verdict(band)}"
    mean, low, high = (float(np.exp(value)) for value in (band.mean, band.low, band.high))
    return f"x {interval_text(mean, low, high, sign=False)} {verdict(band)}"
