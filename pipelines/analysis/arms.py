"""`restoray analyze arms`: the same pictures restored with several sets of options or models, scored side by side.

The study works for models of any system. It answers what an option or a training is worth (SUPIR's Fig. 8a varies its
tau, Table 2c its connectors): every picture is degraded once, restored by every arm with the same noise, and scored
against the original, the input and nothing. Differences are paired by picture, with 95 % intervals.

An arm may have several models, trainings that differ in their seed. The n-th training of an arm restores with the n-th
seed and is compared with the n-th training of the first arm; the intervals then cover new pictures, trainings and
noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.captions.identity import CaptionerError
from components.captions.presets import TAGS, build_captioner
from components.captions.text import fill_frame, tidy
from components.degradations import build_degradation
from components.evaluation.metrics import MetricError, Metrics, Origin, usable
from components.evaluation.statistics import Band, training_band
from components.images import to_float, to_uint8
from components.options import TEXTS
from components.restoring import check_text, picture_seed
from components.types import Image, Request, SampleError
from pipelines.analysis.bands import band_document, band_line, band_text, stack_bands
from pipelines.analysis.costs import COSTS, cost_text, training_costs
from pipelines.analysis.model import WholeModel, open_whole
from pipelines.analysis.page import Page, Section
from pipelines.analysis.strips import sheet_keys, strip_files, strip_name, strip_sheet, tile
from pipelines.analysis.study import (
    Measurements,
    Pictures,
    StudyResult,
    column,
    finish,
    list_study_pictures,
    measure_pictures,
    middle_square,
    pictures_fact,
    study_folder,
    write_csv,
)
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import UsageError, unknown
from pipelines.core.pictures import read_picture
from pipelines.pages.figures import Panel, draw

NAME = "arms"
METRICS = ("psnr", "ssim", "st_lpips", "consistency", "piqe", "niqe_restoray")
"""Fidelity, agreement with the input, and two scores without a target."""
WITHOUT_WEIGHTS = ("lpips", "clipiqa", "musiq", "maniqa")
"""Scores of SUPIR's tables. Their weights do not ship, so the table says "unavailable" unless they are asked for."""
INPUT = "input"
"""The row of the input itself."""
MODEL, CAPTION = "model", "caption"
CAPTIONS = ("", "own", "other")
OWN_KEYS = (*TEXTS, MODEL, CAPTION)
"""Keys of an arm that are no options of its model."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One set of options, with its models and texts.

    Attributes:
        models: one for each training, the same number for every arm.
        options: typed options of the models.
        prompt, negative_prompt: the same for all pictures.
        caption: "own" takes the caption of the original for the prompt, "other" that of the next original.
    """

    name: str
    models: Sequence[WholeModel]
    options: Mapping[str, Any]
    prompt: str = ""
    negative_prompt: str = ""
    caption: str = ""

    def document(self) -> dict[str, Any]:
        """For study.json."""
        texts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        more = {"caption": self.caption} if self.caption else {}
        digests = [model.digest for model in self.models]
        model = digests[0] if len(digests) == 1 else digests
        return {"model": model, "options": dict(self.options), **texts, **more}


def model_names(values: Mapping[str, Any]) -> list[str]:
    """The models that an arm names: one, several trainings in a list, or none."""
    models = values.get(MODEL) or []
    return [str(each) for each in models] if isinstance(models, list | tuple) else [str(models)]


