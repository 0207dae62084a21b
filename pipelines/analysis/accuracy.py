"""`restoray analyze accuracy`: DINOv2's accuracy on degraded pictures of an ImageNet folder (InstantIR's Fig. 3a).

Each class has a folder of pictures, as in the usual layout of ImageNet's validation set. The caller names DINOv2's
weights and the pictures; neither ships with the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.evaluation.statistics import share_band
from components.types import Image, SampleError
from pipelines.analysis import levels as lv
from pipelines.analysis.bands import band_document, band_text, fault_panel
from pipelines.analysis.page import Page, Section
from pipelines.analysis.study import (
    Measurements,
    StudyResult,
    finish,
    list_study_pictures,
    measure_pictures,
    middle_square,
    study_folder,
    write_csv,
)
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import UsageError, unknown
from pipelines.core.pictures import read_picture
from pipelines.pages.figures import draw

if TYPE_CHECKING:
    from components.evaluation.recognition import Recogniser

NAME = "accuracy"
SIDE_PX = 256  # DINOv2's own preparation: short side 256, middle 224
REFERENCES = 50  # clean pictures of each class for the nearest class means


def analyze_accuracy(
    images: Path,
    out: Path,
    encoder: str,
    method: str = "linear",
    reference: Path | None = None,
    classes: Path | None = None,
    mixed: str = "realesrgan",
    limit: int = 0,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> StudyResult:
    """Classify every picture clean and at every degradation; the study resumes picture by picture.

    Args:
        images: folders of pictures, one for each class.
        encoder: a folder or hub id; see components.evaluation.recognition.
        method: "linear" or "nearest".
        reference: for "nearest": clean pictures in folders of the same names, not those of `images`.
        classes: a text file with the folder names in the order of the head.
        mixed: preset of the mixed degradation.

    Raises:
        UsageError: there are no pictures, the method or preset is unknown, or the weights or classes do not fit.
        Failure: no picture could be measured, or `out` cannot be written.
    """
    from components.evaluation.recognition import METHODS, RecognitionError, class_numbers, load_recogniser

    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if (method == "nearest") != (reference is not None):
        raise UsageError("--method nearest needs --reference with clean pictures, and only that method takes it.")
    levels = lv.all_levels(mixed)
    pictures = list_study_pictures(images, out, limit)
    head_folders = _lines(classes) if classes is not None else ()
    folders = {key: path.parent.name for key, path in pictures.by_key.items()}
    try:
        recogniser = load_recogniser(encoder, method, device)
        numbers = class_numbers(sorted(set(folders.values())), recogniser.labels, head_folders)
        if reference is not None:
            numbers = _learn(recogniser, reference, out, numbers)
    except RecognitionError as error:
        raise UsageError(str(error)) from error
    settings = {
        "encoder": encoder,
        "weights": _weights_digest(recogniser),
        "method": method,
        "classes": numbers,
        "levels": [level.document() for level in levels],
        "seed": seed,
    }

    def measure(key: str, picture: Image) -> dict[str, Any]:
        predictions = recogniser.predict([lv.degrade(level, picture, seed, key) for level in levels])
        by_level = dict(zip((level.name for level in levels), predictions, strict=True))
        return {"class": numbers[folders[key]], "predicted": by_level}

    with study_folder(out, NAME, settings):
        measurements = measure_pictures(pictures, out, settings, SIDE_PX, measure, progress)
        return report_accuracy(out, measurements, levels, encoder, method)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}") from error


def _learn(recogniser: Recogniser, reference: Path, out: Path, numbers: Mapping[str, int]) -> dict[str, int]:
    """Learn class means from the first REFERENCES pictures of each folder; returns the class number of each folder."""
    import torch

    by_class: dict[str, list[tuple[str, Path]]] = {}
    for key, path in list_study_pictures(reference, out, 0).by_key.items():
        by_class.setdefault(path.parent.name, []).append((key, path))
    missing = sorted(set(numbers) - set(by_class))
    if missing:
        raise UsageError(f"{reference} has no pictures of {len(missing)} classes, first {missing[0]!r}")
    features: dict[int, torch.Tensor] = {}
    for number, name in enumerate(sorted(by_class)):
        vectors: list[torch.Tensor] = []
        for key, path in by_class[name]:
            if len(vectors) == REFERENCES:
                break
            try:
                vectors.append(recogniser.features([middle_square(read_picture(path, key), key, SIDE_PX)]))
            except SampleError:
                continue  # the next picture takes its place
        if not vectors:
            raise UsageError(f"{reference}: no picture of class {name!r} can be read")
        features[number] = torch.cat(vectors)
    recogniser.learn(features)
    return {name: number for number, name in enumerate(sorted(by_class))}


def _weights_digest(recogniser: Recogniser) -> str:
    """Digest of all weights and class means; other weights need other rows."""
    digest = hashlib.sha256()
    for name, value in sorted(recogniser.model.state_dict().items()):
        digest.update(name.encode("utf-8", "surrogateescape"))
        digest.update(value.cpu().contiguous().numpy().tobytes())
    if recogniser.means is not None:
        digest.update(recogniser.means.cpu().numpy().tobytes())
    return digest.hexdigest()


def report_accuracy(
    out: Path, measurements: Measurements, levels: Sequence[lv.Level], encoder: str, method: str
) -> StudyResult:
    """Write the table and the report of the rows."""
    rows = measurements.rows
    hits = {
        level.name: np.array([row["predicted"][level.name] == row["class"] for row in rows], dtype=float)
        for level in levels
    }
    bands = {name: share_band(values) for name, values in hits.items()}
    write_csv(
        out / "values.csv",
        ["key", "class", "level", "predicted"],
        [(row["key"], row["class"], level.name, row["predicted"][level.name]) for row in rows for level in levels],
    )
    mixed = bands[lv.MIXED]
    panels = [
        fault_panel(kind, levels, {method: bands}, "accuracy", (float(mixed.mean), "mixed degradation"))
        for kind in lv.STRENGTHS
    ]
    section = Section(
        title="Classification under degradations (Fig. 3a)",
        findings=[
            f"Right of clean pictures: {band_text(bands[lv.HQ], sign=False)}; of mixed degradations "
            f"{band_text(mixed, sign=False)} (the paper: about 0.8)."
        ],
        figure=("accuracy.png", draw(panels, columns=2)),
        head=["Degradation", "Accuracy"],
        rows=[[level.name, band_text(bands[level.name], sign=False)] for level in levels],
    )
    page = Page(
        title="What the picture encoder still classifies",
        subtitle="restoray analyze accuracy: DINOv2 on degraded pictures",
        facts=[("Pictures", str(len(rows))), ("Encoder", Path(encoder).name), ("Method", method)],
        sections=[section],
        quarantine=measurements.quarantine,
    )
    accuracies = {name: band_document(band) for name, band in bands.items()}
    return finish(out, measurements, page, {"accuracy": accuracies, "encoder": Path(encoder).name, "method": method})
