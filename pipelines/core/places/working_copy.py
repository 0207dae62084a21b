"""A folder of this machine that stands for a folder in a store, for jobs that need files: append, map, rename, lock.

    with working_copy(place_of("s3://bucket/run")) as folder:    # takes the lease, fetches what is there
        ...                                                      # the job works in `folder`; changes go up meanwhile
                                                                 # the rest goes up, and the lease is released

A path is yielded as it is. The copy stays below RESTORAY_HOME/cache/working, so a job that continues on the same
machine fetches nothing. Every pass lists the copy first and sends the files of MARKERS last: a marker is written after
the files that it vouches for, so whoever sees the marker in the store sees those files as well. A store that is away
does not stop the job; at its end the last pass waits for the store, and then the job ends resumable.

The processes of the job must be on this machine. A cluster of several machines is refused.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.writing import replace_file
from pipelines.core.errors import RestorayError, UsageError
from pipelines.core.home import cache_folder
from pipelines.core.places.leases import Lease, lease
from pipelines.core.places.place import Place, Where

EVERY_S = 5.0
"""Pause between two passes; ours."""

MARKERS = frozenset({"index.json", "done.json", "plan.json", "model.json", "gate.json", "study.json", "summary.json"})
"""Files that vouch for the files beside and below them; in a store they come last."""

AT_THE_END = (".db", ".db-wal", ".db-shm", ".db-journal")
"""Ends of names of databases: a copy of one in use may be torn, so they go up when the job has ended."""

STATE = ".copy.json"

Fact = list[Any]
"""[bytes, modification time in ns, version in the store] of a file when it was equal to its object."""


@contextmanager
def working_copy(out: Where) -> Iterator[Path]:
    """A folder of this machine for the output of a job.

    Raises:
        RetryLater: another job has the folder in the store, or the store does not answer.
        UsageError: the bucket does not exist or refuses access; or Ray has several machines.
    """
    if isinstance(out, Path):
        yield out
        return
    out.check()
    check_one_machine(out)
    with lease(out) as held:
        copy = Copy(out, held)
        copy.fetch()
        sender = threading.Thread(target=copy.send_often, daemon=True, name="working-copy")
        sender.start()
        try:
            yield copy.folder
        finally:
            copy.stop.set()
            sender.join()
            copy.send(last=True)


def local_copy(where: Where) -> Path:
    """A folder of this machine with the files of a folder in a store, to read only; a path is returned as it is.

    Raises:
        UsageError: there is nothing at that place.
    """
    if isinstance(where, Path):
        return where
    where.check()
    copy = Copy(where, None)
    copy.fetch()
    if not copy.facts:
        raise UsageError(f"{where} does not exist.")
    return copy.folder


def check_one_machine(*places: Where | None) -> None:
    """Check that one machine does the work if one of the places is a store's, whose copy only this machine has.

    Raises:
        UsageError: Ray runs on several machines.
    """
    ray = sys.modules.get("ray")
    stores = [place for place in places if isinstance(place, Place)]
    if stores and ray is not None and ray.is_initialized():
        machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        if len(machines) > 1:
            raise UsageError(
                f"{stores[0]}: this command works with a copy of it on one machine, and Ray has {len(machines)} "
                "machines: use a file system that all of them share."
            )


class Copy:
    """The copy of one folder, and what is known about its files.

    Args:
        place: the folder in the store.
        held: the lease of a job that writes; None for a copy to read.
    """

    def __init__(self, place: Place, held: Lease | None) -> None:
        self.place, self.held = place, held
        kind = "working" if held is not None else "read"
        self.folder = cache_folder() / kind / f"{hashlib.sha256(str(place).encode()).hexdigest()[:16]}-{place.name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stop = threading.Event()
        self.facts: dict[str, Fact] = {}
        self.token = 0
        try:
            state = json.loads((self.folder / STATE).read_bytes())
            self.facts, self.token = state["files"], state["token"]
        except (OSError, ValueError, KeyError, TypeError):
            return

    def fetch(self) -> None:
        """Make the copy equal to the store; files that a killed job on this machine did not send stay.

        If another machine had the folder since, nothing of this machine's that is not in the store stays.
        """
        objects = {name: stat for name, stat in self.place.files() if not _is_hidden(name)}
        token = self.held.fence.token if self.held is not None else 0
        in_turn = self.held is not None and token == self.token + 1
        files = self._files()
        for name in files:
            gone = name in self.facts and name not in objects  # another machine removed it
            if gone or (name not in objects and not in_turn):
                (self.folder / name).unlink()
                self.facts.pop(name, None)
        for name, stat in objects.items():
            fact = self.facts.get(name)
            same = fact is not None and name in files and fact[2] == stat.version
            if same and (in_turn or files[name] == self.facts[name][:2]):
                continue
            (self.place / name).download(self.folder / name)
            self.facts[name] = [*self._fact(name), stat.version]
        self.facts = {name: fact for name, fact in self.facts.items() if name in objects}
        self.token = token
        self._save()

    def send_often(self) -> None:
        """Passes until the job ends; errors are left to the last pass."""
        while not self.stop.wait(EVERY_S):
            try:
                self.send()
            except (OSError, RestorayError):
                continue

    def send(self, last: bool = False) -> None:
        """Send changed files, markers last; then delete the objects of files that are gone.

        Raises:
            RetryLater: the lease is lost, or the store does not answer.
        """
        assert self.held is not None
        files = self._files()
        changed = [name for name, fact in files.items() if self.facts.get(name, [])[:2] != fact]
        for name in sorted(changed, key=lambda name: (Path(name).name in MARKERS, name)):
            if not last and (name.endswith(AT_THE_END) or self.stop.is_set()):
                continue
            self.held.check()
            try:
                (self.place / name).upload(self.folder / name)
            except FileNotFoundError:  # the job removed it meanwhile
                if (self.folder / name).exists():
                    raise
                continue
            self.facts[name] = [*files[name], (self.place / name).stat().version]
        for name in [name for name in self.facts if name not in files]:
            self.held.check()
            (self.place / name).unlink(missing_ok=True)
            del self.facts[name]
        self._save()

    def _files(self) -> dict[str, list[int]]:
        """[bytes, modification time in ns] of the copy's files by name, without hidden ones."""
        files: dict[str, list[int]] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if _is_hidden(name) or path.is_symlink():
                continue
            try:
                if path.is_file():
                    files[name] = self._fact(name)
            except FileNotFoundError:
                continue
        return files

    def _fact(self, name: str) -> list[int]:
        status = (self.folder / name).stat()
        return [status.st_size, status.st_mtime_ns]

    def _save(self) -> None:
        document: Mapping[str, Any] = {"place": str(self.place), "token": self.token, "files": self.facts}
        replace_file(self.folder / STATE, json.dumps(document).encode())


def _is_hidden(name: str) -> bool:
    """Whether a file is a lock, a draft or a mark: these are about processes of one machine."""
    return any(part.startswith(".") for part in name.split("/"))
