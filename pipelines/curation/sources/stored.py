"""Folders of a store as sources: pictures with the captions and tables beside them, in one pass over the listing.

A picture's caption has its stem or its name, as in a folder of this machine, but letters must agree in case: keys of
stores differ by it. Tables (tables.py) are opened when the listing enters their folder, before the first picture that
they describe. Where the loaded pages do not reach a table's name yet, one more request asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from components.corpora import SourceSpec
from pipelines.core.pictures import SIDECARS, is_system_name
from pipelines.core.places.backends import Stat
from pipelines.core.places.place import Place
from pipelines.curation.sources import stores
from pipelines.curation.sources.objects import Listing
from pipelines.curation.sources.patterns import expand, fixed_folder, has_braces
from pipelines.curation.sources.tables import CREDITS, METADATA, FolderTables, Note
from pipelines.curation.sources.texts import CAPTION_SUFFIXES

SPELLINGS = tuple(form for suffix in CAPTION_SUFFIXES for form in (suffix, suffix.upper(), suffix.title()))
"""Suffixes of captions as they are spelt in stores; the first one wins."""


class StoredPicture(NamedTuple):
    """A candidate: its name below the source, its object, what tables say of it, and the object of its caption."""

    name: str
    stat: Stat
    note: Note
    caption: Stat | None


class StoredFolder:
    """One pass over the pictures of a source in a store.

    Args:
        source: its path is an address, maybe with wildcards and braces.
        is_sorted: sort the listing on disk, see objects.py.

    Attributes:
        root: the source's fixed part.
        skipped: sidecars and system files so far.
        sentences: on tables and texts; complete after the pass.
    """

    def __init__(self, source: SourceSpec, is_sorted: bool) -> None:
        self.source, self.is_sorted = source, is_sorted
        self.root = stores.place_in(fixed_folder(source.path), source.storage)
        self.skipped = 0
        self.sentences: list[str] = []

    def pictures(self) -> Iterator[StoredPicture]:
        """All candidates, in the order of their keys; members of braces in the pattern's order.

        Raises:
            UsageError, Failure, OutOfOrder: as stores.list_files.
        """
        path = self.source.path
        for pattern in expand(path) if has_braces(path) else (path,):
            with stores.store_errors(pattern, self.source.storage):
                yield from self._of_pattern(pattern)

    def _of_pattern(self, pattern: str) -> Iterator[StoredPicture]:
        folder, prefix, chosen = stores.scope_of(pattern, self.source.storage)
        only = ""
        listing = Listing(folder, prefix, self.is_sorted)
        if chosen is None and listing.is_empty() and "/" in folder.path:  # an object, and no folder
            only, prefix = folder.path, folder.name.removesuffix(folder.suffix) + "." * bool(folder.suffix)
            if folder.path == self.root.path:
                self.root = folder.parent
            listing = Listing(folder.parent, prefix, self.is_sorted)
        walk = _Walk(listing, self.root, bool(prefix), self.source)
        is_empty = True
        for stat in listing:
            if (only and stat.path != only) or (chosen is not None and not chosen.match(stat.path)):
                walk.sidecar(stat, False)
                continue
            is_empty = False
            name = stat.path[len(self.root.path) + 1 :]
            is_system = any(map(is_system_name, name.split("/")))
            if is_system or suffix_of(name) in SIDECARS:
                self.skipped += 1
                walk.sidecar(stat, is_system)
            else:
                yield StoredPicture(name, stat, *walk.facts_of(stat))
        if is_empty:
            raise stores.no_file(pattern)
        self.sentences += walk.close()


def suffix_of(name: str) -> str:
    """The suffix of a name, in lower case, with its dot; "" for none."""
    last = name.rpartition("/")[2]
    return f".{last.rpartition('.')[2].lower()}" if "." in last else ""


class _Walk:
    """The tables and captions around the present place of a listing.

    Args:
        is_partial: the listing leaves out objects of its first folder, so tables are asked for.
    """

    def __init__(self, listing: Listing, root: Place, is_partial: bool, source: SourceSpec) -> None:
        self.listing, self.root, self.is_partial = listing, root, is_partial
        self.tables = FolderTables(root, source)
        self.folders: list[str] = []  # paths of the folders that are open, from the root on
        self.earlier: dict[str, Stat] = {}  # captions whose picture may still come
        self.used: set[str] = set()  # paths of captions that have a picture

    def facts_of(self, stat: Stat) -> tuple[Note, Stat | None]:
        """What tables say of a picture, and the object of its caption."""
        self._enter(stat)
        stem = stat.path[: len(stat.path) - len(suffix_of(stat.path))]
        caption = next(filter(None, (self._caption(f"{stem}."), self._caption(f"{stat.path}."))), None)
        if caption is not None:
            self.used.add(caption.path)
        return self.tables.note_of(self._place(stat.path)), caption

    def sidecar(self, stat: Stat, is_system: bool) -> None:
        """Note a file that is no candidate; it may be a caption."""
        self._enter(stat)
        if stat.path in self.used:
            self.used.discard(stat.path)
        elif not is_system and stat.path.rpartition(".")[2] in SPELLINGS:  # of a picture that may come later
            self.earlier[stat.path] = stat
        elif not is_system:
            self.tables.leave(self._place(stat.path))

    def close(self) -> list[str]:
        """Sentences after the last picture."""
        self._forget("")
        return self.tables.close()

    def _place(self, path: str) -> Place:
        return Place(self.root.scheme, path, self.root.storage)

    def _caption(self, start: str) -> Stat | None:
        paths = [start + suffix for suffix in SPELLINGS]
        for path in paths:
            stat = self.earlier.get(path) or self.listing.ahead(path)
            if stat is not None:
                return stat
        return None

    def _forget(self, path: str) -> None:
        """Forget captions whose pictures would have come before this path."""
        for earlier in [one for one in self.earlier if not path.startswith(one.rpartition(".")[0] + ".")]:
            del self.earlier[earlier]
            if earlier in self.used:
                self.used.discard(earlier)
            else:
                self.tables.leave(self._place(earlier))

    def _enter(self, stat: Stat) -> None:
        """Open the tables of the folders of an object, and close those of folders that the listing has left."""
        self._forget(stat.path)
        folder = stat.path.rpartition("/")[0]
        if self.folders and self.folders[-1] == folder:
            return
        left = False
        while self.folders and not f"{folder}/".startswith(f"{self.folders[-1]}/"):
            self.folders.pop()
            left = True
        if left and self.folders:
            self.tables.enter(self._place(self.folders[-1]), [])
        if not self.folders:
            self._open(self.root.path, stat)
        for name in folder[len(self.folders[-1]) + 1 :].split("/") if folder != self.folders[-1] else ():
            self._open(f"{self.folders[-1]}/{name}", stat)

    def _open(self, folder: str, stat: Stat) -> None:
        self.folders.append(folder)
        names = [CREDITS, *METADATA] if folder == self.root.path else METADATA
        paths = [f"{folder}/{name}" for name in names]
        if self.is_partial or not self.listing.reaches(max(paths)):
            pages = (page for name in ("CREDITS", "metadata.") for page in self._place(folder).pages(prefix=name))
            there = {one.path for page in pages for one in page}
        else:
            there = {path for path in paths if path == stat.path or self.listing.ahead(path, loads=False)}
        self.tables.enter(self._place(folder), [path.rpartition("/")[2] for path in paths if path in there])
