"""Webdataset shards: writing them, reading single samples by offset, and reading strangers' tars that may be broken.

A shard is a plain tar whose members come in pairs: KEY.EXT, the picture's original bytes, then KEY.json. Nothing is
ever re-encoded. A shard's name ends in the first 8 digits of its sha256, so a name never means two contents, and a file
with its final name is whole: it is written under another name, flushed to disk and renamed.

A corpus folder is format 2 of decision 0004: `index.json` lists the shards, and a table of each split, mapped and not
read, holds where each picture's bytes begin, so that any sample is one lookup and one ranged read.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from components.naming import bounded
from components.types import SampleError
from pipelines.errors import Failure, UsageError, unknown
from pipelines.rows import iter_lines, replace_file, sync_folder

FORMAT = 2
BLOCK = 512  # POSIX.1-1988 ustar: headers and data are padded to this
KEY_BYTES = 120  # ours: leaves room for suffixes under the 255 bytes that file systems allow
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tiff", "BMP": "bmp", "AVIF": "avif", "GIF": "gif"}
"""Member suffix of each format that components.images decodes; the content decides, not the file's name."""
PICTURE_SUFFIXES = frozenset(EXTENSIONS.values()) | {"jpeg", "jpe", "jfif", "tif", "mpo"}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture on its way into a shard: key, member suffix, and what its JSON member says."""

    key: str
    ext: str
    info: Mapping[str, Any]


def safe_key(name: str) -> str:
    """Turn any file name (without suffix, folders allowed) into a sample key.

    Keys become tar members and file names: letters and digits of any script in NFC form, "-" and "_"; no dots
    (webdataset splits there), no separators, no leading dash; at most KEY_BYTES bytes of UTF-8; longer ones end
    in a hash of the name.
    """
    normal = unicodedata.normalize("NFC", name)
    parts = [part for part in re.split(r"[/\\]+", normal) if part not in ("", ".", "..")]
    key = "__".join(re.sub(r"[^\w-]+", "_", part) for part in parts)
    if not key or key.startswith("-"):
        key = "_" + key
    return bounded(key, KEY_BYTES, normal)


def json_line(row: Mapping[str, Any]) -> str:
    """One canonical JSON line: equal rows give equal bytes."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"


def member_header(name: str, size: int) -> bytes:
    """Tar header of a regular file, free of clock, user and machine. Long or non-ASCII names go into a PAX header."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uid, info.gid, info.uname, info.gname = size, 0o644, 0, 0, 0, "", ""
    return info.tobuf(format=tarfile.PAX_FORMAT, encoding="utf-8", errors="strict")


def sample_bytes(sample: Sample, size: int) -> int:
    """Bytes that a sample of `size` picture bytes takes in a shard, headers and padding included."""
    members = ((sample.ext, size), ("json", len(json_line(sample.info).encode())))
    return sum(len(member_header(f"{sample.key}.{ext}", n)) + n + -n % BLOCK for ext, n in members)


def write_shard(
    folder: Path, prefix: str, samples: Iterable[Sample], read: Callable[[Sample], bytes]
) -> dict[str, Any]:
    """Write one shard and return its index entry.

    Args:
        folder: where it goes; created.
        prefix: name up to the content's hash, e.g. "train-00000".
        samples: in order.
        read: the picture bytes of a sample; called once for each, one at a time, so memory holds one picture.

    Returns:
        {"name", "bytes", "sha256", "samples": [{"key", "offset", "size", "ext"}]}, as in index.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{prefix}.tmp-{os.getpid()}"
    digest, position, entries = hashlib.sha256(), 0, []

    def put(target: BinaryIO, data: bytes) -> None:
        nonlocal position
        target.write(data)
        digest.update(data)
        position += len(data)

    try:
        with open(temporary, "wb") as target:
            for sample in samples:
                picture = read(sample)
                put(target, member_header(f"{sample.key}.{sample.ext}", len(picture)))
                entries.append({"key": sample.key, "offset": position, "size": len(picture), "ext": sample.ext})
                put(target, picture + bytes(-len(picture) % BLOCK))
                info = json_line(sample.info).encode()
                put(target, member_header(f"{sample.key}.json", len(info)) + info + bytes(-len(info) % BLOCK))
            put(target, bytes(2 * BLOCK))  # end-of-archive marker
            target.flush()
            os.fsync(target.fileno())
        name = f"{prefix}-{digest.hexdigest()[:8]}.tar"
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)
    return {"name": name, "bytes": position, "sha256": digest.hexdigest(), "samples": entries}


