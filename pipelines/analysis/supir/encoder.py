"""`restoray analyze encoder`: what SUPIR's robust encoder is worth (Fig. 14 and 18), alone and with several seeds.

Every picture is degraded by SUPIR's five test degradations and a mixed one. D(E(lq)) by the prior's own autoencoder and
D(E_dr(lq)) by each model's robust encoder are compared with HQ. A captioner describes LQ, the first model's D(E_dr(lq))
and HQ: a first restoration is useful for texts if its caption is closer to HQ's than LQ's is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from components.captions.identity import CaptionerError
from components.captions.presets import TAGS, build_captioner
from components.captions.text import tidy
from components.degradations import build_degradation
from components.evaluation.statistics import mean_band, psnr
from components.images import to_float, to_uint8
from components.types import Image
from pipelines.analysis.bands import band_document, band_text, verdict
from pipelines.analysis.model import StudyJob, StudyModel
from pipelines.analysis.page import Page, Section
from pipelines.analysis.strips import sheet_keys, strip_files, strip_name, strip_sheet, tile
from pipelines.analysis.study import (
    Measurements,
    StudyResult,
    column,
    finish,
    list_study_pictures,
    measure_pictures,
    pictures_fact,
    study_folder,
    write_csv,
)
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import Failure, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from components.models import Model
    from components.priors.robust_encoder import RobustEncoder

NAME = "encoder"
FAULTS = ("x4", "x8", "blur2-x4", "x4-noise40", "blur2-x4-noise20-jpeg50")
"""SUPIR's test degradations (Table 1 and its supplement)."""
LQ, PLAIN, HQ = "lq", "plain", "hq"
MODEL = "model"
MOST_DB = 80.0
"""Of two equal pictures."""


@dataclass(frozen=True, kw_only=True)
class EncoderModel(StudyModel):
    """The job's model, opened only as far as its name and digest."""


def open_encoder(job: StudyJob) -> EncoderModel:
    """Raises UsageError unless the job's model has a robust encoder."""
    model = _encoder_folder(str(job.model))
    return EncoderModel(job=job, name=str(model.info["name"]), digest=model.digest)


def _encoder_folder(name: str) -> Model:
    from components.models import ModelError, load_model, resolve_model  # imports torch
    from components.systems.supir.network import ENCODER

    try:
        model = load_model(resolve_model(name))
    except ModelError as error:
        raise UsageError(str(error)) from error
    if model.info["system"] != "supir" or ENCODER not in model.info["parts"]:
        raise UsageError(f"{name} has no robust encoder: name a model of SUPIR")
    return model


def _load(model: Model, device: str) -> RobustEncoder:
    from components.models import ModelError  # imports torch
    from components.priors.opening import open_recorded_prior
    from components.systems.supir.build import network_of
    from components.systems.supir.network import ENCODER

    record = model.info["prior"]
    try:
        prior = open_recorded_prior(str(record["id"]), record, device, image_encoder="")
        return network_of(model, prior, (ENCODER,)).to(device).encoder
    except ModelError as error:
        raise Failure(f"{model.path} cannot be loaded: {error}") from error


def analyze_encoder(
    model: EncoderModel,
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    mixed: str = "realesrgan",
    captioner: str = TAGS,
    progress: Progress = no_progress,
) -> StudyResult:
    """Run the study; an interrupted run continues at the next picture.

    Args:
        arms: models by name, {"model": folder}; usually the same training with several seeds. None takes the job's.
        mixed: preset of the sixth degradation.
        captioner: by name.

    Raises:
        UsageError: there are no pictures, an arm has other keys or no robust encoder, the preset or the captioner does
            not exist, or the folder holds another study.
        Failure: a model cannot be loaded, no picture could be measured, or the folder cannot be written.
    """
    job = model.job
    for name, values in (arms or {}).items():
        if set(values) != {MODEL}:
            raise UsageError(f"arm {name!r}: this study compares models: give model=FOLDER and nothing else")
    folders = {name: _encoder_folder(str(values[MODEL])) for name, values in (arms or {}).items()}
    folders = folders or {model.name: _encoder_folder(str(job.model))}
    names = (*FAULTS, *([mixed] if mixed not in FAULTS else []))
    try:
        degradations = {name: build_degradation(name) for name in names}
        writer = build_captioner(captioner, max_tokens=0, device=job.device)
    except (ValueError, CaptionerError) as error:
        raise UsageError(str(error)) from error
    pictures = list_study_pictures(job.images, job.out, job.limit)
    encoders = {name: _load(folder, job.device) for name, folder in folders.items()}
    first = next(iter(encoders.values()))
    settings = {
        **model.settings({}),
        "models": {name: folder.digest for name, folder in folders.items()},
        "degradations": list(names),
        "captioner": dict(writer.identity),
    }
    keys_on_sheet = sheet_keys(list(pictures.by_key))

    def measure(key: str, picture: Image) -> dict[str, Any]:
        scores: dict[str, dict[str, float]] = {}
        captions: dict[str, dict[str, str]] = {}
        strip = []
        for name, degradation in degradations.items():
            lq = to_uint8(degradation.apply(to_float(picture), degradation.draw(job.seed, key, 0)))
            robust = {arm: first_picture(encoder, lq) for arm, encoder in encoders.items()}
            plain = round_trip(first, lq)
            every = {LQ: lq, PLAIN: plain, **robust}
            scores[name] = {what: min(psnr(image, picture), MOST_DB) for what, image in every.items()}
            shown = next(iter(robust.values()))
            texts = [tidy(text) for text in writer.caption([picture, lq, shown])]
            captions[name] = dict(zip((HQ, LQ, "robust"), texts, strict=True))
            strip.append([tile(each) for each in (lq, plain, shown, picture)])
        return {
            "psnr": scores,
            "captions": captions,
            "agreement": {
                n: {what: _agreement(c[what], c[HQ]) for what in (LQ, "robust")} for n, c in captions.items()
            },
            "files": strip_files(key, strip if key in keys_on_sheet else []),
        }

    strips = {key: strip_name(key) for key in keys_on_sheet}
    with study_folder(job.out, NAME, settings):
        measurements = measure_pictures(pictures, job.out, settings, job.side_px, measure, progress, strips)
        return _report(model, measurements, list(folders), names)


