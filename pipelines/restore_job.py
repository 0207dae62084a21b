"""The driver's books of a restoring job: records and quarantine of one output folder, which one job at a time holds."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from components.images import read_png_text
from components.types import SampleError
from pipelines.console import Progress
from pipelines.errors import Failure, RetryLater, UsageError
from pipelines.rows import read_lines, write_lines

HOPELESS = 3  # equal failures from the first picture on, none restored: the job is wrong, not the pictures


def marks_folder(out: Path) -> Path:
    """Where workers leave the marks of what they are working on."""
    return out / ".attempts"


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Hold `out` for this process; the kernel lets go when the process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".restore.lock").open("a")
    except OSError as error:
        raise Failure(f"cannot write to {out}: {error.strerror or error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RetryLater(f"another restore is working on {out}") from error
        yield


def _made_from(place: Path, key: str, source: Path) -> bool:
    """Whether a PNG says that it is this key's result from this source: a job was killed before it wrote the record."""
    try:
        text = read_png_text(place.read_bytes())
        made_from = hashlib.sha256(source.read_bytes()).hexdigest()
    except (OSError, SampleError):
        return False
    return (text.get("software"), text.get("key"), text.get("source_sha256")) == ("restoray", key, made_from)


class Job:
    """The driver's books of one output folder: what was made there, and the files that say so."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.records, self.quarantine = out / "records.jsonl", out / "quarantine.jsonl"

    def open(self, sources: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        """Tidy up after an earlier job; returns the newest record by key. A record stays until another replaces it.

        Raises:
            UsageError: a file that is not ours stands where a result would go.
        """
        try:
            records = {record["key"]: record for record in read_lines(self.records)}
            self._check_places(sources, records)
            marks = marks_folder(self.out)
            marks.mkdir(exist_ok=True)
            for stale in (*marks.iterdir(), *self.out.glob(".*.tmp-*")):
                stale.unlink()
            write_lines(self.records, list(records.values()))
            write_lines(self.quarantine, [q for q in read_lines(self.quarantine) if q["key"] not in sources])
        except OSError as error:
            raise Failure(f"cannot write to {self.out}: {error.strerror or error}") from error
        return records

    def _check_places(self, sources: Mapping[str, Path], records: Mapping[str, Any]) -> None:
        for key, source in sources.items():
            place = self.out / f"{key}.png"
            if not os.path.lexists(place):
                continue
            if place.resolve() == source.resolve() or (key not in records and not _made_from(place, key, source)):
                raise UsageError(
                    f"{place} would be overwritten, and no record says that it is a result made there; "
                    "choose another output folder"
                )

    def collect(self, answers: Iterator[dict[str, Any]], of: int, progress: Progress) -> dict[str, int]:
        """Write down what the workers say, as they say it; returns counts by status."""
        counts = {"restored": 0, "quarantined": 0, "skipped": 0}
        reasons: list[str] = []
        progress(0, of)
        try:
            with (
                self.records.open("a", encoding="utf-8") as records,
                self.quarantine.open("a", encoding="utf-8") as quarantine,
            ):
                for number, answer in enumerate(answers, start=1):
                    status, row = answer["status"], answer["row"]
                    if status == "fatal":
                        raise Failure(row["detail"])
                    counts[status] += 1
                    if status != "skipped":
                        target = records if status == "restored" else quarantine
                        target.write(json.dumps(row, ensure_ascii=False) + "\n")
                        target.flush()
                    if status == "quarantined":
                        reasons.append(f"{row['code']}: {row['detail']}")
                        self._check_hope(counts, reasons, of, row)
                    progress(number, of, row["key"])
        except OSError as error:
            raise Failure(f"cannot write to {self.out}: {error.strerror or error}") from error
        told = counts["restored"] + counts["skipped"] + counts["quarantined"]
        if told != of:
            raise Failure(f"{of - told} of {of} pictures came back without an answer; the same command continues")
        self._tidy()
        return counts

    def _tidy(self) -> None:
        """One line a key, in order: arrival depends on timing, the finished files should not."""
        quarantine = sorted(read_lines(self.quarantine), key=itemgetter("key"))
        bad = {row["key"] for row in quarantine}
        every = {row["key"]: row for row in read_lines(self.records)}
        records = {key: row for key, row in every.items() if key not in bad or (self.out / row["output"]).exists()}
        write_lines(self.records, sorted(records.values(), key=itemgetter("key")))
        write_lines(self.quarantine, quarantine)

    def _check_hope(self, counts: Mapping[str, int], reasons: Sequence[str], of: int, row: Mapping[str, Any]) -> None:
        """End a job whose every picture fails in the restorer for one reason, such as a misspelt option."""
        if row["code"] not in ("refused", "failed", "no_view") or len(set(reasons)) > 1:
            return
        if counts["restored"] + counts["skipped"]:
            return
        if len(reasons) >= min(HOPELESS, of):
            kind = Failure if row["code"] == "failed" else UsageError
            raise kind(f"nothing can be restored: {row['detail']}")
