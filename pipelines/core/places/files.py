"""Reading and writing where a path or a place may stand. A path is used as ever, at the cost of one type check."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from components.writing import replace_file
from pipelines.core.places.backends import Stat
from pipelines.core.places.place import Place, Where


def read(where: Where, start: int = 0, size: int = -1) -> bytes:
    """The bytes of a file or object, or `size` of them from `start` on; fewer at its end. OSError as of open."""
    if isinstance(where, Place) or (start == 0 and size < 0):
        return where.read_bytes(start, size) if isinstance(where, Place) else where.read_bytes()
    with open(where, "rb") as source:
        source.seek(start)
        rest = max(0, os.fstat(source.fileno()).st_size - start)
        return source.read(rest if size < 0 else min(size, rest))  # read(n) allocates n bytes at once


def put(where: Where, data: bytes) -> None:
    """Write a file or object atomically: a reader sees the old bytes or the new ones."""
    if isinstance(where, Place):
        where.write_bytes(data)
    else:
        replace_file(where, data)


def create(where: Where, data: bytes) -> bool:
    """Write a file or object that must not exist, atomically; False if it exists with other bytes."""
    if isinstance(where, Place):
        return where.create(data)
    temporary = where.with_name(f".{where.name}.tmp-{uuid.uuid4().hex}")
    temporary.write_bytes(data)
    try:
        os.link(temporary, where)  # fails if the name exists, also on shared file systems, and shows whole files only
    except FileExistsError:
        return where.read_bytes() == data
    finally:
        temporary.unlink()
    return True


def upload(where: Where, file: Path) -> None:
    """Copy a local file of any size to a path or place, atomically."""
    if isinstance(where, Place):
        where.upload(file)
    else:
        replace_file(where, file.read_bytes())


def stat(where: Where) -> Stat:
    """Size, version and time of the last write; FileNotFoundError without such a file."""
    if isinstance(where, Place):
        return where.stat()
    status = where.stat()
    return Stat(str(where), status.st_size, str(status.st_mtime_ns), status.st_mtime)


def list_files(folder: Where) -> Iterator[tuple[str, Stat]]:
    """(name below the folder, details) of every file, also in sub-folders; nothing if the folder does not exist."""
    if isinstance(folder, Place):
        yield from folder.files()
        return
    for here, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(here) / name
            try:
                yield path.relative_to(folder).as_posix(), stat(path)
            except FileNotFoundError:  # removed meanwhile
                continue


def remove(where: Where) -> None:
    """Delete a file or object; one that does not exist is no error."""
    where.unlink(missing_ok=True)


def sha256_of(where: Where) -> str:
    """Digest of a file's or an object's bytes."""
    if isinstance(where, Place):
        return where.sha256()
    with open(where, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
