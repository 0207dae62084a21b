"""Webdataset shards of a corpus: write them, and read single samples by their offset.

A shard is a plain tar whose members come in pairs: KEY.EXT with the picture's original bytes, then KEY.json. Nothing is
ever encoded again. A shard's name ends in the first 8 digits of its sha256, so two contents never share a name. A
file with its final name is complete: it is written under another name, flushed to disk and renamed.

A corpus folder has format 2 of decision 0004. `index.json` lists the shards. A table of each split is mapped, not read;
it holds the offset of each picture's bytes, so reading a sample costs one lookup and one ranged read.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
import tarfile
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa

from components.images import Limits
from components.naming import shorten
from components.types import SampleError
from components.writing import replace_file, whole_file
from pipelines.core.errors import Failure, UsageError, unknown
from pipelines.core.rows import iter_lines
from pipelines.corpus.lists import ShardList, open_mapped, read_lists
from pipelines.corpus.partial_tables import PartialTable
from pipelines.corpus.stored import stored_manifest, stored_shard, stored_table

FORMAT = 2
BLOCK = 512  # POSIX.1-1988 ustar: headers and data are padded to this
KEY_BYTES = 120  # ours: leaves room for suffixes within the 255 bytes of a file name
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tiff", "BMP": "bmp", "AVIF": "avif", "GIF": "gif"}
"""Member suffix of each format that components.images decodes. The content decides, not the name of the file."""
PICTURE_EXTENSIONS = frozenset(EXTENSIONS.values()) | {"jpeg", "jpe", "jfif", "tif", "mpo"}

SPLIT = "held_out"
"""The split for evaluation; the other one is "train"."""

STORED_LIMITS = Limits(max_pixels=1 << 40, max_bytes=1 << 40, min_side_px=1, max_aspect=1e9, max_expansion=1e9)
"""Limits for pictures of a corpus: curation has applied the corpus' own, which may exceed the decoder's defaults."""

TABLE = pa.schema(
    [
        ("key", pa.string()),
        ("ext", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("sha256", pa.string()),
        ("print", pa.binary()),
    ]
)
"""Columns of a split's table, which has one record batch per shard, in order. `print` is the perceptual fingerprint.

A caption may hold several texts, see components.captions.text.
"""

CACHED_BATCHES = 64  # record batches that a Split remembers; they are mapped, so they need little memory


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A picture that is written to a shard: its key, its member suffix, and the content of its JSON member."""

    key: str
    ext: str
    info: Mapping[str, Any]


def safe_key(name: str) -> str:
    """Turn any file name (without suffix, folders allowed) into a sample key.

    Keys become tar members and file names. They hold letters and digits of any script in NFC form, "-" and "_", but no
    dots (webdataset splits there), no separators and no leading dash. They have at most KEY_BYTES bytes of UTF-8; a
    longer one ends in a hash of the name.
    """
    normal = unicodedata.normalize("NFC", name)
    parts = [part for part in re.split(r"[/\\]+", normal) if part not in ("", ".", "..")]
    key = "__".join(re.sub(r"[^\w-]+", "_", part) for part in parts)
    if not key or key.startswith("-"):
        key = "_" + key
    return shorten(key, KEY_BYTES, normal)


def json_line(row: Mapping[str, Any]) -> str:
    """One canonical JSON line: equal rows give equal bytes."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"


def member_header(name: str, size: int) -> bytes:
    """Tar header of a regular file without time, user or machine. Long or non-ASCII names go into a PAX header."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uid, info.gid, info.uname, info.gname = size, 0o644, 0, 0, 0, "", ""
    return info.tobuf(format=tarfile.PAX_FORMAT, encoding="utf-8", errors="strict")


