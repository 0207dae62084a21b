"""End what hangs: a guard in the worker against a single picture, and one on the driver against a whole phase.

A decoder that kills its process, or that never returns, cannot report it. So the worker writes the id of a candidate to
a small file before it decodes it; the next attempt at the part reads there over which candidate the last one died. This
is the idea of core.deaths.Attempt for a stream of candidates: one write of 24 bytes each, and deaths apart from hangs.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from components.writing import replace_file
from pipelines.core.errors import Failure

DEATHS = 3  # deaths over one candidate before it is refused
PART_DEATHS = 3  # deaths between the candidates of a part: over its tar, its table, its file
ID_BYTES = 24

T = TypeVar("T")


class Guard:
    """Watches one attempt at a part.

    Args:
        folder: folder of the cursor files: <name>.now holds the id of the candidate in work, <name>.hang a traceback
            after a timeout, <name>.json the deaths of earlier attempts. They are removed when the part is complete.
        name: name of the part.
        timeout_s: timeout for one candidate. The process then ends itself: nothing else stops a decoder's loop.
    """

    def __init__(self, folder: Path, name: str, timeout_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.now, self.hang, self.record = (folder / f"{name}.{end}" for end in ("now", "hang", "json"))
        self.timeout_s, self.timer_start = timeout_s, float("-inf")
        self.deaths: dict[str, list[int]] = {}  # id: [deaths, hangs among them]
        self._read_record()
        self.cursor = os.open(self.now, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.log = open(self.hang, "w")  # noqa: SIM115 - faulthandler needs it until `close`

    def _read_record(self) -> None:
        """Read the deaths of earlier attempts, and add the one of the last attempt."""
        try:
            record = json.loads(self.record.read_bytes())
            self.deaths = {str(name): [int(deaths), int(hangs)] for name, (deaths, hangs) in record.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self.deaths = {}
        if self.now.exists():
            last = self.now.read_bytes().decode("ascii", "replace").strip()
            is_hang = self.hang.exists() and self.hang.stat().st_size > 0
            counts = self.deaths.setdefault(last, [0, 0])  # "" is the part itself
            counts[0] += 1
            counts[1] += int(is_hang)
            replace_file(self.record, json.dumps(self.deaths).encode())

    @property
    def is_lethal(self) -> bool:
        """Whether too many processes died over the part itself for another try."""
        return self.deaths.get("", [0, 0])[0] >= PART_DEATHS

    def refusal(self, candidate: str) -> tuple[str, str] | None:
        """(code, detail) of a candidate that must not be decoded again; None for any other."""
        deaths, hangs = self.deaths.get(candidate, [0, 0])
        if hangs:
            return "timeout", f"decoding it took more than {self.timeout_s:g} s"
        if deaths >= DEATHS:
            return "crashed", f"the process that decoded it died {deaths} times"
        return None

    def at(self, candidate: str) -> None:
        """Write the id of the candidate in work, and start its timer. "" means that the next one is being read."""
        os.pwrite(self.cursor, candidate[:ID_BYTES].ljust(ID_BYTES).encode(), 0)
        if (time.monotonic() - self.timer_start) * 4 > self.timeout_s:  # a timer is a thread: not for every candidate
            # a quarter longer, since the timer may have been started for an earlier candidate
            faulthandler.dump_traceback_later(1.25 * self.timeout_s, exit=True, file=self.log)
            self.timer_start = time.monotonic()

    def close(self, complete: bool) -> None:
        """Stop the timer; after a complete part the record is removed too."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self.cursor)
        self.log.close()
        for path in (self.now, self.hang, *((self.record,) if complete else ())):
            path.unlink(missing_ok=True)


def forget_candidates_in_work(folder: Path) -> None:
    """At the start of a run: a killed run counts as no death of the candidates that were in work."""
    for path in (*folder.glob("*.now"), *folder.glob("*.hang")) if folder.is_dir() else ():
        path.unlink(missing_ok=True)


def last_sign_of_life(folder: Path) -> float:
    """Newest modification time of the cursor files, seconds of the epoch; 0 without files."""
    try:
        return max((entry.stat().st_mtime for entry in os.scandir(folder)), default=0.0)
    except OSError:  # a file or the folder was removed meanwhile
        return 0.0


def watch_items(items: Iterable[T], stall_s: float, alive: Callable[[], float], what: str) -> Iterator[T]:
    """The items of a job that may stop without an error, as Ray's pools can (ray-project/ray#62746).

    Args:
        stall_s: longest time without an item or a sign of life.
        alive: returns the time of the last sign of life between items, seconds of the epoch.
        what: name of the job, for errors.

    Raises:
        Failure: there was neither an item nor a sign of life for `stall_s`. Errors of the job pass through.
    """
    pipe: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=64)
    stop = threading.Event()

    def pump() -> None:
        try:
            for item in items:
                while not stop.is_set():
                    try:
                        pipe.put(("item", item), timeout=0.5)
                        break
                    except queue.Full:
                        continue
                if stop.is_set():
                    return
            pipe.put(("end", None))
        except BaseException as error:  # noqa: BLE001 - the waiting thread raises it
            pipe.put(("error", error))

    threading.Thread(target=pump, daemon=True, name=f"watched-{what}").start()
    try:
        silent_since = time.time()
        while True:
            try:
                kind, value = pipe.get(timeout=min(stall_s, 5.0))
            except queue.Empty:
                if time.time() - max(silent_since, alive()) > stall_s:
                    raise Failure(
                        f"{what}: no progress for {stall_s:g} s, so the run was ended. Finished work is kept; "
                        "the same command continues."
                    ) from None
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
            silent_since = time.time()
    finally:
        stop.set()
