"""`restoray analyze previews`: the paper's Fig. 4 (and 3b) for four levels of quality and for single faults.

For each picture and level a run is recorded with the same noise: distances between previews and denoising means (a),
between adjacent previews (b), and Eq. 7's relative distance (c). The paper says that (a) and (c) rise with the input's
quality; whether they do here is told level by level, as paired differences over pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.evaluation.statistics import Band, mean_band, psnr, rms_levels
from components.types import Image
from pipelines.analysis import levels as lv
from pipelines.analysis import runs
from pipelines.analysis.figures import Line, Panel, draw
from pipelines.analysis.page import Page, Section, interval, shown, verdict, write_page
from pipelines.analysis.study import (
    Rows,
    Subject,
    column,
    json_bytes,
    measure_pictures,
    numbers,
    picture_files,
    study_folder,
    write_csv,
)
from pipelines.console import Progress, no_progress
from pipelines.rows import replace_file

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
RATIOS = frozenset({"delta"})  # averaged as logarithms: a mean of ratios belongs to their few largest
NAME = "previews"


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study did: counts of pictures, its sentences, and where things are."""

    measured: int
    kept: int
    quarantined: int
    ignored: int
    seen: Sequence[str]
    folder: Path
    report: Path


def finish(out: Path, found: Rows, page: Page, summary: Mapping[str, Any]) -> StudyResult:
    """Write summary and report; what every study ends with."""
    seen = [sentence for section in page.sections for sentence in section.seen]
    replace_file(out / "summary.json", json_bytes({**summary, "seen": seen, "pictures": len(found.rows)}))
    report = write_page(out, page)
    return StudyResult(
        measured=found.measured,
        kept=found.kept,
        quarantined=len(found.quarantined),
        ignored=found.ignored,
        seen=seen,
        folder=out,
        report=report,
    )


def facts_of(subject: Subject, found: Rows) -> list[tuple[str, str]]:
    """What every report of a model says first."""
    options = subject.options
    return [
        ("Pictures", f"{len(found.rows)} (middle squares, {subject.side_px} px)"),
        ("Model", f"{subject.model}, digest {subject.digest[:12]}"),
        ("Sampler", f"{options.sampler}, {options.steps} steps, guidance {options.cfg_scale:g}, start {options.start}"),
        ("Seed", str(subject.seed)),
    ]


def analyze_previews(
    subject: Subject, mixed: str = "realesrgan", faults: bool = True, progress: Progress = no_progress
) -> StudyResult:
    """Run the study; resumable a picture at a time.

    Args:
        mixed: preset of the synthetic multi-degradation.
        faults: also every single fault at its strengths.

    Raises:
        UsageError: no pictures, an unknown preset, or a folder that holds another study.
        Failure: nothing could be measured, or `out` cannot be written.
    """
    levels = lv.all_levels(mixed, faults)
    files, ignored = picture_files(subject.images, subject.out, subject.limit)
    settings = {**runs.settings_of(subject), "levels": [level.document() for level in levels]}
    chosen = runs.sheet_keys(list(files))
    quality = lv.QUALITY

    def measure(key: str, picture: Image) -> dict[str, Any]:
        hq = runs.latents_of(subject, picture)
        found: dict[str, Any] = {}
        strip = []
        for level in levels:
            lq = lv.degraded(level, picture, subject.seed, key)
            run = runs.record_picture(subject, key, lq)
            values = runs.run_values(run, hq)
            restored = runs.decoded(subject, run.latents)[0]
            found[level.name] = {
                **values,
                "psnr": numbers([psnr(restored, picture)])[0],
                "lq_rms": rms_levels(lq, picture),
            }
            if key in chosen and level.name in quality:
                strip.append(runs.strip_row(subject, run, [picture, lq]))
        files = {runs.strip_name(key): runs.strip_png(strip)} if strip else {}
        return {"timesteps": run.timesteps.tolist(), "levels": found, "files": files}

    wanted = {key: runs.strip_name(key) for key in chosen}
    with study_folder(subject.out, NAME, settings):
        base = subject.images if subject.images.is_dir() else subject.images.parent
        found = measure_pictures(
            files, base.absolute(), subject.out, settings, subject.side_px, measure, progress, ignored, wanted
        )
        return report_previews(subject, found, levels)


def report_previews(subject: Subject, found: Rows, levels: Sequence[lv.Level]) -> StudyResult:
    """Bands, paired differences, plots, sheet and page of measured rows."""
    rows, seed = found.rows, subject.seed
    timesteps = np.asarray(rows[0]["timesteps"])
    curves = {
        name: {level.name: column(rows, "levels", level.name, name) for level in levels} for name in CURVES
    }  # [pictures, steps] each
    bands = {
        name: {level: mean_band(values, seed, "previews", geometric=name in RATIOS) for level, values in by.items()}
        for name, by in curves.items()
    }
    table = [
        (row["key"], level.name, step + 1, int(timesteps[step]), *(row["levels"][level.name][c][step] for c in CURVES))
        for row in rows
        for level in levels
        for step in range(len(timesteps))
    ]
    write_csv(subject.out / "values.csv", ["key", "level", "step", "timestep", *CURVES], table)
    order = [name for name in lv.QUALITY if name in curves["delta"]]
    pairs = list(zip(order[1:], order[:-1], strict=True))  # (worse, better)
    steps = quality_steps(curves, pairs, seed)
    sections = [
        Section(
            title="Previews by input quality (the paper's Fig. 4)",
            words="Means over pictures with 95 % bands; time steps fall from left to right as sampling goes on. (c) is "
            "averaged as logarithms.",
            seen=quality_sentences(steps),
            figure=("fig4.png", draw([_panel(c, timesteps, bands[c], order) for c in CURVES], columns=2)),
            head=["Better minus worse input", *CURVES.values()],
            rows=[
                [f"{better} − {worse}", *(_told(steps[c][(worse, better)], c) for c in CURVES)]
                for worse, better in pairs
            ],
        )
    ]
    kinds = list(dict.fromkeys(level.kind for level in levels if level.kind))
    effects: dict[str, Any] = {}
    if kinds:
        effects = fault_effects(curves, levels, kinds, seed)
        panels = []
        for kind in kinds:
            names = [lv.HQ, *(level.name for level in levels if level.kind == kind)]
            panels += [_panel(c, timesteps, bands[c], names, f"{kind}: ") for c in ("to_denoised", "change", "delta")]
        sections.append(
            Section(
                title="By type of degradation",
                words="Each fault alone, weak to strong, beside the clean input. The table holds strongest minus "
                "clean; for (c) the ratio.",
                seen=fault_sentences(effects),
                figure=("types.png", draw(panels, columns=3)),
                head=["Fault", *CURVES.values()],
                rows=[[kind, *(_told(effects[kind][c], c) for c in CURVES)] for kind in kinds],
            )
        )
    captions = {row["key"]: [f"{row['key'][:40]}: {name}" for name in order] for row in rows}
    sheet = runs.strip_sheet(subject.out, rows, captions)
    made = [value is not None for value in rows[0]["levels"][order[0]]["preview_error"]]
    shown_steps = ", ".join(f"t={timesteps[step]}" for step in runs.strip_steps(len(timesteps), made))
    if sheet is not None:
        sections.append(
            Section(
                title="Previews over the steps (Fig. 3b)",
                words=f"Left to right: original, input, previews at {shown_steps}, result.",
                sheet=("previews.jpg", sheet),
            )
        )
    quality = {name: {c: _band(bands[c][name]) for c in CURVES} for name in curves["delta"]}
    differences = {c: {f"{b} - {w}": _band(band) for (w, b), band in by.items()} for c, by in steps.items()}
    summary = {
        "timesteps": timesteps,
        "levels": quality,
        "differences": differences,
        "faults": {kind: {c: _band(band) for c, band in by.items()} for kind, by in effects.items()},
    }
    page = Page(
        title="What the previews do",
        subtitle="restoray analyze previews: InstantIR's Previewer over the sampling steps, by degradation",
        facts=facts_of(subject, found),
        sections=sections,
        quarantined=found.quarantined,
    )
    return finish(subject.out, found, page, summary)


