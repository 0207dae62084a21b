"""Candidates of a part, one after the other, inside the task that measures it; and their bytes once more later.

`at` is a small JSON text that says where a candidate's bytes lie: in a file, at an offset of a tar, in a row of a
parquet file, in what was fetched, or in a synthetic picture's three numbers. It holds paths of the machine, so it never
leaves work/.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from components.corpora import CorpusSpec, SourceSpec
from components.images import encode_png
from components.synthetic import dead_leaves
from components.types import SampleError
from pipelines import shards, tars
from pipelines.errors import RestorayError
from pipelines.rows import iter_lines
from pipelines.sources import stores
from pipelines.sources.parts import Part

MAX_CAPTION_CHARS = 10_000  # ours: longer ones are cut; no text encoder reads a hundredth of it
LICENCE_FIELDS = ("licence", "license")
CAPTION_FIELDS = ("caption", "prompt", "text")


@dataclass(kw_only=True)
class Candidate:
    """One picture that may be taken.

    Attributes:
        id: known again in another run.
        key, source, licence, credit, caption: for the manifest.
        size: bytes, where listing tells.
        at: where its bytes lie.
        problem: what is wrong already, and at which stage it was found; then there is nothing to load.
        load: its bytes; SampleError where they cannot be had. None where the caller knows the verdict.
        keep: for what was fetched: keeps the bytes and sets `at`.
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


def candidates(part: Part, spec: CorpusSpec, out: Path, known: Callable[[str], bool]) -> Iterator[Candidate]:
    """Everything in a part, in its order.

    Args:
        known: whether the verdict on an id is known, so that its bytes are not needed.
    """
    source = spec.sources[part.source]
    if source.kind == "tar":
        yield from _of_tar(part, source, Bytes(spec, out))
    elif source.kind == "parquet":
        yield from _of_row_group(part, source, spec)
    elif source.kind == "urls":
        yield from _of_addresses(part, source, spec, out, known)
    else:
        yield from _of_files(part, spec, out)


def _of_files(part: Part, spec: CorpusSpec, out: Path) -> Iterator[Candidate]:
    reader = Bytes(spec, out)
    for row in iter_lines(out / "work" / "parts" / part.where["list"]):
        refused = row.get("refused")
        if row.get("leaves"):
            at: dict[str, Any] = {"leaves": row["leaves"]}
        else:
            at = {"source": part.source, "path": row.get("path", "")}
        place = json.dumps(at)
        version = f"{row['source']}|{row.get('size', 0)}|{row.get('mtime_ns', 0)}|{row.get('version', '')}"
        candidate = Candidate(
            id=_short(version),
            key=row["key"],
            source=row["source"],
            licence=row.get("licence", ""),
            credit=row.get("credit", ""),
            size=row.get("size", 0),
            at=place,
            problem=SampleError(refused[0], refused[1], row["key"]) if refused else None,
        )
        if row.get("caption_path"):
            candidate.caption, stamp = _caption_file(row["caption_path"])
            candidate.id = _short(version + stamp)
        limit = spec.filters.limits().max_bytes
        if not refused and candidate.size > limit and "leaves" not in at:
            detail = f"{candidate.size} bytes exceed the limit of {limit}"
            candidate.problem = SampleError("too_large", detail, candidate.key)
        candidate.load = _loader(reader, place, candidate.key)
        yield candidate


def _loader(reader: Bytes, at: str, key: str) -> Callable[[], bytes]:
    return lambda: reader.read(at, key)


def _caption_file(path: str) -> tuple[str, str]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
            return "", ""
        with open(path, encoding="utf-8", errors="replace") as source:
            text = source.read(4 * MAX_CAPTION_CHARS)
        return tidy_caption(text), f"|{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    except OSError:
        return "", ""


def tidy_caption(text: str) -> str:
    """One line without control characters, of at most MAX_CAPTION_CHARS."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * MAX_CAPTION_CHARS]).split())[
        :MAX_CAPTION_CHARS
    ]


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
                named = f"{archive}/{item.key}" if item.key else archive
                yield Candidate(id=_short(f"{archive_id}|{named}|{number}"), key=key, source=named, problem=problem)
                continue
            yield from _of_sample(item, archive, archive_id, part, source, reader)


def _of_sample(
    sample: tars.TarSample, archive: str, archive_id: str, part: Part, source: SourceSpec, reader: Bytes
) -> Iterator[Candidate]:
    """Each picture of a sample by itself: `a.v1.jpg` and `a.v2.jpg` are two pictures."""
    caption, licence, credit = _beside(sample.members, source)
    pictures = [s for s in sample.offsets if s.rpartition(".")[2].lower() in shards.PICTURE_SUFFIXES]
    for suffix in pictures:
        name = f"{sample.key}.{suffix}"
        offset, size = sample.offsets[suffix], sample.sizes[suffix]
        at = json.dumps({"source": part.source, "path": part.where["path"], "offset": offset, "size": size})
        key = shards.safe_key(name[: len(name) - len(suffix.rpartition(".")[2]) - 1])
        held = suffix in sample.members  # one that is not is read once more from its place
        yield Candidate(
            id=_short(f"{archive_id}|{offset}"),
            key=key,
            source=f"{archive}/{name}",
            licence=licence,
            credit=credit,
            caption=caption,
            size=size,
            at=at,
            load=_given(sample.members[suffix]) if held else _loader(reader, at, key),
        )
    if not pictures:
        offset, key = min(sample.offsets.values()), shards.safe_key(sample.key)
        names = ", ".join(sorted(sample.members))[:1000]
        problem = SampleError("no_picture", f"the sample holds {names} and no picture that we read", key)
        yield Candidate(id=_short(f"{archive_id}|{offset}"), key=key, source=f"{archive}/{sample.key}", problem=problem)


def _given(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _beside(members: Mapping[str, bytes], source: SourceSpec) -> tuple[str, str, str]:
    """(caption, licence, credit) from a sample's text and JSON members."""
    caption, licence, credit = "", source.licence, source.credit
    for suffix, data in members.items():
        kind = suffix.rpartition(".")[2].lower()
        if kind == "txt" and not caption:
            caption = data[: 4 * MAX_CAPTION_CHARS].decode("utf-8", "replace")
        elif kind == "json":
            try:
                document = json.loads(data)
            except (ValueError, RecursionError):  # thousands of brackets
                continue
            if isinstance(document, dict):
                text = {name: value for name, value in document.items() if isinstance(value, str)}
                names = (source.caption_column,) if source.caption_column else CAPTION_FIELDS
                caption = next((text[name] for name in names if text.get(name)), caption)
                licence = next((text[name] for name in LICENCE_FIELDS if text.get(name)), licence)
                credit = text.get("credit") or credit
    return tidy_caption(caption), tidy_caption(licence)[:200], tidy_caption(credit)[:200]


