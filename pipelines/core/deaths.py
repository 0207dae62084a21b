"""Marks on disk that show which sample killed a worker process.

A mark is one byte in a small file. A worker writes the byte before it starts on a sample. It removes the file after the
work. The bytes of a file that stays count the processes that died over the sample.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from components.writing import LEFTOVERS, replace_file
from pipelines.core.errors import Failure
from pipelines.core.places.files import put, remove
from pipelines.core.places.place import Place, Where

T = TypeVar("T")

MAX_DEATHS = 2
"""Number of processes that may die over one sample, or while they load the model."""


class WorkersDied(Failure):
    """MAX_DEATHS processes died while they loaded the model."""


class Marks:
    """The marks of a job: a folder with one file per name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Remove all marks of earlier jobs, before a job starts."""
        self.folder.mkdir(exist_ok=True)
        for stale in self.folder.iterdir():
            stale.unlink()

    def forget(self, name: str) -> None:
        """Remove the marks of one name, before a job starts; for marks in a folder with other files."""
        (self.folder / name).unlink(missing_ok=True)

    def deaths(self, name: str) -> int:
        """Number of processes that died over a name, plus those that work on it now."""
        mark = self.folder / name
        return mark.stat().st_size if mark.exists() else 0

    @contextmanager
    def work_on(self, name: str) -> Iterator[None]:
        """Mark a name while this process works on it. The mark stays if the process ends, also by sys.exit."""
        mark = self.folder / name
        with mark.open("ab") as stream:
            stream.write(b".")
        try:
            yield
        except Exception:
            mark.unlink(missing_ok=True)
            raise
        mark.unlink(missing_ok=True)

    def load(self, name: str, others: int, make: Callable[[], T]) -> T:
        """Load a model, unless MAX_DEATHS processes died while they loaded it.

        Args:
            name: name of the mark.
            others: number of processes that may load the model at the same time; their marks do not count as deaths.
            make: loads the model.

        Raises:
            WorkersDied: MAX_DEATHS processes died.
            Exception: any error of `make`.
        """
        if self.deaths(name) >= MAX_DEATHS + others:
            raise WorkersDied("workers died again and again while they loaded the model")
        with self.work_on(name):
            return make()


class StoredMarks(Marks):
    """Marks in a store: a folder of each name, with an object for each process."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def clear(self) -> None:
        for name, _ in list(self.place.files()):
            remove(self.place / name)

    def forget(self, name: str) -> None:
        for mark, _ in list((self.place / name).files()):
            remove(self.place / name / mark)

    def deaths(self, name: str) -> int:
        return sum(1 for _ in (self.place / name).files())

    @contextmanager
    def work_on(self, name: str) -> Iterator[None]:
        mark = self.place / name / uuid.uuid4().hex
        put(mark, b".")
        try:
            yield
        except Exception:
            remove(mark)
            raise
        remove(mark)


def marks_in(folder: Where) -> Marks:
    """The marks of a job in a folder or in a store."""
    return StoredMarks(folder) if isinstance(folder, Place) else Marks(folder)


class Attempt:
    """One attempt at a unit of work, such as a shard. A file lists the current items for the attempt after a death.

    The file holds {"flight": numbers of the current items, "deaths": {number: deaths while that item was alone}}.
    After a death, the next attempt processes each item of "flight" alone, to find the lethal one.

    Attributes:
        deaths: processes that died over an item while it was processed alone, by its number.
        suspects: items of an attempt that died; each must be processed alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.deaths: Counter[int] = Counter()
        self.suspects: set[int] = set()
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return
        self.deaths.update({int(item): count for item, count in record["deaths"].items()})
        if len(record["flight"]) == 1:
            self.deaths[record["flight"][0]] += 1
        self.suspects = set(record["flight"]) | set(self.deaths)

    @property
    def lethal(self) -> list[int]:
        """Items over which MAX_DEATHS processes died."""
        return [item for item, count in self.deaths.items() if count >= MAX_DEATHS]

    def work_on(self, items: Sequence[int]) -> None:
        """Record the items that this attempt processes from now on."""
        replace_file(self.path, json.dumps({"flight": list(items), "deaths": self.deaths}).encode())

    def finish(self) -> None:
        """The unit is complete: remove the file."""
        self.path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *patterns: str) -> None:
    """Remove temporary files of killed writers: the files that match the globs, by default those of the folder itself.

    Args:
        folder: a folder of ours.
        patterns: globs of files below `folder`; without any, LEFTOVERS.
    """
    for pattern in patterns or (LEFTOVERS,):
        for stale in folder.glob(pattern):
            stale.unlink(missing_ok=True)
