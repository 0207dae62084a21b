"""Sources that are files one by one: folders, stores, shipped demo pictures, scikit-image's photographs, dead leaves.

Listing decides by names and sizes only, and goes on one entry at a time: a folder may hold millions.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from components.corpora import CorpusSpec, SourceSpec, SplitSpec
from pipelines import shards
from pipelines.errors import Failure, UsageError, unknown
from pipelines.home import package_folder
from pipelines.sources import stores

KINDS = frozenset({"folder", "skimage", "demo_corpus", "dead_leaves", "negatives"})
"""Kinds of sources that are listed here."""

KNOWN = shards.PICTURE_SUFFIXES
SIDECARS = frozenset({".csv", ".html", ".json", ".jsonl", ".md", ".txt", ".xmp", ".yaml", ".yml"})
"""Files that travel with pictures; counted, not quarantined."""
OWN_MARKS = {
    "plan.json": ("plan", "stages"),
    "done.json": ("digest", "outputs"),
    "index.json": ("digest", "splits"),
    "records.jsonl": ("output_sha256", "source_sha256"),
    "study.json": ("study", "settings"),
}
"""Files, and fields in them (in their first row), by which the folder of a run, a stage, a corpus, a restoration or a
study is known: its pictures are outputs."""
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
    version: str = ""  # what a store says instead of a modification time
    caption_path: str = ""  # a text file of the same name,
    caption_version: str = ""  # and what tells it from what it was another day
    leaves: tuple[int, int, int] | None = None  # (size_px, seed, index) of a synthetic picture
    refused: tuple[str, str] | None = None  # (code, detail) where listing already settled it


@dataclass
class Skipped:
    """Sidecar and hidden files that a listing came across."""

    count: int = 0


def iter_entries(source: SourceSpec, out: Path | None, skipped: Skipped) -> Iterator[Entry]:
    """Candidates of one source of files in a fixed order, by name. What lies below `out`, or below a folder that some
    run of ours wrote, is none.

    Raises:
        UsageError: the source is missing, is `out` itself, or names what does not exist.
    """
    if source.kind == "dead_leaves":
        yield from _leaves(source)
    elif source.kind == "skimage":
        yield from _skimage(source)
    elif source.kind == "demo_corpus":
        yield from _folder(package_folder() / "demo_corpus", source, out, skipped)
    elif source.kind == "negatives":
        yield from _negatives(source, out, skipped)
    elif not source.path:
        raise UsageError("a folder source needs its path: give --images DIR or sources.0.path=DIR.")
    elif stores.is_address(source.path):
        yield from _stored(source, skipped)
    else:
        yield from _folder(Path(source.path).absolute(), source, out, skipped)


def negatives_folder(source: SourceSpec, out: Path) -> Path:
    """Where the pictures of a source of negatives are made: another one for every corpus and setting."""
    told = {n: v for n, v in asdict(source.negatives).items() if n not in ("count", "workers", "num_gpus")}
    digest = hashlib.sha256(json.dumps([source.path, told], sort_keys=True).encode()).hexdigest()[:8]
    return out / "work" / f"negatives-{digest}"


def _negatives(source: SourceSpec, out: Path | None, skipped: Skipped) -> Iterator[Entry]:
    """What was made so far; before anything was, the corpus stands for it, so that a missing one is told early."""
    made = negatives_folder(source, out) / "pictures" if out is not None else Path()
    if out is not None and made.is_dir():
        yield from _folder(made, source, None, skipped)
        return
    corpus = shards.open_corpus(source.path)
    yield Entry(key="negatives", source=f"negatives:{corpus.digest}")


def list_entries(spec: CorpusSpec, out: Path | None = None) -> tuple[list[Entry], int]:
    """All candidates of a spec whose sources are files, and how many files were skipped; errors as `iter_entries`."""
    skipped = Skipped()
    entries = [entry for source in spec.sources if source.kind in KINDS for entry in iter_entries(source, out, skipped)]
    if not entries and all(source.kind in KINDS for source in spec.sources):
        raise nothing_to_curate(spec)
    return entries, skipped.count


def identities(spec: CorpusSpec) -> Iterator[list[Any]]:
    """What tells the candidates of a spec from those of another day, wherever they lie; errors as `check_sources`."""
    check_sources(spec)
    for source in spec.sources:
        if source.kind in KINDS:
            for entry in iter_entries(source, None, Skipped()):
                # What comes with the code has the modification times of its check-out, which mean nothing.
                mtime_ns = entry.mtime_ns if source.kind == "folder" else 0
                yield [entry.key, entry.source, entry.size, mtime_ns, entry.version, entry.refused]
        else:
            files = stores.list_files(source.path, source.storage)
            yield from ([name, size, version] for _, name, size, version in files)


def check_sources(spec: CorpusSpec, out: Path | None = None) -> None:
    """Look whether every source is there, and whether there is anything at all, before anything is made.

    Raises:
        UsageError: as `iter_entries`; or all sources together hold no candidate.
    """
    found = False
    for number, source in enumerate(spec.sources):
        if source.kind in KINDS:
            found = next(iter_entries(source, out, Skipped()), None) is not None or found
        elif not source.path:
            raise UsageError(f"{spec.name}: source {number} ({source.kind}) needs a path: sources.{number}.path=...")
        else:
            found = next(stores.list_files(source.path, source.storage), None) is not None or found
    if not found:
        raise nothing_to_curate(spec)


def nothing_to_curate(spec: CorpusSpec) -> UsageError:
    """The error for a spec whose sources hold no candidate."""
    where = " and ".join(source.path or source.kind for source in spec.sources) or "no source"
    return UsageError(f"no picture to curate: {where} holds none.")


def _folder(folder: Path, source: SourceSpec, out: Path | None, skipped: Skipped) -> Iterator[Entry]:
    """Candidates of a directory tree."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder." if folder.exists() else f"there is no folder {folder}.")
    if out is not None and out.resolve() == folder.resolve():
        raise UsageError(f"{folder} is both input and output; choose another output folder.")
    notes_of = _read_credits(folder)
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not is_output(Path(parent) / n, out))
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                place = _printable((Path(parent) / name).relative_to(folder).as_posix())
                refused = ("linked_folder", "links to folders are not followed: name the folder as a source")
                yield Entry(key=shards.safe_key(place), source=f"{source.kind}:{place}", refused=refused)
        captions = {name for name in files if name.endswith(".txt")}
        for name in sorted(files):
            path = Path(parent) / name
            if name.startswith(".") or path.suffix.lower() in SIDECARS:
                skipped.count += 1
                continue
            entry = _file_entry(path, path.relative_to(folder).as_posix(), source, notes_of)
            beside = path.with_suffix(".txt")
            yield _captioned(entry, beside) if beside.name in captions else entry
    for error in unreadable:
        place = Path(error.filename).relative_to(folder).as_posix() if error.filename else ""
        if place in ("", "."):
            raise UsageError(f"{folder} cannot be read: {error.strerror}.")
        refused = ("unreadable", f"folder cannot be listed: {error.strerror}")
        yield Entry(key=shards.safe_key(place), source=f"{source.kind}:{_printable(place)}", refused=refused)


