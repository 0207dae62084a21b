"""`restoray analyze`: studies of what InstantIR's parts do, and of any model's seeds. See docs/insight.md.

A study is a function of a Subject or WholeModel (an opened model, a folder of pictures, where results go);
pipelines/analysis/ holds one file for each. They run in this process: what is studied is one picture's run, and a
folder of some dozens of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.images import Limits
from pipelines.analysis.previews import StudyResult
from pipelines.analysis.study import Subject, WholeModel, picture_files
from pipelines.console import Progress, no_progress
from pipelines.errors import Failure, UsageError, unknown
from pipelines.restore import model_identity, option_check
from pipelines.restore_worker import THREADS, set_threads

Study = Callable[..., StudyResult]
SYSTEM = "instantir"


def _previews(subject: Subject, **options: Any) -> StudyResult:
    from pipelines.analysis.previews import analyze_previews

    return analyze_previews(subject, **options)


def _tokens(subject: Subject, **options: Any) -> StudyResult:
    from pipelines.analysis.tokens import analyze_tokens

    return analyze_tokens(subject, **options)


def _creative(subject: Subject, **options: Any) -> StudyResult:
    from pipelines.analysis.creative import analyze_creative

    return analyze_creative(subject, **options)


def _time(subject: Subject, **options: Any) -> StudyResult:
    from pipelines.analysis.questions import analyze_time

    return analyze_time(subject, **options)


def _crowded(subject: Subject, **options: Any) -> StudyResult:
    from pipelines.analysis.questions import analyze_crowded

    return analyze_crowded(subject, **options)


def _seeds(subject: WholeModel, **options: Any) -> StudyResult:
    from pipelines.analysis.seeds import analyze_seeds

    return analyze_seeds(subject, **options)


STUDIES: Mapping[str, Study] = {
    "previews": _previews,
    "tokens": _tokens,
    "creative": _creative,
    "time": _time,
    "crowded": _crowded,
}
"""Studies of InstantIR by name. Each takes a Subject, `mixed`, `progress`, and what is its own."""

STUDIES_OF_ANY: Mapping[str, Study] = {"seeds": _seeds}
"""Studies of any system's model; the same of a WholeModel."""


def analyze(
    study: str,
    model: str | Path,
    images: Path,
    out: Path,
    options: Mapping[str, Any] | None = None,
    limit: int = 0,
    side_px: int = 256,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = no_progress,
    **more: Any,
) -> StudyResult:
    """Run one study.

    Args:
        study: a name in STUDIES or STUDIES_OF_ANY.
        model: a model folder or a shipped name, of InstantIR for STUDIES.
        images: a folder of pictures, or one picture.
        options: the restorer's, for every run.
        limit: first so many pictures by name; 0 for all (studies of tokens: 64).
        side_px: each picture's middle square is resized to this side.
        seed: with a picture's name it fixes every random bit.
        more: what the study itself takes (mixed, faults, stop, seeds).

    Raises:
        UsageError: an unknown study or option, no pictures, no InstantIR model, or a folder that holds other results.
        Failure: the model cannot be loaded, or nothing could be measured.
    """
    if study not in STUDIES and study not in STUDIES_OF_ANY:
        raise unknown("study", study, [*STUDIES, *STUDIES_OF_ANY])
    if side_px < Limits().min_side_px:
        raise UsageError(f"--side must be at least {Limits().min_side_px} px, got {side_px}")
    picture_files(images, out, limit)  # an empty folder dies before the model is loaded
    check_mixed(str(more.get("mixed", "realesrgan")))
    if study in STUDIES_OF_ANY:
        whole = open_whole(model, images, out, options or {}, limit, side_px, seed, device)
        return STUDIES_OF_ANY[study](whole, progress=progress, **more)
    subject = open_subject(model, images, out, options or {}, limit, side_px, seed, device)
    return STUDIES[study](subject, progress=progress, **more)


def check_mixed(preset: str) -> None:
    """UsageError for an unknown degradation, with the near name."""
    from pipelines.analysis.levels import quality_levels

    quality_levels(preset)


def open_subject(
    model: str | Path,
    images: Path,
    out: Path,
    options: Mapping[str, Any],
    limit: int,
    side_px: int,
    seed: int,
    device: str,
) -> Subject:
    """Load the model and settle the options; errors as `analyze`."""
    folder, identity = model_identity(model)
    if identity.system != SYSTEM:
        raise UsageError(f"{model} is a {identity.system} model; studies of previews and tokens need InstantIR.")
    try:
        given = option_check(identity.system, identity.defaults)(options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    from components.models import ModelError, load_model
    from components.systems.instantir.build import build_restorer
    from components.systems.instantir.insight import check_recordable
    from components.systems.instantir.options import parse_options

    set_threads(THREADS)
    try:
        restorer = build_restorer(load_model(folder), device)
    except (ModelError, ValueError) as error:
        raise Failure(f"{model} cannot be loaded: {error}") from error
    settled = parse_options(given, restorer.defaults)
    try:
        check_recordable(settled)
    except ValueError as error:
        raise UsageError(str(error)) from error
    multiple = restorer.network.prior.multiple_px
    if side_px % multiple:
        raise UsageError(f"--side must be a multiple of {multiple} px for this model, got {side_px}")
    return Subject(
        network=restorer.network,
        options=settled,
        digest=identity.digest,
        model=identity.name,
        images=images,
        out=out,
        limit=limit,
        side_px=side_px,
        seed=seed,
        device=device,
    )


def open_whole(
    model: str | Path,
    images: Path,
    out: Path,
    options: Mapping[str, Any],
    limit: int,
    side_px: int,
    seed: int,
    device: str,
) -> WholeModel:
    """Load any system's restorer and check the options; errors as `analyze`."""
    folder, identity = model_identity(model)
    try:
        given = option_check(identity.system, identity.defaults)(options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    from components.models import ModelError
    from components.systems import build_restorer

    set_threads(THREADS)
    try:
        restorer = build_restorer(folder, device=device)
    except (ModelError, ValueError) as error:
        raise Failure(f"{model} cannot be loaded: {error}") from error
    return WholeModel(
        system=identity.system,
        restorer=restorer,
        options=given,
        digest=identity.digest,
        model=identity.name,
        images=images,
        out=out,
        limit=limit,
        side_px=side_px,
        seed=seed,
        device=device,
    )
