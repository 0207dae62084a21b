"""A store in memory behind the interface of pipelines.core.places.backends.Store, with counts of its requests."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Mapping

from pipelines.core.places.backends import Stat


class ListedStore:
    """Objects by path ("bucket/key").

    Args:
        page_size: objects of a page.
        is_reversed: list in descending order, as no S3 does.
        on_page: called before each page with its number.

    Attributes:
        reads: requests for bytes by path; pages: requests for pages; most: most reads at the same time.
    """

    def __init__(
        self,
        objects: Mapping[str, bytes],
        page_size: int = 1000,
        is_reversed: bool = False,
        on_page: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.objects, self.page_size, self.on_page = dict(objects), page_size, on_page
        self.paths = sorted(objects, reverse=is_reversed)
        self.below: dict[str, list[str]] = {}
        self.reads: Counter[str] = Counter()
        self.pages, self.now, self.most = 0, 0, 0
        self.lock = threading.Lock()

    def __call__(self, address: str, storage: object) -> ListedStore:
        """As backends.open_store."""
        return self

    def read(self, path: str, start: int = 0, size: int = -1) -> bytes:
        with self.lock:
            self.reads[path] += 1
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            data = self.objects[path]
            return data[start:] if size < 0 else data[start : start + size]
        except KeyError:
            raise FileNotFoundError(path) from None
        finally:
            with self.lock:
                self.now -= 1

    def stat(self, path: str) -> Stat:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return Stat(path, len(self.objects[path]), hashlib.md5(self.objects[path]).hexdigest())

    def page(self, path: str, token: str, prefix: str = "") -> tuple[list[Stat], str]:
        self.on_page(self.pages)
        self.pages += 1
        start = f"{path}/{prefix}"
        paths = self.below.setdefault(start, []) or [one for one in self.paths if one.startswith(start)]
        self.below[start] = paths
        first = int(token or 0)
        end = first + self.page_size
        return [self.stat(one) for one in paths[first:end]], str(end) if end < len(paths) else ""
