"""Parts that are measured while the sources are still listed: the first task of a large bucket starts at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from components.corpora import CorpusSpec
from pipelines.curation.sources.files import SkippedFiles
from pipelines.curation.sources.objects import OutOfOrder
from pipelines.curation.sources.parts import Listing, Part, iter_parts

FIRST_PARTS = 64
"""Parts that are listed before the first of them is measured, and that later rounds wait for too; ours."""


class ComingParts:
    """Lists the sources of a spec in a thread; `take` gives the parts so far.

    Where the spec names held-out pictures, `take` waits for the whole listing: a wrong name must end the run before the
    work. So does `is_early=False`.

    Args:
        save: called with the whole listing, before `take` gives the last parts.
    """

    def __init__(self, spec: CorpusSpec, out: Path, save: Callable[[Listing], None]) -> None:
        self.spec, self.out, self.save = spec, out, save
        self.listing: Listing | None = None
        self._first = FIRST_PARTS if not spec.split.held_out else None
        self._parts: list[Part] = []
        self._taken = 0
        self._error: BaseException | None = None
        self._stop = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True, name="listing")
        self._thread.start()

    def take(self) -> list[Part]:
        """Parts that no earlier call gave; [] after the last one. Blocks until there are some.

        Where a store lists out of order, parts may come again. `listing` counts: it may lack parts that came before.

        Raises:
            UsageError, Failure: as list_parts.
        """
        with self._changed:
            while self.listing is None and self._error is None:
                if self._first is not None and len(self._parts) - self._taken >= self._first:
                    break
                self._changed.wait()
            if self._error is not None:
                raise self._error
            parts = self._parts[self._taken :]
            self._taken = len(self._parts)
            return parts

    def close(self) -> None:
        """Stop the listing."""
        self._stop = True
        self._thread.join()

    def _run(self) -> None:
        try:
            try:
                facts = self._list(False)
            except OutOfOrder:
                with self._changed:
                    self._parts, self._taken = [], 0
                facts = self._list(True)
            if self._stop:
                return
            listing = Listing(parts=self._parts, skipped=facts.count, sentences=facts.sentences)
            self.save(listing)
            with self._changed:
                self.listing = listing
                self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - `take` raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _list(self, is_sorted: bool) -> SkippedFiles:
        facts = SkippedFiles()
        for part in iter_parts(self.spec, self.out, facts, is_sorted):
            with self._changed:
                self._parts.append(part)
                self._changed.notify_all()
            if self._stop:
                break
        return facts


class ListedParts:
    """A listing that is complete, with the interface of ComingParts."""

    def __init__(self, listing: Listing) -> None:
        self.listing: Listing | None = listing
        self._is_taken = False

    def take(self) -> list[Part]:
        """All parts; [] at the second call."""
        assert self.listing is not None
        parts, self._is_taken = [] if self._is_taken else self.listing.parts, True
        return parts

    def close(self) -> None:
        """Nothing to do."""
