"""The last listing of a corpus' sources. A replay works on it, so that new files stay out.

work/listing.jsonl: {"skipped", "by"}, then a line per part. The entries of files and addresses are in work/parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from components.corpora import CorpusSpec, SourceSpec
from components.writing import replace_file
from pipelines.core.errors import Failure, UsageError
from pipelines.core.rows import iter_lines
from pipelines.curation.sources.files import Entry, entry_again
from pipelines.curation.sources.parts import Listing, Part, about, archive_parts, list_digest, write_list


def save_listing(listing: Listing, out: Path, by: str) -> None:
    """Store a listing, and the verb that made it: "curate" or "replay"."""
    rows: list[dict[str, Any]] = [{"skipped": listing.skipped, "by": by}, *map(asdict, listing.parts)]
    replace_file(out / "work" / "listing.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def load_listing(out: Path) -> tuple[Listing, str]:
    """The last listing of a corpus, and the verb that made it.

    Raises:
        UsageError: there is none.
    """
    rows = iter_lines(out / "work" / "listing.jsonl")
    head = next(rows, None)
    if head is None or "skipped" not in head:
        raise UsageError(
            f"{out} has no list of its sources (work/ was deleted, or an older version made it): run `restoray curate` "
            "again, which also tries the quarantined pictures."
        )
    return Listing(parts=[Part(**row) for row in rows], skipped=head["skipped"]), head["by"]


def list_again(
    listing: Listing, spec: CorpusSpec, out: Path, sources_to_retry: Callable[[Part], Collection[str]]
) -> Listing:
    """The listing with the present sizes and times of the candidates that are tried again; new files stay out.

    Args:
        sources_to_retry: returns `source` of each row of a part that is tried again.

    Raises:
        UsageError: a later run listed the sources again and did not finish.
    """
    parts: list[Part] = []
    for (number, path), group in groupby(listing.parts, key=lambda part: (part.source, part.where.get("path"))):
        together, source = list(group), spec.sources[number]
        if path is None:
            parts += (_list_part_again(part, spec, out, sources_to_retry(part)) for part in together)
            continue
        if any(sources_to_retry(part) for part in together):  # a tar or a table is read as a whole
            with suppress(UsageError, Failure, OSError):  # it was removed: its rows get that error when they are tried
                together = archive_parts(number, source, path, together[0].where["label"])
        parts += together
    return replace(listing, parts=parts)


def _list_part_again(part: Part, spec: CorpusSpec, out: Path, sources: Collection[str]) -> Part:
    if not sources:
        return part
    source, folder = spec.sources[part.source], out / "work" / "parts"
    path = folder / part.where["list"]
    if not path.is_file() or list_digest(path.read_bytes(), about(source)) != part.digest:
        raise unfinished_error(out)
    if source.kind == "urls":
        return part
    data = "".join(_lines_again(path, source, sources)).encode()
    return write_list(part.source, part.name, data, folder, about(source))


def _lines_again(path: Path, source: SourceSpec, sources: Collection[str]) -> Iterator[str]:
    for line in iter_lines(path):
        entry = Entry.from_line(line)
        if entry.source in sources:
            entry = entry_again(entry, source) or entry
        yield json.dumps(entry.to_line(), sort_keys=True) + "\n"


def unfinished_error(out: Path) -> UsageError:
    """The error for a folder whose last curation did not finish."""
    return UsageError(f"the last curation into {out} did not finish: run it again first, then replay.")
