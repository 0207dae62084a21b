"""Listings of stores: pages in ascending order with a look ahead, and a spool on disk where the order is another.

S3 lists keys in ascending order, so a listing of any length needs one page of memory, and work can begin with its first
page. Other servers may have another order. Then `OutOfOrder` is raised, and the listing is sorted on disk instead. So
the order of a source never depends on the server or on the size of its pages.
"""

from __future__ import annotations

import sqlite3
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pipelines.core.places.backends import Stat
from pipelines.core.places.place import Place

T = TypeVar("T")


class OutOfOrder(Exception):
    """A store does not list its objects in ascending order."""


def in_any_order(work: Callable[[bool], T]) -> T:
    """`work(False)`, or `work(True)` where a store lists in another order: the listing is then sorted on disk."""
    try:
        return work(False)
    except OutOfOrder:
        return work(True)


class Listing:
    """Objects below a place in ascending order of their keys; iterate once.

    Args:
        place: bucket and folder.
        prefix: how names below it begin.
        is_sorted: sort on disk first.

    Raises:
        OutOfOrder: while it is iterated, if it is not sorted on disk.
        OSError, RestorayError: as Place.pages.
    """

    def __init__(self, place: Place, prefix: str = "", is_sorted: bool = False) -> None:
        pages = place.pages(prefix=prefix)
        self._pages = _sorted_pages(pages) if is_sorted else iter(pages)
        self._loaded: list[Stat] = []
        self._next = 0  # place in `_loaded` of the object that comes next
        self._ended = False

    def __iter__(self) -> Iterator[Stat]:
        while self._next < len(self._loaded) or self._load():
            while self._next < len(self._loaded):
                self._next += 1
                yield self._loaded[self._next - 1]

    def is_empty(self) -> bool:
        """Whether there is no object, before the first one is taken."""
        return not self._loaded and not self._load_some()

    def _load_some(self) -> bool:
        while not self._loaded and self._load():
            pass
        return bool(self._loaded)

    def ahead(self, path: str, loads: bool = True) -> Stat | None:
        """The object of a path if it is yet to come; None for none.

        Args:
            loads: load pages until this is certain; otherwise only what is loaded counts, see `reaches`.
        """
        while loads and not self.reaches(path) and self._load():
            pass
        place = bisect_left(self._loaded, path, self._next, key=_path_of)
        is_there = place < len(self._loaded) and self._loaded[place].path == path
        return self._loaded[place] if is_there else None

    def reaches(self, path: str) -> bool:
        """Whether all objects up to a path are loaded."""
        return self._ended or (bool(self._loaded) and self._loaded[-1].path >= path)

    def _load(self) -> bool:
        page = next(self._pages, None)
        if page is None:
            self._ended = True
            return False
        last = self._loaded[-1].path if self._loaded else ""
        for stat in page:
            if stat.path <= last:
                raise OutOfOrder
            last = stat.path
        self._loaded = self._loaded[max(0, self._next - 1) :] + page  # the last one stays, for the check of the order
        self._next = min(self._next, 1)
        return True


def _path_of(stat: Stat) -> str:
    return stat.path


def _sorted_pages(pages: Iterable[list[Stat]], page: int = 1000) -> Iterator[list[Stat]]:
    """All pages once, in ascending order, by way of a file; an object that two pages hold is kept once."""
    with tempfile.TemporaryDirectory(prefix="restoray-listing-") as folder:
        table = sqlite3.connect(Path(folder) / "listing.db", isolation_level=None, check_same_thread=False)
        try:
            table.execute("PRAGMA journal_mode=OFF")
            table.execute("PRAGMA synchronous=OFF")
            table.execute("CREATE TABLE objects (path BLOB PRIMARY KEY, size INT, version TEXT) WITHOUT ROWID")
            for stats in pages:
                rows = [(stat.path.encode("utf-8", "surrogatepass"), stat.size, stat.version) for stat in stats]
                table.execute("BEGIN")
                table.executemany("INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", rows)
                table.execute("COMMIT")
            cursor = table.execute("SELECT path, size, version FROM objects ORDER BY path")
            while rows := cursor.fetchmany(page):
                yield [Stat(path.decode("utf-8", "surrogatepass"), size, version) for path, size, version in rows]
        finally:
            table.close()
