"""Sources of single files: folders, stores, shipped demo pictures, scikit-image's photographs, dead leaves.

Listing uses names and sizes only, and yields one entry at a time, since a folder may hold millions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import stat
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from components.corpora import CorpusSpec, SourceSpec, SplitSpec
from pipelines.core.errors import Failure, UsageError, near_miss, unknown
from pipelines.core.home import package_folder
from pipelines.core.pictures import SIDECARS, is_output, is_own_sheet, is_system_name
from pipelines.core.places.place import Where
from pipelines.corpus import shards
from pipelines.curation.sources import stores
from pipelines.curation.sources.objects import in_any_order
from pipelines.curation.sources.stored import StoredFolder, suffix_of
from pipelines.curation.sources.tables import FolderTables, Note
from pipelines.curation.sources.tars import printable_name
from pipelines.curation.sources.texts import CAPTION_SUFFIXES

KINDS = frozenset({"folder", "skimage", "demo_corpus", "dead_leaves", "negatives"})
"""Kinds of sources that this module lists."""

SHIPPED_KINDS = frozenset({"skimage", "demo_corpus"})
"""Kinds of sources whose pictures come with the installation: they are few, and listed in no time."""

DEFAULT_HELD_OUT_FRACTION = 0.2  # for a user's folder in a spec that names its held-out pictures

SKIMAGE_CREDITS = {  # file: (licence, credit), from the docstrings of scikit-image 0.26's loaders
    "astronaut.png": ("public domain", "NASA"),
    "chelsea.png": ("CC0-1.0", "Stefan van der Walt"),
    "coffee.png": ("CC0-1.0", "Rachel Michetti"),
    "hubble_deep_field.jpg": ("public domain", "NASA"),
    "rocket.jpg": ("public domain", "SpaceX"),
}


TABLE_CODES = ("bad_caption", "not_text")
"""Codes of pictures that a metadata table describes wrongly: only a new listing reads the table again."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One candidate picture of a listing.

    Attributes:
        key: key of the sample.
        source: name of the picture in the manifest, without a path of the machine.
        path: where its bytes are.
        size, mtime_ns: bytes and modification time of a local file.
        licence, credit: for the manifest.
        version: version in a store, in the place of a modification time.
        caption: caption from a table in a folder (tables.py).
        caption_path: path of a text file of the same name.
        caption_version: size and modification time of that text file.
        leaves: (size_px, seed, index) of a synthetic picture.
        refused: (code, detail) of a picture that listing refuses.
    """

    key: str
    source: str
    path: str = ""
    size: int = 0
    mtime_ns: int = 0
    licence: str = ""
    credit: str = ""
    version: str = ""
    caption: str = ""
    caption_path: str = ""
    caption_version: str = ""
    leaves: tuple[int, int, int] | None = None
    refused: tuple[str, str] | None = None

    def to_line(self) -> dict[str, Any]:
        """A line of work/parts; it has no empty fields."""
        return {name: value for name in ENTRY_FIELDS if (value := getattr(self, name)) not in ("", 0, None)}

    @staticmethod
    def from_line(line: Mapping[str, Any]) -> Entry:
        """The inverse of `to_line`."""
        pairs = {name: tuple(line[name]) for name in ("leaves", "refused") if line.get(name)}
        return Entry(**{**line, **pairs})


ENTRY_FIELDS = tuple(Entry.__dataclass_fields__)


@dataclass
class SkippedFiles:
    """Number of sidecar and hidden files in a listing, and sentences on its tables that a user should read."""

    count: int = 0
    sentences: list[str] = field(default_factory=list)


def iter_entries(
    source: SourceSpec, out: Path | None, skipped: SkippedFiles, is_sorted: bool = False
) -> Iterator[Entry]:
    """Candidates of one source of files, ordered by name. Files below `out`, or below an output of a run, are not.

    Args:
        is_sorted: sort the listing of a store on disk, see objects.py.

    Raises:
        UsageError: the source is missing, is `out` itself, or names a picture that does not exist.
        OutOfOrder: a store lists in another order, and `is_sorted` is not set.
    """
    if source.kind == "dead_leaves":
        yield from _leaves(source)
    elif source.kind == "skimage":
        yield from _skimage(source)
    elif source.kind == "demo_corpus":
        yield from _demo_corpus(source, out, skipped)
    elif source.kind == "negatives":
        yield from _negatives(source, out, skipped)
    elif not source.path:
        raise UsageError("a folder source needs its path: give --images DIR or sources.0.path=DIR.")
    elif stores.is_address(source.path):
        yield from _stored(source, skipped, is_sorted)
    else:
        yield from _folder(Path(source.path).absolute(), source, out, skipped)


def negatives_folder(source: SourceSpec, out: Path) -> Path:
    """Folder of the pictures of a source of negatives; every corpus and every setting has its own."""
    settings = {n: v for n, v in asdict(source.negatives).items() if n not in ("count", "workers", "num_gpus")}
    digest = hashlib.sha256(json.dumps([source.path, settings], sort_keys=True).encode()).hexdigest()[:8]
    return out / "work" / f"negatives-{digest}"


def _negatives(source: SourceSpec, out: Path | None, skipped: SkippedFiles) -> Iterator[Entry]:
    """The pictures so far. Before the first one: one entry with the corpus digest, or an error without a corpus."""
    pictures = negatives_folder(source, out) / "pictures" if out is not None else Path()
    if out is not None and pictures.is_dir():
        yield from _folder(pictures, source, None, skipped)
        return
    corpus = shards.open_corpus(source.path)
    yield Entry(key="negatives", source=f"negatives:{corpus.digest}")


def list_entries(spec: CorpusSpec, out: Path | None = None) -> tuple[list[Entry], int]:
    """All candidates of a spec's sources of files, and the number of skipped files; errors as `iter_entries`."""
    skipped = SkippedFiles()
    entries = [entry for source in spec.sources if source.kind in KINDS for entry in iter_entries(source, out, skipped)]
    if not entries and all(source.kind in KINDS for source in spec.sources):
        raise nothing_to_curate(spec)
    return entries, skipped.count


