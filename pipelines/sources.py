"""Where pictures come from: folders, the shipped demo pictures, scikit-image's photographs, dead leaves.

Listing decides by names and sizes only; `read_entry` gives the bytes, on whatever worker asks.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from components.corpora import CorpusSpec, SourceSpec, SplitSpec
from components.images import encode_png
from components.synthetic import dead_leaves
from components.types import SampleError
from pipelines import shards
from pipelines.errors import Failure, UsageError, unknown
from pipelines.home import package_folder

SIDECARS = frozenset({".csv", ".html", ".json", ".jsonl", ".md", ".txt", ".xmp", ".yaml", ".yml"})
"""Files that travel with pictures; counted, not quarantined."""
OWN_MARKS = {
    "plan.json": ("plan", "stages"),
    "done.json": ("digest", "outputs"),
    "index.json": ("digest", "splits"),
    "records.jsonl": ("output_sha256", "source_sha256"),
}
"""Files, and fields in them (in their first row), by which the folder of a run, a stage, a corpus or a restoration is
known: its pictures are outputs."""
DEFAULT_HELD_OUT_FRACTION = 0.2  # for a user's folder given to a spec that names its held-out pictures

SKIMAGE_CREDITS = {  # file: (licence, credit); the loaders' docstrings of scikit-image 0.26 state both
    "astronaut.png": ("public domain", "NASA"),
    "chelsea.png": ("CC0-1.0", "Stefan van der Walt"),
    "coffee.png": ("CC0-1.0", "Rachel Michetti"),
    "hubble_deep_field.jpg": ("public domain", "NASA"),
    "rocket.jpg": ("public domain", "SpaceX"),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One candidate picture. `source` is what the manifest says (no machine path); `path` is where to read it."""

    key: str
    source: str
    path: str = ""
    size: int = 0
    mtime_ns: int = 0
    licence: str = ""
    credit: str = ""
    leaves: tuple[int, int, int] | None = None  # (size_px, seed, index) of a synthetic picture
    refused: tuple[str, str] | None = None  # (code, detail) where listing already settled it


def list_entries(spec: CorpusSpec, out: Path | None = None) -> tuple[list[Entry], int]:
    """All candidates of a spec in a fixed order (sources as given, files by name), and how many files were skipped.

    What lies below `out`, or below a folder that some run of ours wrote, is neither.

    Raises:
        UsageError: a source is missing, is `out` itself, names nothing, or all together hold no candidate.
    """
    entries: list[Entry] = []
    skipped = 0
    for source in spec.sources:
        if source.kind == "dead_leaves":
            entries.extend(_leaves(source))
        elif source.kind == "skimage":
            entries.extend(_skimage(source))
        else:
            if source.kind == "folder" and not source.path:
                raise UsageError(f"{spec.name}: a folder source needs its path: give --images DIR.")
            folder = package_folder() / "demo_corpus" if source.kind == "demo_corpus" else Path(source.path).absolute()
            found, ignored = _folder(folder, source, out)
            entries.extend(found)
            skipped += ignored
    if not entries:
        where = " and ".join(source.path or source.kind for source in spec.sources) or "no source"
        raise UsageError(f"no picture to curate: {where} holds none.")
    return entries, skipped


