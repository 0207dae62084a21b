"""Nothing may hang: a guard inside the worker against one picture, and one on the driver against everything.

A decoder that kills its process, or never comes back, cannot say so. So the worker writes which candidate it is at into
a small file before it looks, and whoever does the part next reads there what the last one died of.
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

from pipelines.errors import Failure
from pipelines.rows import replace_file

DEATHS = 3  # of the process over one candidate, before it is given up
PART_DEATHS = 3  # between candidates of a part: over its tar, its table, its file
ID_BYTES = 24

T = TypeVar("T")


class Guard:
    """Watches one attempt at a part.

    Args:
        folder: of the cursor files; one per part, gone when the part is through.
        name: of the part.
        timeout_s: for one candidate. The process ends itself then: there is no other way out of a decoder's loop.
    """

    def __init__(self, folder: Path, name: str, timeout_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.now, self.hang, self.record = (folder / f"{name}.{end}" for end in ("now", "hang", "json"))
        self.timeout_s, self.armed = timeout_s, float("-inf")
        self.deaths: dict[str, list[int]] = {}  # id: [deaths, of which hung]
        self._learn()
        self.cursor = os.open(self.now, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self.log = open(self.hang, "w")  # noqa: SIM115 - faulthandler needs it until `close`

    def _learn(self) -> None:
        """Who was looked at when the last attempt died."""
        try:
            told = json.loads(self.record.read_bytes())
            self.deaths = {str(name): [int(deaths), int(hung)] for name, (deaths, hung) in told.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self.deaths = {}
        if self.now.exists():
            last = self.now.read_bytes().decode("ascii", "replace").strip()
            hung = self.hang.exists() and self.hang.stat().st_size > 0
            known = self.deaths.setdefault(last, [0, 0])  # "" is the part itself
            known[0] += 1
            known[1] += int(hung)
            replace_file(self.record, json.dumps(self.deaths).encode())

    @property
    def hopeless(self) -> bool:
        """Whether the part has died too often to be tried again."""
        return self.deaths.get("", [0, 0])[0] >= PART_DEATHS

    def sentence(self, candidate: str) -> tuple[str, str] | None:
        """(code, detail) of a candidate that must not be looked at again; None where it may."""
        deaths, hung = self.deaths.get(candidate, [0, 0])
        if hung:
            return "timeout", f"decoding it took more than {self.timeout_s:g} s"
        if deaths >= DEATHS:
            return "crashed", f"the process that decoded it died {deaths} times"
        return None

    def at(self, candidate: str) -> None:
        """Say what is looked at now ("": nothing, the next one is being read), and start its clock."""
        os.pwrite(self.cursor, candidate[:ID_BYTES].ljust(ID_BYTES).encode(), 0)
        if (time.monotonic() - self.armed) * 4 > self.timeout_s:  # arming starts a thread: not for every candidate
            # by a quarter longer, since the clock may have been started for a candidate before
            faulthandler.dump_traceback_later(1.25 * self.timeout_s, exit=True, file=self.log)
            self.armed = time.monotonic()

    def close(self, done: bool) -> None:
        """Stop the clock; with `done` nothing is left to learn from."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self.cursor)
        self.log.close()
        for path in (self.now, self.hang, *((self.record,) if done else ())):
            path.unlink(missing_ok=True)


def forget_the_living(folder: Path) -> None:
    """At the start of a run: what its predecessor was at when it was killed says nothing against a picture."""
    for path in (*folder.glob("*.now"), *folder.glob("*.hang")) if folder.is_dir() else ():
        path.unlink(missing_ok=True)


def last_sign_of_life(folder: Path) -> float:
    """Newest modification time of the cursor files, seconds of the epoch; 0 where there are none."""
    try:
        return max((entry.stat().st_mtime for entry in os.scandir(folder)), default=0.0)
    except OSError:  # a file or the folder went away meanwhile
        return 0.0


def watched(items: Iterable[T], stall_s: float, alive: Callable[[], float], what: str) -> Iterator[T]:
    """The items of a job that may stand still for ever, as Ray's pools can (ray-project/ray#62746).

    Args:
        stall_s: longest silence.
        alive: a time of the epoch at which something was last seen to happen between items.

    Raises:
        Failure: nothing came, and nothing was seen, for `stall_s`; and whatever the job raises.
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
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits
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
                        f"{what}: nothing got done for {stall_s:g} s, so the run was ended. What is done is kept; "
                        "the same command goes on."
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
