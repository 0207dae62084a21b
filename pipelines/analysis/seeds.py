"""`restoray analyze seeds`: how far a model's results for one input lie apart, and whether each agrees with the input.

For any system. InstaRevive's A.6 shows five results of one input and says that several are welcome where the input
leaves them open, if all align with it. Each picture is degraded to the four levels of InstantIR's Fig. 4 and restored
with several seeds; the spread over seeds is split at 8 px into a coarse and a fine part
(components/evaluation/diversity.py), and the coarse difference to the input stands beside that of the original, which
agrees with the input by construction.
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
from pipelines.analysis import runs
from pipelines.analysis.figures import Line, Panel, draw
from pipelines.analysis.page import Page, Section, told, verdict
from pipelines.analysis.previews import StudyResult, finish
from pipelines.analysis.study import (
    Rows,
    WholeModel,
    column,
    measure_pictures,
    numbers,
    picture_files,
    study_folder,
    write_csv,
)
from pipelines.console import Progress, no_progress
from pipelines.errors import UsageError

NAME = "seeds"
SEEDS = 5
"""Fig. 18 shows five results."""
MAX_SEEDS = 100  # ours
MAP_GAIN = 4
"""A standard deviation of 64 levels is white in the sheet's map."""

VALUES = {
    "total": "spread over seeds, levels",
    "coarse": f"its coarse part (means of {BLOCK_PX} px)",
    "fine": "its fine part",
    "result_to_input": "coarse difference of a result to the input, levels",
    "original_to_input": "coarse difference of the original to the input, levels",
    "psnr": "PSNR of a result, dB",
    "psnr_range": "best seed's PSNR less the worst's, dB",
    "psnr_of_mean": "PSNR of the seeds' mean picture, dB",
    "psnr_of_input": "PSNR of the input, dB",
}


def analyze_seeds(
    subject: WholeModel, mixed: str = "realesrgan", seeds: int = SEEDS, progress: Progress = no_progress
) -> StudyResult:
    """Run the study; resumable a picture at a time.

    Args:
        mixed: preset of the synthetic multi-degradation.
        seeds: results of each input; the first is that of `restoray restore --seed <the study's>`, and so on.

    Raises:
        UsageError: no pictures, an unknown preset, too few or many seeds, or a folder that holds another study.
        Failure: nothing could be measured, or `out` cannot be written.
    """
    if not 2 <= seeds <= MAX_SEEDS:
        raise UsageError(f"--seeds must be between 2 and {MAX_SEEDS}, got {seeds}")
    if subject.side_px < BLOCK_PX:
        raise UsageError(f"--side must be at least {BLOCK_PX} px here, got {subject.side_px}")
    levels = lv.quality_levels(mixed)
    files, ignored = picture_files(subject.images, subject.out, subject.limit)
    settings = {**settings_of(subject), "levels": [level.document() for level in levels], "seeds": seeds}
    chosen = runs.sheet_keys(list(files))

    def measure(key: str, picture: Image) -> dict[str, Any]:
        values: dict[str, Any] = {}
        strip = []
        for level in levels:
            lq = lv.degraded(level, picture, subject.seed, key)
            results = [restored(subject, key, lq, subject.seed + number) for number in range(seeds)]
            values[level.name] = picture_values(results, lq, picture)
            if key in chosen:
                strip.append([runs.small(p) for p in (picture, lq, *results[:SEEDS], spread_map(results))])
        files = {runs.strip_name(key): runs.strip_png(strip)} if strip else {}
        return {"levels": values, "files": files}

    wanted = {key: runs.strip_name(key) for key in chosen}
    with study_folder(subject.out, NAME, settings):
        base = subject.images if subject.images.is_dir() else subject.images.parent
        found = measure_pictures(
            files, base.absolute(), subject.out, settings, subject.side_px, measure, progress, ignored, wanted
        )
        return report_seeds(subject, found, [level.name for level in levels], seeds)


def settings_of(subject: WholeModel) -> dict[str, Any]:
    """What decides the rows besides the study's own settings."""
    return {
        "model": subject.digest,
        "options": dict(subject.options),
        "side_px": subject.side_px,
        "seed": subject.seed,
        "device": subject.device,
    }


def restored(subject: WholeModel, key: str, lq: Image, seed: int) -> Image:
    """One result, with the seed that a job of that seed gives this picture."""
    asked = Request(key=key, image=lq, seed=picture_seed(seed, key), options=subject.options)
    return subject.restorer.restore([asked])[0].image


def picture_values(results: Sequence[Image], lq: Image, hq: Image) -> dict[str, float | None]:
    """VALUES of one picture at one level; None where not finite (a PSNR of equal pictures)."""
    apart = spread(results)
    scores = [psnr(result, hq) for result in results]
    mean = np.rint(np.mean([result.astype(np.float64) for result in results], axis=0)).astype(np.uint8)
    values = {
        "total": apart.total,
        "coarse": apart.coarse,
        "fine": apart.fine,
        "result_to_input": float(np.mean([coarse_error(result, lq) for result in results])),
        "original_to_input": coarse_error(hq, lq),
        "psnr": float(np.mean(scores)),
        "psnr_range": max(scores) - min(scores),
        "psnr_of_mean": psnr(mean, hq),
        "psnr_of_input": psnr(lq, hq),
    }
    return dict(zip(values, numbers(list(values.values())), strict=True))


def spread_map(results: Sequence[Image]) -> Image:
    """Where the results differ: the standard deviation over seeds, MAP_GAIN times, as a gray picture [H, W, 3]."""
    deviation = np.stack([result.astype(np.float64) for result in results]).std(axis=0, ddof=1).mean(axis=2)
    gray = np.clip(np.rint(MAP_GAIN * deviation), 0, 255).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)