def _folder(folder: Path, source: SourceSpec, out: Path | None) -> tuple[list[Entry], int]:
    """Candidates of a directory tree, and the count of sidecar and hidden files."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder." if folder.exists() else f"there is no folder {folder}.")
    if out is not None and out.resolve() == folder.resolve():
        raise UsageError(f"{folder} is both input and output; choose another output folder.")
    notes_of = _read_credits(folder)
    entries, skipped = [], 0
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not is_output(Path(parent) / n, out))
        for name in sorted(files):
            path = Path(parent) / name
            if name.startswith(".") or path.suffix.lower() in SIDECARS:
                skipped += 1
                continue
            entries.append(_file_entry(path, path.relative_to(folder).as_posix(), source, notes_of))
    for error in unreadable:
        place = Path(error.filename).relative_to(folder).as_posix() if error.filename else ""
        if place in ("", "."):
            raise UsageError(f"{folder} cannot be read: {error.strerror}.")
        refused = ("unreadable", f"folder cannot be listed: {error.strerror}")
        entries.append(Entry(key=shards.safe_key(place), source=f"{source.kind}:{_printable(place)}", refused=refused))
    return entries, skipped


def is_output(folder: Path, out: Path | None) -> bool:
    """Whether a folder is `out`, or was written by some run of ours."""
    if out is not None and folder.resolve() == out.resolve():
        return True
    for name, fields in OWN_MARKS.items():
        try:
            text = (folder / name).read_bytes()
            document = json.loads(text.partition(b"\n")[0] if name.endswith(".jsonl") else text)
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and all(field in document for field in fields):
            return True
    return False


def _file_entry(path: Path, relative: str, source: SourceSpec, notes_of: Mapping[str, tuple[str, str]]) -> Entry:
    suffix = path.suffix[1:].lower()
    named = _printable(relative)
    licence, credit = notes_of.get(relative, (source.licence, source.credit))
    known = suffix in shards.PICTURE_SUFFIXES
    entry = Entry(
        key=shards.safe_key(named[: len(named) - len(suffix) - 1] if known else named),
        source=f"{source.kind}:{named}",
        path=str(path),
        licence=licence,
        credit=credit,
    )
    try:
        status = path.stat()
    except OSError as error:
        return replace(entry, refused=("unreadable", f"cannot be read: {error.strerror}"))
    if not stat.S_ISREG(status.st_mode):
        return replace(entry, refused=("not_image", "neither a file nor a link to one"))
    if suffix and not known:  # a name without a suffix is judged by its content
        return replace(entry, refused=("not_image", f"the suffix .{suffix} is of no picture format that we read"))
    return replace(entry, size=status.st_size, mtime_ns=status.st_mtime_ns)


def _skimage(source: SourceSpec) -> Iterator[Entry]:
    package = importlib.util.find_spec("skimage")  # found, not imported: importing it takes a second
    if package is None or not package.submodule_search_locations:
        raise Failure("scikit-image is not installed: install the project's requirements.")
    folder = Path(package.submodule_search_locations[0]) / "data"
    for name in source.names or sorted(SKIMAGE_CREDITS):
        if name not in SKIMAGE_CREDITS:
            raise unknown("cleared picture of scikit-image", name, SKIMAGE_CREDITS)
        yield _file_entry(folder / name, name, source, SKIMAGE_CREDITS)


def _leaves(source: SourceSpec) -> Iterator[Entry]:
    for number in range(source.count):
        name = f"dead-leaves-{source.seed}-{number:06d}"
        leaves = (source.size_px, source.seed, number)
        yield Entry(
            key=name,
            source=f"dead_leaves:{source.size_px}/{source.seed}/{number}",
            size=source.size_px**2 * 2,
            licence="CC0-1.0",
            credit="made by this project",
            leaves=leaves,
        )


def _read_credits(folder: Path) -> dict[str, tuple[str, str]]:
    """(licence, credit) by file name from a CREDITS.csv in the folder; {} where there is none."""
    try:
        with open(folder / "CREDITS.csv", newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
        return {row["file"]: (row["licence"], row["credit"]) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UsageError(f"{folder / 'CREDITS.csv'} cannot be read: it needs columns file, licence, credit.") from error


def _printable(name: str) -> str:
    """A file name as text that JSON can hold: undecodable bytes show as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_entry(entry: Entry, limit_bytes: int) -> bytes:
    """The bytes that a shard will hold.

    Raises:
        SampleError: too_large (not read then), unreadable.
    """
    if entry.leaves is not None:
        return encode_png(dead_leaves(*entry.leaves))
    if entry.size > limit_bytes:
        raise SampleError("too_large", f"{entry.size} bytes exceed the limit of {limit_bytes}", entry.key)
    try:
        with open(entry.path, "rb") as source:
            return source.read(limit_bytes + 1)
    except OSError as error:
        raise SampleError("unreadable", f"cannot be read: {error.strerror}", entry.key) from error


def for_folder(spec: CorpusSpec, folder: Path) -> CorpusSpec:
    """The spec with one folder in place of its sources."""
    fraction = spec.split.held_out_fraction or DEFAULT_HELD_OUT_FRACTION
    return replace(
        spec,
        name=Path(os.path.abspath(folder)).name or spec.name,  # "..", too, has a name
        licence="as their owner says",
        sources=[SourceSpec(kind="folder", path=str(folder))],
        split=SplitSpec(held_out_fraction=fraction),
    )