# --- a curated corpus -------------------------------------------------------------------------------------------------

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
"""Of a split's table; one record batch for each shard, in order. `print` is the perceptual fingerprint."""

BATCHES_KEPT = 64  # record batches that a Split remembers; mapped, so they cost little


@dataclass(frozen=True)
class Split:
    """One split of a corpus: sample numbers 0 .. len-1, in manifest order.

    Attributes:
        name, folder: of the split; shards lie in the folder, the table beside it.
        shards: {"name", "bytes", "sha256", "samples"} each.
        starts: first sample number of each shard, and the number of all at the end.
        table: path of the Arrow file.
    """

    name: str
    folder: Path
    shards: Sequence[Mapping[str, Any]]
    starts: Sequence[int] = field(repr=False, default=())
    table: Path = Path()

    def __len__(self) -> int:
        return self.starts[-1] if self.starts else 0

    def locate(self, sample: int) -> tuple[Path, Mapping[str, Any]]:
        """Path of the shard, and the table's row, of a sample number.

        Raises:
            IndexError: not in 0 .. len-1.
            Failure: the table is missing or is not this corpus'.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is not among the {len(self)} of split {self.name}")
        shard = bisect.bisect_right(self.starts, sample) - 1
        batch, row = self.batch(shard), sample - self.starts[shard]
        entry = {name: batch.column(place)[row].as_py() for place, name in enumerate(TABLE.names) if name != "print"}
        return self.folder / self.shards[shard]["name"], entry

    def batch(self, shard: int) -> pa.RecordBatch:
        """Rows of the table for a shard by its number."""
        kept = self._batches
        if shard not in kept:
            if len(kept) >= BATCHES_KEPT:
                kept.pop(next(iter(kept)))
            kept[shard] = self._reader.get_batch(shard)
        return kept[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}  # no open files

    @cached_property
    def _batches(self) -> dict[int, pa.RecordBatch]:
        return {}

    @cached_property
    def _reader(self) -> Any:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.table)))
        except (OSError, pa.ArrowInvalid) as error:
            raise Failure(f"{self.table} cannot be read: {error}.") from error
        if reader.num_record_batches != len(self.shards) or reader.schema.names != TABLE.names:
            raise Failure(f"{self.table} does not belong to the index beside it: curate again.")
        return reader


@dataclass(frozen=True)
class Corpus:
    """A curated folder, opened. `digest` is the sha256 of its manifest: what models and reports name."""

    folder: Path
    digest: str
    splits: Mapping[str, Split]

    def split(self, name: str) -> Split:
        """A split by name; UsageError with the near name otherwise."""
        if name not in self.splits:
            raise unknown(f"split of {self.folder}", name, self.splits)
        return self.splits[name]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of the manifest, one at a time: train, then held_out, each in the order of its sample numbers."""
        return iter_lines(self.folder / "manifest.jsonl")


def open_corpus(folder: str | Path) -> Corpus:
    """Open a curated corpus folder.

    Raises:
        UsageError: no such folder, no index in it, or an index of another format.
    """
    folder = Path(folder)
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a curated corpus: it holds no index.json.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UsageError(f"{path} is not an index of format {FORMAT}: curate again.")
    splits = {}
    for name, entry in index["splits"].items():
        counts = [shard["samples"] for shard in entry["shards"]]
        starts = list(itertools.accumulate(counts, initial=0))
        splits[name] = Split(name, folder / name, entry["shards"], starts, folder / entry["table"]["name"])
    return Corpus(folder, index["digest"], splits)


def read_sample(corpus: Corpus, split: str, sample: int) -> bytes:
    """The original picture bytes of a sample number: one ranged read.

    Raises:
        SampleError: the shard is missing ("missing_shard") or shorter than the index says ("truncated").
    """
    return read_located(*corpus.split(split).locate(sample))


def read_located(path: Path, entry: Mapping[str, Any]) -> bytes:
    """The picture bytes that `Split.locate` found; errors as `read_sample`."""
    try:
        with open(path, "rb") as shard:
            shard.seek(entry["offset"])
            data = shard.read(entry["size"])
    except OSError as error:
        raise SampleError("missing_shard", f"{path} cannot be read: {error.strerror}", entry["key"]) from error
    if len(data) != entry["size"]:
        raise SampleError("truncated", f"{path} ends before the sample does", entry["key"])
    return data