def identities(spec: CorpusSpec) -> Iterator[list[Any]]:
    """Facts that change when the candidates of a spec change, for any kind of source; errors as `check_sources`."""
    check_sources(spec)
    for source in spec.sources:
        if source.kind in KINDS:
            for entry in iter_entries(source, None, SkippedFiles(), is_sorted=True):
                # shipped pictures have the modification time of their check-out
                mtime_ns = entry.mtime_ns if source.kind == "folder" else 0
                facts = [entry.key, entry.source, entry.size, mtime_ns, entry.version, entry.refused]
                texts = (entry.caption, entry.caption_version if entry.version else "")
                yield [*facts, *filter(None, texts)]
        else:
            files = stores.list_files(source.path, source.storage, is_sorted=True)
            yield from ([name, size, version] for _, name, size, version in files)


def check_sources(spec: CorpusSpec, out: Path | None = None) -> None:
    """Check that every source exists and that there is a candidate, before anything is written.

    Raises:
        UsageError: as `iter_entries`; or all sources together hold no candidate; or no shipped picture has a name that
            the spec holds out. Sources of any size are checked for such names when they are listed.
    """
    if spec.split.held_out and all(source.kind in SHIPPED_KINDS for source in spec.sources):
        keys = [entry.key for source in spec.sources for entry in iter_entries(source, out, SkippedFiles())]
        for name in spec.split.held_out:
            if shards.safe_key(name) not in keys:
                raise held_out_is_missing(spec, name, keys)
    has_candidates = False
    for number, source in enumerate(spec.sources):
        if stores.is_address(source.path) and source.kind != "negatives":
            stores.check_store(source.path, source.storage)
        if source.kind in KINDS:
            has_candidates = _has_entry(source, out) or has_candidates
        elif not source.path:
            raise UsageError(f"{spec.name}: source {number} ({source.kind}) needs a path: sources.{number}.path=...")
        else:
            has_candidates = _has_file(source) or has_candidates
    if not has_candidates:
        raise nothing_to_curate(spec)


def _has_entry(source: SourceSpec, out: Path | None) -> bool:
    def first(is_sorted: bool) -> Entry | None:
        return next(iter_entries(source, out, SkippedFiles(), is_sorted), None)

    return in_any_order(first) is not None


def _has_file(source: SourceSpec) -> bool:
    return (
        in_any_order(lambda is_sorted: next(stores.list_files(source.path, source.storage, is_sorted), None))
        is not None
    )


