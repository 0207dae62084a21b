"""Output folders of jobs: a check before the job, and a lock against a second job."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.core.errors import Failure, RetryLater
from pipelines.core.places.addresses import refuse_address

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
