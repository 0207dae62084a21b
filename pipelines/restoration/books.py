"""The records and the quarantine of a restoration job, kept by the driver in the output folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from components.picture_files import read_result_text
from components.writing import LEFTOVERS
from pipelines.core.console import Progress
from pipelines.core.deaths import marks_in, remove_leftovers
from pipelines.core.errors import Failure, RetryLater, UsageError
from pipelines.core.places.journals import Journal
from pipelines.core.places.leases import Lease
from pipelines.core.places.place import Place, Where
from pipelines.restoration.parts import Part, Source
from pipelines.restoration.shards import is_shard
from pipelines.restoration.worker import Answer

RECORD_FIELDS, QUARANTINE_FIELDS = ("key", "output", "output_sha256", "model_digest"), ("key", "code")
MAX_EQUAL_FAILURES = 3  # equal failures of the first pictures end the job: then the job is wrong, not the pictures


class Books:
    """Records, quarantine and marks of one output folder, here or in a store.

    Args:
        out: the folder.
        lease: the job's lease, see folders.job_lock.
        suffixes: of the results that the job may write.

    Attributes:
        rejects: rows of the earlier quarantine by key, once `open` has run.
    """

    def __init__(self, out: Where, lease: Lease | None = None, suffixes: Sequence[str] = (".png",)) -> None:
        self.out, self.lease, self.suffixes = out, lease, suffixes
        self.records, self.quarantine = out / "records.jsonl", out / "quarantine.jsonl"
        self.marks = out / ".attempts"
        self.rejects: dict[str, dict[str, Any]] = {}

    def open(self, sources: Mapping[str, Source], shards: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Clean up after an earlier job and return the newest record by key. Only a newer record replaces a record.

        Args:
            sources: the pictures by key.
            shards: tars or tables that hold the results, if they are no files.

        Raises:
            UsageError: a result or a list would overwrite a file of another program or of another command.
            Failure: the folder cannot be written.
        """
        try:
            records = {record["key"]: record for record in self._journal(self.records).read(RECORD_FIELDS)}
            rejects = self._journal(self.quarantine).read(QUARANTINE_FIELDS)
            self.rejects = {row["key"]: row for row in rejects}
            if shards is None:
                self._check_outputs(sources, records)
            else:
                self._check_shards(shards, records)
            marks_in(self.marks).clear()
            if isinstance(self.out, Path):
                remove_leftovers(self.out, f"**/{LEFTOVERS}")
            self._journal(self.records).write(list(records.values()))
            self._journal(self.quarantine).write([q for q in rejects if q["key"] not in sources])
        except OSError as error:
            raise Failure(f"cannot write to {self.out}: {error.strerror or error}") from error
        return records

    def _journal(self, path: Where) -> Journal:
        return Journal(path, self.lease)

    def _check_outputs(self, sources: Mapping[str, Source], records: Mapping[str, Any]) -> None:
        names = {name for name, _ in self.out.files()} if isinstance(self.out, Place) else None
        for key, source in sources.items():
            for name in [f"{key}{suffix}" for suffix in self.suffixes]:
                path = self.out / name
                if name not in names if names is not None else not os.path.lexists(str(path)):
                    continue
                recorded = records.get(key, {}).get("output") == name
                if _same(path, source) or (not recorded and not _is_result(path, key, source)):
                    raise UsageError(
                        f"{path} would be overwritten, and no record lists it as a result of an earlier job; "
                        "choose another output folder"
                    )

    def _check_shards(self, shards: Sequence[str], records: Mapping[str, Any]) -> None:
        recorded = {record["output"] for record in records.values()}
        for name in shards:
            path = self.out / name
            if path.exists() and name not in recorded and not is_shard(path):
                raise UsageError(f"{path} would be overwritten, and it is no result; choose another output folder")

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
                self._journal(self.records).open() as records,
                self._journal(self.quarantine).open() as quarantine,
            ):
                for number, answer in enumerate(answers, start=1):
                    status, row = answer.status, answer.row
                    if status == "fatal":
                        raise (RetryLater if row.get("later") else Failure)(row["detail"])
                    counts[status] += 1
                    if status != "skipped":
                        (records if status == "restored" else quarantine).append(row)
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
        quarantine = sorted(self._journal(self.quarantine).read(), key=itemgetter("key"))
        bad = {row["key"] for row in quarantine}
        newest = {row["key"]: row for row in self._journal(self.records).read()}
        # an earlier result of a picture that is refused now stays, but not in a shard, which was written without it
        stay = {key for key in bad & set(newest) if "member" not in newest[key]}
        exist = {key for key in stay if (self.out / newest[key]["output"]).exists()}
        records = {key: row for key, row in newest.items() if key not in bad or key in exist}
        self._journal(self.records).write(sorted(records.values(), key=itemgetter("key")))
        self._journal(self.quarantine).write(quarantine)

    def _check_hope(self, counts: Mapping[str, int], reasons: Sequence[str], of: int, row: Mapping[str, Any]) -> None:
        """End a job if all its first pictures fail in the restorer for the same reason, such as a wrong option."""
        if row["code"] not in ("refused", "failed", "no_view") or len(set(reasons)) > 1:
            return
        if counts["restored"] + counts["skipped"]:
            return
        if len(reasons) >= min(MAX_EQUAL_FAILURES, of):
            kind = Failure if row["code"] == "failed" else UsageError
            raise kind(f"nothing can be restored: {row['detail']}")


def _same(path: Where, source: Source) -> bool:
    if isinstance(source, Part):
        return False
    if isinstance(path, Place) or isinstance(source, Place):
        return path == source
    return path.resolve() == source.resolve()


def _is_result(path: Where, key: str, source: Source) -> bool:
    """Whether a result's text names this key and source: then a job was killed before it wrote the record."""
    try:
        text = read_result_text(path.read_bytes())
        sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    except (OSError, ValueError):  # SampleError is a ValueError
        return False
    return (text.get("software"), text.get("key"), text.get("source_sha256")) == ("restoray", key, sha256)