def write_shard(
    folder: Path, prefix: str, samples: Iterable[Sample], read: Callable[[Sample], bytes]
) -> dict[str, Any]:
    """Write one shard and return its index entry.

    Args:
        folder: folder of the shard; created.
        prefix: name up to the content's hash, for example "train-00000".
        samples: in their order in the shard.
        read: returns the picture bytes of a sample; called once per sample, so memory holds one picture.

    Returns:
        {"name", "bytes", "sha256", "samples": [{"key", "offset", "size", "ext"}]}, as in index.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest, position, entries = hashlib.sha256(), 0, []

    def put(target: BinaryIO, data: bytes) -> None:
        nonlocal position
        target.write(data)
        digest.update(data)
        position += len(data)

    with whole_file(folder / prefix, sync=True) as draft:
        with open(draft.temporary, "wb") as target:
            for sample in samples:
                picture = read(sample)
                put(target, member_header(f"{sample.key}.{sample.ext}", len(picture)))
                entries.append({"key": sample.key, "offset": position, "size": len(picture), "ext": sample.ext})
                put(target, picture + bytes(-len(picture) % BLOCK))
                info = json_line(sample.info).encode()
                put(target, member_header(f"{sample.key}.json", len(info)) + info + bytes(-len(info) % BLOCK))
            put(target, bytes(2 * BLOCK))  # end-of-archive marker
        draft.path = folder / f"{prefix}-{digest.hexdigest()[:8]}.tar"
    return {"name": draft.path.name, "bytes": position, "sha256": digest.hexdigest(), "samples": entries}


# --- a curated corpus -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """One split of a corpus: sample numbers 0 .. len-1, in manifest order.

    Attributes:
        name: name of the split.
        folder: folder of its shards; the table lies next to the folder.
        shards: {"name", "bytes", "sha256", "samples"} of each shard.
        starts: first sample number of each shard, then the number of all samples.
        table: path of the Arrow file.
    """

    name: str
    folder: Path
    shards: ShardList
    starts: Sequence[int] = field(repr=False, default=())
    table: Path = Path()

    def __len__(self) -> int:
        return self.starts[-1] if self.starts else 0

    def locate(self, sample: int) -> tuple[Path, Mapping[str, Any]]:
        """Path of the shard, and row of the table, of a sample number.

        Raises:
            IndexError: the number is not in 0 .. len-1.
            Failure: the table is missing or belongs to another corpus.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is not among the {len(self)} of split {self.name}")
        shard = bisect.bisect_right(self.starts, sample) - 1
        batch, row = self.batch(shard), sample - self.starts[shard]
        entry = {name: batch.column(place)[row].as_py() for place, name in enumerate(TABLE.names) if name != "print"}
        return self.folder / self.shards[shard]["name"], entry

    def batch(self, shard: int) -> pa.RecordBatch:
        """Rows of the table for a shard by its number."""
        batches = self._batches
        if shard not in batches:
            if len(batches) >= CACHED_BATCHES:
                batches.pop(next(iter(batches)))
            batches[shard] = self._read(shard)
        return batches[shard]

    def _read(self, shard: int) -> pa.RecordBatch:
        reader = self._reader
        if self._parts is None:
            return reader.get_batch(shard)
        self._parts.fetch([shard])
        batch = reader.get_batch(shard)
        if batch.num_rows != self.starts[shard + 1] - self.starts[shard]:
            raise Failure(f"{self.table} does not belong to the index next to it.")
        return batch

    def fetch_rows(self, shards: Iterable[int]) -> None:
        """Fetch the rows of shards whose table is in a store and comes in parts; nothing for other tables."""
        _ = self._reader
        if self._parts is not None:
            self._parts.fetch(shards)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}  # no open files

    @cached_property
    def _batches(self) -> dict[int, pa.RecordBatch]:
        return {}

    @cached_property
    def _parts(self) -> PartialTable | None:
        """The parts of a table in a store; None for a whole table."""
        return stored_table(self.table, self.name)

    @cached_property
    def _reader(self) -> Any:
        _ = self._parts  # fetches a table in a store
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.table)))
        except (OSError, pa.ArrowInvalid) as error:
            raise Failure(f"{self.table} cannot be read: {error}.") from error
        if reader.num_record_batches != len(self.shards) or reader.schema.names != TABLE.names:
            raise Failure(f"{self.table} does not belong to the index next to it: curate again.")
        return reader


