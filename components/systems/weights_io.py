"""A system's import and export of its authors' published weights, for `restoray weights`. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shapes of tensors by key, by released file."""


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """One imported file.

    Attributes:
        file: name. part: part of the model folder. sha256: of its bytes. tensors, parameters: their numbers.
    """

    file: str
    part: str
    sha256: str
    tensors: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """Result or plan of an import.

    Attributes:
        model: the model folder; None if nothing was written. digest: its digest.
        sources: the imported files. prior, config: as model.json records them.
        licence, permitted_use: as model.json records them.
        missing: parts that restoring needs and that no file holds.
        origin: as model.json records it; "" for systems whose published weights have one origin.
        defaults: the restorer's options unless a request names others: the release's, or those of a trained model.
        notes: for people.
    """

    model: str | None
    digest: str
    sources: tuple[WeightsSource, ...]
    prior: Mapping[str, str]
    licence: str
    permitted_use: str
    config: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    origin: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """The files of one import, and what the user says about them.

    Attributes:
        files: of one model; their keys or names tell which part each holds.
        out: the model folder; replaced as a whole at the end. None only checks.
        prior, image_encoder: of the weights; "" takes the sidecar's, else the system's own. A system that has none of
            them refuses one.
        sizes: checked by the system's check_sizes; they replace the sidecar's, else the published ones.
        name: of the model; "" takes the sidecar's, else the folder's.
        licence, origin: texts for model.json; "" takes the sidecar's, else what the files themselves show.
        proceed: called with the plan after all checks; False writes nothing.
        progress: called with (files done, files, file).
    """

    files: Sequence[Path]
    out: Path | None = None
    prior: str = ""
    image_encoder: str = ""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    licence: str = ""
    origin: str = ""
    proceed: Callable[[ImportReport], bool] = lambda plan: True
    progress: Callable[[int, int, str], None] = lambda count, of, note: None


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Result of an export, or its plan with `write=False`: sha256 by file name ("" if not written)."""

    folder: str
    files: Mapping[str, str]
    parameters: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightsCode:
    """The part of a system's WeightsIO that needs torch.

    Attributes:
        import_weights: job -> ImportReport.
        export_weights: (model folder, target folder, spelling=, form=, write=) -> ExportReport.
        layout: (prior=, image_encoder=, sizes=) -> every key and shape.
    """

    import_weights: Callable[[ImportJob], ImportReport]
    export_weights: Callable[..., ExportReport]
    layout: Callable[..., Shapes]


@dataclass(frozen=True, kw_only=True)
class WeightsIO:
    """Import and export of a system's published weights.

    Attributes:
        published: where the authors' weights are, as a text for people.
        files: names of the released files by part.
        check_sizes: checks and types KEY=VALUE sizes without torch; raises ValueError.
        find: (folder or file) -> the weights files there; raises ValueError if there are none or too many.
        code: imports torch and returns the part that needs it.
        licence: of the published files, as their authors state it; "" if there are none.
        spellings: choices of `spelling`, the default first.
        defaults: the release's options of a restoration; an import writes them into its model folder.
        takes_origin: whether its import records where a file comes from: its weights have many authors.
    """

    published: str
    files: Mapping[str, str]
    check_sizes: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    find: Callable[[Path], Sequence[Path]]
    code: Callable[[], WeightsCode]
    licence: str = ""
    spellings: tuple[str, ...] = field(default=("released",))
    defaults: Mapping[str, Any] = field(default_factory=dict)
    takes_origin: bool = False


def valid_entries(sidecar: Mapping[str, Any], sources: Sequence[WeightsSource]) -> tuple[dict[str, Any], list[str]]:
    """The entries of a sidecar that are valid for these files, and notes about the dropped ones.

    A sidecar of other files keeps sizes and prior, which the import checks. It loses licence, data, recipe and metrics,
    which nothing checks. Sidecars of the first exports name no files; all their entries are kept.
    """
    exported = sidecar.get("files") or {}
    other = [source.file for source in sources if exported.get(source.file) != source.sha256]
    if not exported or not other:
        return dict(sidecar), []
    entries = {name: sidecar[name] for name in ("system", "config", "prior") if name in sidecar}
    return entries, [f"restoray.json describes another {' and '.join(other)}: only its sizes and prior are used"]


def find_released(
    place: Path, names_by_part: Mapping[str, Sequence[str]], system: str, folders: Sequence[str] = (".",)
) -> list[Path]:
    """The weights files of a folder, in the order of their parts; for a file, the file itself.

    Args:
        names_by_part: file names that each part may have.
        folders: folders below `place` to search; the first one that holds a file counts.

    Raises:
        ValueError: `place` does not exist, holds no weights, or holds two files for one part.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ValueError(f"{place} does not exist")
    for folder in (place / name for name in folders):
        paths = []
        for part, names in names_by_part.items():
            matches = [folder / name for name in names if (folder / name).is_file()]
            if len(matches) > 1:
                listing = " and ".join(path.name for path in matches)
                raise ValueError(f"{folder} holds {listing}, both for the {part}: name the files one by one")
            paths += matches
        if paths:
            return paths
    candidates = ", ".join(name for names in names_by_part.values() for name in names)
    raise ValueError(f"{place} holds no weights of {system}; looked for {candidates}{_checkpoint_hint(place)}")


def _checkpoint_hint(place: Path) -> str:
    """The remedy for a folder with a checkpoint of several files."""
    if (place / "zero_to_fp32.py").is_file():
        return f". It is a checkpoint of DeepSpeed: run `python zero_to_fp32.py . weights.bin` in {place} first"
    if (place / ".metadata").is_file():
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {place} weights.pt"
        return f". It is a distributed checkpoint of torch: run `{command}` first"
    return ""