def over_steps(values: np.ndarray, name: str) -> np.ndarray:
    """One number a picture [n] of a curve [n, steps]: the mean over the steps, of logarithms for a ratio."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log(values) if name in RATIOS else values
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, values, 0.0).sum(axis=1) / there.sum(axis=1))


def difference(a: np.ndarray, b: np.ndarray, name: str, seed: int, *label: str) -> Band:
    """Paired difference of two curves' step means with its interval; of a ratio's logarithms."""
    return mean_band(over_steps(a, name) - over_steps(b, name), seed, *label)


def quality_steps(
    curves: Mapping[str, Mapping[str, np.ndarray]], pairs: Sequence[tuple[str, str]], seed: int
) -> dict[str, dict[tuple[str, str], Band]]:
    """By curve and (worse, better) level: how much higher the curve lies for the better input."""
    return {
        name: {(w, b): difference(by[b], by[w], name, seed, "previews") for w, b in pairs}
        for name, by in curves.items()
    }


def fault_effects(
    curves: Mapping[str, Mapping[str, np.ndarray]], levels: Sequence[lv.Level], kinds: Sequence[str], seed: int
) -> dict[str, dict[str, Band]]:
    """By fault and curve: strongest minus clean."""
    strongest = {kind: [level.name for level in levels if level.kind == kind][-1] for kind in kinds}
    return {
        kind: {name: difference(by[strongest[kind]], by[lv.HQ], name, seed, "previews") for name, by in curves.items()}
        for kind in kinds
    }


def quality_sentences(steps: Mapping[str, Mapping[tuple[str, str], Band]]) -> list[str]:
    """Whether (a) and (c) rise with quality, as section 3.3 says."""
    sentences = []
    for name in ("to_denoised", "delta"):
        told = {f"{b} over {w}": verdict(float(band.low), float(band.high)) for (w, b), band in steps[name].items()}
        kinds = set(told.values())
        if kinds == {"higher"}:
            word = "rises with the input's quality at every level, as the paper says"
        elif kinds == {"lower"}:
            word = "falls with the input's quality at every level, against the paper"
        elif kinds == {"no effect seen"}:
            word = "does not depend on the input's quality as far as these pictures can tell"
        else:
            word = "is not ordered by quality throughout: " + ", ".join(f"{pair} {what}" for pair, what in told.items())
        sentences.append(f"{CURVES[name]} {word}.")
    return sentences


def fault_sentences(effects: Mapping[str, Mapping[str, Band]]) -> list[str]:
    """What each fault does to (a) and (c) at its strongest."""
    sentences = []
    for kind, by in effects.items():
        words = [f"{CURVES[c]}: {verdict(float(by[c].low), float(by[c].high))}" for c in ("to_denoised", "delta")]
        sentences.append(f"Strong {kind} against the clean input: {'; '.join(words)}.")
    return sentences


def _panel(
    name: str, timesteps: np.ndarray, bands: Mapping[str, Band], names: Sequence[str], before: str = ""
) -> Panel:
    lines = [Line(label=n, y=bands[n].mean, low=bands[n].low, high=bands[n].high) for n in names]
    return Panel(
        title=before + CURVES[name],
        x_label="time step",
        y_label=Y_LABELS[name],
        x=timesteps,
        lines=lines,
        log=name in RATIOS,
        reverse=True,
    )


def _told(band: Band, name: str) -> str:
    """A difference for a table; a ratio for a ratio's logarithms."""
    mean, low, high = float(band.mean), float(band.low), float(band.high)
    word = verdict(low, high)
    if name in RATIOS:
        mean, low, high = (float(np.exp(v)) for v in (mean, low, high))
        return f"x {shown(mean)} [{shown(low)}, {shown(high)}] {word}"
    return f"{interval(mean, low, high)} {word}"


def _band(band: Band) -> dict[str, Any]:
    return {"mean": band.mean, "low": band.low, "high": band.high}