def first_picture(encoder: RobustEncoder, image: Image) -> Image:
    """D(E_dr(image)), uint8 [H, W, 3]."""
    from components.priors.robust_encoder import first_restoration  # imports torch

    return _through(image, encoder, lambda pixels: first_restoration(encoder, pixels))


def round_trip(encoder: RobustEncoder, image: Image) -> Image:
    """D(E(image)) by the autoencoder itself, uint8 [H, W, 3]."""
    from components.priors.autoencoder import decode_latents, encode_pixels  # imports torch

    autoencoder = encoder.autoencoder
    return _through(image, encoder, lambda pixels: decode_latents(autoencoder, encode_pixels(autoencoder, pixels)))


def _through(image: Image, encoder: RobustEncoder, function: Callable[[Tensor], Tensor]) -> Image:
    import torch

    from components.tensors import images_to_tensor, tensor_to_images

    with torch.no_grad():
        pixels = images_to_tensor([image]).to(next(encoder.parameters()).device)
        return tensor_to_images(function(pixels).float().cpu().clamp(-1, 1))[0]


def _agreement(caption: str, reference: str) -> float:
    """Words that both captions have over words that either has (Jaccard); 1 for two empty ones."""
    mine, other = set(caption.lower().split()), set(reference.lower().split())
    return len(mine & other) / len(mine | other) if mine | other else 1.0


# -- report ------------------------------------------------------------------------------------------------------------


def _report(
    model: EncoderModel, measurements: Measurements, arms: Sequence[str], degradations: Sequence[str]
) -> StudyResult:
    job, rows = model.job, measurements.rows
    gains, texts, lines, findings = {}, {}, [], []
    for name in degradations:
        lq, plain = (column(rows, "psnr", name, what) for what in (LQ, PLAIN))
        robust = np.stack([column(rows, "psnr", name, arm) for arm in arms])
        gains[name] = mean_band(robust.mean(axis=0) - plain)
        texts[name] = mean_band(column(rows, "agreement", name, "robust") - column(rows, "agreement", name, LQ))
        seeds = robust.mean(axis=1)
        spread = f" ({seeds.min():.2f} to {seeds.max():.2f})" if len(arms) > 1 else ""
        means = [f"{np.mean(values):.2f}" for values in (lq, plain)]
        lines.append([name, *means, f"{seeds.mean():.2f}{spread}", band_text(gains[name]), band_text(texts[name])])
        findings.append(f"{name}: D(E_dr(lq)) less D(E(lq)) {band_text(gains[name])} dB: {verdict(gains[name])}.")
    write_csv(
        job.out / "values.csv",
        ["key", "degradation", "picture", "psnr"],
        [
            (row["key"], name, what, value)
            for row in rows
            for name in degradations
            for what, value in row["psnr"][name].items()
        ],
    )
    sections = [
        Section(
            title="Decoded LQ against HQ",
            words="Mean PSNR to HQ in dB: of LQ, of D(E(lq)) by the prior's own encoder, and of D(E_dr(lq)) by the "
            f"robust encoder, a mean over {len(arms)} model(s), lowest to highest. Differences are paired by picture, "
            "with 95 % intervals. The last column: how much more of HQ's caption (words of both over words of either) "
            "the caption of D(E_dr(lq)) has than that of LQ.",
            findings=findings,
            head=["Degradation", "LQ", "D(E(lq))", "D(E_dr(lq))", "robust less plain", "caption's agreement"],
            rows=lines,
        )
    ]
    sheet = strip_sheet(job.out, rows, {row["key"]: _captions(row, degradations) for row in rows})
    if sheet is not None:
        words = "Left to right: LQ, D(E(lq)), D(E_dr(lq)), HQ (Fig. 14); below, the captions of all but the second."
        sections.append(Section(title="First restorations", words=words, sheet=("encoder.jpg", sheet)))
    page = Page(
        title="What the robust encoder is worth",
        subtitle="restoray analyze encoder: SUPIR's Fig. 14 and 18",
        facts=[
            pictures_fact(measurements, job.side_px),
            ("Models", ", ".join(arms)),
            ("First model", model.title("supir")),
            ("Seed", str(job.seed)),
        ],
        sections=sections,
        quarantine=measurements.quarantine,
    )
    summary = {
        "gain": {name: band_document(band) for name, band in gains.items()},
        "caption_agreement": {name: band_document(band) for name, band in texts.items()},
        "models": list(arms),
        "table": {"head": list(sections[0].head), "rows": lines, "words": sections[0].words},
        "picture": "encoder.jpg",
    }
    return finish(job.out, measurements, page, summary)


def _captions(row: Mapping[str, Any], degradations: Sequence[str]) -> list[str]:
    """The caption of each line of a picture's strip."""
    lines = []
    for name in degradations:
        texts = row["captions"][name]
        parts = [f"{row['key'][:30]}, {name}", *(f"{what}: {texts[what][:90]}" for what in (LQ, "robust", HQ))]
        lines.append("\n".join(parts))
    return lines
