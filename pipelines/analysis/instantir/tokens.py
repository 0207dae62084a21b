"""`restoray analyze tokens`: how often a degraded picture's tokens retrieve its own clean picture from a gallery.

The study resembles InstantIR's Fig. 3a, but needs no ImageNet labels. (`restoray analyze accuracy` reproduces Fig. 3a.)
The gallery holds the image encoder's tokens of the clean pictures, 64 by default. Each picture is degraded to the
quality levels and by each single fault at each strength (pipelines/analysis/levels.py). The study ranks the gallery by
cosine with the degraded picture's tokens. Chance is 1 / gallery size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from components.evaluation.statistics import share_band
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
    study_folder,
    write_csv,
)
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import UsageError
from pipelines.core.pictures import read_picture
from pipelines.pages.figures import draw

if TYPE_CHECKING:
    from torch import Tensor

GALLERY = 64
NAME = "tokens"
VIEW_LABELS = {
    "pooled": "mean of the patch tokens",
    "whole": "all tokens",
    "class": "class token",
    "perceptor": "the Resampler's queries",
}
"""Label of each view. A view is a way to turn a picture's tokens into one vector, see insight.TOKEN_VIEWS."""


class Gallery:
    """Token vectors of the clean pictures.

    Attributes:
        keys: keys of the m readable pictures, in order.
        vectors: unit vectors [m, D] of these pictures, by view.
        digest: digest of the pictures' keys and bytes.
    """

    def __init__(self, subject: Subject, pictures: Pictures) -> None:
        import torch

        self.keys: list[str] = []
        parts: dict[str, list[Tensor]] = {}
        digest = hashlib.sha256()
        for key, path in pictures.by_key.items():
            try:
                data = read_picture(path, key)
                vectors = finite_vectors(subject, key, middle_square(data, key, subject.job.side_px))
            except SampleError:
                continue  # measure_pictures quarantines the picture later
            for view, vector in vectors.items():
                parts.setdefault(view, []).append(vector)
            self.keys.append(key)
            digest.update(f"{key}:{hashlib.sha256(data).hexdigest()};".encode())
        self.vectors = {view: torch.cat(vectors) for view, vectors in parts.items()}
        self.digest = digest.hexdigest()

    def find(self, key: str, subject: Subject, lq: Image) -> dict[str, dict[str, float]]:
        """Scores of the degraded picture `lq` against the gallery, by view.

        rank is the rank of its clean picture (1 is a hit), similarity is the cosine with it, and margin is that cosine
        minus the largest cosine with another picture. `key` must be in the gallery.
        """
        import torch

        from components.systems.instantir.insight import retrieve

        vectors = finite_vectors(subject, key, lq)
        index = torch.tensor([self.keys.index(key)])
        scores = {}
        for view, vector in vectors.items():
            retrieval = retrieve(vector, self.vectors[view], index.to(vector.device))
            similarity, margin = numbers([float(retrieval.similarity[0]), float(retrieval.margin[0])])
            scores[view] = {"rank": int(retrieval.rank[0]), "similarity": similarity, "margin": margin}
        return scores


def finite_vectors(subject: Subject, key: str, picture: Image) -> dict[str, Tensor]:
    """Token vectors [1, D] of a picture by view. Raises SampleError "not_finite", see tensors.check_finite."""
    from components.systems.instantir.insight import token_vectors
    from components.tensors import check_finite

    vectors = token_vectors(subject.network, runs.tensor(picture))
    for vector in vectors.values():
        check_finite(vector, [key])
    return vectors


def gallery_pictures(subject: Subject) -> Pictures:
    """The gallery's pictures: the first ones by name, at most job.limit, or GALLERY if the job has no limit.

    Raises:
        UsageError: there are fewer than two pictures.
    """
    job = subject.job
    pictures = list_study_pictures(job.images, job.out, job.limit or GALLERY)
    if len(pictures.by_key) < 2:
        raise UsageError(f"retrieval needs at least two pictures, {job.images} holds {len(pictures.by_key)}")
    return pictures


def analyze_tokens(subject: Subject, mixed: str = "realesrgan", progress: Progress = no_progress) -> StudyResult:
    """Run the study; an interrupted run continues.

    Args:
        mixed: preset of the mixed degradation.

    Raises:
        UsageError: there are fewer than two pictures, the preset is unknown, or the folder holds another study.
        Failure: no picture could be measured, or the output folder cannot be written.
    """
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
    """Write values.csv and the report of the measurements; `size` is the number of pictures in the gallery."""
    job, rows = subject.job, measurements.rows
    views = list(VIEW_LABELS)
    ranks = {level.name: {v: column(rows, "levels", level.name, v, "rank") for v in views} for level in levels}
    hit_rates = {
        name: {v: share_band((by_view[v] == 1).astype(float)) for v in views} for name, by_view in ranks.items()
    }
    table = [
        (row["key"], level.name, view, *(row["levels"][level.name][view][n] for n in ("rank", "similarity", "margin")))
        for row in rows
        for level in levels
        for view in views
    ]
    write_csv(job.out / "values.csv", ["key", "level", "view", "rank", "similarity", "margin"], table)
    by_label = {VIEW_LABELS[v]: {name: by_view[v] for name, by_view in hit_rates.items()} for v in views}
    panels = [
        fault_panel(kind, levels, by_label, f"share found among {size}", (1 / size, "chance")) for kind in lv.STRENGTHS
    ]
    fault_rates = {
        view: float(np.mean([hit_rates[level.name][view].mean for level in levels if level.kind])) for view in views
    }
    best_view = max(fault_rates, key=lambda view: fault_rates[view])
    mixed_rate = hit_rates[lv.MIXED]["pooled"]
    findings = [
        f"Under the mixed degradation, {100 * float(mixed_rate.mean):.0f} % of the pictures retrieve their original "
        f"among {size} by the mean of their patch tokens (chance {100 / size:.1f} %).",
        f"Over all single faults, the highest mean share is {100 * fault_rates[best_view]:.0f} % "
        f"({VIEW_LABELS[best_view]}).",
    ]
    for kind in lv.STRENGTHS:
        shares = ", ".join(
            f"{level.strength:g}: {100 * float(hit_rates[level.name]['pooled'].mean):.0f} %"
            for level in lv.levels_of_kind(levels, kind)
        )
        findings.append(f"{kind} ({lv.UNITS[kind]}), mean of the patch tokens: {shares}.")
    section = Section(
        title="How often the tokens retrieve the original",
        words="A degraded picture retrieves its original if the original's tokens have the largest cosine with its own "
        "among all clean pictures. A tie does not count.",
        findings=findings,
        figure=("tokens.png", draw(panels, columns=2)),
        head=["Degradation", *VIEW_LABELS.values()],
        rows=[[level.name, *(band_text(hit_rates[level.name][v], sign=False) for v in views)] for level in levels],
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
        "found": {name: {v: band_document(band) for v, band in by_view.items()} for name, by_view in hit_rates.items()},
    }
    return finish(job.out, measurements, page, summary)
