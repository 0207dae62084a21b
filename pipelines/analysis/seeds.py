"""`restoray analyze seeds`: how much results for one input vary with the seed, and whether they agree with the input.

The study works for models of any system. Appendix A.6 of InstaRevive shows five results of one input: they may differ
in what the input does not determine, but each must align with the input.

Each picture is degraded to the four quality levels (pipelines/analysis/levels.py) and restored with several seeds. The
standard deviation over seeds has a coarse part, of the means of 8 x 8 px blocks, and a fine part within the blocks
(components/evaluation/diversity.py). The coarse difference between a result and the input is compared with the coarse
difference between the original and the input, because the original agrees with the input by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from components.evaluation.diversity import BLOCK_PX, coarse_error, spread
from components.evaluation.statistics import Band, mean_band, psnr
from components.restoring import picture_seed
from components.types import Image, Request
from pipelines.analysis import levels as lv
from pipelines.analysis.bands import (
    HIGHER,
    LOWER,
    NO_EFFECT,
    band_document,
    band_line,
    band_text,
    stack_bands,
    verdict,
)
from pipelines.analysis.model import WholeModel
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
    pictures_fact,
    study_folder,
    write_csv,
)
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import UsageError
from pipelines.pages.figures import Panel, draw

NAME = "seeds"
SEEDS = 5
"""Five, as in InstaRevive's Fig. 18."""
MAX_SEEDS = 100  # our choice
MAP_GAIN = 4
"""The gray value of the spread map is the standard deviation times MAP_GAIN: 64 or more 8-bit levels are white."""

VALUES = {
    "total": "spread over seeds, 8-bit levels",
    "coarse": f"coarse part of the spread (means of {BLOCK_PX} x {BLOCK_PX} px)",
    "fine": "fine part of the spread",
    "result_to_input": "coarse difference between result and input, 8-bit levels",
    "original_to_input": "coarse difference between original and input, 8-bit levels",
    "psnr": "PSNR of a result, dB",
    "psnr_range": "PSNR of the best seed minus the worst, dB",
    "psnr_of_mean": "PSNR of the seeds' mean picture, dB",
    "psnr_of_input": "PSNR of the input, dB",
}
"""The values of a picture at one quality level, with their labels in the report."""


def analyze_seeds(
    model: WholeModel, mixed: str = "realesrgan", seeds: int = SEEDS, progress: Progress = no_progress
) -> StudyResult:
    """Run the study; an interrupted run continues at the next picture.

    Args:
        mixed: preset of the mixed degradation.
        seeds: number of results for each input. Result n equals that of `restoray restore --seed S` with S = the
            study's seed + n, from n = 0.

    Raises:
        UsageError: there are no pictures, the preset is unknown, the number of seeds is out of range, or the folder
            holds another study.
        Failure: no picture could be measured, or the output folder cannot be written.
    """
    job = model.job
    if not 2 <= seeds <= MAX_SEEDS:
        raise UsageError(f"--seeds must be between 2 and {MAX_SEEDS}, got {seeds}")
    if job.side_px < BLOCK_PX:
        raise UsageError(f"--side must be at least {BLOCK_PX} px here, got {job.side_px}")
    levels = lv.quality_levels(mixed)
    pictures = list_study_pictures(job.images, job.out, job.limit)
    settings = {**model.settings(model.options), "levels": [level.document() for level in levels], "seeds": seeds}
    keys_on_sheet = sheet_keys(list(pictures.by_key))

    def measure(key: str, picture: Image) -> dict[str, Any]:
        values: dict[str, Any] = {}
        strip = []
        for level in levels:
            lq = lv.degrade(level, picture, job.seed, key)
            results = [restore(model, key, lq, job.seed + number) for number in range(seeds)]
            values[level.name] = picture_values(results, lq, picture)
            if key in keys_on_sheet:
                strip.append([tile(p) for p in (picture, lq, *results[:SEEDS], spread_map(results))])
        return {"levels": values, "files": strip_files(key, strip)}

    strips = {key: strip_name(key) for key in keys_on_sheet}
    with study_folder(job.out, NAME, settings):
        measurements = measure_pictures(pictures, job.out, settings, job.side_px, measure, progress, strips)
        return report_seeds(model, measurements, [level.name for level in levels], seeds)


def restore(model: WholeModel, key: str, lq: Image, seed: int) -> Image:
    """Restore one picture, as a batch job with this seed does."""
    request = Request(key=key, image=lq, seed=picture_seed(seed, key), options=model.options)
    return model.restorer.restore([request])[0].image


def picture_values(results: Sequence[Image], lq: Image, hq: Image) -> dict[str, float | None]:
    """The VALUES of one picture at one quality level; None for a value that is not finite (PSNR of equal pictures)."""
    deviation = spread(results)
    scores = [psnr(result, hq) for result in results]
    mean = np.rint(np.mean([result.astype(np.float64) for result in results], axis=0)).astype(np.uint8)
    values = {
        "total": deviation.total,
        "coarse": deviation.coarse,
        "fine": deviation.fine,
        "result_to_input": float(np.mean([coarse_error(result, lq) for result in results])),
        "original_to_input": coarse_error(hq, lq),
        "psnr": float(np.mean(scores)),
        "psnr_range": max(scores) - min(scores),
        "psnr_of_mean": psnr(mean, hq),
        "psnr_of_input": psnr(lq, hq),
    }
    return dict(zip(values, numbers(list(values.values())), strict=True))


def spread_map(results: Sequence[Image]) -> Image:
    """The standard deviation over seeds, times MAP_GAIN, as a gray picture [H, W, 3]."""
    deviation = np.stack([result.astype(np.float64) for result in results]).std(axis=0, ddof=1).mean(axis=2)
    gray = np.clip(np.rint(MAP_GAIN * deviation), 0, 255).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)


