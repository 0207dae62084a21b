"""What a corpus' sources held when they were last listed: a replay works on that, and a new file stays out.

work/listing.jsonl: {"skipped", "by"}, then a line per part. The entries of files and addresses are in work/parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from components.corpora import CorpusSpec
from pipelines.errors import Failure, UsageError
from pipelines.rows import iter_lines, replace_file
from pipelines.sources.files import entry_again
from pipelines.sources.parts import Listing, Part, about, archive_parts, list_digest, write_list


def save_listing(listing: Listing, out: Path, by: str) -> None:
    """Remember a listing, and which verb made it: "curate" or "replay"."""
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
            f"{out} does not know any more what its sources held (work/ was deleted, or an older version made it): "
            "run `restoray curate` again, which also tries what was refused."
        )
    return Listing(parts=[Part(**row) for row in rows], skipped=head["skipped"]), head["by"]


def list_tried(listing: Listing, spec: CorpusSpec, out: Path, tried: Callable[[Part], Collection[str]]) -> Listing:
    """The listing with fresh sizes and times of what is to be tried again; what was not listed then stays out.

    Args:
        tried: `source` of each row of a part that is to be tried again.

    Raises:
        UsageError: a later run listed the sources anew and did not come to its end.
    """
    parts: list[Part] = []
    for (number, path), group in groupby(listing.parts, key=lambda part: (part.source, part.where.get("path"))):
        together, source = list(group), spec.sources[number]
        if path is None:
            parts += (_list_again(part, spec, out, tried(part)) for part in together)
            continue
        if any(tried(part) for part in together):  # a tar or a table is read as a whole
            with suppress(UsageError, Failure, OSError):  # it is gone: its rows say so when they are tried
                together = archive_parts(number, source, path, together[0].where["label"])
        parts += together
    return Listing(parts=parts, skipped=listing.skipped)


def _list_again(part: Part, spec: CorpusSpec, out: Path, tried: Collection[str]) -> Part:
    if not tried:
        return part
    source, folder = spec.sources[part.source], out / "work" / "parts"
    path = folder / part.where["list"]
    if not path.is_file() or list_digest(path.read_bytes(), about(source)) != part.digest:
        raise unfinished(out)
    if source.kind == "urls":
        return part
    data = "".join(_lines_again(path, part, spec, tried)).encode()
    return write_list(part.source, part.name, data, folder, about(source))


def _lines_again(path: Path, part: Part, spec: CorpusSpec, tried: Collection[str]) -> Iterator[str]:
    for row in iter_lines(path):
        entry = entry_again(row, spec.sources[part.source]) if row["source"] in tried else None
        if entry is not None:
            row = {name: value for name, value in asdict(entry).items() if value not in ("", 0, None)}
        yield json.dumps(row, sort_keys=True) + "\n"


def unfinished(out: Path) -> UsageError:
    """The error for a folder whose last curation did not come to its end."""
    return UsageError(f"the last curation into {out} did not come to its end: run it again first, then replay.")