def read_arms(model: WholeModel, arms: Mapping[str, Mapping[str, Any]]) -> list[Arm]:
    """Arms by name, with typed options.

    Args:
        arms: options by arm; `model` (a folder or a name, or a list of trainings) replaces the study's, `caption` is
            own or other, `prompt` and `negative_prompt` are texts, all others the model's own options, on top of the
            job's.

    Raises:
        UsageError: no arm, an arm named as the input's row, arms with different numbers of trainings, or an option that
            the model does not take.
    """
    if not arms:
        raise UsageError("name at least one arm: --vary KEY=V1,V2 or --arm 'NAME: KEY=VALUE KEY=VALUE'")
    result, models = [], dict[str, WholeModel]()
    for name, values in arms.items():
        if name == INPUT:
            raise UsageError(f"an arm cannot be called {INPUT!r}: that is the row of the input itself")
        names, caption = model_names(values), str(values.get(CAPTION, ""))
        if caption not in CAPTIONS:
            raise UsageError(f"arm {name!r}: {unknown('caption', caption, CAPTIONS)}")
        if caption and values.get("prompt"):
            raise UsageError(f"arm {name!r} has a prompt and takes captions: leave one out")
        for other in names:
            if other not in models:
                models[other] = open_whole(dataclasses.replace(model.job, model=other))
        own = [models[other] for other in names] or [model]
        try:
            texts = {key: check_text(key, values[key]) for key in TEXTS if key in values}
            options = own[0].check({**own[0].options, **{k: v for k, v in values.items() if k not in OWN_KEYS}})
        except ValueError as error:
            raise UsageError(f"arm {name!r}: {error}") from error
        result.append(Arm(name=name, models=own, options=options, caption=caption, **texts))
    check_trainings({arm.name: len(arm.models) for arm in result})
    return result


def check_trainings(counts: Mapping[str, int]) -> None:
    """Raises UsageError unless all arms have one number of trainings; the n-th of each are paired."""
    first, most = next(iter(counts.items()))
    for name, count in counts.items():
        if count != most:
            raise UsageError(
                f"the n-th trainings of all arms are compared, but there are models: {count} for arm {name!r} and "
                f"{most} for {first!r}"
            )


def write_captions(pictures: Pictures, side_px: int, captioner: str, device: str) -> dict[str, str]:
    """Captions of the originals by key; pictures that cannot be read have none.

    Raises:
        UsageError: there is no such captioner.
    """
    try:
        writer = build_captioner(captioner, max_tokens=0, device=device)
    except CaptionerError as error:
        raise UsageError(str(error)) from error
    captions = {}
    for key, path in pictures.by_key.items():
        with contextlib.suppress(SampleError):  # the study itself quarantines it
            captions[key] = tidy(writer.caption([middle_square(read_picture(path, key), key, side_px)])[0])
    return captions


