"""A watch over Ray's own processes, which a machine without free memory may kill.

When one of them dies, Ray ends the driver 10 to 60 s later, from C++ and without an exception: a command would end
without a word, and a service would stay and answer nothing. The watch ends the command at once, with one sentence.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.core.errors import EXIT_FAILURE
from pipelines.core.ray_output import keep_logs

PROCESSES = ("raylet", "gcs_server")
POLL_S = 0.5
GRACE_S = 3.0
"""Time for a command that ends just now, for example after a signal to all processes."""

_reports: list[Callable[[str], None]] = []


def end_with(report: Callable[[str], None]) -> None:
    """Let the death of Ray end this process after a call of `report` with a sentence.

    Only a command calls this. In an application with Restoray inside, the death is logged, and Ray does the rest.
    """
    _reports[:] = [report]


class RayWatch:
    """Watches PROCESSES of the running Ray inside a `with` block.

    Args:
        folder: Ray's folder, whose logs are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes = folder, ray_processes()
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._run, name="ray-watch", daemon=True)

    def __enter__(self) -> RayWatch:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end.set()
        dead = self.dead()
        if dead and kind is not None and issubclass(kind, Exception):  # a stop of Ray would end this process
            self._report(dead)

    def dead(self) -> str:
        """The name of a process that has ended; "" if all run."""
        return next((name for name, process in self.processes.items() if process.poll() is not None), "")

    def _run(self) -> None:
        while not self.end.wait(POLL_S):
            dead = self.dead()
            if dead:
                if not self.end.wait(GRACE_S):
                    self._report(dead)
                return

    def _report(self, name: str) -> None:
        message = f"Ray's process {name} ended, perhaps for lack of memory; the same command continues."
        if not _reports:
            logging.getLogger(__name__).error(message)
            return
        logs = keep_logs(self.folder)
        _reports[0](f"{message}\nRay's logs: {logs}" if logs is not None else message)
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(EXIT_FAILURE)


def ray_processes() -> dict[str, Any]:
    """Ray's processes that this driver started, of PROCESSES by name: objects with `poll`; {} if Ray hides them."""
    from ray._private import worker

    running = getattr(getattr(worker, "_global_node", None), "all_processes", {})
    return {name: entry.process for name in PROCESSES for entry in running.get(name, ()) if hasattr(entry, "process")}
