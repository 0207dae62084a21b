"""InstantIR's networks under study: the opened model and the options of each run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from components.systems.instantir.options import Options, parse_options
from pipelines.analysis.model import StudyJob, StudyModel, checked_options
from pipelines.analysis.study import Measurements, pictures_fact
from pipelines.core.errors import Failure, UsageError
from pipelines.core.pool import THREADS, set_threads
from pipelines.restoration.models import open_model

if TYPE_CHECKING:
    from components.systems.instantir.network import InstantIR

SYSTEM = "instantir"


@dataclass(frozen=True, kw_only=True)
class Subject(StudyModel):
    """The networks of an InstantIR model, and the options of each run."""

    network: InstantIR
    options: Options


def open_subject(job: StudyJob) -> Subject:
    """Load the networks and parse the options.

    Raises:
        UsageError: there is no such model, it is of another system, an option is wrong or not supported in a recorded
            run, or the side does not fit the model.
        Failure: the model cannot be loaded.
    """
    from components.models import ModelError, load_model  # imports torch
    from components.systems.instantir.build import build_restorer
    from components.systems.instantir.insight import UNSUPPORTED_DEFAULTS, check_recordable

    model = open_model(job.model)
    identity = model.identity
    if identity.system != SYSTEM:
        raise UsageError(f"{job.model} is a {identity.system} model, and this study needs an InstantIR model.")
    options = checked_options(model, job)
    set_threads(THREADS)
    try:
        restorer = build_restorer(load_model(model.folder), job.device)
    except (ModelError, ValueError) as error:
        raise Failure(f"{job.model} cannot be loaded: {error}") from error
    # a recorded run is at the picture's size, so the model's own working size does not apply
    run_options = parse_options(options, replace(restorer.defaults, **UNSUPPORTED_DEFAULTS))  # type: ignore[arg-type]
    try:
        check_recordable(run_options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    multiple = restorer.network.prior.multiple_px
    if job.side_px % multiple:
        raise UsageError(f"--side must be a multiple of {multiple} px for this model, got {job.side_px}")
    return Subject(job=job, name=identity.name, digest=identity.digest, network=restorer.network, options=run_options)


def run_settings(subject: Subject) -> dict[str, Any]:
    """The settings that every study with recorded runs has."""
    return subject.settings(asdict(subject.options))


def facts_of(subject: Subject, measurements: Measurements) -> list[tuple[str, str]]:
    """The facts at the top of a report about recorded runs."""
    options = subject.options
    return [
        pictures_fact(measurements, subject.job.side_px),
        ("Model", subject.title()),
        ("Sampler", f"{options.sampler}, {options.steps} steps, guidance {options.cfg_scale:g}, start {options.start}"),
        ("Seed", str(subject.job.seed)),
    ]
