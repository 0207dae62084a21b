"""`restoray weights`: weights that a system's authors published, in and out of model folders.

Dispatches through SYSTEMS: a system takes part by its `weights` entry, and this file knows none of them by name.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.places import weights_folder
from components.systems.weights_io import Exported, Imported, Shapes, WeightsIO
from pipelines.console import Progress, no_progress
from pipelines.errors import Failure, UsageError, unknown

if TYPE_CHECKING:
    from components.models import Model

FORMS = ("pt", "safetensors")


def weights_of(system: str) -> WeightsIO:
    """The system's entry. Raises UsageError for an unknown name (with the near one), or a system without."""
    from components.systems import SYSTEMS

    able = {name: found.weights for name, found in SYSTEMS.items() if found.weights is not None}
    if system in able:
        return able[system]
    if system in SYSTEMS:
        raise UsageError(f"{system} has no published weights to read or write; {', '.join(sorted(able))} has.")
    raise unknown("system", system, able)


def check_sizes(weights: WeightsIO, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """KEY=VALUE sizes in their types. Raises UsageError that names the near one."""
    try:
        return weights.check_sizes(sizes)
    except ValueError as error:
        raise UsageError(str(error)) from error


def find_sources(weights: WeightsIO, places: Sequence[Path]) -> list[Path]:
    """The weights files at the places named. Raises UsageError where one holds none, or too many."""
    try:
        found = [path for place in places for path in weights.find(place)]
    except ValueError as error:
        raise UsageError(f"{error}. Published: {weights.published}.") from error
    if not found:
        raise UsageError(f"import needs --from FILE or FOLDER. Published: {weights.published}.")
    return list(dict.fromkeys(found))


def import_weights(
    system: str,
    places: Sequence[Path],
    out: Path | None = None,
    *,
    prior: str = "",
    image_encoder: str = "",
    sizes: Mapping[str, Any] | None = None,
    licence: str = "",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> Imported:
    """Make a model folder of published weights.

    Args:
        system: a name in SYSTEMS.
        places: files, or folders that hold them.
        out: the model folder; RESTORAY_HOME/weights/<system> by default.
        prior, image_encoder, sizes, licence: see the system's import.
        overwrite: replace a model folder that holds something else.
        dry_run: check everything, write nothing.

    Returns:
        What was imported. A folder that these very files were imported to before is left as it is.

    Raises:
        UsageError: unknown names, no files, or `out` holds something else.
        Failure: a file cannot be read or does not fit (every fault is named), or the disk is too small.
    """
    weights = weights_of(system)
    sizes = check_sizes(weights, sizes or {})
    files = find_sources(weights, places)
    folder = out or weights_folder() / system
    from components.models import ModelError

    before: list[str] = []

    def proceed(plan: Imported) -> bool:
        if dry_run:
            return False
        before.extend(_imported_before(folder, system, plan, overwrite))
        if not before:
            _check_room(folder, files)
        return not before

    try:
        result = weights.import_weights(
            files,
            folder,
            prior=_as_place(prior),
            image_encoder=_as_place(image_encoder),
            sizes=sizes,
            licence=licence,
            proceed=proceed,
            progress=progress,
        )
    except ModelError as error:
        raise Failure(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not before:
        return result
    notes = (*result.notes, "imported before from the same files: nothing was done")
    return dataclasses.replace(result, model=str(folder), digest=before[0], notes=notes)


def export_weights(
    system: str,
    model: str | Path,
    folder: Path,
    *,
    spelling: str = "",
    form: str = "pt",
    overwrite: bool = False,
    dry_run: bool = False,
) -> Exported:
    """Write a model folder's weights as the system's authors released theirs.

    Raises:
        UsageError: unknown names, or `folder` holds such files already.
        Failure: no usable model.
    """
    weights = weights_of(system)
    spelling = spelling or weights.spellings[0]
    if spelling not in weights.spellings:
        raise unknown("spelling", spelling, weights.spellings)
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    from components.models import ModelError

    try:
        plan = weights.export_weights(model, folder, spelling=spelling, form=form, write=False)
        there = [name for name in plan.files if (folder / name).exists()]
        if there and not overwrite and not dry_run:
            raise UsageError(f"{folder} holds {', '.join(there)} already: choose another --to, or give --overwrite.")
        return plan if dry_run else weights.export_weights(model, folder, spelling=spelling, form=form)
    except ModelError as error:
        raise Failure(str(error)) from error


def layout(system: str, *, prior: str = "", image_encoder: str = "", sizes: Mapping[str, Any] | None = None) -> Shapes:
    """Every key and shape of the released files on a prior. Raises as import_weights."""
    weights = weights_of(system)
    sizes = check_sizes(weights, sizes or {})
    from components.models import ModelError

    try:
        return weights.layout(prior=_as_place(prior), image_encoder=_as_place(image_encoder), sizes=sizes)
    except ModelError as error:
        raise Failure(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def imported_lines(result: Imported) -> list[str]:
    """An import in words."""
    lines = [
        f"{source.file}: {source.part}, {source.tensors} tensors, {source.parameters:,} parameters, "
        f"sha256 {source.sha256}"
        for source in result.sources
    ]
    lines += [f"prior: {result.prior['id']}"] if result.prior else []
    lines += [f"licence: {result.licence}", f"permitted use: {result.permitted_use}"]
    lines += [f"note: {note}" for note in result.notes]
    if result.missing:
        lines.append(f"missing for restoring: {', '.join(result.missing)}")
    made = f"model: {result.model}, digest {result.digest}"
    return [*lines, made if result.model else "everything fits; nothing was written"]


def exported_lines(result: Exported) -> list[str]:
    """An export in words."""
    lines = [f"{name}{f': sha256 {digest}' if digest else ''}" for name, digest in result.files.items()]
    lines += [f"note: {note}" for note in result.notes]
    written = any(result.files.values())
    return [*lines, f"{result.parameters:,} parameters {'written to' if written else 'would go to'} {result.folder}"]


def layout_lines(shapes: Shapes) -> list[str]:
    """A layout in words: key and shape a line, by file."""
    lines: list[str] = []
    for file, keys in shapes.items():
        count = sum(_product(shape) for shape in keys.values())
        lines.append(f"{file}: {len(keys)} tensors, {count:,} parameters")
        lines += [f"  {key} {list(shape)}" for key, shape in keys.items()]
    return lines


def _imported_before(folder: Path, system: str, plan: Imported, overwrite: bool) -> list[str]:
    """The digest of the model that these files were made into there before, whole; else nothing.

    Raises:
        UsageError: something else is in the way.
    """
    from components.models import ModelError, file_sha256, load_model

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    try:
        model: Model | None = load_model(folder) if (folder / "model.json").is_file() else None
    except ModelError:
        model = None
    if model is None:
        raise UsageError(f"{folder} is there and is no model folder: choose another --out.")
    digests = {source.file: f"sha256:{source.sha256}" for source in plan.sources}
    prior = model.info["prior"] or {}  # a system without one records null
    same = model.info["system"] == system and model.info.get("parents") == digests and prior == plan.prior
    settings = {"sizes": (model.info["config"], plan.config), "licence": (model.info["licence"], plan.licence)}
    changed = [name for name, (there, wanted) in settings.items() if there != wanted]
    if same and changed and not overwrite:
        raise UsageError(
            f"{folder} was made of these files with other {' and another '.join(changed)}: give --overwrite to make it "
            "again, or choose another --out."
        )
    if not same and not overwrite:
        raise UsageError(
            f"{folder} holds another model ({model.info['name']}): choose another --out, or give --overwrite."
        )
    parts = [(model.path / part["file"], part["sha256"]) for part in model.info["parts"].values()]
    whole = all(path.is_file() and file_sha256(path) == digest for path, digest in parts)
    return [model.digest] if same and whole and not overwrite else []


def _check_room(folder: Path, files: Sequence[Path]) -> None:
    """Raises Failure where the disk cannot hold the parts."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(place).free
    if free < needed:
        raise Failure(f"{place} has {free >> 20} MiB free, and the model folder needs {needed >> 20} MiB.")


def _as_place(name: str) -> str:
    """A folder's whole path, so that a model folder finds its prior again from anywhere; other names as they are."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _product(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
