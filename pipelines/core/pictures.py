"""The pictures of a folder, by key.

`list_pictures` is for inputs of a job: it makes keys that are valid file names. `pictures_by_key` is for folders whose
pictures are compared by name: a key is the path without its suffix.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from components.restoring import file_key
from pipelines.core.errors import UsageError

SIDECARS = frozenset(
    {".caption", ".csv", ".html", ".json", ".jsonl", ".md", ".parquet", ".tsv", ".txt", ".xmp", ".yaml", ".yml"}
)
"""Suffixes of files that accompany pictures; such files are counted and never quarantined."""

SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r")
SYSTEM_FOLDERS = ("__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "lost+found")
SYSTEM_HIDDEN = (".ds_store", ".apdisk", ".trashes", ".fseventsd", ".spotlight-v100", "system volume information")
SYSTEM_NAMES = frozenset((*SYSTEM_FILES, *SYSTEM_FOLDERS, *SYSTEM_HIDDEN))
"""Names, in lower case, of what operating systems, disk stations and picture browsers put beside pictures."""

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

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")


def is_system_name(name: str) -> bool:
    """Whether a file or a folder of this name is hidden, or is no user's: Thumbs.db, "._a.jpg", "__MACOSX"."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def list_pictures(src: Path, out: Path | None = None) -> tuple[dict[str, Path], int]:
    """Return pictures by key, in the order of their names, and the number of other files.

    The key is the relative path without its suffix, with "__" for "/". If two files would share a key, also on file
    systems that ignore case, each keeps its suffix. Hidden files, those of the system, and sidecars do not count as
    pictures. Files below `out`, and below folders inside `src` that an earlier run wrote, are left out.

    Raises:
        UsageError: `src` does not exist, holds no picture, or is `out` itself.
    """
    if not src.exists():
        raise UsageError(f"{src} does not exist")
    if src.is_file():
        return {file_key(src.stem): src.absolute()}, 0
    if out is not None and out.resolve() == src.resolve():
        raise UsageError(f"{src} is both input and output; choose another output folder")
    paths: list[Path] = []
    other_files = 0
    for here, folders, names in os.walk(src):
        folders[:] = sorted(f for f in folders if not is_system_name(f) and not is_output(Path(here) / f, out))
        for name in sorted(names):
            path = Path(here) / name
            if is_system_name(name) or path.suffix.lower() in SIDECARS or not path.is_file():
                other_files += 1
            else:
                paths.append(path)
    if not paths:
        raise UsageError(f"{src} holds no pictures")
    names_of = {path: "__".join(path.relative_to(src).parts) for path in paths}
    short = {path: file_key(name[: len(name) - len(path.suffix)]) for path, name in names_of.items()}
    uses: dict[str, int] = {}
    for key in short.values():
        uses[key.casefold()] = uses.get(key.casefold(), 0) + 1
    keys: dict[str, Path] = {}
    for path, key in short.items():
        if uses[key.casefold()] > 1:
            key = file_key(names_of[path])
        if key in keys:  # a.jpg and A.JPG without case, or names that differ only in letters that file_key replaces
            key = file_key(f"{key}-{hashlib.sha256(os.fsencode(path.relative_to(src))).hexdigest()[:8]}")
        keys[key] = path.absolute()
    return keys, other_files


def pictures_by_key(folder: Path, missing: list[dict[str, str]]) -> dict[str, Path]:
    """Pictures below `folder` by key. Two files with one key are both left out, and reported in `missing`.

    Raises:
        UsageError: the folder does not exist.
    """
    if not folder.is_dir():
        raise UsageError(f"no folder {str(folder)!r}")
    paths: dict[str, Path] = {}
    duplicates: set[str] = set()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_hidden = any(map(is_system_name, relative.parts))
        if is_hidden or path.suffix.lower() not in PICTURE_SUFFIXES or not path.is_file():
            continue
        key = relative.with_suffix("").as_posix()
        if key in paths:
            duplicates.add(key)
            reason = f"two files have this key: {paths[key].name} and {path.name}"
            missing.append({"key": key, "where": folder.name, "reason": reason})
        paths[key] = path
    return {key: path for key, path in paths.items() if key not in duplicates}


def is_output(folder: Path, out: Path | None) -> bool:
    """Whether a folder is `out`, or an earlier run wrote it."""
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
