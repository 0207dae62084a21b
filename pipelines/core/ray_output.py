"""Where the output of Ray goes: to files in Ray's folder, and after a failure to a folder that stays.

Ray writes lines of its own to the user's terminal: its C++ parts to descriptor 2, its listener for errors to standard
output, where it would tear the document of --json. They help nobody who waits for pictures, and they help whoever
looks for the cause of a failure. So they go into files beside Ray's logs.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.core.home import home

DRIVER_LOG = "driver-native.log"
KEPT_RUNS = 5  # folders of logs; older ones are removed
KEPT_BYTES = 4 << 20  # of each file, its end


def open_standard_streams() -> None:
    """Open the null device for standard streams that the caller has closed ("2>&-"), before anything else is opened.

    Without it the next file of the job would get descriptor 1 or 2, and a library's message would end in its bytes.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until the process ends


def separate_stderr() -> None:
    """Give Python's standard error a descriptor of its own, so that descriptor 2 is free for `ray_output_in`.

    Only a command calls this, before it writes anything: an application with Restoray inside owns its descriptors.
    """
    try:
        if sys.stderr.fileno() != 2:
            return
        own = os.dup(2)
    except (AttributeError, OSError, ValueError):  # no standard error, or one that is no file
        return
    sys.stderr = os.fdopen(own, "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)


@contextmanager
def ray_output_in(folder: Path) -> Iterator[None]:
    """Send Ray's own lines to DRIVER_LOG in `folder` inside a `with` block.

    Lines on descriptor 2 are sent there only after `separate_stderr`.
    """
    from ray._private import worker

    printer = getattr(worker, "print_to_stdstream", None)
    with (folder / DRIVER_LOG).open("ab", buffering=0) as log:

        def write(data: dict[str, Any], *_: Any, **__: Any) -> None:
            log.write("".join(f"({data.get('pid')}) {line}\n" for line in data.get("lines", [])).encode())

        terminal = _redirect(log.fileno())
        if printer is not None:
            worker.print_to_stdstream = write
        try:
            yield
        finally:
            if printer is not None:
                worker.print_to_stdstream = printer
            if terminal is not None:
                os.dup2(terminal, 2)
                os.close(terminal)


def _redirect(target: int) -> int | None:
    """Point descriptor 2 to `target`; return a copy of the old one, or None if Python's standard error uses it."""
    try:
        if sys.stderr.fileno() == 2:
            return None
        copy = os.dup(2)
    except (AttributeError, OSError, ValueError):
        return None
    os.dup2(target, 2)
    return copy


def keep_logs(folder: Path) -> Path | None:
    """Copy the logs below Ray's folder to RESTORAY_HOME/logs, where the newest KEPT_RUNS stay.

    Returns:
        The copy, or None if there is none: for example the disk is full. The failure itself counts, not its logs.
    """
    logs = home() / "logs"
    copy = logs / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file() or not ("logs" in path.parts or path.name == DRIVER_LOG):
                continue
            if path.stat().st_size:
                copy.mkdir(parents=True, exist_ok=True)
                name = path.name  # two attempts to start Ray have files of one name
                if (copy / name).exists():
                    name = "-".join(path.relative_to(folder).parts)
                with path.open("rb") as stream:
                    stream.seek(max(0, path.stat().st_size - KEPT_BYTES))
                    (copy / name).write_bytes(stream.read())
        for old in sorted(entry for entry in logs.iterdir() if entry.is_dir())[:-KEPT_RUNS]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        shutil.rmtree(copy, ignore_errors=True)
        return None
    return copy if copy.is_dir() else None