# -- report ------------------------------------------------------------------------------------------------------------


def report_seeds(subject: WholeModel, found: Rows, levels: Sequence[str], seeds: int) -> StudyResult:
    """Bands, sentences, plots, sheet and page of measured rows."""
    rows, seed = found.rows, subject.seed
    values = {name: {level: column(rows, "levels", level, name) for level in levels} for name in VALUES}
    bands = {name: {level: mean_band(by[level], seed, "seeds") for level in levels} for name, by in values.items()}
    write_csv(
        subject.out / "values.csv",
        ["key", "level", *VALUES],
        [(row["key"], level, *(row["levels"][level][name] for name in VALUES)) for row in rows for level in levels],
    )
    seen = sentences(values, levels, seed)
    captions = {row["key"]: [f"{row['key'][:40]}: {level}" for level in levels] for row in rows}
    sheet = runs.strip_sheet(subject.out, rows, captions)
    sections = [
        Section(
            title="What the seed decides, and what the input",
            words=f"Means over pictures with 95 % bands, {seeds} seeds each. Coarse: means of squares of {BLOCK_PX} "
            "px, which even the x8 input keeps. The original agrees with its input by construction: results that "
            "differ from it coarsely no more than the original does are aligned with it.",
            seen=seen,
            figure=("seeds.png", draw(panels(bands, levels))),
            head=["Input", *VALUES.values()],
            rows=[[level, *(told(bands[name][level], sign=False) for name in VALUES)] for level in levels],
        )
    ]
    if sheet is not None:
        sections.append(
            Section(
                title="Results of several seeds",
                words=f"Left to right: original, input, results of the first {min(seeds, SEEDS)} seeds, and where they "
                f"differ (a standard deviation of {255 // MAP_GAIN} levels is white).",
                sheet=("seeds.jpg", sheet),
            )
        )
    page = Page(
        title="How many pictures one input allows",
        subtitle="restoray analyze seeds: diversity over seeds and consistency with the input",
        facts=[
            ("Pictures", f"{len(rows)} (middle squares, {subject.side_px} px)"),
            ("Model", f"{subject.model} ({subject.system}), digest {subject.digest[:12]}"),
            ("Options", ", ".join(f"{k}={v}" for k, v in subject.options.items()) or "the model's own"),
            ("Seeds", f"{seed} to {seed + seeds - 1}"),
        ],
        sections=sections,
        quarantined=found.quarantined,
    )
    summary = {
        "seeds": seeds,
        "levels": {
            level: {
                n: {"mean": b.mean, "low": b.low, "high": b.high} for n, b in ((n, bands[n][level]) for n in VALUES)
            }
            for level in levels
        },
    }
    return finish(subject.out, found, page, summary)


def panels(bands: Mapping[str, Mapping[str, Band]], levels: Sequence[str]) -> list[Panel]:
    """Spread, agreement and PSNR over the levels."""

    def line(label: str, name: str) -> Line:
        of = [bands[name][level] for level in levels]
        mean, low, high = (np.array([float(getattr(band, part)) for band in of]) for part in ("mean", "low", "high"))
        return Line(label=label, y=mean, low=low, high=high)

    kinds = {
        "spread over seeds": ("levels", {"all": "total", "coarse": "coarse", "fine": "fine"}),
        "coarse difference to the input": ("levels", {"results": "result_to_input", "original": "original_to_input"}),
        "PSNR": ("dB", {"a seed's": "psnr", "of the mean": "psnr_of_mean", "the input's": "psnr_of_input"}),
    }
    return [
        Panel(
            title=title,
            x_label="input",
            y_label=unit,
            x=np.arange(len(levels), dtype=float),
            ticks=list(levels),
            lines=[line(label, name) for label, name in lines.items()],
        )
        for title, (unit, lines) in kinds.items()
    ]


def sentences(values: Mapping[str, Mapping[str, np.ndarray]], levels: Sequence[str], seed: int) -> list[str]:
    """What the numbers say: of diversity, of its dependence on the input, of consistency and of PSNR."""
    total = values["total"]
    if all(not np.any(total[level]) for level in levels):
        return ["Every seed gives the same picture: this model takes no noise."]

    def mean(name: str, level: str) -> str:
        return told(mean_band(values[name][level], seed, "seeds"), sign=False)

    worst = levels[-1]
    square = np.square(values["fine"][worst]).sum() / np.square(total[worst]).sum()
    said = [
        f"Seeds spread the results of the {worst} input by {mean('total', worst)} levels; {100 * square:.0f} % of that "
        f"variance is detail below {BLOCK_PX} px."
    ]
    words = []
    for better, worse in pairwise(levels):
        band = mean_band(total[worse] - total[better], seed, "seeds")
        words.append(f"{worse} over {better} {told(band)}, {verdict(float(band.low), float(band.high))}")
    said.append(f"Spread by input: {'; '.join(words)}.")
    for level in levels[1:]:
        band = mean_band(values["result_to_input"][level] - values["original_to_input"][level], seed, "seeds")
        word = verdict(float(band.low), float(band.high))
        agree = {"higher": "agree with it less than", "lower": "agree with it more than", "no effect seen": "agree as"}
        said.append(
            f"{level}: results differ coarsely from the input by {mean('result_to_input', level)} levels, originals by "
            f"{mean('original_to_input', level)}: "
            + (f"results {agree[word]} the original does." if word in agree else f"{word}.")
        )
    gain = mean_band(values["psnr_of_mean"][worst] - values["psnr"][worst], seed, "seeds")
    said.append(
        f"{worst}: best and worst seed lie {mean('psnr_range', worst)} dB of PSNR apart, and the seeds' mean picture "
        f"has {told(gain)} dB over a single result."
    )
    return said
