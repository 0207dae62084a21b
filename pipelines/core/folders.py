"""Output folders of jobs: a check before the job, and a lock against a second job."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from pipelines.core.errors import Failure, RetryLater
from pipelines.core.places.addresses import refuse_address
from pipelines.core.places.leases import Lease, lease
from pipelines.core.places.place import Place, Where

LOCK_NAME = ".lock"


def check_output(out: Path, free_mib: int) -> None:
    """Create a folder and check that a job can write to it.

    Raises:
        Failure: the folder cannot be created or written, or less than `free_mib` MiB are free.
        UsageError: the folder is the address of a store.
    """
    refuse_address(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Failure(f"cannot write to {out}: {error.strerror or error}.") from error
    free = shutil.disk_usage(out).free // 2**20
    if free < free_mib:
        raise Failure(f"{out} has {free} MiB free and this plan needs {free_mib} MiB: free some or choose --out.")


SHARED_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "fuse", "gpfs", "beegfs", "ceph", "9p", "afs", "glusterfs")
"""Starts of names of file systems that several machines may mount: the kernel's lock may hold on one of them only."""


@contextmanager
def job_lock(out: Where) -> Iterator[Lease | None]:
    """Lock a folder for one job: the kernel's lock on this machine, a lease in a store, both on a shared file system.

    Yields:
        The lease, whose `check` says whether the job may still write; None on a disk of this machine.

    Raises:
        RetryLater: another job has the folder; the message names it.
        Failure: the folder cannot be created or written.
    """
    with ExitStack() as stack:
        if isinstance(out, Path):
            stack.enter_context(folder_lock(out))
        yield stack.enter_context(lease(out)) if isinstance(out, Place) or is_shared(out) else None


def is_shared(folder: Path, mounts: Path = Path("/proc/mounts")) -> bool:
    """Whether a folder is on a file system that other machines may mount; False where there is no table of mounts."""
    folder, kinds = folder.resolve(), {}
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        kinds[Path(point.replace("\\040", " "))] = kind
    mount = next(one for one in (folder, *folder.parents) if one in kinds or one == one.parent)
    return kinds.get(mount, "").startswith(SHARED_FILE_SYSTEMS)


@contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Create a folder and lock it for one job. The kernel releases the lock when the process ends in any way.

    Raises:
        RetryLater: another process has the lock; the message names it.
        Failure: the folder cannot be created or written.
        UsageError: the folder is the address of a store.
    """
    refuse_address(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK_NAME).open("a+b", buffering=0)
    except OSError as error:
        raise Failure(f"cannot write to {out}: {error.strerror or error}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise RetryLater(f"{out} is in use by {lock.read().decode().strip() or 'another process'}.") from error
        except OSError as error:  # a file system without locks
            raise RetryLater(f"{out} cannot be locked: {error.strerror or error}.") from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the holder's name
            lock.truncate(0)
            lock.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        yield


@contextmanager
def waiting(
    lock: Callable[[Path], AbstractContextManager[None]], folder: Path, longest_s: float = 3600
) -> Iterator[None]:
    """Take a lock of a folder that several processes of this machine need in turn; RetryLater after `longest_s`."""
    deadline = time.monotonic() + longest_s
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(folder))
                break
            except RetryLater:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield
