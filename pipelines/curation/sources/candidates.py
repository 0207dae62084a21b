"""Candidates of a part, one after the other, inside the task that measures it; later their bytes once more.

`at` is a small JSON text with the place of a candidate's bytes: a file, an offset in a tar, a row of a parquet file, a
fetched body, or the three numbers of a synthetic picture. It holds paths of the machine, so it never leaves work/.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from components.corpora import FILE_SIZE_OPTION, CorpusSpec, SourceSpec
from components.images import encode_png
from components.secrets import without_user
from components.synthetic import dead_leaves
from components.text_files import decode_text
from components.types import SampleError
from pipelines.core.errors import RestorayError, first_line
from pipelines.core.places.patience import StoreUnavailable
from pipelines.core.rows import iter_lines
from pipelines.corpus import shards
from pipelines.curation.sources import stores, tars
from pipelines.curation.sources.ahead import map_ahead
from pipelines.curation.sources.fetch import FetchedFile, Fetcher, fetch_many
from pipelines.curation.sources.files import Entry
from pipelines.curation.sources.parts import Part
from pipelines.curation.sources.spool import Spool, new_file, spooled
from pipelines.curation.sources.tars import printable_name
from pipelines.curation.sources.texts import (
    CAPTION_FIELDS,
    CAPTION_SUFFIXES,
    LICENCE_FIELDS,
    caption_of,
    caption_of_bytes,
    first_caption,
    key_of,
    plain,
    read_caption_file,
    read_stored_caption,
    tidy_caption,
    tidy_note,
)


@dataclass(kw_only=True)
class Candidate:
    """A picture that may become a sample.

    Attributes:
        id: identity of the picture, the same in every run.
        key, source, licence, credit, caption: for the manifest.
        size: size in bytes, if listing gives it.
        at: place of its bytes.
        problem, stage: error of the picture before it was measured, and its stage; then nothing is loaded.
        load: returns its bytes or raises a SampleError. None if the caller has a row of it already.
        keep: stores the bytes of a fetched picture and sets `at`.
    """

    id: str
    key: str
    source: str
    licence: str = ""
    credit: str = ""
    caption: str = ""
    size: int = 0
    at: str = ""
    problem: SampleError | None = None
    stage: str = "list"
    load: Callable[[], bytes] | None = None
    keep: Callable[[bytes], None] | None = None


def candidates(part: Part, spec: CorpusSpec, out: Path, has_row: Callable[[str], bool]) -> Iterator[Candidate]:
    """All candidates of a part, in their order.

    Args:
        has_row: whether there is a measured row of an id, so that the bytes are not needed.
    """
    source = spec.sources[part.source]
    if source.kind == "tar":
        yield from _kept(_of_tar(part, source, Bytes(spec, out)), part, spec, out)
    elif source.kind == "parquet":
        yield from _kept(_of_row_group(part, source, spec), part, spec, out)
    elif source.kind == "urls":
        yield from _of_addresses(part, source, spec, out, has_row)
    else:
        yield from _of_files(part, spec, out, has_row)


def _kept(items: Iterator[Candidate], part: Part, spec: CorpusSpec, out: Path) -> Iterator[Candidate]:
    """Candidates of an archive; those of one in a store are spooled."""
    if not stores.is_address(part.where["path"]):
        yield from items
        return
    spool = Spool(out, part.name, spec.spool_gib)
    try:
        for candidate in items:
            candidate.keep = spool.keeper(candidate) if candidate.at else None
            yield candidate
    finally:
        spool.close()


def _of_files(part: Part, spec: CorpusSpec, out: Path, has_row: Callable[[str], bool]) -> Iterator[Candidate]:
    reader, storage = Bytes(spec, out), spec.sources[part.source].storage
    entries = map(Entry.from_line, iter_lines(out / "work" / "parts" / part.where["list"]))
    if not stores.is_address(spec.sources[part.source].path):
        yield from (_of_file(entry, part, spec, reader) for entry in entries)
        return

    def fetch(job: tuple[Candidate, Entry]) -> bytes | None:
        """The caption, and the picture if it is needed."""
        candidate, entry = job
        if entry.caption_path:
            try:
                candidate.caption = read_stored_caption(entry.caption_path, storage)
            except SampleError as error:
                candidate.problem = candidate.problem or SampleError(error.code, error.detail, entry.key)
        return None if candidate.problem or has_row(candidate.id) else reader.read(candidate.at, candidate.key)

    spool = Spool(out, part.name, spec.spool_gib)
    jobs = ((_of_file(entry, part, spec, reader, is_stored=True), entry) for entry in entries)
    try:
        for (candidate, _), future in map_ahead(fetch, jobs, spec.requests, lambda job: job[0].size):
            candidate.load = _result_of(future)
            candidate.keep = spool.keeper(candidate)
            yield candidate
    finally:
        spool.close()


def _result_of(future: Future[bytes | None]) -> Callable[[], bytes]:
    def load() -> bytes:
        data = future.result()
        assert data is not None, "the bytes of a row that exists are not loaded"
        return data

    return load


def _of_file(entry: Entry, part: Part, spec: CorpusSpec, reader: Bytes, is_stored: bool = False) -> Candidate:
    """The candidate of a file; the caption file of an object is left to the caller, and its version to the id."""
    place = json.dumps({"leaves": entry.leaves} if entry.leaves else {"source": part.source, "path": entry.path})
    version = f"{entry.source}|{entry.size}|{entry.mtime_ns}|{entry.version}"
    candidate = Candidate(
        id=_short(version),
        key=entry.key,
        source=entry.source,
        licence=entry.licence,
        credit=entry.credit,
        size=entry.size,
        at=place,
        problem=SampleError(*entry.refused, entry.key) if entry.refused else None,
    )
    candidate.caption = entry.caption
    if entry.caption_path:
        stamp = f"|{entry.caption_version}"
        try:
            if not is_stored:
                candidate.caption, stamp = read_caption_file(entry.caption_path)
        except SampleError as error:
            candidate.problem = candidate.problem or SampleError(error.code, error.detail, entry.key)
        candidate.id = _short(version + stamp)
    limit = spec.filters.limits().max_bytes
    if not entry.refused and candidate.size > limit and not entry.leaves:
        detail = f"{candidate.size} bytes exceed the limit of {limit} bytes ({FILE_SIZE_OPTION})"
        candidate.problem = SampleError("too_large", detail, candidate.key)
    candidate.load = _loader(reader, place, candidate.key)
    return candidate


def _loader(reader: Bytes, at: str, key: str) -> Callable[[], bytes]:
    return lambda: reader.read(at, key)


def _of_tar(part: Part, source: SourceSpec, reader: Bytes) -> Iterator[Candidate]:
    path, label = part.where["path"], part.where["label"]
    archive = f"tar:{label}"
    number = 0
    try:
        file = stores.open_file(path, source.storage)
    except (OSError, RestorayError) as error:
        problem = SampleError("unreadable", f"{label}: {_sentence(error)}", shards.safe_key(label))
        yield Candidate(id=_short(archive), key=problem.key, source=archive, problem=problem)
        return
    archive_id = f"{archive}|{part.digest}"
    with file:
        for item in tars.read_tar(file, part.where["size"], label, reader.limit):
            if isinstance(item, tars.TarProblem):
                number += 1
                key = shards.safe_key(item.key) if item.key else shards.safe_key(label)
                problem = SampleError(item.code, item.detail, key)
                name = f"{archive}/{item.key}" if item.key else archive
                yield Candidate(id=_short(f"{archive_id}|{name}|{number}"), key=key, source=name, problem=problem)
                continue
            yield from _of_sample(item, archive, archive_id, part, source, reader)


def _of_sample(
    sample: tars.TarSample, archive: str, archive_id: str, part: Part, source: SourceSpec, reader: Bytes
) -> Iterator[Candidate]:
    """A candidate for each picture of a sample: `a.v1.jpg` and `a.v2.jpg` are two pictures."""
    problem: SampleError | None = None
    try:
        caption, licence, credit = _texts_of(sample.members, source)
    except SampleError as error:
        (caption, licence, credit), problem = ("", source.licence, source.credit), error
    pictures = [s for s in sample.offsets if s.rpartition(".")[2].lower() in shards.PICTURE_EXTENSIONS]
    for suffix in pictures:
        name = f"{sample.key}.{suffix}"
        offset, size = sample.offsets[suffix], sample.sizes[suffix]
        at = json.dumps({"source": part.source, "path": part.where["path"], "offset": offset, "size": size})
        key = shards.safe_key(name[: len(name) - len(suffix.rpartition(".")[2]) - 1])
        in_memory = suffix in sample.members  # a larger picture is read again from its place
        yield Candidate(
            id=_short(f"{archive_id}|{offset}"),
            key=key,
            source=f"{archive}/{name}",
            licence=licence,
            credit=credit,
            caption=caption,
            size=size,
            at=at,
            problem=SampleError(problem.code, problem.detail, key) if problem else None,
            load=_return(sample.members[suffix]) if in_memory else _loader(reader, at, key),
        )
    if not pictures:
        offset, key = min(sample.offsets.values()), shards.safe_key(sample.key)
        names = ", ".join(sorted(sample.members))[:1000]
        none = SampleError("no_picture", f"the sample holds {names} and no picture that we read", key)
        yield Candidate(id=_short(f"{archive_id}|{offset}"), key=key, source=f"{archive}/{sample.key}", problem=none)


def _return(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _texts_of(members: Mapping[str, bytes], source: SourceSpec) -> tuple[str, str, str]:
    """(caption, licence, credit) from a sample's text and JSON members.

    Raises:
        SampleError: bad_caption or not_text: a caption cannot be read; bad_json: a document cannot, and no other member
            holds a caption.
    """
    caption, licence, credit = "", source.licence, source.credit
    broken: SampleError | None = None
    texts = {suffix: data for suffix, data in members.items() if _kind(suffix) in CAPTION_SUFFIXES}
    for suffix in sorted(texts, key=lambda suffix: CAPTION_SUFFIXES.index(_kind(suffix))):
        caption = caption or caption_of_bytes(texts[suffix], f".{suffix}")
    for suffix, data in members.items():
        if _kind(suffix) != "json":
            continue
        try:
            document = json.loads(decode_text(data))
        except SampleError as error:
            broken = SampleError(error.code, f"its .{printable_name(suffix)} cannot be decoded: {error.detail}")
            continue
        except (ValueError, RecursionError):  # RecursionError: thousands of brackets
            broken = SampleError("bad_json", f"its .{printable_name(suffix)} is no JSON document")
            continue
        if isinstance(document, str | list) and not source.caption_column:
            with suppress(SampleError):  # lists of boxes and other annotations hold no texts
                caption = caption_of(document, f".{suffix}") or caption
        if isinstance(document, dict):
            names = (source.caption_column,) if source.caption_column else CAPTION_FIELDS
            caption = first_caption(document, names, f".{suffix}") or caption
            text = {name: value for name, value in document.items() if isinstance(value, str | int)}
            licences = (plain(text.get(name), name) for name in LICENCE_FIELDS)
            licence = next(filter(None, licences), licence)
            credit = plain(text.get("credit"), "credit") or credit
    if broken is not None and not caption:
        raise broken
    return caption, tidy_note(licence), tidy_note(credit)


def _kind(suffix: str) -> str:
    """The last part of a suffix, in lower case."""
    return suffix.rpartition(".")[2].lower()


def _of_row_group(part: Part, source: SourceSpec, spec: CorpusSpec) -> Iterator[Candidate]:
    label = f"parquet:{part.where['label']}"
    key = shards.safe_key(part.where["label"])
    if "broken" in part.where:
        problem = SampleError("corrupt", f"not a readable parquet file: {part.where['broken']}", key)
        yield Candidate(id=_short(label), key=key, source=label, problem=problem)
        return
    group = part.where["group"]
    reader = Bytes(spec, Path())
    try:
        rows = reader.row_group(part.source, part.where["path"], group)
    except SampleError as error:
        problem = SampleError(error.code, error.detail, key)
        yield Candidate(id=_short(f"{label}|{part.digest}"), key=key, source=f"{label}#{group}", problem=problem)
        return
    for number in range(rows.num_rows):
        row = {name: rows.column(name)[number].as_py() for name in rows.column_names if name != source.image_column}
        own = f"{part.where['label'].rpartition('.')[0]}-{group:05d}-{number:06d}"
        candidate = Candidate(
            id=_short(f"{label}|{part.digest}|{number}"),
            key=shards.safe_key(own),
            source=f"{label}#{group}/{number}",
            licence=source.licence,
            credit=source.credit,
            at=json.dumps({"source": part.source, "path": part.where["path"], "group": group, "row": number}),
        )
        try:
            if source.key_column:
                candidate.key = shards.safe_key(key_of(row[source.key_column], f'the column "{source.key_column}"'))
            if source.licence_column:
                candidate.licence = plain(row[source.licence_column], source.licence_column) or source.licence
            if source.caption_column:
                candidate.caption = caption_of(row[source.caption_column], f'the column "{source.caption_column}"')
        except SampleError as error:
            candidate.problem = SampleError(error.code, error.detail, candidate.key)
        candidate.load = _loader(reader, candidate.at, candidate.key)
        yield candidate


def _of_addresses(
    part: Part, source: SourceSpec, spec: CorpusSpec, out: Path, has_row: Callable[[str], bool]
) -> Iterator[Candidate]:
    rows = list(iter_lines(out / "work" / "parts" / part.where["list"]))
    fresh = [row for row in rows if "refused" not in row and not has_row(_short(row["url"]))]
    spool = _Spool(out, part.name)
    try:
        with Fetcher(spec.download, spec.filters.limits().max_bytes) as fetcher:
            answers = iter(fetch_many(fetcher, [(row["key"], row["url"]) for row in fresh]))
            for row in rows:
                candidate = Candidate(
                    id=_short(row["url"]),
                    key=row["key"],
                    source=without_user(row["url"]),
                    licence=row.get("licence") or source.licence,
                    credit=source.credit,
                    caption=row.get("texts") or tidy_caption(row.get("caption", "")),
                    problem=SampleError(row["refused"][0], row["refused"][1], row["key"]) if "refused" in row else None,
                )
                if candidate.problem is None and not has_row(candidate.id):
                    answer = next(answers)
                    if isinstance(answer, FetchedFile):
                        candidate.load, candidate.size = _return(answer.data), len(answer.data)
                        candidate.keep = spool.keeper(candidate)
                    else:
                        candidate.problem, candidate.stage = answer, "fetch"
                yield candidate
    finally:
        spool.close()


class _Spool:
    """Fetched bodies of one attempt at a part. A body is written before the row that names it."""

    def __init__(self, out: Path, name: str) -> None:
        self.folder, self.name = out / "work" / "fetched", name
        self.target: BinaryIO | None = None

    def keeper(self, candidate: Candidate) -> Callable[[bytes], None]:
        """Returns `keep` of a candidate: it writes the body and sets the candidate's `at`."""

        def keep(data: bytes) -> None:
            target = self.target = self.target or new_file(self.folder, self.name)
            at = {"fetched": Path(target.name).name, "offset": target.tell(), "size": len(data)}
            target.write(data)
            target.flush()  # bodies of written rows are complete even after a kill
            candidate.at = json.dumps(at)

        return keep

    def close(self) -> None:
        """Flush the file to disk and close it."""
        if self.target is not None:
            os.fsync(self.target.fileno())
            self.target.close()


def remove_bodies(out: Path, name: str, names: Collection[str]) -> None:
    """Remove a part's fetched files that no row names: attempts that died left them.

    Args:
        names: names of the files that rows name.
    """
    for path in (out / "work" / "fetched").glob(f"{name}-*.bin"):
        if path.name not in names:
            path.unlink()


class Bytes:
    """Reads the bytes of candidates by their `at`. It caches the last row group, since rows are read in order."""

    def __init__(self, spec: CorpusSpec, out: Path) -> None:
        self.spec, self.out = spec, out
        self.limit = spec.filters.limits().max_bytes
        self._group: tuple[Any, Any] = (None, None)

    def read(self, at: str, key: str = "") -> bytes:
        """The bytes.

        Raises:
            SampleError: "unreadable", "corrupt" (the column holds no bytes) or "empty" (a null).
        """
        place = json.loads(at)
        try:
            if "spool" in place and (data := spooled(self.out, place["spool"])) is not None:
                return data
            if "leaves" in place:
                return encode_png(dead_leaves(*place["leaves"]))
            if "fetched" in place:
                path = str(self.out / "work" / "fetched" / place["fetched"])
                return stores.read_range(path, {}, place["offset"], place["size"])
            if "group" in place:
                return self._row(place, key)
            storage = self.spec.sources[place["source"]].storage
            size = place.get("size", -1 if stores.is_address(place["path"]) else self.limit + 1)
            return stores.read_range(place["path"], storage, place.get("offset", 0), size)
        except StoreUnavailable:
            raise  # it is no fault of the picture: the job ends, and continues later
        except (OSError, RestorayError) as error:
            raise SampleError("unreadable", f"cannot be read: {_sentence(error)}", key) from error

    def _row(self, place: Mapping[str, Any], key: str) -> bytes:
        source = self.spec.sources[place["source"]]
        value = self.row_group(place["source"], place["path"], place["group"]).column(source.image_column)[place["row"]]
        data = value.as_py()
        data = data.get("bytes") if isinstance(data, dict) else data
        if data is None:
            raise SampleError("empty", f'the column "{source.image_column}" is null in this row', key)
        if not isinstance(data, bytes):
            raise SampleError("corrupt", f'the column "{source.image_column}" holds no bytes', key)
        return data

    def row_group(self, source: int, path: str, group: int) -> Any:
        """The columns of a row group that its source names; a SampleError if it cannot be read."""
        if self._group[0] != (path, group):
            settings = self.spec.sources[source]
            names = (
                settings.image_column,
                settings.key_column,
                settings.caption_column,
                settings.licence_column,
            )
            try:
                with stores.open_file(path, settings.storage) as file:
                    table = pq.ParquetFile(file).read_row_group(group, columns=[name for name in names if name])
            except (OSError, pa.ArrowException, RestorayError) as error:
                raise SampleError("corrupt", f"row group {group} cannot be read: {_sentence(error)}") from error
            self._group = ((path, group), table)
        return self._group[1]


def _short(text: str) -> str:
    """A text as an id."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _sentence(error: BaseException) -> str:
    return getattr(error, "strerror", "") or first_line(error)