def _of_row_group(part: Part, source: SourceSpec, spec: CorpusSpec) -> Iterator[Candidate]:
    label = f"parquet:{part.where['label']}"
    key = shards.safe_key(part.where["label"])
    if "broken" in part.where:
        problem = SampleError("corrupt", f"no readable parquet file: {part.where['broken']}", key)
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
        own = str(row.get(source.key_column) or "") if source.key_column else ""
        name = shards.safe_key(own or f"{part.where['label'].rpartition('.')[0]}-{group:05d}-{number:06d}")
        at = {"source": part.source, "path": part.where["path"], "group": group, "row": number}
        place = json.dumps(at)
        yield Candidate(
            id=_short(f"{label}|{part.digest}|{number}"),
            key=name,
            source=f"{label}#{group}/{number}",
            licence=str(row.get(source.licence_column) or "") or source.licence,
            credit=source.credit,
            caption=tidy_caption(str(row.get(source.caption_column) or "")),
            at=place,
            load=_loader(reader, place, name),
        )


def _of_addresses(
    part: Part, source: SourceSpec, spec: CorpusSpec, out: Path, known: Callable[[str], bool]
) -> Iterator[Candidate]:
    from pipelines.fetch import Fetched, Fetcher, fetch_many

    rows = list(iter_lines(out / "work" / "parts" / part.where["list"]))
    fresh = [row for row in rows if not known(_short(row["url"]))]
    spool = _Spool(out, part.name)
    try:
        with Fetcher(spec.download, spec.filters.limits().max_bytes) as fetcher:
            answers = iter(fetch_many(fetcher, [(row["key"], row["url"]) for row in fresh]))
            for row in rows:
                candidate = Candidate(
                    id=_short(row["url"]),
                    key=row["key"],
                    source=row["url"],
                    licence=row.get("licence") or source.licence,
                    credit=source.credit,
                    caption=tidy_caption(row.get("caption", "")),
                )
                if not known(candidate.id):
                    answer = next(answers)
                    if isinstance(answer, Fetched):
                        candidate.load, candidate.size = _given(answer.data), len(answer.data)
                        candidate.keep = spool.keeper(candidate)
                    else:
                        candidate.problem, candidate.stage = answer, "fetch"
                yield candidate
    finally:
        spool.close()


class _Spool:
    """Fetched bodies of one attempt at a part. A row that is kept refers to what was written before it."""

    def __init__(self, out: Path, name: str) -> None:
        self.folder, self.name = out / "work" / "fetched", name
        self.target: BinaryIO | None = None

    def keeper(self, candidate: Candidate) -> Callable[[bytes], None]:
        """Writes a body and says in the candidate where it lies."""

        def keep(data: bytes) -> None:
            target = self.target = self.target or self._open()
            at = {"fetched": Path(target.name).name, "offset": target.tell(), "size": len(data)}
            target.write(data)
            target.flush()  # an attempt that is killed leaves whole what its rows refer to
            candidate.at = json.dumps(at)

        return keep

    def _open(self) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            with suppress(FileExistsError):  # of an earlier run, or of an attempt that died
                return open(self.folder / f"{self.name}-{number}.bin", "xb")
        raise AssertionError

    def close(self) -> None:
        """Bring it to the disk."""
        if self.target is not None:
            os.fsync(self.target.fileno())
            self.target.close()


def forget_bodies(out: Path, name: str, wanted: Collection[str]) -> None:
    """Remove a part's fetched files that no row refers to: what attempts left that died."""
    for path in (out / "work" / "fetched").glob(f"{name}-*.bin"):
        if path.name not in wanted:
            path.unlink()


class Bytes:
    """Reads candidates' bytes by their `at`; remembers the last row group, since rows are asked for in order."""

    def __init__(self, spec: CorpusSpec, out: Path) -> None:
        self.spec, self.out = spec, out
        self.limit = spec.filters.limits().max_bytes
        self._group: tuple[Any, Any] = (None, None)

    def read(self, at: str, key: str = "") -> bytes:
        """The bytes.

        Raises:
            SampleError: unreadable, or corrupt for a column that holds no bytes.
        """
        place = json.loads(at)
        try:
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
        """A row group's needed columns; SampleError where it cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

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
    """An id."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _sentence(error: BaseException) -> str:
    return str(getattr(error, "strerror", "") or error).splitlines()[0] if str(error) else type(error).__name__
