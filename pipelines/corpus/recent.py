"""Caches of open files: the values of the keys that were read last, as many as a window of the stream needs."""

from __future__ import annotations

import contextlib
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import cache
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

LEAST_OPEN, MOST_OPEN = 128, 4096
"""Ours. A window of 65,536 samples lies in 512 shards of 64 MiB, and a cache below that opens a file for most rows."""


@cache
def open_limit() -> int:
    """How many files one cache may hold open: a quarter of what the process may open, from 128 to 4,096.

    The first call raises the process' soft limit to its hard limit: many systems start with a soft limit of 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4 * MOST_OPEN if hard == resource.RLIM_INFINITY else min(hard, 4 * MOST_OPEN)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses more than its kernel allows a process
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
    return MOST_OPEN if soft == resource.RLIM_INFINITY else max(LEAST_OPEN, min(MOST_OPEN, soft // 4))


class Recent(Generic[K, V]):
    """The values of the keys that were asked for last. Threads may share it.

    A value that leaves is not closed, since a thread may still read from it: a file closes with its last reference.

    Args:
        limit: returns the number of values to hold.
    """

    def __init__(self, limit: Callable[[], int] = open_limit) -> None:
        self.limit = limit
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key; `make` makes it if it is not held."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            value = self._values.setdefault(key, value)
            self._values.move_to_end(key)
            while len(self._values) > self.limit():
                self._values.popitem(last=False)
        return value

    def drop(self, is_stale: Callable[[V], bool]) -> None:
        """Drop the values for which `is_stale` is true."""
        with self._lock:
            for key in [key for key, value in self._values.items() if is_stale(value)]:
                del self._values[key]

    def __len__(self) -> int:
        return len(self._values)
