"""Files of rows: one JSON object a line, appended to while a job runs and replaced as a whole when it is tidied up.

Nothing here waits for the disk unless asked to: most rows name their files' sha256, and a resumed job checks them, so
what a power cut tears is made again. Waiting costs up to a second a file on a busy disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of the file; a last line that was cut off by a kill is dropped, a missing file has none."""
    return parse_lines(path.read_bytes()) if path.exists() else []


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """Rows of a file's bytes; what is no JSON object is left out."""
    rows = []
    for line in data.split(b"\n"):  # not splitlines: JSON text may hold other line separators
        try:
            row = json.loads(line)
        except ValueError:  # a line that a kill or a crash of the machine left damaged is as good as absent
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def iter_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file of any size, one at a time; a missing file has none."""
    if not path.exists():
        return
    with open(path, "rb") as source:
        for line in source:
            yield from parse_lines(line)


def end_torn_line(path: Path) -> None:
    """Before the first append: end a last line that a kill cut off, so that the next row is not glued to it."""
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file at once."""
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def replace_file(path: Path, data: bytes, sync: bool = False) -> None:
    """Write a file that readers and killed writers see old or whole; with `sync` a power cut does so too."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as target:
            target.write(data)
            if sync:
                target.flush()
                os.fsync(target.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
