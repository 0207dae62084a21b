"""The records and the quarantine of a restoration job, kept by the driver in the output folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from components.images import read_png_text
from components.types import SampleError
from components.writing import LEFTOVERS
from pipelines.core.console import Progress
from pipelines.core.deaths import Marks, remove_leftovers
from pipelines.core.errors import Failure, UsageError
from pipelines.core.rows import json_text, own_lines, read_lines, write_lines
from pipelines.restoration.worker import Answer

RECORD_FIELDS, QUARANTINE_FIELDS = ("key", "output", "output_sha256", "model_digest"), ("key", "code")
MAX_EQUAL_FAILURES = 3  # equal failures of the first pictures end the job: then the job is wrong, not the pictures


class Books:
    """Records, quarantine and marks of one output folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.records, self.quarantine = out / "records.jsonl", out / "quarantine.jsonl"
        self.marks = Marks(out / ".attempts")

    def open(self, sources: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
        """Clean up after an earlier job and return the newest record by key. Only a newer record replaces a record.

        Raises:
            UsageError: a result or a list would overwrite a file of another program or of another command.
            Failure: the folder cannot be written.
        """
        try:
            records = {record["key"]: record for record in own_lines(self.records, RECORD_FIELDS)}
            rejects = own_lines(self.quarantine, QUARANTINE_FIELDS)
            self._check_outputs(sources, records)
            self.marks.clear()
            remove_leftovers(self.out, f"**/{LEFTOVERS}")
            write_lines(self.records, list(records.values()))
            write_lines(self.quarantine, [q for q in rejects if q["key"] not in sources])
        except OSError as error:
            raise Failure(f"cannot write to {self.out}: {error.strerror or error}") from error
        return records

    def _check_outputs(self, sources: Mapping[str, Path], records: Mapping[str, Any]) -> None:
        for key, source in sources.items():
            path = self.out / f"{key}.png"
            if not os.path.lexists(path):
                continue
            if path.resolve() == source.resolve() or (key not in records and not _is_result(path, key, source)):
                raise UsageError(
                    f"{path} would be overwritten, and no record lists it as a result of an earlier job; "
                    "choose another output folder"
                )

    def collect(self, answers: Iterator[Answer], of: int, progress: Progress) -> dict[str, int]:
        """Write the workers' answers as they arrive; return counts by status.

        Raises:
            Failure: a worker cannot load the model or write results, the lists cannot be written, answers are missing,
                or the first pictures fail for the same reason.
            UsageError: the first pictures are refused for the same reason.
        """
        counts = {"restored": 0, "quarantined": 0, "skipped": 0}
        reasons: list[str] = []
        progress(0, of)
        try:
            with (
                self.records.open("a", encoding="utf-8") as records,
                self.quarantine.open("a", encoding="utf-8") as quarantine,
            ):
                for number, answer in enumerate(answers, start=1):
                    status, row = answer.status, answer.row
                    if status == "fatal":
                        raise Failure(row["detail"])
                    counts[status] += 1
                    if status != "skipped":
                        target = records if status == "restored" else quarantine
                        target.write(json_text(row) + "\n")
                        target.flush()
                    if status == "quarantined":
                        reasons.append(f"{row['code']}: {row['detail']}")
                        self._check_hope(counts, reasons, of, row)
                    progress(number, of, row["key"])
        except OSError as error:
            raise Failure(f"cannot write to {self.out}: {error.strerror or error}") from error
        total = counts["restored"] + counts["skipped"] + counts["quarantined"]
        if total != of:
            raise Failure(f"{of - total} of {of} pictures came back without an answer; the same command continues")
        self._sort_files()
        return counts

    def _sort_files(self) -> None:
        """Rewrite both files with one line per key, sorted by key: the order of arrival depends on timing."""
        quarantine = sorted(read_lines(self.quarantine), key=itemgetter("key"))
        bad = {row["key"] for row in quarantine}
        newest = {row["key"]: row for row in read_lines(self.records)}
        records = {key: row for key, row in newest.items() if key not in bad or (self.out / row["output"]).exists()}
        write_lines(self.records, sorted(records.values(), key=itemgetter("key")))
        write_lines(self.quarantine, quarantine)

    def _check_hope(self, counts: Mapping[str, int], reasons: Sequence[str], of: int, row: Mapping[str, Any]) -> None:
        """End a job if all its first pictures fail in the restorer for the same reason, such as a wrong option."""
        if row["code"] not in ("refused", "failed", "no_view") or len(set(reasons)) > 1:
            return
        if counts["restored"] + counts["skipped"]:
            return
        if len(reasons) >= min(MAX_EQUAL_FAILURES, of):
            kind = Failure if row["code"] == "failed" else UsageError
            raise kind(f"nothing can be restored: {row['detail']}")


def _is_result(path: Path, key: str, source: Path) -> bool:
    """Whether a PNG's text names this key and source: then a job was killed before it wrote the record."""
    try:
        text = read_png_text(path.read_bytes())
        sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    except (OSError, SampleError):
        return False
    return (text.get("software"), text.get("key"), text.get("source_sha256")) == ("restoray", key, sha256)
