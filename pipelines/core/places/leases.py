"""One writer a folder: a lease object with a heartbeat and a fencing token, for stores and for shared file systems.

    <folder>/.lease/00000007.json     {"holder", "machine", "process", "nonce", "ttl_s", "beat", "released"}

The number is the fencing token. A lease is taken by creating the next number, which every store allows once: S3 by a
conditional PUT (If-None-Match), a file system by an exclusive create. So of two drivers one wins, and nothing has to be
compared and swapped. The holder writes its own object again and again; that is the heartbeat. Another driver may take
the next number when the heartbeat has been silent for `ttl_s`, by the clock of the store: the driver writes an object
of its own and compares the two times, so the machines' clocks need not agree.

A driver whose lease may be over must not write any more. `check` raises LeaseLost if a higher number exists or if the
last heartbeat that the store confirmed is too old. Workers hold a Fence, which looks for a higher number at most every
third of `ttl_s`. A driver that took over after a silence waits for that time first, so that no such worker writes
after it.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.core.errors import Failure, RestorayError, RetryLater
from pipelines.core.places.files import create, list_files, put, read, remove, stat
from pipelines.core.places.place import Where

TTL_S = 60.0
"""Silence after which a lease is over. Ours: three heartbeats that a store may lose."""

LEASE_FOLDER = ".lease"


class LeaseLost(RetryLater):
    """Another driver has taken the folder over, or may have."""


@dataclass(frozen=True)
class Fence:
    """A lease as its workers see it; small and picklable.

    Attributes:
        folder: the folder of the lease objects.
        token: number of the lease.
        ttl_s: see TTL_S.
    """

    folder: Where
    token: int
    ttl_s: float
    _checked: list[float] = field(default_factory=list, repr=False, compare=False)

    def check(self) -> None:
        """Raise LeaseLost if another driver has the folder; asks the store at most every third of ttl_s."""
        if self._checked and time.monotonic() - self._checked[-1] < self.ttl_s / 3:
            return
        asked = time.monotonic()
        if max(_tokens(self.folder), default=0) > self.token:
            raise LeaseLost(f"{self.folder.parent} was taken over by another job.")
        self._checked[:] = [asked]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "token": self.token, "ttl_s": self.ttl_s, "_checked": []}


class Lease:
    """A lease that this process holds, with its heartbeat thread."""

    def __init__(self, fence: Fence, nonce: str) -> None:
        self.fence, self.nonce = fence, nonce
        self.beats = 0
        self.confirmed = time.monotonic()
        self.lost = ""
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self.thread.start()

    def check(self) -> None:
        """Raise LeaseLost unless the lease certainly still holds; asks no store."""
        silence = time.monotonic() - self.confirmed
        if not self.lost and silence > self.fence.ttl_s * 0.9:
            self.lost = f"{self.fence.folder.parent}: the lease could not be renewed for {silence:.0f} s."
        if self.lost:
            raise LeaseLost(self.lost)

    def _beat(self) -> None:
        while not self.stop.wait(self.fence.ttl_s / 4):
            try:
                asked = time.monotonic()
                if max(_tokens(self.fence.folder), default=0) > self.fence.token:
                    self.lost = f"{self.fence.folder.parent} was taken over by another job."
                    return
                self.beats += 1
                put(_path(self.fence), _record(self.nonce, self.fence.ttl_s, self.beats))
                self.confirmed = asked
            except (OSError, RestorayError):
                continue  # `check` notices the silence

    def release(self) -> None:
        """End the heartbeat and mark the lease as free. Its object stays: the numbers must grow."""
        self.stop.set()
        self.thread.join()
        if not self.lost:
            with suppress(OSError, RestorayError):  # then it is over after ttl_s
                put(_path(self.fence), _record(self.nonce, self.fence.ttl_s, self.beats, released=True))
                for token in _tokens(self.fence.folder):
                    if token < self.fence.token:
                        remove(self.fence.folder / f"{token:08d}.json")


@contextmanager
def lease(folder: Where, ttl_s: float | None = None) -> Iterator[Lease]:
    """Hold the lease of a folder.

    Raises:
        RetryLater: another driver holds it, or won the race for it.
        Failure: the store does not refuse a second create, so two drivers could write at the same time.
    """
    held = _take(folder, TTL_S if ttl_s is None else ttl_s)
    try:
        yield held
    finally:
        held.release()


def _take(folder: Where, ttl_s: float) -> Lease:
    leases = folder / LEASE_FOLDER
    leases.mkdir(parents=True, exist_ok=True)
    nonce = uuid.uuid4().hex
    tokens = _tokens(leases)
    last = max(tokens, default=0)
    silent = bool(tokens) and _is_silent(leases, last, nonce)
    mine = Fence(leases, last + 1, ttl_s)
    if not create(_path(mine), _record(nonce, ttl_s, 0)):
        raise RetryLater(f"{folder} was taken by another job at the same moment.")
    if create(_path(mine), _record(uuid.uuid4().hex, ttl_s, 0)):
        remove(_path(mine))
        raise Failure(
            f"{folder}: this store does not refuse to create an object twice (conditional writes), so two jobs could "
            "write at the same time; use a store that does."
        )
    held = Lease(mine, nonce)
    if silent:
        time.sleep(ttl_s / 3 + 0.1)  # a worker of the silent driver may have looked just now
    return held


def _is_silent(leases: Where, token: int, nonce: str) -> bool:
    """Whether a lease is over by silence; False if it was released or its process is dead. RetryLater if it holds."""
    path = leases / f"{token:08d}.json"
    try:
        record = json.loads(read(path))
        beat = stat(path).modified
    except (FileNotFoundError, ValueError):
        return False  # removed meanwhile; the create decides
    if record.get("released") or _is_dead(record):
        return False
    clock = leases / f"clock-{nonce}"
    put(clock, b"")
    now = stat(clock).modified
    remove(clock)
    rest = float(record["ttl_s"]) - (now - beat)
    if rest > 0:
        raise RetryLater(
            f"{leases.parent} is in use by {record['holder']}; if that job is dead, its lease ends in {rest:.0f} s."
        )
    return True


def _tokens(leases: Where) -> list[int]:
    names = (name for name, _ in list_files(leases))
    return [int(name[:8]) for name in names if name.endswith(".json") and name[:8].isdigit()]


def _path(fence: Fence) -> Where:
    return fence.folder / f"{fence.token:08d}.json"


def _record(nonce: str, ttl_s: float, beat: int, released: bool = False) -> bytes:
    document = {
        "holder": f"process {os.getpid()} on {socket.gethostname()}",
        "machine": _machine(),
        "process": os.getpid(),
        "started": _start_of(os.getpid()),
        "nonce": nonce,
        "ttl_s": ttl_s,
        "beat": beat,
        "released": released,
    }
    return json.dumps(document).encode()


def _machine() -> str:
    """Names this start of this machine and this container's processes; "" where that cannot be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(process: int) -> str:
    """When a process started, in ticks since the machine's start; "" if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def _is_dead(record: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone: then nobody has to wait."""
    same = bool(record.get("machine")) and record["machine"] == _machine()
    return same and _start_of(int(record["process"])) != record.get("started")
