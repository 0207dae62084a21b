"""Atomic file writes: a temporary name, then a rename. Standard library only.

The functions wait for the disk only with `sync`. A resumed job checks the recorded sha256 of most files and rewrites
files that a power cut has damaged. Waiting takes up to a second per file on a busy disk.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LEFTOVERS = ".*.tmp-*"
"""Glob of the temporary files of killed writers."""


@dataclass(kw_only=True)
class Draft:
    """A file during a write: the caller writes to `temporary`, which is renamed to `path` at the end."""

    temporary: Path
    path: Path


@contextmanager
def whole_file(path: Path, sync: bool = False) -> Iterator[Draft]:
    """Write a file atomically: readers see the old file or the complete new one. `sync` covers power cuts too.

    The caller writes to `draft.temporary`, and may change `draft.path` to another name in the same folder. An error
    leaves the old file unchanged.
    """
    draft = Draft(temporary=path.with_name(f".{path.name}.tmp-{os.getpid()}"), path=path)
    try:
        yield draft
        if sync:
            with open(draft.temporary, "rb") as stream:
                os.fsync(stream.fileno())
        os.replace(draft.temporary, draft.path)
    finally:
        draft.temporary.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def replace_file(path: Path, data: bytes, sync: bool = False) -> None:
    """Write bytes atomically; see `whole_file`."""
    with whole_file(path, sync) as draft:
        draft.temporary.write_bytes(data)


def write_error_reason(error: OSError) -> str:
    """Return the reason of a failed write in a few words, for an error's sentence."""
    return "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
