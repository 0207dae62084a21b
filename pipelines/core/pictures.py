"""The pictures of a folder, by key. All verbs that read a folder of pictures list it here, so they agree on both.

The key of a picture is its path below the folder without the suffix ("sub/b"), made a valid file name in each part.
A job writes the result of a picture as KEY.png, so the folder of the results has the same keys as that of the sources.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

from components.images import Limits
from components.restoring import file_key, picture_key
from components.types import SampleError
from pipelines.core.errors import UsageError
from pipelines.core.places.place import Place, Where

SIDECARS = frozenset(
    {
        *(".caption", ".csv", ".html", ".json", ".jsonl", ".md", ".parquet", ".tsv", ".txt", ".xmp", ".yaml", ".yml"),
        *(".aae", ".cos", ".dop", ".pp3"),  # edits of a photograph, as phones and raw developers save them
        *(".md5", ".sfv", ".sha1", ".sha256", ".sha512"),
        *(".npz", ".xml"),  # latents that other trainers store, and boxes
    }
)
"""Suffixes of files that accompany pictures; such files are counted and never quarantined."""

PICTURE_SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp", ""}
)
"""Of two files with one stem, one with such a suffix keeps the short key: a.jpg is not renamed by a.nef or a.mov."""

SYSTEM_FILES = (
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "thumbscache.db", "desktop.ini", "picasa.ini", "icon\r"),
    *("zbthumbnail.info", "pspbrwse.jbf", "albumartsmall.jpg"),
)
SYSTEM_FOLDERS = (
    *("__macosx", "network trash folder", "temporary items", "@eadir", "@recycle", "#recycle", "#snapshot"),
    *("$recycle.bin", "recycler", "recycled", "lost+found"),
)
SYSTEM_HIDDEN = (".ds_store", ".apdisk", ".trashes", ".fseventsd", ".spotlight-v100", "system volume information")
SYSTEM_NAMES = frozenset((*SYSTEM_FILES, *SYSTEM_FOLDERS, *SYSTEM_HIDDEN))
"""Names, in lower case, of what operating systems, disk stations and picture browsers put beside pictures."""

SYSTEM_STREAMS = (":zone.identifier", ":encryptable", ":com.dropbox.attrs", ":com.dropbox.attributes")
"""Ends of names, in lower case: streams of NTFS that became files of their own on another file system."""

OWN_MARKS = {
    "plan.json": ("plan", "stages"),
    "done.json": ("digest", "outputs"),
    "index.json": ("digest", "splits"),
    "records.jsonl": ("output_sha256", "source_sha256"),
    "study.json": ("study", "settings"),
}
"""Files, with fields of them or of their first row, that mark a folder of ours, whose pictures are outputs.

They mark the folder of a run, a stage, a corpus, a restoration or a study, in this order.
"""

MARK_BYTES = 64 << 20
"""Bytes of a mark in a store that are fetched at most."""

SHEET = "contact.jpg"
"""Overview that a job writes next to its results."""

OWN_FILES = frozenset({SHEET, "records.jsonl", "quarantine.jsonl"})
"""Files of a job next to its results: no folder of results may have these names."""


def is_system_name(name: str) -> bool:
    """Whether a file or a folder of this name is hidden, or is no user's: Thumbs.db, "._a.jpg", "__MACOSX"."""
    name = name.lower()
    return name.startswith((".", "~$", "albumart_{")) or name in SYSTEM_NAMES or name.endswith(SYSTEM_STREAMS)


@overload
def list_pictures(src: Path, out: Where | None = None) -> tuple[dict[str, Path], int]: ...


@overload
def list_pictures(src: Where, out: Where | None = None) -> tuple[dict[str, Where], int]: ...


def list_pictures(src: Where, out: Where | None = None) -> tuple[dict[str, Path], int] | tuple[dict[str, Where], int]:
    """Return pictures by key, in the order of their names, and the number of other files.

    Hidden files, those of the system, sidecars and our own sheets do not count as pictures. Files below `out`, and
    below folders inside `src` that an earlier run wrote, are left out. Links to files are followed. Links to folders
    and links that lead nowhere have a key too, and so have folders that cannot be listed: `read_picture` refuses them.

    Raises:
        UsageError: `src` does not exist, holds no picture, or is `out` itself.
    """
    if isinstance(src, Place):
        return _list_stored(src, out)
    out = None if isinstance(out, Place) else out
    if not src.exists():
        raise UsageError(f"{src} does not exist")
    if src.is_file():
        return {file_key(src.stem): src.absolute()}, 0
    if out is not None and out.resolve() == src.resolve():
        raise UsageError(f"{src} is both input and output; choose another output folder")
    paths, other_files = _walk(src, out)
    if not any(map(os.path.isfile, paths)):
        raise UsageError(f"{src} holds no pictures{_first_refusal(src, paths)}")
    keys = make_keys([path.relative_to(src).as_posix() for path in paths])
    return {key: path.absolute() for key, path in zip(keys, paths, strict=True)}, other_files