def held_out_is_missing(spec: CorpusSpec, name: str, keys: Collection[str]) -> UsageError:
    """The error for a picture that the spec holds out by name, and none of its sources has. `keys` are suggestions."""
    return UsageError(
        f'{spec.name}: no source has the held-out picture "{name}" (split.held_out names it).{near_miss(name, keys)}'
    )


def nothing_to_curate(spec: CorpusSpec) -> UsageError:
    """The error for a spec whose sources hold no candidate."""
    where = " and ".join(source.path or source.kind for source in spec.sources) or "no source"
    return UsageError(f"no picture to curate: {where} holds none.")


def _folder(folder: Path, source: SourceSpec, out: Path | None, skipped: SkippedFiles) -> Iterator[Entry]:
    """Candidates of a directory tree."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder." if folder.exists() else f"there is no folder {folder}.")
    if out is not None and out.resolve() == folder.resolve():
        raise UsageError(f"{folder} is both input and output; choose another output folder.")
    tables = FolderTables(folder, source)
    unreadable: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(n for n in folders if not is_system_name(n) and not is_output(Path(parent) / n, out))
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                place = printable_name((Path(parent) / name).relative_to(folder).as_posix())
                refused = ("linked_folder", "links to folders are not followed: name the folder as a source")
                yield Entry(key=shards.safe_key(place), source=f"{source.kind}:{place}", refused=refused)
        tables.enter(Path(parent), files)
        captions = _caption_files(files)
        used: set[str] = set()
        sidecars: list[Path] = []
        for name in sorted(files):
            path = Path(parent) / name
            if is_system_name(name) or path.suffix.lower() in SIDECARS or is_own_sheet(path):
                skipped.count += 1
                sidecars += [] if is_system_name(name) else [path]
                continue
            entry = _file_entry(path, path.relative_to(folder).as_posix(), source, tables.note_of(path))
            text_file = next((captions[form] for form in _caption_stems(name) if form in captions), "")
            used.add(text_file)
            yield _with_caption(entry, path.with_name(text_file)) if text_file else entry
        for path in sidecars:
            if path.name not in used:
                tables.leave(path)
    skipped.sentences += tables.close()
    for error in unreadable:
        place = printable_name(Path(error.filename).relative_to(folder).as_posix()) if error.filename else ""
        if place in ("", "."):
            raise UsageError(f"{folder} cannot be read: {error.strerror}.")
        refused = ("unreadable", f"folder cannot be listed: {error.strerror}")
        yield Entry(key=shards.safe_key(place), source=f"{source.kind}:{printable_name(place)}", refused=refused)


def _caption_files(files: Iterable[str]) -> dict[str, str]:
    """Name of the caption file by stem, for any case of its suffix: a.txt goes before a.TXT and a.caption.

    A stem is also a key in composed letters and without case, as the file systems of macOS and Windows compare names.
    """
    by_stem: dict[str, str] = {}
    names = [(stem, suffix, name) for name in files for stem, _, suffix in [name.rpartition(".")] if stem]
    for kind in CAPTION_SUFFIXES:
        for stem, suffix, name in sorted(names, key=lambda item: (item[1] != kind, item)):
            if suffix.lower() == kind:
                by_stem.setdefault(stem, name)
    for stem, name in list(by_stem.items()):
        by_stem.setdefault(_any_case(stem), name)
    return by_stem


def _caption_stems(name: str) -> Iterator[str]:
    """Stems of a picture's caption file, the first one before the others: "a" and "a.jpg" of a.jpg, as written and in
    any spelling."""
    stem = Path(name).stem
    for form in (stem, name):
        yield from (form, _any_case(form))


def _any_case(name: str) -> str:
    """A name without its case, in composed letters; the mark keeps it apart from names as written."""
    return "/" + unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _with_caption(entry: Entry, text_file: Path) -> Entry:
    """The entry with its caption file, whose version is its size and time; a broken link has none."""
    try:
        status = text_file.stat()
    except OSError:
        return replace(entry, caption_path=str(text_file))
    return replace(entry, caption_path=str(text_file), caption_version=f"{status.st_size}|{status.st_mtime_ns}")


def _stored(source: SourceSpec, skipped: SkippedFiles, is_sorted: bool) -> Iterator[Entry]:
    """Candidates below an address of a store, or those that match a pattern, with captions and tables beside them."""
    folder = StoredFolder(source, is_sorted)
    for name, stored, note, caption in folder.pictures():
        suffix = suffix_of(name)
        refused = note.problem
        if suffix and not _is_picture(suffix[1:]):
            refused = ("not_image", f"the suffix {suffix} is not of a picture format that we read")
        yield Entry(
            key=shards.safe_key(name[: len(name) - len(suffix)] if _is_picture(suffix[1:]) else name),
            source=f"{source.kind}:{name}",
            path=stores.address_in(folder.root, stored.path),
            size=stored.size,
            version=stored.version,
            licence=note.licence,
            credit=note.credit,
            caption=note.caption,
            caption_path=stores.address_in(folder.root, caption.path) if caption else "",
            caption_version=f"{caption.size}|{caption.version}" if caption else "",
            refused=refused,
        )
    skipped.count += folder.skipped
    skipped.sentences += folder.sentences


def _file_entry(path: Path, relative: str, source: SourceSpec, note: Note) -> Entry:
    suffix = path.suffix[1:].lower()
    name = printable_name(relative)
    entry = Entry(
        key=shards.safe_key(name[: len(name) - len(suffix) - 1] if _is_picture(suffix) else name),
        source=f"{source.kind}:{name}",
        path=str(path),
        licence=note.licence,
        credit=note.credit,
        caption=note.caption,
    )
    try:
        status = path.stat()
    except OSError as error:
        return replace(entry, refused=("unreadable", f"cannot be read: {error.strerror}"))
    if not stat.S_ISREG(status.st_mode):
        return replace(entry, refused=("not_image", "neither a file nor a link to one"))
    if suffix and not _is_picture(suffix):  # the content decides about a name without a suffix
        return replace(entry, refused=("not_image", f"the suffix .{suffix} is not of a picture format that we read"))
    return replace(entry, size=status.st_size, mtime_ns=status.st_mtime_ns, refused=note.problem)


def _is_picture(suffix: str) -> bool:
    """Whether a suffix, in lower case and without its dot, is one of a picture."""
    return suffix in shards.PICTURE_EXTENSIONS


def entry_again(entry: Entry, source: SourceSpec) -> Entry | None:
    """The entry of a listed local file in its present state; None for an entry that is not a local file."""
    if not entry.path or stores.is_address(entry.path):
        return None
    if entry.refused and entry.refused[0] in TABLE_CODES:
        return entry
    relative = entry.source.removeprefix(f"{source.kind}:")
    note = Note(caption=entry.caption, licence=entry.licence, credit=entry.credit)
    present = _file_entry(Path(entry.path), relative, source, note)
    text_file = entry.caption_path
    return replace(_with_caption(present, Path(text_file)) if text_file else present, key=entry.key)


def _skimage(source: SourceSpec) -> Iterator[Entry]:
    package = importlib.util.find_spec("skimage")  # not imported: that takes a second
    if package is None or not package.submodule_search_locations:
        raise Failure("scikit-image is not installed: install the project's requirements.")
    folder = Path(package.submodule_search_locations[0]) / "data"
    for name in source.names or sorted(SKIMAGE_CREDITS):
        if name not in SKIMAGE_CREDITS:
            raise unknown("cleared picture of scikit-image", name, SKIMAGE_CREDITS)
        licence, credit = SKIMAGE_CREDITS[name]
        yield _file_entry(folder / name, name, source, Note(licence=licence, credit=credit))


def _demo_corpus(source: SourceSpec, out: Path | None, skipped: SkippedFiles) -> Iterator[Entry]:
    """The shipped pictures, or those that the source names."""
    folder = package_folder() / "demo_corpus"
    for name in source.names:
        if not (folder / name).is_file():
            raise unknown("shipped picture", name, [path.name for path in folder.glob("*.jpg")])
    for entry in _folder(folder, source, out, skipped):
        if not source.names or Path(entry.path).name in source.names:
            yield entry


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


def for_folder(spec: CorpusSpec, folder: Where) -> CorpusSpec:
    """The spec with one folder, here or in a store, in place of its sources."""
    path = os.path.abspath(folder) if isinstance(folder, Path) else str(folder)
    fraction = spec.split.held_out_fraction or DEFAULT_HELD_OUT_FRACTION
    return replace(
        spec,
        name=printable_name(Path(path).name) or spec.name,  # ".." has a name too
        licence="as their owner says",
        sources=[SourceSpec(kind="folder", path=path)],
        pairs=[],  # the spec's pairs belong to other pictures
        split=SplitSpec(held_out_fraction=fraction),
    )