def table_batch(samples: Sequence[Mapping[str, Any]]) -> pa.RecordBatch:
    """Table rows of one shard from mappings that have at least the fields of TABLE."""
    columns = [pa.array([sample[name] for sample in samples], TABLE.field(name).type) for name in TABLE.names]
    return pa.RecordBatch.from_arrays(columns, schema=TABLE)


def write_table(path: Path, batches: Iterable[pa.RecordBatch]) -> dict[str, str]:
    """Write a split's table at once, and return its entry in the index: {"name", "sha256"}."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as target:
            with pa.ipc.new_file(target, TABLE) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            target.flush()
            os.fsync(target.fileno())
        with open(temporary, "rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return {"name": path.name, "sha256": digest}


def write_index(folder: Path, name: str, digest: str, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Write index.json, which makes a folder a corpus: the last step.

    Args:
        digest: sha256 of the manifest.
        splits: {"table": as `write_table` says, "shards": [{"name", "bytes", "sha256", "samples"}]} by split.
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
    """One sentence for everything about a corpus that is not as its index says; empty where all is well."""
    problems = []
    index = json.loads((corpus.folder / "index.json").read_bytes())
    files = {corpus.folder / "manifest.jsonl": corpus.digest}
    files |= {corpus.folder / part["table"]["name"]: part["table"]["sha256"] for part in index["splits"].values()}
    for path, wanted in files.items():
        try:
            with open(path, "rb") as source:
                if hashlib.file_digest(source, "sha256").hexdigest() != wanted:
                    problems.append(f"{path} was changed after curation: curate again.")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}.")
    if problems:
        return problems
    rows = corpus.rows()
    for split in corpus.splits.values():
        for number, shard in enumerate(split.shards):
            named = [next(rows, {}) for _ in range(shard["samples"])]
            problems += _verify_shard(split, number, shard, named)
    if next(rows, None) is not None:
        problems.append("the manifest holds more samples than the index.")
    return problems


def _verify_shard(split: Split, number: int, shard: Mapping[str, Any], named: Sequence[Mapping[str, Any]]) -> list[str]:
    """Problems of one shard: its file, its table rows, and its manifest rows."""
    path, problems = split.folder / shard["name"], []
    try:
        with open(path, "rb") as source:
            found = hashlib.file_digest(source, "sha256").hexdigest()
            if found != shard["sha256"]:
                return [f"{path}: sha256 is {found}, the index says {shard['sha256']}."]
            for entry, row in zip(split.batch(number).to_pylist(), named, strict=True):
                source.seek(entry["offset"])
                picture = hashlib.sha256(source.read(entry["size"])).hexdigest()
                if not picture == entry["sha256"] == row.get("sha256") or entry["key"] != row.get("key"):
                    problems.append(f"{path}: {entry['key']} is not the picture that the manifest names.")
    except OSError as error:
        problems.append(f"{path}: {error.strerror}.")
    return problems


def write_corpus(
    folder: Path,
    name: str,
    splits: Mapping[str, Sequence[tuple[str, str, bytes, Mapping[str, Any]]]],
    samples_per_shard: int = 1000,
) -> Corpus:
    """A whole corpus of pictures in memory, without curation: for tests, benchmarks and small tools.

    Args:
        splits: (key, ext, picture bytes, more fields of the manifest row) of every sample, by split; "caption", "width"
            and "height" are what the table needs, and empty where absent.
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
            made = write_shard(folder / split, f"{split}-{len(shards):05d}", members, _reader_of(pictures))
            blank = {"caption": "", "width": 0, "height": 0, "print": b""}
            rows = [
                {**blank, **info, "key": key, "sha256": hashlib.sha256(data).hexdigest(), "split": split}
                for key, _, data, info in part
            ]
            batches.append(table_batch([{**row, **entry} for row, entry in zip(rows, made["samples"], strict=True)]))
            lines += [
                json_line({**{k: v for k, v in row.items() if k != "print"}, "shard": made["name"]}) for row in rows
            ]
            shards.append({**made, "samples": len(part)})
        folder.mkdir(parents=True, exist_ok=True)
        content[split] = {"table": write_table(folder / f"{split}.arrow", batches), "shards": shards}
    manifest = "".join(lines).encode()
    replace_file(folder / "manifest.jsonl", manifest)
    write_index(folder, name, hashlib.sha256(manifest).hexdigest(), content)
    return open_corpus(folder)


def _reader_of(pictures: Mapping[str, bytes]) -> Callable[[Sample], bytes]:
    return lambda sample: pictures[sample.key]
