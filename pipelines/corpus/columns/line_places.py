"""Where the line of a picture is, for millions of pictures in several files: 16 bytes of memory each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

RUN = 65_536  # places that are collected in a dictionary before they are sorted into an array
OFFSET_BITS = 44  # of a place: 16 TiB in each of a million files


class LinePlaces:
    """Maps a sha256 to the file and offset of its line; the first place of a sha256 stays.

    Only 8 bytes of a sha256 are held. Two of 20 million share them with a probability of 1e-5; the second then has no
    place. So a reader compares the whole sha256 with that of the line, and takes another line for none.
    """

    def __init__(self) -> None:
        self._files: list[Path] = []
        self._numbers: dict[Path, int] = {}
        self._new: dict[int, int] = {}
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # ascending keys, and their places; each run is shorter

    def add(self, name: bytes, path: Path, offset: int) -> None:
        """Note a line. Does nothing if the sha256 has a place."""
        if name in self:
            return
        if path not in self._numbers:
            self._numbers[path] = len(self._files)
            self._files.append(path)
        self._new[int.from_bytes(name[:8])] = self._numbers[path] << OFFSET_BITS | offset
        if len(self._new) >= RUN:
            self._sort()

    def find(self, name: bytes) -> tuple[Path, int] | None:
        """(file, offset) of a sha256; None without a place."""
        key = int.from_bytes(name[:8])
        place = self._new.get(key)
        for keys, places in self._runs if place is None else ():
            row = int(np.searchsorted(keys, np.uint64(key)))
            if row < len(keys) and int(keys[row]) == key:
                place = int(places[row])
                break
        if place is None:
            return None
        return self._files[place >> OFFSET_BITS], place & ((1 << OFFSET_BITS) - 1)

    def __contains__(self, name: bytes) -> bool:
        return self.find(name) is not None

    def __len__(self) -> int:
        return len(self._new) + sum(len(keys) for keys, _ in self._runs)

    def _sort(self) -> None:
        """Make a run of the new places, and merge runs of similar length, so that a search looks at few."""
        keys = np.fromiter(self._new.keys(), np.uint64, len(self._new))
        places = np.fromiter(self._new.values(), np.uint64, len(self._new))
        self._new = {}
        self._runs.append(_sorted(keys, places))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            second, first = self._runs.pop(), self._runs.pop()
            self._runs.append(_sorted(np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])))


def _sorted(keys: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys, kind="stable")
    return keys[order], places[order]
