"""Cut sources into parts, the units of work of a curation. The driver holds a few hundred bytes of each part.

A part is one tar, one row group of a parquet file, or about a hundred files or addresses. Hashes of names decide where
runs of files and addresses are cut, so a new file changes only its own part.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.corpora import CorpusSpec, SourceSpec
from components.writing import replace_file
from pipelines.core.errors import UsageError, first_line, near_miss
from pipelines.core.pictures import SIDECARS, is_system_name
from pipelines.corpus import shards
from pipelines.curation.sources import stores
from pipelines.curation.sources.address_tables import MARKERS, address_lines
from pipelines.curation.sources.files import (
    KINDS,
    Entry,
    SkippedFiles,
    held_out_is_missing,
    iter_entries,
    nothing_to_curate,
)
from pipelines.curation.sources.objects import in_any_order
from pipelines.curation.sources.texts import check_text_columns

SMALLEST, USUAL, LARGEST = 8, 64, 256
"""Entries of a part of single files: least, usual and largest number. Ours: a part is some seconds of work."""

INDICES = (".idx", ".index", ".crc")  # of webdataset, DALI and Hadoop, beside tars and tables

ADDRESSES = (32, 256, 1024)
"""The same numbers for addresses, many of which are fetched at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One unit of work.

    Attributes:
        source: number of its source in the spec.
        name: name of its files in work/; the same in every run.
        digest: digest of its content.
        where: {"list": file in work/parts} or {"path", "size"} of a tar, or {"path", "group"} of a parquet file.
    """

    source: int
    name: str
    digest: str
    where: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """All parts in the order of the sources.

    Attributes:
        parts: the parts.
        skipped: number of sidecar and hidden files.
        sentences: on tables in folders: pictures without a row, and rows without a picture.
    """

    parts: list[Part]
    skipped: int
    sentences: Sequence[str] = ()


def list_parts(spec: CorpusSpec, out: Path) -> Listing:
    """List every source; entries of files and addresses go to work/parts below `out`.

    Raises:
        UsageError: a source is missing or empty, or no source has a held-out picture that the spec names.
        Failure: a store or a table cannot be read.
    """

    def work(is_sorted: bool) -> Listing:
        facts = SkippedFiles()
        parts = list(iter_parts(spec, out, facts, is_sorted))
        return Listing(parts=parts, skipped=facts.count, sentences=facts.sentences)

    return in_any_order(work)


def iter_parts(spec: CorpusSpec, out: Path, skipped: SkippedFiles, is_sorted: bool = False) -> Iterator[Part]:
    """The parts of `list_parts`, one at a time while the sources are listed; errors come where they are seen.

    Args:
        skipped: gets the number of skipped files, and the sentences.
        is_sorted: sort the listings of stores on disk, see objects.py.

    Raises:
        UsageError, Failure: as `list_parts`.
        OutOfOrder: a store lists in another order, and `is_sorted` is not set.
    """
    held_out = {shards.safe_key(name): name for name in spec.split.held_out}
    some: list[str] = []  # keys for suggestions; a spec that names pictures is small
    names: set[bytes] = set()
    for number, source in enumerate(spec.sources):
        for part in _parts_of(number, source, spec, out, (held_out, some), skipped, is_sorted):
            name = hashlib.sha256(part.name.encode()).digest()[:12]  # a third of the name's memory
            if name in names:
                raise UsageError(f"{spec.name}: two sources name the same files.")
            names.add(name)
            yield part
    if not names:
        raise nothing_to_curate(spec)
    if held_out and all(source.kind in KINDS for source in spec.sources):
        raise held_out_is_missing(spec, next(iter(held_out.values())), some)
    folder = out / "work" / "parts"
    for stale in folder.glob("*.jsonl") if folder.is_dir() else ():
        if hashlib.sha256(stale.stem.encode()).digest()[:12] not in names:
            stale.unlink()


def _parts_of(
    number: int,
    source: SourceSpec,
    spec: CorpusSpec,
    out: Path,
    keys: tuple[dict[str, str], list[str]],
    skipped: SkippedFiles,
    is_sorted: bool,
) -> Iterator[Part]:
    """The parts of one source; `keys` are held out and seen so far, as of `_file_line`."""
    folder = out / "work" / "parts"
    if source.kind in KINDS:
        lines = (_file_line(entry, *keys) for entry in iter_entries(source, out, skipped, is_sorted))
        yield from _write_lists(number, lines, folder, (SMALLEST, USUAL, LARGEST), "")
    elif not source.path:
        raise UsageError(f"{spec.name}: source {number} ({source.kind}) needs a path: sources.{number}.path=...")
    elif source.kind == "tar":
        yield from (_tar(number, archive) for archive in _archives(source, out, is_sorted))
    elif source.kind == "parquet":
        for archive in _archives(source, out, is_sorted):
            yield from _row_groups(number, source, archive)
    else:
        yield from _write_lists(number, address_lines(source, is_sorted), folder, ADDRESSES, about(source))


def _file_line(entry: Entry, held_out: dict[str, str], some: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and line of an entry. Its key is removed from `held_out`, and added to `some` up to a number."""
    if held_out:
        held_out.pop(entry.key, None)
        if len(some) < 100_000:
            some.append(entry.key)
    return entry.source, entry.to_line()


def _write_lists(
    number: int, lines: Iterable[tuple[str, dict[str, Any]]], folder: Path, sizes: tuple[int, int, int], settings: str
) -> Iterator[Part]:
    """Cut a run of (name, line) into parts, each with its file."""
    smallest, usual, largest = sizes
    texts: list[str] = []
    first, counts = "", Counter[str]()

    def part() -> Part:
        counts[first] += 1  # a list of addresses may hold one twice
        unique = first if counts[first] == 1 else f"{first}|{counts[first]}"
        name = f"{number:02d}-{hashlib.sha256(unique.encode()).hexdigest()[:20]}"
        return write_list(number, name, "".join(texts).encode(), folder, settings)

    for name, line in lines:
        first = first or name
        texts.append(json.dumps(line, sort_keys=True) + "\n")  # ASCII: names on disk need not be text
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        if len(texts) >= largest or (len(texts) >= smallest and place % usual == 0):
            yield part()
            texts, first = [], ""
    if texts:
        yield part()


def write_list(number: int, name: str, data: bytes, folder: Path, settings: str) -> Part:
    """The part of these lines; writes its file."""
    path = folder / f"{name}.jsonl"
    if not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    return Part(source=number, name=name, digest=list_digest(data, settings), where={"list": path.name})


def list_digest(data: bytes, settings: str) -> str:
    """Digest of a part of single files or addresses: of its lines, and of the source's settings, see `about`."""
    return hashlib.sha256(settings.encode() + data).hexdigest()[:32]


def about(source: SourceSpec) -> str:
    """Settings of a source that decide its rows besides its content; entries of files hold them already."""
    if source.kind in KINDS:
        return ""
    names = ("licence", "credit", "image_column", "key_column", "caption_column", "licence_column")
    return json.dumps([getattr(source, name) for name in names])


@dataclass(frozen=True, kw_only=True)
class _Archive:
    """A tar or a parquet file: its path, its name in the source, and its present size and digest."""

    path: str
    label: str
    size: int
    digest: str

    def name(self, number: int) -> str:
        """Name of its part in source `number`."""
        return f"{number:02d}-{hashlib.sha256(self.label.encode()).hexdigest()[:20]}"


def _archives(source: SourceSpec, out: Path, is_sorted: bool) -> Iterator[_Archive]:
    """Files of a source, without hidden ones, sidecars (img2dataset's 00000_stats.json) and our own output."""
    own = f"{out.resolve()}{os.sep}"
    for path, relative, size, version in stores.list_files(source.path, source.storage, is_sorted):
        suffix = "." + relative.rpartition(".")[2].lower()
        is_sidecar = suffix in (*SIDECARS, *INDICES) and suffix != f".{source.kind}"
        is_sidecar = is_sidecar or relative.rpartition("/")[2] in MARKERS
        if is_sidecar or any(map(is_system_name, relative.split("/"))) or os.path.realpath(path).startswith(own):
            continue
        yield _archive(path, relative, size, version, source)


def _archive(path: str, relative: str, size: int, version: str, source: SourceSpec) -> _Archive:
    label = relative.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    digest = hashlib.sha256(f"{label}|{size}|{version}|{about(source)}".encode()).hexdigest()[:32]
    return _Archive(path=path, label=label, size=size, digest=digest)


def archive_parts(number: int, source: SourceSpec, path: str, label: str) -> list[Part]:
    """The parts of one file of a source in its present state; UsageError if it is gone, Failure if unreadable."""
    _, _, size, version = next(stores.list_files(path, source.storage))
    archive = _archive(path, label, size, version, source)
    return [_tar(number, archive)] if source.kind == "tar" else list(_row_groups(number, source, archive))


def _tar(number: int, archive: _Archive) -> Part:
    where = {"path": archive.path, "label": archive.label, "size": archive.size}
    return Part(source=number, name=archive.name(number), digest=archive.digest, where=where)


def _row_groups(number: int, source: SourceSpec, archive: _Archive) -> Iterator[Part]:
    name, digest = archive.name(number), archive.digest
    where = {"path": archive.path, "label": archive.label}
    try:
        with stores.open_file(archive.path, source.storage) as file:
            metadata = pq.ParquetFile(file).metadata
            schema = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:  # the part's only row has this error
        sentence = getattr(error, "strerror", "") or first_line(error)
        yield Part(source=number, name=name, digest=digest, where={**where, "broken": sentence})
        return
    columns = (source.image_column, source.key_column, source.caption_column, source.licence_column)
    for column in filter(None, columns):
        if column not in schema.names:
            raise UsageError(f'{archive.label} has no column "{column}".{near_miss(column, schema.names)}')
    check_text_columns(archive.label, schema, source.caption_column, source.key_column, source.licence_column)
    for group in range(metadata.num_row_groups):
        yield Part(source=number, name=f"{name}-{group:05d}", digest=digest, where={**where, "group": group})
