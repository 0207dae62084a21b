"""`restoray analyze tokens`: how often a degraded picture's tokens retrieve its own clean picture from a gallery.

This is Fig. 3a without ImageNet's labels. The study compares the encoder's tokens of a degraded picture, by cosine,
with those of all clean pictures (64 by default), for every single fault and strength. Chance is one over the gallery's
size. `restoray analyze accuracy` is Fig. 3a itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from components.evaluation.statistics import mean_band
from components.types import Image, SampleError
from pipelines.analysis import levels as lv
from pipelines.analysis.bands import band_document, band_text, fault_panel
from pipelines.analysis.instantir import runs
from pipelines.analysis.instantir.subject import Subject, run_settings
from pipelines.analysis.page import Page, Section
from pipelines.analysis.study import (
    Measurements,
    Pictures,
    StudyResult,
    column,
    finish,
    list_study_pictures,
    measure_pictures,
    middle_square,
    numbers,
    read_picture,
    study_folder,
    write_csv,
)
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import UsageError
from pipelines.pages.figures import draw

if TYPE_CHECKING:
    from torch import Tensor

GALLERY = 64
NAME = "tokens"
VIEW_WORDS = {
    "pooled": "mean of the patch tokens",
    "whole": "all tokens",
    "class": "class token",
    "perceptor": "the Resampler's queries",
}


class Gallery:
    """Token vectors of the clean pictures.

    Attributes:
        keys: the pictures' keys, in order; pictures that cannot be read are left out.
        vectors: unit vectors [m, D] by view.
        digest: digest of the pictures' keys and bytes.
    """

    def __init__(self, subject: Subject, pictures: Pictures) -> None:
        import torch

        from components.systems.instantir.insight import token_vectors

        self.keys: list[str] = []
        parts: dict[str, list[Tensor]] = {}
        digest = hashlib.sha256()
        for key, path in pictures.by_key.items():
            try:
                data = read_picture(path, key)
                picture = middle_square(data, key, subject.job.side_px)
            except SampleError:
                continue  # `measure_pictures` quarantines it later
            for view, vector in token_vectors(subject.network, runs.tensor(picture)).items():
                parts.setdefault(view, []).append(vector)
            self.keys.append(key)
            digest.update(f"{key}:{hashlib.sha256(data).hexdigest()};".encode())
        self.vectors = {view: torch.cat(vectors) for view, vectors in parts.items()}
        self.digest = digest.hexdigest()

    def find(self, key: str, subject: Subject, lq: Image) -> dict[str, dict[str, float]]:
        """Rank (1 is a hit), cosine and margin of a degraded picture of the gallery, by view."""
        import torch

        from components.systems.instantir.insight import retrieve, token_vectors

        index = torch.tensor([self.keys.index(key)])
        scores = {}
        for view, vector in token_vectors(subject.network, runs.tensor(lq)).items():
            retrieval = retrieve(vector, self.vectors[view], index.to(vector.device))
            similarity, margin = numbers([float(retrieval.similarity[0]), float(retrieval.margin[0])])
            scores[view] = {"rank": int(retrieval.rank[0]), "similarity": similarity, "margin": margin}
        return scores


def gallery_pictures(subject: Subject) -> Pictures:
    """The gallery's pictures: the job's limit, or GALLERY of them; raises UsageError."""
    job = subject.job
    pictures = list_study_pictures(job.images, job.out, job.limit or GALLERY)
    if len(pictures.by_key) < 2:
        raise UsageError(f"retrieval needs at least two pictures, {job.images} holds {len(pictures.by_key)}")
    return pictures


def analyze_tokens(subject: Subject, mixed: str = "realesrgan", progress: Progress = no_progress) -> StudyResult:
    """Run the study; arguments and errors as in analyze_previews."""
    job = subject.job
    levels = lv.all_levels(mixed)
    pictures = gallery_pictures(subject)
    gallery = Gallery(subject, pictures)
    settings = {
        **{k: v for k, v in run_settings(subject).items() if k != "options"},
        "levels": [level.document() for level in levels],
        "gallery": gallery.digest,
    }

    def measure(key: str, picture: Image) -> dict[str, Any]:
        lqs = {level.name: lv.degrade(level, picture, job.seed, key) for level in levels}
        return {"levels": {name: gallery.find(key, subject, lq) for name, lq in lqs.items()}}

    with study_folder(job.out, NAME, settings):
        measurements = measure_pictures(pictures, job.out, settings, job.side_px, measure, progress)
        return report_tokens(subject, measurements, levels, len(gallery.keys))


def report_tokens(subject: Subject, measurements: Measurements, levels: Sequence[lv.Level], size: int) -> StudyResult:
    """Write the table and the report of the rows; `size` is the gallery's."""
    job, rows, seed = subject.job, measurements.rows, subject.job.seed
    views = list(VIEW_WORDS)
    ranks = {level.name: {v: column(rows, "levels", level.name, v, "rank") for v in views} for level in levels}
    hits = {
        name: {v: mean_band((by[v] == 1).astype(float), seed, "tokens") for v in views} for name, by in ranks.items()
    }
    table = [
        (row["key"], level.name, view, *(row["levels"][level.name][view][n] for n in ("rank", "similarity", "margin")))
        for row in rows
        for level in levels
        for view in views
    ]
    write_csv(job.out / "values.csv", ["key", "level", "view", "rank", "similarity", "margin"], table)
    by_label = {VIEW_WORDS[v]: {name: by[v] for name, by in hits.items()} for v in views}
    panels = [
        fault_panel(kind, levels, by_label, f"share found among {size}", (1 / size, "chance")) for kind in lv.STRENGTHS
    ]
    best = {view: float(np.mean([hits[level.name][view].mean for level in levels if level.kind])) for view in views}
    top = max(best, key=lambda view: best[view])
    mixed = hits[lv.MIXED]["pooled"]
    findings = [
        f"Under the mixed degradation {100 * float(mixed.mean):.0f} % of the pictures find their original among {size} "
        f"by the mean of their patch tokens (chance {100 / size:.1f} %).",
        f"Over all single faults {VIEW_WORDS[top]} {'finds' if top != 'perceptor' else 'find'} most: "
        f"{100 * best[top]:.0f} %.",
    ]
    for kind in lv.STRENGTHS:
        shares = ", ".join(
            f"{level.strength:g}: {100 * float(hits[level.name]['pooled'].mean):.0f} %"
            for level in lv.levels_of_kind(levels, kind)
        )
        findings.append(f"{kind} ({lv.UNITS[kind]}), mean of the patch tokens: {shares}.")
    section = Section(
        title="How often the tokens find their original",
        words="A picture is found when no other clean picture's tokens are nearer by cosine; ties count against it.",
        findings=findings,
        figure=("tokens.png", draw(panels, columns=2)),
        head=["Degradation", *VIEW_WORDS.values()],
        rows=[[level.name, *(band_text(hits[level.name][v], sign=False) for v in views)] for level in levels],
    )
    page = Page(
        title="What the picture encoder still recognises",
        subtitle="restoray analyze tokens: token retrieval of degraded pictures among clean ones",
        facts=[
            ("Gallery", f"{size} pictures (middle squares, {job.side_px} px)"),
            ("Model", subject.title()),
        ],
        sections=[section],
        quarantine=measurements.quarantine,
    )
    summary = {
        "gallery": size,
        "chance": 1 / size,
        "found": {name: {v: band_document(band) for v, band in by.items()} for name, by in hits.items()},
    }
    return finish(job.out, measurements, page, summary)
