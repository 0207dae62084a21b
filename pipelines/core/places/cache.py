"""Objects of stores on this machine's disk: one cache for all its processes, with a cap in bytes, least used first out.

    <folder>/<sha256>            an object; its modification time is that of its last use
    <folder>/<sha256>.lock       held by the process that fetches it
    <folder>/.<sha256>.tmp-<pid> the draft of a fetch, with the object's size from its first moment
    <folder>/slot-<n>.lock       held by a fetch ahead of its use, of which the machine makes a limited number at a time
    <folder>/room                bytes in use, drafts included; a file that is missing or wrong is counted anew

The name of a file is its digest, which is checked before the file gets that name. So a fetch that is killed leaves a
draft and no wrong file, and two corpora with an equal shard share it. The kernel drops a dead process' locks: the next
fetch of the same object begins at once, and the draft goes when room is needed. A file that is removed while a process
reads it stays readable for that process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from components.writing import LEFTOVERS
from pipelines.core.errors import Failure
from pipelines.core.home import cache_folder
from pipelines.core.places.files import sha256_of
from pipelines.core.places.place import Place

SHARE = 0.5
"""Part of the disk's free bytes that a cache without a cap takes at most, with what it holds already. Ours."""

POLL_S = 0.05  # pause between two looks at room or a slot that other processes hold
EXTRA = 20  # when room is made, one object in so many goes besides, so that not every fetch lists the folder


class NodeCache:
    """The cache in a folder.

    Args:
        folder: None takes RESTORAY_HOME/cache/shards.
        max_bytes: cap; 0 takes SHARE of the disk.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = 0) -> None:
        self.folder = folder or cache_folder() / "shards"
        self.max_bytes = max_bytes

    def get(self, sha256: str) -> Path | None:
        """The file with an object's bytes, if the cache has it; it counts as used now."""
        path = self.folder / sha256
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def path_of(self, place: Place, sha256: str, size: int) -> Path:
        """The file with an object's bytes; fetched if it is not there. A rival's fetch of it is waited for.

        Raises:
            Failure: the object has other bytes, or is larger than the cap.
            OSError, StoreUnavailable: as of a place.
        """
        path = self.get(sha256)
        if path is not None:
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(f"{sha256}.lock"):
            path = self.get(sha256)  # another process may have fetched it meanwhile
            return path or self._fetch(place, sha256, size)

    def fetch_ahead(self, place: Place, sha256: str, size: int, slots: int, stopped: threading.Event) -> Path | None:
        """As path_of, in one of the machine's `slots` for fetches ahead; None if `stopped` was set before it began.

        A fetch that somebody waits for (path_of) takes no slot: it would stand behind fetches for later.
        """
        path = self.get(sha256)
        if path is not None:
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        while not stopped.is_set():
            for number in range(slots):
                lock = self._try_lock(f"slot-{number}.lock")
                if lock is not None:
                    with lock:
                        if stopped.is_set():
                            return None
                        fetching = self._try_lock(f"{sha256}.lock")
                        if fetching is not None:
                            with fetching:
                                return self.get(sha256) or self._fetch(place, sha256, size)
                    break  # a rival fetches it: no need of a slot
            stopped.wait(POLL_S)
            path = self.get(sha256)
            if path is not None:
                return path
        return None

    def cap(self) -> int:
        """Most bytes that the cache may hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.max_bytes or int(SHARE * (shutil.disk_usage(self.folder).free + self._used()))

    def size(self) -> int:
        """Bytes of the objects in the cache."""
        return sum(size for _, size, _ in self._entries())

    def _fetch(self, place: Place, sha256: str, size: int) -> Path:
        path, draft = self.folder / sha256, self.folder / f".{sha256}.tmp-{os.getpid()}"
        for old in self.folder.glob(f".{sha256}.tmp-*"):  # of a killed fetch: its lock is ours now
            old.unlink(missing_ok=True)
        self._reserve(draft, size)
        try:
            place.fill(draft, size)
            if sha256_of(draft) != sha256:
                raise Failure(f"{place} does not have the sha256 {sha256[:8]}... that its index names.")
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            with self._lock("room.lock"):
                self._write_used(max(0, self._used() - size))
            raise
        return path

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, path) of each object, the least used first."""
        entries = []
        with os.scandir(self.folder) as files:
            for file in files:
                if len(file.name) != 64:
                    continue
                with suppress(FileNotFoundError):
                    entries.append((file.stat().st_mtime, file.stat().st_size, Path(file.path)))
        return sorted(entries)

    def _reserve(self, draft: Path, size: int) -> None:
        """Make a draft of `size` bytes: the least used objects go until it fits, and drafts of killed fetches.

        Fetches in work may fill the cap: then it waits for them.
        """
        while True:
            with self._lock("room.lock"):
                cap = self.cap()
                if size > cap:
                    raise Failure(
                        f"an object of {size} bytes does not fit into {self.folder}, whose cap is {cap} bytes."
                    )
                used = self._used()
                if used + size > cap:
                    used = self._make_room(cap - size)
                if used + size <= cap:
                    with draft.open("wb") as file:
                        file.truncate(size)
                    self._write_used(used + size)
                    return
            time.sleep(POLL_S)

    def _make_room(self, most: int) -> int:
        """Remove the least used objects until at most `most` bytes are left, if that is possible; returns the rest."""
        drafts = 0
        for draft in self.folder.glob(LEFTOVERS):
            lock = self._try_lock(f"{draft.name[1:65]}.lock")
            with suppress(FileNotFoundError):
                if lock is None:
                    drafts += draft.stat().st_size
                else:  # nobody fetches it
                    draft.unlink()
                    lock.close()
        entries = self._entries()
        used, extra = drafts + sum(size for _, size, _ in entries), len(entries) // EXTRA
        for _, size, path in entries:
            if used <= most:
                extra -= 1
                if extra < 0:
                    break
            path.unlink(missing_ok=True)
            lock = self._try_lock(f"{path.name}.lock")
            if lock is not None:
                (self.folder / f"{path.name}.lock").unlink(missing_ok=True)
                lock.close()
            used -= size
        self._write_used(used)
        return used

    def _used(self) -> int:
        """Bytes in use; counted if the file that holds the number is missing or torn."""
        try:
            return int((self.folder / "room").read_text())
        except (FileNotFoundError, ValueError):
            return self.size()

    def _write_used(self, used: int) -> None:
        (self.folder / "room").write_text(str(used))  # under room.lock

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        while True:
            with (self.folder / name).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_at(lock, self.folder / name):  # removed while we waited
                    continue
                yield
                return

    def _try_lock(self, name: str) -> BinaryIO | None:
        """The open file of a lock that was free, or None; closing it frees the lock."""
        lock = (self.folder / name).open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        if _is_at(lock, self.folder / name):
            return lock
        lock.close()
        return None


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
