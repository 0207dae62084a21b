"""The end that imports of published weights share: model.json, the report, and the model folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from components.models import ModelCard, save_model
from components.options import restore_defaults
from components.systems.weights_io import ImportJob, ImportReport, WeightsSource


def finish_import(
    job: ImportJob,
    *,
    system: str,
    parts: Mapping[str, Mapping[str, Tensor]],
    sources: Sequence[WeightsSource],
    sidecar: Mapping[str, Any],
    config: Mapping[str, Any],
    licence: str,
    permitted_use: str,
    prior: Mapping[str, str] | None = None,
    restore_options: Mapping[str, Any] | None = None,
    origin: str = "",
    missing: Sequence[str] = (),
    notes: Sequence[str] = (),
    defaults_of: Callable[[Mapping[str, Any]], Mapping[str, Any]] = restore_defaults,
) -> ImportReport:
    """The report of a checked import. Its model folder is written unless the job only checks.

    What the job says goes before the sidecar, and the sidecar before `licence`, `permitted_use`, `restore_options` and
    `origin`, which are true of such files in general.

    Args:
        system: name of the system.
        parts: checked tensors by part and key.
        sources: the files.
        sidecar: its valid entries, see valid_entries.
        config: architecture for model.json.
        prior: identity of the prior for model.json.
        restore_options: defaults of the restorer; None if the release has none.
        missing: parts that restoring needs and that no file holds.
        notes: for people.
        defaults_of: the restorer's options that a recipe sets; a system with names of its own gives its own function.
    """
    defaults = {} if restore_options is None else {"restore_options": dict(restore_options)}
    card = ModelCard(
        name=job.name or sidecar.get("name") or (job.out.name if job.out else system),
        system=system,
        recipe=sidecar.get("recipe") or defaults,
        prior=None if prior is None else dict(prior),
        config=dict(config),
        parents={source.file: f"sha256:{source.sha256}" for source in sources},
        data_manifest_digest=sidecar.get("data_manifest_digest") or "",
        licence=job.licence or sidecar.get("licence") or licence,
        permitted_use=sidecar.get("permitted_use") or permitted_use,
        metrics=sidecar.get("metrics") or {},
        origin=job.origin or sidecar.get("origin") or origin,
    )
    result = ImportReport(
        model=None,
        digest="",
        sources=tuple(sources),
        prior=card.prior or {},
        config=card.config,
        licence=card.licence,
        permitted_use=card.permitted_use,
        missing=tuple(missing),
        origin=card.origin,
        defaults=defaults_of(card.recipe),
        notes=tuple(notes),
    )
    if job.out is not None and job.proceed(result):
        job.out.parent.mkdir(parents=True, exist_ok=True)
        model = save_model(job.out, card, parts)
        result = replace(result, model=str(model.path), digest=model.digest)
    job.progress(len(job.files), len(job.files), "")
    return result