def _captioned(entry: Entry, beside: Path) -> Entry:
    """The entry with the text file beside it, known by its size and time."""
    try:
        status = beside.stat()
    except OSError:
        return entry
    return replace(entry, caption_path=str(beside), caption_version=f"{status.st_size}|{status.st_mtime_ns}")


def _stored(source: SourceSpec, skipped: Skipped) -> Iterator[Entry]:
    """Candidates below an address of a store; of a pattern, what matches it."""
    for path, relative, size, version in stores.list_files(source.path, source.storage):
        name = relative.rpartition("/")[2]
        suffix = "." + name.rpartition(".")[2].lower() if "." in name else ""
        if name.startswith(".") or suffix in SIDECARS:
            skipped.count += 1
            continue
        entry = Entry(
            key=shards.safe_key(relative[: len(relative) - len(suffix)] if suffix[1:] in KNOWN else relative),
            source=f"{source.kind}:{relative}",
            path=path,
            size=size,
            version=version,
            licence=source.licence,
            credit=source.credit,
        )
        if suffix and suffix[1:] not in KNOWN:
            refused = ("not_image", f"the suffix {suffix} is of no picture format that we read")
            entry = replace(entry, refused=refused)
        yield entry


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


def entry_again(row: Mapping[str, Any], source: SourceSpec) -> Entry | None:
    """A listed local file as it is now, whatever it was when it was listed; None for what is no local file."""
    path = str(row.get("path", ""))
    if not path or stores.is_address(path):
        return None
    relative = row["source"].removeprefix(f"{source.kind}:")
    notes_of = {relative: (row.get("licence", ""), row.get("credit", ""))}
    entry = _file_entry(Path(path), relative, source, notes_of)
    beside = row.get("caption_path")
    return replace(_captioned(entry, Path(beside)) if beside else entry, key=row["key"])


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


def for_folder(spec: CorpusSpec, folder: Path) -> CorpusSpec:
    """The spec with one folder in place of its sources."""
    fraction = spec.split.held_out_fraction or DEFAULT_HELD_OUT_FRACTION
    return replace(
        spec,
        name=Path(os.path.abspath(folder)).name or spec.name,  # "..", too, has a name
        licence="as their owner says",
        sources=[SourceSpec(kind="folder", path=os.path.abspath(folder))],
        pairs=[],  # those of the spec are other pictures'
        split=SplitSpec(held_out_fraction=fraction),
    )
