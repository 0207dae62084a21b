"""Objects of stores on this machine's disk: one cache for all its processes, with a cap in bytes, least used first out.

    <folder>/<sha256>            an object; its modification time is that of its last use
    <folder>/<sha256>.lock       held by the process that fetches it

The name of a file is its digest, which is checked before the file gets that name. So a fetch that is killed leaves a
draft and no wrong file, and two corpora with an equal shard share it. A file that is removed while a process reads it
stays readable for that process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from components.writing import LEFTOVERS
from pipelines.core.errors import Failure
from pipelines.core.home import cache_folder
from pipelines.core.places.files import sha256_of
from pipelines.core.places.place import Place

SHARE = 0.5
"""Part of the disk's free bytes that a cache without a cap takes at most, with what it holds already. Ours."""

DRAFT_S = 3600.0
"""Age of a draft that no fetch can still be writing. Ours."""


class NodeCache:
    """The cache in a folder.

    Args:
        folder: None takes RESTORAY_HOME/cache/shards.
        max_bytes: cap; 0 takes SHARE of the disk.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = 0) -> None:
        self.folder = folder or cache_folder() / "shards"
        self.max_bytes = max_bytes

    def path_of(self, place: Place, sha256: str, size: int) -> Path:
        """The file with an object's bytes; fetched if it is not there.

        Raises:
            Failure: the object has other bytes, or is larger than the cap.
            OSError, StoreUnavailable: as of a place.
        """
        path = self.folder / sha256
        with suppress(FileNotFoundError):
            os.utime(path)
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(f"{sha256}.lock"):
            if path.is_file():  # another process fetched it meanwhile
                os.utime(path)
                return path
            self._make_room(size)
            draft = self.folder / f".{sha256}.tmp-{os.getpid()}"
            try:
                place.download(draft)
                if sha256_of(draft) != sha256:
                    raise Failure(f"{place} does not have the sha256 {sha256[:8]}... that its index names.")
                os.replace(draft, path)
            finally:
                draft.unlink(missing_ok=True)
        return path

    def cap(self) -> int:
        """Most bytes that the cache may hold."""
        return self.max_bytes or int(SHARE * (shutil.disk_usage(self.folder).free + self.size()))

    def size(self) -> int:
        """Bytes of the objects in the cache."""
        return sum(size for _, size, _ in self._entries())

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of each object, the least used first."""
        entries = []
        with os.scandir(self.folder) as files:
            for file in files:
                if file.name.startswith(".") or file.name.endswith(".lock"):
                    continue
                with suppress(FileNotFoundError):
                    entries.append((file.stat().st_mtime, file.stat().st_size, Path(file.path)))
        return sorted(entries)

    def _make_room(self, size: int) -> None:
        """Remove the least used objects until `size` bytes fit, and the drafts of killed fetches."""
        with self._lock("room.lock"):
            cap = self.cap()
            if size > cap:
                raise Failure(f"an object of {size} bytes does not fit into {self.folder}, whose cap is {cap} bytes.")
            for draft in self.folder.glob(LEFTOVERS):
                with suppress(FileNotFoundError):
                    if time.time() - draft.stat().st_mtime > DRAFT_S:
                        draft.unlink()
            entries = self._entries()
            total = sum(count for _, count, _ in entries)
            for _, count, path in entries:
                if total + size <= cap:
                    return
                path.unlink(missing_ok=True)
                (self.folder / f"{path.name}.lock").unlink(missing_ok=True)
                total -= count

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
