"""Many requests at the same time, with results in the order of the requests and a bound on what waits in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

WAITING_BYTES = 64 << 20
"""Bytes that may be in work or wait for their turn, in one task; ours."""


def map_ahead(
    work: Callable[[S], T], items: Iterable[S], threads: int, size_of: Callable[[S], int] = lambda _: 0
) -> Iterator[tuple[S, Future[T]]]:
    """(item, future of `work`) of each item, in their order, with up to `threads` items in work.

    The next item is begun while 2 * threads items and WAITING_BYTES are not exceeded; one item is always begun. When
    the caller stops the iteration, work that has not begun is cancelled.

    Args:
        size_of: bytes of an item's result.
    """
    rest = iter(items)
    executor = ThreadPoolExecutor(threads, "ahead")
    window: deque[tuple[S, Future[T]]] = deque()
    coming: S | None = None
    waiting, has_more = 0, True
    try:
        while True:
            while has_more and len(window) < 2 * threads:
                if coming is None and (coming := next(rest, None)) is None:
                    has_more = False
                    break
                size = size_of(coming)
                if window and waiting + size > WAITING_BYTES:
                    break
                window.append((coming, executor.submit(work, coming)))
                waiting, coming = waiting + size, None
            if not window:
                return
            item, future = window.popleft()
            future.exception()  # waits; the caller takes the result or the error
            yield item, future
            waiting -= size_of(item)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