def list_names(src: Where, out: Where | None = None, sidecars: frozenset[str] = SIDECARS) -> tuple[list[str], int]:
    """Return the paths below a folder that `list_pictures` gives keys, sorted, and the number of other files.

    Args:
        src: an existing folder.
        out: left out, as in `list_pictures`.
        sidecars: suffixes of files that are no pictures.

    Raises:
        UsageError: `src` cannot be read, or is `out` itself.
    """
    if isinstance(src, Place):
        return _stored_names(src, [name for name, _ in src.files()], out, sidecars)
    out = None if isinstance(out, Place) else out
    if out is not None and out.resolve() == src.resolve():
        raise UsageError(f"{src} is both input and output; choose another output folder")
    paths, other_files = _walk(src, out, sidecars)
    return [path.relative_to(src).as_posix() for path in paths], other_files


def _list_stored(src: Place, out: Where | None) -> tuple[dict[str, Where], int]:
    """`list_pictures` of a store: one listing, in pages."""
    src.check()
    names = {name: src / name for name, _ in src.files()}
    if not names:
        if src.is_file():
            return {file_key(src.stem): src}, 0
        raise UsageError(f"{src} does not exist")
    pictures, other_files = _stored_names(src, names, out, SIDECARS)
    if not pictures:
        raise UsageError(f"{src} holds no pictures")
    return {key: names[name] for key, name in zip(make_keys(pictures), pictures, strict=True)}, other_files


def _stored_names(
    src: Place, names: Iterable[str], out: Where | None, sidecars: frozenset[str]
) -> tuple[list[str], int]:
    """The names of a store's listing that may be pictures, sorted, and the number of the others."""
    if out == src:
        raise UsageError(f"{src} is both input and output; choose another output folder")
    names = sorted(names)
    folders = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] in OWN_MARKS}
    marks = {folder: mark for folder in folders if (mark := own_mark(src / folder if folder else src)) is not None}
    outputs = [f"{folder}/" for folder in marks if folder]
    if isinstance(out, Place) and str(out).startswith(f"{src}/"):
        outputs.append(f"{out.relative_to(src)}/")
    pictures, other_files = [], 0
    for name in names:
        folder, _, last = name.rpartition("/")
        if name.startswith(tuple(outputs)) or any(map(is_system_name, folder.split("/"))):
            continue
        own_sheet = last == SHEET and marks.get(folder) == "records.jsonl"
        if is_system_name(last) or os.path.splitext(last)[1].lower() in sidecars or own_sheet:
            other_files += 1
        else:
            pictures.append(name)
    return pictures, other_files


def pictures_by_key(folder: Path, missing: list[dict[str, str]]) -> dict[str, Path]:
    """Pictures below `folder` by key, as in `list_pictures`; {} if there is none. What cannot be listed is `missing`.

    Raises:
        UsageError: the folder does not exist.
    """
    if not folder.is_dir():
        hint = ", which is a file: name the folder that holds it" if folder.is_file() else ""
        raise UsageError(f"no folder {str(folder)!r}{hint}")
    paths, _ = _walk(folder, None)
    keys = make_keys([path.relative_to(folder).as_posix() for path in paths])
    pictures = dict(zip(keys, paths, strict=True))
    for key in [key for key, path in pictures.items() if not os.path.isfile(path)]:
        try:
            read_picture(pictures.pop(key), key)
        except SampleError as error:
            missing.append({"key": key, "where": folder.name, "reason": f"[{error.code}] {error.detail}"})
    return pictures


def read_picture(path: Where, key: str, limits: Limits | None = None) -> bytes:
    """Return the bytes of a picture's file.

    Args:
        limits: a larger file is refused before it is read.

    Raises:
        SampleError: linked_folder: a link to a folder; unreadable: a link that leads nowhere, a file or a folder that
            cannot be read; not_image: a device or a pipe; too_large.
    """
    try:
        if isinstance(path, Place):
            return _read_stored(path, limits)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode) and path.is_symlink():
            raise SampleError("linked_folder", "links to folders are not followed: name the folder as a source", key)
        if stat.S_ISDIR(status.st_mode):
            raise SampleError("unreadable", "the folder cannot be listed", key)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe might never end
            raise SampleError("not_image", "neither a file nor a link to one", key)
        if limits is not None:
            limits.check_bytes(status.st_size)
        return path.read_bytes()
    except SampleError as error:
        raise SampleError(error.code, error.detail, key) from error
    except OSError as error:
        is_broken = isinstance(error, FileNotFoundError) or error.errno == errno.ELOOP
        reason = "a link that leads nowhere" if is_broken and os.path.islink(str(path)) else error.strerror
        raise SampleError("unreadable", f"cannot be read: {reason or error}", key) from error