def prompts_of(arms: Sequence[Arm], captions: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Prompts by arm and key."""
    keys = list(captions)
    after = dict(zip(keys, [*keys[1:], *keys[:1]], strict=True))
    prompts: dict[str, dict[str, str]] = {}
    for arm in arms:
        texts = {key: captions[key if arm.caption == "own" else after[key]] for key in keys} if arm.caption else {}
        prompts[arm.name] = {key: fill_frame(arm.models[0].frame, text) if text else "" for key, text in texts.items()}
    return prompts


def analyze_arms(
    model: WholeModel,
    arms: Mapping[str, Mapping[str, Any]],
    mixed: str = "realesrgan",
    metrics: Sequence[str] = (),
    captioner: str = TAGS,
    paper: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress = no_progress,
) -> StudyResult:
    """Run the study; an interrupted run continues at the next picture.

    Args:
        arms: see read_arms; the first one is what the others are compared with.
        mixed: preset of the degradation.
        metrics: more metrics, by name; they may need weights.
        captioner: writes the captions of arms with `caption`.
        paper: numbers of a paper by arm and column, to print beside ours.

    Raises:
        UsageError: there are no pictures, an arm, an option, a metric or the preset is wrong, or the folder holds
            another study.
        Failure: no picture could be measured, or the output folder cannot be written.
    """
    job, entries, printed = model.job, read_arms(model, arms), paper or {}
    if strange := [name for name in printed if name not in (*arms, INPUT)]:
        raise unknown("arm of the paper's numbers", strange[0], [INPUT, *arms])
    try:
        degradation = build_degradation(mixed)
        names = tuple(dict.fromkeys([*usable(METRICS), *metrics]))
        scorer = Metrics(names)
    except (ValueError, MetricError) as error:
        raise UsageError(str(error)) from error
    pictures = list_study_pictures(job.images, job.out, job.limit)
    captions = dict[str, str]()
    if any(arm.caption for arm in entries):
        captions = write_captions(pictures, job.side_px, captioner, job.device)
    prompts = prompts_of(entries, captions)
    settings = {
        **model.settings(model.options),
        "arms": {arm.name: arm.document() for arm in entries},
        "degradation": mixed,
        "metrics": list(names),
        **({"captions": captions} if captions else {}),
    }
    keys_on_sheet, trainings = sheet_keys(list(pictures.by_key)), len(entries[0].models)

    def measure(key: str, picture: Image) -> dict[str, Any]:
        plan = degradation.draw(job.seed, key, 0)
        lq = to_uint8(degradation.apply(to_float(picture), plan))
        results = {INPUT: [lq]} | {
            arm.name: [
                _restore(arm, number, key, lq, prompts[arm.name].get(key, arm.prompt))
                for number in range(len(arm.models))
            ]
            for arm in entries
        }
        origin = Origin(lq=lq, plan=plan)
        scores: dict[str, list[dict[str, float | None]]] = {}
        for name, images in results.items():
            measured = [scorer.measure(image, picture, key, origin).values for image in images]
            scores[name] = [{metric: _rounded(values.get(metric)) for metric in names} for values in measured]
        strip = [[tile(each) for each in (picture, *(images[0] for images in results.values()))]]
        files = strip_files(key, strip if key in keys_on_sheet else [])
        if trainings == 1:
            return {"arms": {name: one for name, (one,) in scores.items()}, "files": files}
        return {"trainings": scores, "files": files}

    strips = {key: strip_name(key) for key in keys_on_sheet}
    with study_folder(job.out, NAME, settings):
        measurements = measure_pictures(pictures, job.out, settings, job.side_px, measure, progress, strips)
        return _report(model, measurements, entries, names, mixed, printed)


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")


def _restore(arm: Arm, number: int, key: str, lq: Image, prompt: str) -> Image:
    """One picture by one training of an arm; its noise depends on the study's seed, the number and the key alone."""
    model = arm.models[number]
    request = Request(
        key=key,
        image=lq,
        seed=picture_seed(model.job.seed + number, key),
        options=arm.options,
        prompt=prompt,
        negative_prompt=arm.negative_prompt,
    )
    try:
        return model.restorer.restore([request])[0].image
    except SampleError as error:
        raise SampleError(error.code, f"arm {arm.name}: {error.detail}", key) from error


# -- report ------------------------------------------------------------------------------------------------------------


def _report(
    model: WholeModel,
    measurements: Measurements,
    entries: Sequence[Arm],
    metrics: Sequence[str],
    mixed: str,
    paper: Mapping[str, Mapping[str, Any]],
) -> StudyResult:
    job, rows, trainings = model.job, measurements.rows, len(entries[0].models)
    arms = [arm.name for arm in entries]
    lines = [INPUT, *arms]
    values = {name: {metric: _scores(rows, name, metric) for metric in metrics} for name in lines}
    bands = {name: {metric: training_band(by[metric]) for metric in metrics} for name, by in values.items()}
    first = arms[0]
    differences = {
        name: {metric: training_band(by[metric] - values[first][metric]) for metric in metrics}
        for name, by in values.items()
        if name != first
    }
    numbers = ["training"] if trainings > 1 else []
    write_csv(
        job.out / "values.csv",
        ["key", "arm", *numbers, *metrics],
        [
            (row["key"], name, *([number] * len(numbers)), *(values[name][metric][place, number] for metric in metrics))
            for place, row in enumerate(rows)
            for name in lines
            for number in range(values[name][metrics[0]].shape[1])
        ],
    )
    costs = {arm.name: training_costs([one.job.model for one in arm.models]) for arm in entries}
    cost_columns = {key: label for key, label in COSTS.items() if any(key in each for each in costs.values())}
    missing = [name for name in WITHOUT_WEIGHTS if name not in metrics]
    columns = list(dict.fromkeys(name for by in paper.values() for name in by))
    head = ["Arm", *cost_columns.values(), *metrics, *missing, *(f"paper: {name}" for name in columns)]
    table = [
        [
            name,
            *(cost_text(key, costs.get(name, {})) for key in cost_columns),
            *(_cell(bands, differences, name, metric) for metric in metrics),
            *["unavailable"] * len(missing),
            *(str(paper.get(name, {}).get(each, "")) for each in columns),
        ]
        for name in lines
    ]
    sections = [
        Section(
            title="Scores of the arms",
            words=f"Means over {_sample(trainings)} with 95 % bands; after the semicolon the paired difference to "
            f"{first}. PSNR, SSIM and consistency (the result, degraded again by the same plan, against the input) are "
            "better if higher, the others if lower. Handing the input back has the best consistency."
            + (" The paper's numbers are of its own networks, sizes and pictures." if columns else ""),
            findings=_sentences(differences, first, arms),
            figure=("arms.png", draw(_panels(bands, arms, metrics))),
            head=head,
            rows=table,
        )
    ]
    sheet = strip_sheet(job.out, rows, {row["key"]: [row["key"][:60]] for row in rows})
    if sheet is not None:
        words = f"Left to right: the original, {', '.join(lines)}."
        sections.append(Section(title="Results", words=words, sheet=("arms.jpg", sheet)))
    page = Page(
        title="What options change",
        subtitle="restoray analyze arms: the same pictures with several sets of options",
        facts=[
            pictures_fact(measurements, job.side_px),
            ("Model", model.title(model.system)),
            ("Degradation", mixed),
            ("Seed", str(job.seed)),
        ],
        sections=sections,
        quarantine=measurements.quarantine,
    )
    summary = {
        "arms": {name: {m: band_document(bands[name][m]) for m in metrics} for name in lines},
        "differences": {name: {m: band_document(by[m]) for m in metrics} for name, by in differences.items()},
        "compared_with": first,
        **({"trainings": trainings} if trainings > 1 else {}),
        **({"costs": costs} if cost_columns else {}),
        "unavailable": missing,
        "table": {"head": head, "rows": table, "words": sections[0].words},
        "picture": "arms.png",
        **({"paper": {name: dict(by) for name, by in paper.items()}} if paper else {}),
    }
    return finish(job.out, measurements, page, summary)


def _scores(rows: Sequence[Mapping[str, Any]], name: str, metric: str) -> np.ndarray:
    """A metric of an arm, [pictures, trainings]; the input has one column, and rows of one training have "arms"."""
    if "arms" in rows[0]:
        return np.asarray(column(rows, "arms", name, metric))[:, None]
    scores = [[one[metric] for one in row["trainings"][name]] for row in rows]
    return np.asarray(scores, dtype=np.float64)


def _sample(trainings: int) -> str:
    return "pictures" if trainings == 1 else f"pictures and {trainings} trainings (the strips show the first)"


def _cell(
    bands: Mapping[str, Mapping[str, Band]], differences: Mapping[str, Mapping[str, Band]], name: str, metric: str
) -> str:
    text = band_text(bands[name][metric], sign=False)
    return f"{text}; {band_text(differences[name][metric])}" if name in differences else text


def _panels(bands: Mapping[str, Mapping[str, Band]], arms: Sequence[str], metrics: Sequence[str]) -> list[Panel]:
    """A plot of each metric over the arms, with the input as a dashed line."""
    return [
        Panel(
            title=metric,
            x_label="arm",
            y_label=metric,
            x=np.arange(len(arms), dtype=float),
            ticks=list(arms),
            lines=[band_line("results", stack_bands([bands[arm][metric] for arm in arms]))],
            reference=(float(bands[INPUT][metric].mean), INPUT),
        )
        for metric in metrics
    ]


def _sentences(differences: Mapping[str, Mapping[str, Band]], first: str, arms: Sequence[str]) -> list[str]:
    """What each arm changes in fidelity and in the learned score."""
    return [
        f"{arm} against {first}: PSNR {band_text(differences[arm]['psnr'])} dB, ST-LPIPS "
        f"{band_text(differences[arm]['st_lpips'])}, consistency {band_text(differences[arm]['consistency'])} dB."
        for arm in arms
        if arm != first
    ]
