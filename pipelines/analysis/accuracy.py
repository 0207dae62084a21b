"""`restoray analyze accuracy`: the paper's Fig. 3a, DINOv2's classes of degraded pictures, on an ImageNet folder.

Pictures lie in one folder a class, as ImageNet's validation set is usually unpacked. At full size this wants DINOv2's
weights and the pictures, of which nothing ships: everything is named by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.evaluation.statistics import mean_band
from components.types import Image, SampleError
from pipelines.analysis import levels as lv
from pipelines.analysis.figures import Line, Panel, draw
from pipelines.analysis.page import Page, Section, told
from pipelines.analysis.previews import StudyResult, finish
from pipelines.analysis.study import (
    Rows,
    measure_pictures,
    picture_files,
    prepared,
    read_picture,
    study_folder,
    write_csv,
)
from pipelines.console import Progress, no_progress
from pipelines.errors import UsageError, unknown

if TYPE_CHECKING:
    from components.evaluation.recognition import Recogniser

NAME = "accuracy"
SIDE_PX = 256  # DINOv2's own preparation: short side 256, middle 224
REFERENCES = 50  # clean pictures a class for nearest class means


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
    """Classify every picture clean and under every degradation; resumable a picture at a time.

    Args:
        images: folders of pictures, one a class.
        encoder: a folder or hub id; see components.evaluation.recognition.
        method: "linear" or "nearest".
        reference: clean pictures in the same folders, from which nearest learns; other ones than `images`.
        classes: a text file with the head's folder names in its order.
        mixed: preset of the synthetic multi-degradation.

    Raises:
        UsageError: no pictures, an unknown method or preset, weights or classes that do not fit.
        Failure: nothing could be measured, or `out` cannot be written.
    """
    from components.evaluation.recognition import METHODS, RecognitionError, class_numbers, load_recogniser

    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if (method == "nearest") != (reference is not None):
        raise UsageError("--reference names the clean pictures that method nearest learns from, and only that one.")
    levels = lv.all_levels(mixed)
    files, ignored = picture_files(images, out, limit)
    listed = _lines(classes) if classes is not None else ()
    try:
        recogniser = load_recogniser(encoder, method, device)
        numbers = class_numbers(sorted({path.parent.name for path in files.values()}), recogniser.labels, listed)
        if reference is not None:
            numbers = _learn(recogniser, reference, out, numbers)
    except RecognitionError as error:
        raise UsageError(str(error)) from error
    settings = {
        "encoder": encoder,
        "weights": _digest(recogniser),
        "method": method,
        "classes": numbers,
        "levels": [level.document() for level in levels],
        "seed": seed,
    }

    def measure(key: str, picture: Image) -> dict[str, Any]:
        pictures = [lv.degraded(level, picture, seed, key) for level in levels]
        predicted = recogniser.predict(pictures)
        own = numbers[files[key].parent.name]
        return {"class": own, "predicted": dict(zip((level.name for level in levels), predicted, strict=True))}

    with study_folder(out, NAME, settings):
        found = measure_pictures(files, images.absolute(), out, settings, SIDE_PX, measure, progress, ignored)
        return report_accuracy(out, found, levels, encoder, method, seed)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {error}") from error


def _learn(recogniser: Recogniser, reference: Path, out: Path, numbers: Mapping[str, int]) -> dict[str, int]:
    """Class means of the first REFERENCES pictures of each folder; returns the numbering of its folders."""
    import torch

    files, _ = picture_files(reference, out, 0)
    by_class: dict[str, list[tuple[str, Path]]] = {}
    for key, path in files.items():
        by_class.setdefault(path.parent.name, []).append((key, path))
    lacking = sorted(set(numbers) - set(by_class))
    if lacking:
        raise UsageError(f"{reference} has no pictures of {len(lacking)} classes, first {lacking[0]!r}")
    learned: dict[int, torch.Tensor] = {}
    for number, name in enumerate(sorted(by_class)):
        vectors: list[torch.Tensor] = []
        for key, path in by_class[name]:
            if len(vectors) == REFERENCES:
                break
            try:
                vectors.append(recogniser.features([prepared(read_picture(path, key), key, SIDE_PX)]))
            except SampleError:
                continue  # the next one takes its place
        if not vectors:
            raise UsageError(f"{reference}: no picture of class {name!r} can be read")
        learned[number] = torch.cat(vectors)
    recogniser.learn(learned)
    return {name: number for number, name in enumerate(sorted(by_class))}


def _digest(recogniser: Recogniser) -> str:
    """Of all weights and class means: rows of other ones are measured again."""
    import hashlib

    found = hashlib.sha256()
    for name, value in sorted(recogniser.model.state_dict().items()):
        found.update(name.encode())
        found.update(value.cpu().contiguous().numpy().tobytes())
    if recogniser.means is not None:
        found.update(recogniser.means.cpu().numpy().tobytes())
    return found.hexdigest()


def report_accuracy(
    out: Path, found: Rows, levels: Sequence[lv.Level], encoder: str, method: str, seed: int
) -> StudyResult:
    """Accuracies, plots and page of measured rows."""
    rows = found.rows
    right = {
        level.name: np.array([row["predicted"][level.name] == row["class"] for row in rows], dtype=float)
        for level in levels
    }
    bands = {name: mean_band(values, seed, "accuracy") for name, values in right.items()}
    write_csv(
        out / "values.csv",
        ["key", "class", "level", "predicted"],
        [(row["key"], row["class"], level.name, row["predicted"][level.name]) for row in rows for level in levels],
    )
    panels = []
    for kind in lv.STRENGTHS:
        faults = [level for level in levels if level.kind == kind]
        names = [lv.HQ, *(level.name for level in faults)]
        parts = [np.array([getattr(bands[n], part) for n in names]) for part in ("mean", "low", "high")]
        panels.append(
            Panel(
                title=kind,
                x_label=lv.UNITS[kind],
                y_label="accuracy",
                x=np.arange(len(names), dtype=float),
                ticks=["none", *(f"{level.strength:g}" for level in faults)],
                lines=[Line(label=method, y=parts[0], low=parts[1], high=parts[2])],
                reference=(float(bands[lv.MIXED].mean), "mixed degradation"),
            )
        )
    clean, mixed = float(bands[lv.HQ].mean), bands[lv.MIXED]
    seen = [
        f"Clean pictures: {100 * clean:.1f} % right; under the mixed degradation {100 * float(mixed.mean):.1f} % "
        f"[{100 * float(mixed.low):.1f}, {100 * float(mixed.high):.1f}] (the paper: about 80 %)."
    ]
    section = Section(
        title="Classification under degradations (Fig. 3a)",
        seen=seen,
        figure=("accuracy.png", draw(panels, columns=2)),
        head=["Degradation", "Accuracy"],
        rows=[[level.name, told(bands[level.name], sign=False)] for level in levels],
    )
    page = Page(
        title="What the picture encoder still classifies",
        subtitle="restoray analyze accuracy: DINOv2 on degraded pictures",
        facts=[("Pictures", str(len(rows))), ("Encoder", Path(encoder).name), ("Method", method)],
        sections=[section],
        quarantined=found.quarantined,
    )
    accuracies = {name: {"mean": b.mean, "low": b.low, "high": b.high} for name, b in bands.items()}
    return finish(out, found, page, {"accuracy": accuracies, "encoder": Path(encoder).name, "method": method})