@dataclass(frozen=True)
class Corpus:
    """A curated folder, opened. `digest` is the sha256 of its manifest; models and reports name it."""

    folder: Path
    digest: str
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        """A split by name; an unknown name raises a UsageError that suggests a similar one."""
        if name not in self.splits:
            raise unknown(f"split of {self.folder}", name, self.splits)
        return self.splits[name]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the manifest, one at a time: train, then held_out, each in the order of the sample numbers."""
        return iter_lines(stored_manifest(self.folder))


def open_corpus(folder: str | Path) -> Corpus:
    """Open a curated corpus folder.

    Raises:
        UsageError: the folder does not exist, or holds no index or one of another format.
    """
    folder = Path(folder)
    path = folder / "index.json"
    try:
        index = open_mapped(folder) or read_lists(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a curated corpus: it holds no index.json.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    if index.get("format") != FORMAT:
        raise UsageError(f"{path} is not an index of format {FORMAT}: curate again.")
    splits = {}
    for name, entry in index["splits"].items():
        shards = entry["shards"] if isinstance(entry["shards"], ShardList) else ShardList(entry["shards"])
        starts = array("q", itertools.accumulate(shards.samples.tolist(), initial=0))
        splits[name] = Split(name, folder / name, shards, starts, folder / entry["table"]["name"])
    return Corpus(folder, index["digest"], splits)


class ShardFile:
    """A shard for ranged reads: opened at the first read, closed at the end of a `with` or with this object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: FileIO | None = None

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, offset: int, size: int, key: str) -> bytes:
        """The bytes of a sample's picture.

        Raises:
            SampleError: the shard is missing ("missing_shard") or shorter than the index says ("truncated").
        """
        try:
            if self._file is None:
                self._file = self._open()
            data = b""
            while len(data) < size:  # a network file system may return fewer bytes than there are
                piece = os.pread(self._file.fileno(), size - len(data), offset + len(data))
                if not piece:
                    break
                data += piece
        except OSError as error:
            raise SampleError("missing_shard", f"{self.path} cannot be read: {error.strerror}", key) from error
        if len(data) != size:
            raise SampleError("truncated", f"{self.path} ends before the sample does", key)
        return data

    def is_gone(self) -> bool:
        """Whether the open file has no name any more: it has left a cache, and its bytes go when it is closed."""
        return self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0

    def _open(self) -> FileIO:
        try:
            return open(self.path, "rb", buffering=0)
        except FileNotFoundError:
            cached = stored_shard(self.path)  # a corpus in a store
            if cached is None:
                raise
            return open(cached, "rb", buffering=0)


def read_sample(corpus: Corpus, split: str, sample: int) -> bytes:
    """The original picture bytes of a sample number; errors as `ShardFile.read`."""
    path, entry = corpus.split(split).locate(sample)
    with ShardFile(path) as shard:
        return shard.read(entry["offset"], entry["size"], entry["key"])


