"""What a system that reads and writes its authors' published weights tells the verb `restoray weights`. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Shapes of tensors by key, by released file."""


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """One file that was read.

    Attributes:
        file: its name. part: what it became. sha256: of its bytes. tensors, parameters: what it holds.
    """

    file: str
    part: str
    sha256: str
    tensors: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did, or would do.

    Attributes:
        model: the model folder; None where nothing was written. digest: its digest.
        sources: the files read. prior, config: as model.json records them.
        licence, permitted_use: as model.json records them.
        missing: parts that restoring needs and no file gave.
        notes: what people should know.
    """

    model: str | None
    digest: str
    sources: tuple[WeightsSource, ...]
    prior: Mapping[str, str]
    licence: str
    permitted_use: str
    config: Mapping[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote, or with `write=False` would write: files by name with their sha256 ("" if not written)."""

    folder: str
    files: Mapping[str, str]
    parameters: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WeightsIO:
    """Published weights of a system, in and out.

    Attributes:
        published: where the authors' weights are, in words.
        files: names of the released files by part.
        check_sizes: judges and types KEY=VALUE sizes without torch; raises ValueError.
        import_weights: (files, out or None, prior=, image_encoder=, sizes=, name=, licence=, proceed=, progress=)
            -> Imported; `proceed` is asked after the checks and before anything is written.
        export_weights: (model folder, target folder, spelling=, form=, write=) -> Exported.
        layout: (prior=, image_encoder=, sizes=) -> every key and shape.
        spellings: choices of `spelling`, the default first.
        find: (folder or file) -> the weights files there; raises ValueError where there are none or too many.
    """

    published: str
    files: Mapping[str, str]
    check_sizes: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    find: Callable[[Path], Sequence[Path]]
    import_weights: Callable[..., Imported]
    export_weights: Callable[..., Exported]
    layout: Callable[..., Shapes]
    spellings: tuple[str, ...] = field(default=("released",))


def own_words(said: Mapping[str, Any], sources: Sequence[WeightsSource]) -> tuple[dict[str, Any], list[str]]:
    """A sidecar's words as far as they are of these very files, and notes about what was left out.

    Sizes and prior fit or the import fails; licence, data, recipe and metrics would be believed. Sidecars of the first
    exports name no files, and are believed.
    """
    exported = said.get("files") or {}
    other = [source.file for source in sources if exported.get(source.file) != source.sha256]
    if not exported or not other:
        return dict(said), []
    kept = {name: said[name] for name in ("system", "config", "prior") if name in said}
    return kept, [
        f"restoray.json was written beside another {' and '.join(other)}: only sizes and prior are taken of it"
    ]


def find_released(
    place: Path, known: Mapping[str, Sequence[str]], system: str, folders: Sequence[str] = (".",)
) -> list[Path]:
    """The weights files of a folder, in the order of their parts; a file stands for itself.

    Args:
        known: names that a part's file may have.
        folders: where to look, below `place`; the first that holds any file is taken.

    Raises:
        ValueError: no such place, no weights in it, or two files for one part.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ValueError(f"{place} does not exist")
    for folder in (place / name for name in folders):
        found = []
        for part, names in known.items():
            here = [folder / name for name in names if (folder / name).is_file()]
            if len(here) > 1:
                told = " and ".join(path.name for path in here)
                raise ValueError(f"{folder} holds {told}, both for the {part}: name the files one by one")
            found += here
        if found:
            return found
    looked = ", ".join(name for names in known.values() for name in names)
    raise ValueError(f"{place} holds no weights of {system}; looked for {looked}")