# -- report ------------------------------------------------------------------------------------------------------------


def report_seeds(model: WholeModel, measurements: Measurements, levels: Sequence[str], seeds: int) -> StudyResult:
    """Write values.csv, the contact sheet and the report of the measurements."""
    job, rows, seed = model.job, measurements.rows, model.job.seed
    values = {name: {level: column(rows, "levels", level, name) for level in levels} for name in VALUES}
    bands = {name: {level: mean_band(by_level[level]) for level in levels} for name, by_level in values.items()}
    write_csv(
        job.out / "values.csv",
        ["key", "level", *VALUES],
        [(row["key"], level, *(row["levels"][level][name] for name in VALUES)) for row in rows for level in levels],
    )
    captions = {row["key"]: [f"{row['key'][:40]}: {level}" for level in levels] for row in rows}
    sheet = strip_sheet(job.out, rows, captions)
    sections = [
        Section(
            title="Spread over seeds, and agreement with the input",
            words=f"Means over pictures with 95 % bands, {seeds} seeds each. Coarse values are of the means of "
            f"{BLOCK_PX} x {BLOCK_PX} px blocks, which even the x8 downsampling keeps. The original agrees with its "
            "input by construction. So a result is aligned with the input if its coarse difference from the input is "
            "not larger than the original's.",
            findings=sentences(values, levels),
            figure=("seeds.png", draw(panels(bands, levels))),
            head=["Input", *VALUES.values()],
            rows=[[level, *(band_text(bands[name][level], sign=False) for name in VALUES)] for level in levels],
        )
    ]
    if sheet is not None:
        sections.append(
            Section(
                title="Results of several seeds",
                words=f"Left to right: original, input, results of the first {min(seeds, SEEDS)} seeds, and the "
                f"standard deviation over all seeds ({256 // MAP_GAIN} or more 8-bit levels are white).",
                sheet=("seeds.jpg", sheet),
            )
        )
    page = Page(
        title="How much the results of one input vary with the seed",
        subtitle="restoray analyze seeds: diversity over seeds and consistency with the input",
        facts=[
            pictures_fact(measurements, job.side_px),
            ("Model", model.title(model.system)),
            ("Options", ", ".join(f"{k}={v}" for k, v in model.options.items()) or "the model's defaults"),
            ("Seeds", f"{seed} to {seed + seeds - 1}"),
        ],
        sections=sections,
        quarantine=measurements.quarantine,
    )
    summary = {
        "seeds": seeds,
        "levels": {level: {name: band_document(bands[name][level]) for name in VALUES} for level in levels},
    }
    return finish(job.out, measurements, page, summary)


def panels(bands: Mapping[str, Mapping[str, Band]], levels: Sequence[str]) -> list[Panel]:
    """Plots of the spread, the coarse difference from the input and the PSNR over the quality levels."""
    plots = {
        "spread over seeds": ("8-bit levels", {"all": "total", "coarse": "coarse", "fine": "fine"}),
        "coarse difference from the input": (
            "8-bit levels",
            {"results": "result_to_input", "original": "original_to_input"},
        ),
        "PSNR": ("dB", {"one result": "psnr", "mean of the seeds": "psnr_of_mean", "input": "psnr_of_input"}),
    }
    return [
        Panel(
            title=title,
            x_label="input",
            y_label=unit,
            x=np.arange(len(levels), dtype=float),
            ticks=list(levels),
            lines=[
                band_line(label, stack_bands([bands[name][level] for level in levels])) for label, name in lines.items()
            ],
        )
        for title, (unit, lines) in plots.items()
    ]


def sentences(values: Mapping[str, Mapping[str, np.ndarray]], levels: Sequence[str]) -> list[str]:
    """Findings: spread over seeds, its change with the input's quality, agreement with the input, and PSNR."""
    total = values["total"]
    if all(not np.any(total[level]) for level in levels):
        return ["Every seed gives the same picture: this model takes no noise."]

    def mean(name: str, level: str) -> str:
        return band_text(mean_band(values[name][level]), sign=False)

    worst = levels[-1]
    fine_share = np.square(values["fine"][worst]).sum() / np.square(total[worst]).sum()
    text = [
        f"At {worst}, the standard deviation over seeds is {mean('total', worst)} levels; {100 * fine_share:.0f} % of "
        f"that variance is detail below {BLOCK_PX} px."
    ]
    differences = []
    for better, worse in pairwise(levels):
        band = mean_band(total[worse] - total[better])
        differences.append(f"{worse} minus {better} {band_text(band)}, {verdict(band)}")
    text.append(f"Change of the spread with the input: {'; '.join(differences)}.")
    for level in levels[1:]:
        word = verdict(mean_band(values["result_to_input"][level] - values["original_to_input"][level]))
        agree = {
            HIGHER: "agree with the input less than",
            LOWER: "agree with the input more than",
            NO_EFFECT: "agree with the input as well as",
        }
        text.append(
            f"{level}: the coarse difference from the input is {mean('result_to_input', level)} levels for results and "
            f"{mean('original_to_input', level)} for originals: "
            + (f"results {agree[word]} the original does." if word in agree else f"{word}.")
        )
    gain = mean_band(values["psnr_of_mean"][worst] - values["psnr"][worst])
    text.append(
        f"{worst}: the PSNR of the best seed minus that of the worst is {mean('psnr_range', worst)} dB. The PSNR of "
        f"the mean picture over seeds minus that of one result is {band_text(gain)} dB."
    )
    return text