def _read_stored(place: Place, limits: Limits | None) -> bytes:
    """One request for a picture that keeps the limit, and none for the rest of a larger one."""
    if limits is None:
        return place.read_bytes()
    data = place.read_bytes(0, limits.max_bytes + 1)
    if len(data) > limits.max_bytes:
        limits.check_bytes(place.stat().size)
    return data


def make_keys(names: Sequence[str], earlier: Mapping[str, str] | None = None) -> list[str]:
    """Return the keys of paths below one folder ("sub/b.png"), which differ also where letters' case does not count.

    If two paths would share a key, each of them keeps its suffix, and if that does not suffice, gets a hash of its
    path; but a path with a suffix of a picture does so for another picture only. So a key depends on its own path and
    on the paths that collide with it, not on their order.

    Args:
        names: paths, each once.
        earlier: keys of an earlier job by path; a path keeps its key if it is one of its spellings, and the others give
            way. So a file that is added later renames no result.
    """
    spellings = [spellings_of(name) for name in names]
    kept = [
        spelling.index(key) if (key := (earlier or {}).get(name)) in spelling else None
        for name, spelling in zip(names, spellings, strict=True)
    ]
    others = [
        os.path.splitext(name)[1].lower() not in PICTURE_SUFFIXES and level is None
        for name, level in zip(names, kept, strict=True)
    ]
    levels = [level or 0 for level in kept]
    for _ in range(len(spellings[0]) if names else 0):
        keys = [spelling[level] for spelling, level in zip(spellings, levels, strict=True)]
        uses = Counter(map(_folded, keys))
        rivals = Counter(_folded(key) for key, other in zip(keys, others, strict=True) if not other)
        folders = {_folded(folder) for key in keys for folder in _parents(key)}
        for number, key in enumerate(keys):
            if kept[number] is not None:
                continue
            if (uses if others[number] else rivals)[_folded(key)] > 1 or _folded(f"{key}.png") in folders:
                levels[number] = min(levels[number] + 1, len(spellings[number]) - 1)
    return [spelling[level] for spelling, level in zip(spellings, levels, strict=True)]


def spellings_of(name: str) -> tuple[str, str, str]:
    """The keys that a path may have, from the shortest to the one that no other path has."""
    folder, slash, last = name.rpartition("/")
    prefix = "".join(f"_{part}/" if part.casefold() in OWN_FILES else f"{part}/" for part in folder.split("/") if slash)
    stem = last[: len(last) - len(Path(last).suffix)]
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    whole = picture_key(prefix + last)
    return picture_key(prefix + stem), whole, picture_key(f"{whole}-{digest}")


def _folded(key: str) -> str:
    return unicodedata.normalize("NFC", key.casefold())


def _parents(key: str) -> Iterator[str]:
    parts = key.split("/")[:-1]
    return ("/".join(parts[: count + 1]) for count in range(len(parts)))


def _walk(src: Path, out: Path | None, sidecars: frozenset[str] = SIDECARS) -> tuple[list[Path], int]:
    """Candidates below a folder in the order of their names, and the number of other files."""
    if own_mark(src) == "study.json":
        raise UsageError(f"{src} holds a study, and its pictures are plots; name a folder of pictures")
    paths: list[Path] = []
    unreadable: list[OSError] = []
    other_files = 0
    for here, folders, names in os.walk(src, onerror=unreadable.append):
        folders[:] = sorted(f for f in folders if not is_system_name(f) and not is_output(Path(here) / f, out))
        paths += [Path(here) / name for name in folders if os.path.islink(os.path.join(here, name))]
        for name in sorted(names):
            path = Path(here) / name
            if is_system_name(name) or path.suffix.lower() in sidecars or is_own_sheet(path):
                other_files += 1
            else:
                paths.append(path)
    for error in unreadable:
        if error.filename is None or Path(error.filename) == src:
            raise UsageError(f"{src} cannot be read: {error.strerror}")
        paths.append(Path(error.filename))
    return paths, other_files


def _first_refusal(src: Path, paths: Sequence[Path]) -> str:
    for path in paths:
        try:
            read_picture(path, "")
        except SampleError as error:
            return f"; {path.relative_to(src)}: {error.detail}"
    return ""


def is_own_sheet(path: Path) -> bool:
    """Whether a file is an overview that a job of ours wrote next to its results, and no picture of the folder."""
    return path.name == SHEET and own_mark(path.parent) == "records.jsonl"


def is_output(folder: Path, out: Path | None) -> bool:
    """Whether a folder is `out`, or an earlier run wrote it."""
    if out is not None and folder.resolve() == out.resolve():
        return True
    return own_mark(folder) is not None


def own_mark(folder: Where) -> str | None:
    """The name of the file in OWN_MARKS that marks a folder of ours; None for another folder."""
    for name, fields in OWN_MARKS.items():
        try:
            place = folder / name
            text = place.read_bytes(0, MARK_BYTES) if isinstance(place, Place) else place.read_bytes()
            document = json.loads(text.partition(b"\n")[0] if name.endswith(".jsonl") else text)
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(document, dict) and all(field in document for field in fields):
            return name
    return None
