"""The model under study: the job of a study, and the model it opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.options import OptionCheck
from components.types import Restorer
from pipelines.core.errors import Failure, UsageError
from pipelines.core.pool import THREADS, set_threads
from pipelines.restoration.models import OpenedModel, open_model


@dataclass(frozen=True, kw_only=True)
class StudyJob:
    """The model, the pictures and the settings of a study.

    Attributes:
        model: a model folder or a shipped name.
        images: a folder of pictures, or one picture.
        out: output folder.
        options: the restorer's options, for every run.
        limit: number of pictures, the first by name; 0 for all (studies with a gallery: 64).
        side_px: each picture's middle square is resized to this side.
        seed: fixes every random bit of a picture, together with its key.
        device: device of the networks.
    """

    model: str | Path
    images: Path
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: int = 0
    side_px: int = 256
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class StudyModel:
    """The opened model of a study.

    Attributes:
        job: the study's job.
        name: the model's name.
        digest: digest of the model's files.
    """

    job: StudyJob
    name: str
    digest: str

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that every study of a model has; `options` are all options of a run."""
        return {
            "model": self.digest,
            "options": dict(options),
            "side_px": self.job.side_px,
            "seed": self.job.seed,
            "device": self.job.device,
        }

    def title(self, system: str = "") -> str:
        """Name and digest for a report."""
        return f"{self.name}{f' ({system})' if system else ''}, digest {self.digest[:12]}"


@dataclass(frozen=True, kw_only=True)
class WholeModel(StudyModel):
    """A model of any system.

    Attributes:
        system: its name.
        restorer: the loaded model.
        options: the typed options of each request.
        check: checks and types options, see components.options.OptionCheck.
        frame: text around a caption, see components.restoring.Identity.
    """

    system: str
    restorer: Restorer
    options: Mapping[str, Any]
    check: OptionCheck
    frame: str = ""


def checked_options(model: OpenedModel, job: StudyJob) -> Mapping[str, Any]:
    """The job's options with their types; UsageError for an option that the model does not take."""
    try:
        return model.check(job.options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def open_whole(job: StudyJob) -> WholeModel:
    """Load the restorer of a model of any system.

    Raises:
        UsageError: there is no such model, it restores nothing, or an option is wrong.
        Failure: the model cannot be loaded.
    """
    from components.models import ModelError  # imports torch

    model = open_model(job.model, {"device": job.device})
    options = checked_options(model, job)
    set_threads(THREADS)
    try:
        restorer = model.factory()
    except (ModelError, ValueError) as error:
        raise Failure(f"{job.model} cannot be loaded: {error}") from error
    identity = model.identity
    return WholeModel(
        job=job,
        name=identity.name,
        digest=identity.digest,
        system=identity.system,
        restorer=restorer,
        options=options,
        check=model.check,
        frame=identity.frame,
    )
