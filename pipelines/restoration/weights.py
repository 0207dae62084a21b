"""`restoray weights`: import the published weights of a system into a model folder, and export them from one.

The code dispatches through the `weights` entries in SYSTEMS and names no system.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.places import weights_folder
from components.systems import SYSTEMS
from components.systems.weights_io import ExportReport, ImportJob, ImportReport, Shapes, WeightsIO
from pipelines.core.console import Progress, no_progress
from pipelines.core.errors import Failure, UsageError, unknown

if TYPE_CHECKING:
    from components.models import Model

FORMS = ("pt", "safetensors")


def weights_of(system: str) -> WeightsIO:
    """Return the system's `weights` entry. Raises UsageError for an unknown system or one without the entry."""
    entries = {name: entry.weights for name, entry in SYSTEMS.items() if entry.weights is not None}
    if system in entries:
        return entries[system]
    if system in SYSTEMS:
        raise UsageError(f"{system} has no published weights; choose one of {', '.join(sorted(entries))}.")
    raise unknown("system", system, entries)


def check_sizes(weights: WeightsIO, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check KEY=VALUE sizes and convert them to their types. Raises UsageError, with the closest name for a typo."""
    try:
        return weights.check_sizes(sizes)
    except ValueError as error:
        raise UsageError(str(error)) from error


def find_sources(weights: WeightsIO, places: Sequence[Path]) -> list[Path]:
    """Find the weights files in these places. Raises UsageError if a place has none, or too many."""
    try:
        paths = [path for place in places for path in weights.find(place)]
    except ValueError as error:
        raise UsageError(f"{error}. Published: {weights.published}.") from error
    if not paths:
        raise UsageError(f"import needs --from FILE or FOLDER. Published: {weights.published}.")
    return list(dict.fromkeys(paths))


def import_weights(
    system: str,
    places: Sequence[Path],
    out: Path | None = None,
    *,
    prior: str = "",
    image_encoder: str = "",
    sizes: Mapping[str, Any] | None = None,
    licence: str = "",
    origin: str = "",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ImportReport:
    """Write a model folder from published weights.

    Args:
        system: a name in SYSTEMS.
        places: weights files, or folders with them.
        out: the model folder; RESTORAY_HOME/weights/<system> by default.
        prior, image_encoder, sizes, licence: see the system's import.
        origin: where the file comes from, for a system whose weights have many authors.
        overwrite: replace another model in `out`.
        dry_run: check everything, write nothing.
        progress: passed to the system's import.

    Returns:
        A report of the import. If `out` already has the model of the same files, nothing is written.

    Raises:
        UsageError: an unknown name, no files, or `out` holds something else.
        Failure: a file cannot be read or does not fit (the message lists every fault), or the disk is too small.
    """
    weights = weights_of(system)
    sizes = check_sizes(weights, sizes or {})
    files = find_sources(weights, places)
    if origin and not weights.takes_origin:
        raise UsageError(
            f"--origin is for systems whose weights have many authors; those of {system} come as published."
        )
    folder = out or weights_folder() / system
    from components.models import ModelError

    digests: list[str] = []  # of the same model from an earlier import

    def proceed(plan: ImportReport) -> bool:
        if dry_run:
            return False
        digests.extend(_earlier_import(folder, system, plan, overwrite))
        if not digests:
            _check_disk(folder, files)
        return not digests

    try:
        job = ImportJob(
            files=files,
            out=folder,
            prior=_absolute(prior),
            image_encoder=_absolute(image_encoder),
            sizes=sizes,
            licence=licence,
            origin=origin,
            proceed=proceed,
            progress=progress,
        )
        result = weights.code().import_weights(job)
    except ModelError as error:
        raise Failure(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not digests:
        return result
    notes = (*result.notes, "an earlier import used the same files: nothing was done")
    return dataclasses.replace(result, model=str(folder), digest=digests[0], notes=notes)


def export_weights(
    system: str,
    model: str | Path,
    folder: Path,
    *,
    spelling: str = "",
    form: str = "pt",
    overwrite: bool = False,
    dry_run: bool = False,
) -> ExportReport:
    """Write a model folder's weights in the format of the published files.

    Args:
        system: a name in SYSTEMS.
        model: a model folder or the name of a model.
        folder: receives the files.
        spelling: one of the system's spellings of keys and file names; "" for the first one.
        form: one of FORMS.
        overwrite: replace such files in `folder`.
        dry_run: check everything, write nothing.

    Raises:
        UsageError: an unknown name, or `folder` has such files already.
        Failure: the model is unusable.
    """
    weights = weights_of(system)
    spelling = spelling or weights.spellings[0]
    if spelling not in weights.spellings:
        raise unknown("spelling", spelling, weights.spellings)
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    from components.models import ModelError

    try:
        plan = weights.code().export_weights(model, folder, spelling=spelling, form=form, write=False)
        existing = [name for name in plan.files if (folder / name).exists()]
        if existing and not overwrite and not dry_run:
            raise UsageError(f"{folder} holds {', '.join(existing)} already: choose another --to, or give --overwrite.")
        return plan if dry_run else weights.code().export_weights(model, folder, spelling=spelling, form=form)
    except ModelError as error:
        raise Failure(str(error)) from error


def layout(system: str, *, prior: str = "", image_encoder: str = "", sizes: Mapping[str, Any] | None = None) -> Shapes:
    """Return every key and shape of the published files for a prior. Raises as import_weights."""
    weights = weights_of(system)
    sizes = check_sizes(weights, sizes or {})
    from components.models import ModelError

    try:
        return weights.code().layout(prior=_absolute(prior), image_encoder=_absolute(image_encoder), sizes=sizes)
    except ModelError as error:
        raise Failure(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def import_lines(result: ImportReport) -> list[str]:
    """Return the report of an import as lines of text."""
    lines = [
        f"{source.file}: {source.part}, {source.tensors} tensors, {source.parameters:,} parameters, "
        f"sha256 {source.sha256}"
        for source in result.sources
    ]
    lines += [f"prior: {result.prior['id']}"] if result.prior else []
    lines += [f"licence: {result.licence}", f"permitted use: {result.permitted_use}"]
    lines += [f"origin: {result.origin}"] if result.origin else []
    if result.defaults:
        lines.append(f"restores with {option_text(result.defaults)}, as it was trained; options of a command go first")
    lines += [f"note: {note}" for note in result.notes]
    if result.missing:
        lines.append(f"missing for restoring: {', '.join(result.missing)}")
    model = f"model: {result.model}, digest {result.digest}"
    return [*lines, model if result.model else "everything fits; nothing was written"]


def option_text(options: Mapping[str, Any]) -> str:
    """Return options as KEY=VALUE text, as a command takes them."""
    return " ".join(f"{name}={value}" for name, value in sorted(options.items()))


def export_lines(result: ExportReport) -> list[str]:
    """Return the report of an export as lines of text."""
    lines = [f"{name}{f': sha256 {digest}' if digest else ''}" for name, digest in result.files.items()]
    lines += [f"note: {note}" for note in result.notes]
    wrote = any(result.files.values())
    return [*lines, f"{result.parameters:,} parameters {'written to' if wrote else 'would go to'} {result.folder}"]


def layout_lines(shapes: Shapes) -> list[str]:
    """Return a layout as lines of text: per file a heading, then one line per key with its shape."""
    lines: list[str] = []
    for file, keys in shapes.items():
        count = sum(_product(shape) for shape in keys.values())
        lines.append(f"{file}: {len(keys)} tensors, {count:,} parameters")
        lines += [f"  {key} {list(shape)}" for key, shape in keys.items()]
    return lines


def _earlier_import(folder: Path, system: str, plan: ImportReport, overwrite: bool) -> list[str]:
    """Return [digest] if `folder` has the complete model of the same files, otherwise [].

    Raises:
        UsageError: `folder` holds something else, or the same files with other settings, and not `overwrite`.
    """
    from components.models import ModelError, file_sha256, load_model

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    try:
        model: Model | None = load_model(folder) if (folder / "model.json").is_file() else None
    except ModelError:
        model = None
    if model is None:
        raise UsageError(f"{folder} exists and is not a model folder: choose another --out.")
    digests = {source.file: f"sha256:{source.sha256}" for source in plan.sources}
    prior = model.info["prior"] or {}  # null for a system without a prior
    same = model.info["system"] == system and model.info.get("parents") == digests and prior == plan.prior
    earlier_defaults = SYSTEMS[system].restore_defaults(model.info.get("recipe") or {}) if same else {}
    settings = {
        "sizes": (model.info["config"], plan.config),
        "licence": (model.info["licence"], plan.licence),
        "origin": (model.info.get("origin", ""), plan.origin),
        "defaults": (dict(earlier_defaults), dict(plan.defaults)),
    }
    changes = [name for name, (current, new) in settings.items() if current != new]
    if same and changes and not overwrite:
        raise UsageError(
            f"{folder} was made of these files with other {' and another '.join(changes)}: give --overwrite to make it "
            "again, or choose another --out."
        )
    if not same and not overwrite:
        raise UsageError(
            f"{folder} holds another model ({model.info['name']}): choose another --out, or give --overwrite."
        )
    parts = [(model.path / part["file"], part["sha256"]) for part in model.info["parts"].values()]
    whole = all(path.is_file() and file_sha256(path) == digest for path, digest in parts)
    return [model.digest] if same and whole and not overwrite else []


def _check_disk(folder: Path, files: Sequence[Path]) -> None:
    """Raises Failure if the disk has less space than the files need."""
    parent = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    size, free = sum(path.stat().st_size for path in files), shutil.disk_usage(parent).free
    if free < size:
        raise Failure(f"{parent} has {free >> 20} MiB free, and the model folder needs {size >> 20} MiB.")


def _absolute(name: str) -> str:
    """Return the absolute path of a folder, so that model.json names it from anywhere; other names stay."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _product(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