def table_batch(samples: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """Rows of the table for one shard, from mappings with at least the fields of TABLE."""
    columns = [pa.array([sample[name] for sample in samples], TABLE.field(name).type) for name in TABLE.names]
    return pa.RecordBatch.from_arrays(columns, schema=TABLE)


def write_table(path: Path, batches: Iterable[pa.RecordBatch]) -> dict[str, str]:
    """Write a split's table, and return its entry in the index: {"name", "sha256"}."""
    with whole_file(path, sync=True) as draft:
        with open(draft.temporary, "wb") as target, pa.ipc.new_file(target, TABLE) as writer:
            for batch in batches:
                writer.write_batch(batch)
        with open(draft.temporary, "rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
    return {"name": path.name, "sha256": digest}


def write_index(folder: Path, name: str, digest: str, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Write index.json, the last step: it makes the folder a corpus.

    Args:
        digest: sha256 of the manifest.
        splits: {"table": result of `write_table`, "shards": [{"name", "bytes", "sha256", "samples"}]} by split.
    """
    document: dict[str, Any] = {"format": FORMAT, "name": name, "digest": digest, "splits": {}}
    for split, content in splits.items():
        shards = [{name: shard[name] for name in ("name", "bytes", "sha256", "samples")} for shard in content["shards"]]
        document["splits"][split] = {
            "samples": sum(shard["samples"] for shard in shards),
            "bytes": sum(shard["bytes"] for shard in shards),
            "table": content["table"],
            "shards": shards,
        }
    replace_file(folder / "index.json", (json.dumps(document, ensure_ascii=False) + "\n").encode(), sync=True)


def verify(corpus: Corpus) -> list[str]:
    """One sentence for everything in a corpus that differs from its index; empty for an intact corpus."""
    problems = []
    index = json.loads((corpus.folder / "index.json").read_bytes())
    files = {stored_manifest(corpus.folder): corpus.digest}
    files |= {corpus.folder / part["table"]["name"]: part["table"]["sha256"] for part in index["splits"].values()}
    for path, sha256 in files.items():
        try:
            with open(path, "rb") as source:
                if hashlib.file_digest(source, "sha256").hexdigest() != sha256:
                    problems.append(f"{path} was changed after curation: curate again.")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}.")
    if problems:
        return problems
    rows = corpus.rows()
    for split in corpus.splits.values():
        for number, shard in enumerate(split.shards):
            own_rows = [next(rows, {}) for _ in range(shard["samples"])]
            problems += _verify_shard(split, number, shard, own_rows)
    if next(rows, None) is not None:
        problems.append("the manifest holds more samples than the index.")
    return problems


def _verify_shard(split: Split, number: int, shard: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Problems of one shard: of its file, its table rows, and its manifest rows."""
    path, problems = split.folder / shard["name"], []
    try:
        with open(path, "rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        if digest != shard["sha256"]:
            return [f"{path}: sha256 is {digest}, the index says {shard['sha256']}."]
        with ShardFile(path) as pictures:
            for entry, row in zip(split.batch(number).to_pylist(), rows, strict=True):
                data = pictures.read(entry["offset"], entry["size"], entry["key"])
                picture = hashlib.sha256(data).hexdigest()
                if not picture == entry["sha256"] == row.get("sha256") or entry["key"] != row.get("key"):
                    problems.append(f"{path}: {entry['key']} is not the picture that the manifest names.")
    except OSError as error:
        problems.append(f"{path}: {error.strerror}.")
    except SampleError as error:
        problems.append(f"{error.detail}.")
    return problems


def write_corpus(
    folder: Path,
    name: str,
    splits: Mapping[str, Sequence[tuple[str, str, bytes, Mapping[str, Any]]]],
    samples_per_shard: int = 1000,
) -> Corpus:
    """Write a corpus from pictures in memory, without curation: for tests, benchmarks and small tools.

    Args:
        splits: (key, ext, picture bytes, further fields of the manifest row) of every sample, by split. The table reads
            "caption", "width" and "height"; they are empty or 0 by default.
    """
    content: dict[str, dict[str, Any]] = {}
    lines = []
    for split, samples in splits.items():
        shards: list[dict[str, Any]] = []
        batches = []
        for first in range(0, len(samples), samples_per_shard):
            part = samples[first : first + samples_per_shard]
            pictures = {key: data for key, _, data, _ in part}
            members = [Sample(key=key, ext=ext, info={"key": key, **info}) for key, ext, _, info in part]
            shard = write_shard(folder / split, f"{split}-{len(shards):05d}", members, _reader_of(pictures))
            blank = {"caption": "", "width": 0, "height": 0, "print": b""}
            rows = [
                {**blank, **info, "key": key, "sha256": hashlib.sha256(data).hexdigest(), "split": split}
                for key, _, data, info in part
            ]
            batches.append(table_batch([{**row, **entry} for row, entry in zip(rows, shard["samples"], strict=True)]))
            lines += [
                json_line({**{k: v for k, v in row.items() if k != "print"}, "shard": shard["name"]}) for row in rows
            ]
            shards.append({**shard, "samples": len(part)})
        folder.mkdir(parents=True, exist_ok=True)
        content[split] = {"table": write_table(folder / f"{split}.arrow", batches), "shards": shards}
    manifest = "".join(lines).encode()
    replace_file(folder / "manifest.jsonl", manifest)
    write_index(folder, name, hashlib.sha256(manifest).hexdigest(), content)
    return open_corpus(folder)


def _reader_of(pictures: Mapping[str, bytes]) -> Callable[[Sample], bytes]:
    return lambda sample: pictures[sample.key]
