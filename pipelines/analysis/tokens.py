"""`restoray analyze tokens`: how often a degraded picture's tokens still find their own clean picture in a gallery.

What Fig. 3a shows with ImageNet's labels, asked without labels: the encoder's tokens of a degraded picture are
compared, by cosine, with those of all clean pictures (64 by default), for every single fault and strength. Chance is
one over the gallery. `restoray analyze accuracy` is Fig. 3a itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.evaluation.statistics import mean_band
from components.types import Image, SampleError
from pipelines.analysis import levels as lv
from pipelines.analysis import runs
from pipelines.analysis.figures import Line, Panel, draw
from pipelines.analysis.page import Page, Section, told
from pipelines.analysis.previews import StudyResult, finish
from pipelines.analysis.study import (
    Rows,
    Subject,
    column,
    measure_pictures,
    numbers,
    picture_files,
    prepared,
    read_picture,
    study_folder,
    write_csv,
)
from pipelines.console import Progress, no_progress
from pipelines.errors import UsageError

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
    """Clean pictures' token vectors.

    Attributes:
        keys: of the pictures, in order; what cannot be read is not in it.
        vectors: unit vectors [m, D] by view.
        digest: of the pictures' bytes and keys.
    """

    def __init__(self, subject: Subject, files: Mapping[str, Path], progress: Progress = no_progress) -> None:
        import torch

        from components.systems.instantir.insight import token_vectors

        self.keys: list[str] = []
        made: dict[str, list[Tensor]] = {}
        seen = hashlib.sha256()
        for number, (key, path) in enumerate(files.items(), start=1):
            try:
                data = read_picture(path, key)
                picture = prepared(data, key, subject.side_px)
            except SampleError:
                continue  # the study quarantines it when its turn comes
            for view, vector in token_vectors(subject.network, runs.tensor(picture)).items():
                made.setdefault(view, []).append(vector)
            self.keys.append(key)
            seen.update(f"{key}:{hashlib.sha256(data).hexdigest()};".encode())
            progress(number, len(files), key)
        self.vectors = {view: torch.cat(parts) for view, parts in made.items()}
        self.digest = seen.hexdigest()

    def find(self, key: str, subject: Subject, lq: Image) -> dict[str, dict[str, float]]:
        """Rank (1 is found), cosine and margin of a degraded picture of the gallery, by view."""
        import torch

        from components.systems.instantir.insight import retrieve, token_vectors

        own = torch.tensor([self.keys.index(key)])
        answer = {}
        for view, vector in token_vectors(subject.network, runs.tensor(lq)).items():
            found = retrieve(vector, self.vectors[view], own.to(vector.device))
            similarity, margin = numbers([float(found.similarity[0]), float(found.margin[0])])
            answer[view] = {"rank": int(found.rank[0]), "similarity": similarity, "margin": margin}
        return answer


def gallery_files(subject: Subject) -> tuple[dict[str, Path], int]:
    """The gallery's pictures, GALLERY of them unless the subject has a limit of its own; raises UsageError."""
    files, ignored = picture_files(subject.images, subject.out, subject.limit or GALLERY)
    if len(files) < 2:
        raise UsageError(f"retrieval needs at least two pictures, {subject.images} holds {len(files)}")
    return files, ignored


def analyze_tokens(subject: Subject, mixed: str = "realesrgan", progress: Progress = no_progress) -> StudyResult:
    """Run the study; arguments and errors as analyze_previews."""
    levels = lv.all_levels(mixed)
    files, ignored = gallery_files(subject)
    gallery = Gallery(subject, files)
    settings = {
        **{k: v for k, v in runs.settings_of(subject).items() if k != "options"},
        "levels": [level.document() for level in levels],
        "gallery": gallery.digest,
    }

    def measure(key: str, picture: Image) -> dict[str, Any]:
        lqs = {level.name: lv.degraded(level, picture, subject.seed, key) for level in levels}
        return {"levels": {name: gallery.find(key, subject, lq) for name, lq in lqs.items()}}

    with study_folder(subject.out, NAME, settings):
        base = subject.images if subject.images.is_dir() else subject.images.parent
        found = measure_pictures(
            files, base.absolute(), subject.out, settings, subject.side_px, measure, progress, ignored
        )
        return report_tokens(subject, found, levels, len(gallery.keys))


def report_tokens(subject: Subject, found: Rows, levels: Sequence[lv.Level], size: int) -> StudyResult:
    """Shares found, plots and page of measured rows."""
    rows, seed = found.rows, subject.seed
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
    write_csv(subject.out / "values.csv", ["key", "level", "view", "rank", "similarity", "margin"], table)
    panels = []
    for kind in lv.STRENGTHS:
        faults = [level for level in levels if level.kind == kind]
        names = [lv.HQ, *(level.name for level in faults)]
        ticks = ["none", *(f"{level.strength:g}" for level in faults)]
        panels.append(
            Panel(
                title=kind,
                x_label=lv.UNITS[kind],
                y_label=f"share found among {size}",
                x=np.arange(len(names), dtype=float),
                ticks=ticks,
                lines=[
                    Line(
                        label=VIEW_WORDS[v],
                        y=np.array([hits[n][v].mean for n in names]),
                        low=np.array([hits[n][v].low for n in names]),
                        high=np.array([hits[n][v].high for n in names]),
                    )
                    for v in views
                ],
                reference=(1 / size, "chance"),
            )
        )
    best = {view: float(np.mean([hits[level.name][view].mean for level in levels if level.kind])) for view in views}
    top = max(best, key=lambda view: best[view])
    mixed = hits[lv.MIXED]["pooled"]
    seen = [
        f"Under the mixed degradation {100 * float(mixed.mean):.0f} % of the pictures find their original among {size} "
        f"by the mean of their patch tokens (chance {100 / size:.1f} %).",
        f"Over all single faults {VIEW_WORDS[top]} {'finds' if top != 'perceptor' else 'find'} most: "
        f"{100 * best[top]:.0f} %.",
    ]
    for kind in lv.STRENGTHS:
        faults = [level for level in levels if level.kind == kind]
        shares = ", ".join(
            f"{level.strength:g}: {100 * float(hits[level.name]['pooled'].mean):.0f} %" for level in faults
        )
        seen.append(f"{kind} ({lv.UNITS[kind]}), mean of the patch tokens: {shares}.")
    section = Section(
        title="How often the tokens find their original",
        words="A picture is found when no other clean picture's tokens are nearer by cosine; ties count against it.",
        seen=seen,
        figure=("tokens.png", draw(panels, columns=2)),
        head=["Degradation", *VIEW_WORDS.values()],
        rows=[
            [
                level.name,
                *(told(hits[level.name][v], sign=False) for v in views),
            ]
            for level in levels
        ],
    )
    page = Page(
        title="What the picture encoder still recognises",
        subtitle="restoray analyze tokens: token retrieval of degraded pictures among clean ones",
        facts=[
            ("Gallery", f"{size} pictures (middle squares, {subject.side_px} px)"),
            ("Model", f"{subject.model}, digest {subject.digest[:12]}"),
        ],
        sections=[section],
        quarantined=found.quarantined,
    )
    summary = {
        "gallery": size,
        "chance": 1 / size,
        "found": {
            name: {v: {"mean": b.mean, "low": b.low, "high": b.high} for v, b in by.items()}
            for name, by in hits.items()
        },
    }
    return finish(subject.out, found, page, summary)
