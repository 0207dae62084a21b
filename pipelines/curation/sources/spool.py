"""Bytes of measured pictures from a store, kept below work/.spool until the shards are written.

Selection needs every picture's measures before the first shard is written, so a picture is needed twice. The spool
saves the second request. It is bounded: pictures for which it has no room are fetched again. Its name is hidden, so a
copy of the corpus in a store does not have it; a machine without it fetches again too.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

FREE_SHARE = 4
"""The spool takes at most one part in so many of the disk's free bytes, with what it holds; ours."""


class HasPlace(Protocol):
    """What has a place of bytes, as a Candidate has."""

    at: str


class Spool:
    """Writes the bytes of one attempt at a part. Bytes are written before the row that names them.

    Args:
        limit_gib: size of all spools together; the room is taken when the first picture is written.
    """

    def __init__(self, out: Path, name: str, limit_gib: float) -> None:
        self.folder, self.name, self.limit_gib = out / "work" / ".spool", name, limit_gib
        self.target: BinaryIO | None = None
        self.room = -1

    def keeper(self, candidate: HasPlace) -> Callable[[bytes], None]:
        """Returns `keep` of a candidate: it writes the bytes if there is room, and adds their place to `at`."""

        def keep(data: bytes) -> None:
            if self.room < 0:
                self.room = self._room()
            if len(data) > self.room:
                return
            try:
                target = self.target = self.target or new_file(self.folder, self.name)
                offset = target.tell()
                target.write(data)
                target.flush()
            except OSError:  # a full disk: the shards may still find room
                self.room = 0
                return
            self.room -= len(data)
            place = [Path(target.name).name, offset, len(data)]
            candidate.at = json.dumps({**json.loads(candidate.at), "spool": place})

        return keep

    def _room(self) -> int:
        held = 0
        with suppress(FileNotFoundError):
            held = sum(entry.stat().st_size for entry in os.scandir(self.folder))
        out = self.folder.parent.parent
        limit = min(int(self.limit_gib * 2**30), (shutil.disk_usage(out).free + held) // FREE_SHARE)
        return max(0, limit - held)

    def close(self) -> None:
        """Close the file."""
        if self.target is not None:
            self.target.close()


def new_file(folder: Path, name: str) -> BinaryIO:
    """Open a file that no other task has, for writing: "<name>-<number>.bin"."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        with suppress(FileExistsError):  # file of an earlier run, or of an attempt that died
            return open(folder / f"{name}-{number}.bin", "xb")
    raise AssertionError


def spooled(out: Path, place: Sequence[Any]) -> bytes | None:
    """The bytes at a place of the spool; None if this machine does not have them."""
    name, offset, size = place
    try:
        with open(out / "work" / ".spool" / name, "rb") as source:
            source.seek(offset)
            data = source.read(size)
    except OSError:
        return None
    return data if len(data) == size else None


def without_spool(at: str) -> dict[str, Any]:
    """A place of bytes as it is without the spool."""
    place: dict[str, Any] = json.loads(at) if at else {}
    place.pop("spool", None)
    return place


def remove_spool(out: Path) -> None:
    """Remove all kept bytes."""
    shutil.rmtree(out / "work" / ".spool", ignore_errors=True)
