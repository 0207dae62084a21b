"""Webdataset shards: writing them, reading single samples by offset, and reading strangers' tars that may be broken.

A shard is a plain tar whose members come in pairs: KEY.EXT, the picture's original bytes, then KEY.json. Nothing is
ever re-encoded. A shard's name ends in the first 8 digits of its sha256, so a name never means two contents, and a file
with its final name is whole: it is written under another name, flushed to disk and renamed.

`index.json` holds where each picture's bytes begin, so that any sample is one ranged read. See decision 0001.
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

from components.naming import bounded
from components.types import SampleError
from pipelines.errors import Failure, UsageError, unknown
from pipelines.rows import parse_lines, sync_folder

FORMAT = 1
BLOCK = 512  # POSIX.1-1988 ustar: headers and data are padded to this
KEY_BYTES = 120  # ours: leaves room for suffixes under the 255 bytes that file systems allow
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tiff", "BMP": "bmp", "AVIF": "avif", "GIF": "gif"}
"""Member suffix of each format that components.images decodes; the content decides, not the file's name."""
PICTURE_SUFFIXES = frozenset(EXTENSIONS.values()) | {"jpeg", "jpe", "jfif", "tif", "mpo"}
REFUSED_SUFFIXES = frozenset({"pickle", "pkl", "pyd", "pt", "pth", "npy", "npz"})  # formats that can carry code


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture on its way into a shard: key, member suffix, and what its JSON member says."""

    key: str
    ext: str
    info: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """The members of one sample by suffix, as read from any webdataset tar."""

    key: str
    members: Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class TarProblem:
    """A part of a tar that cannot be used: sample key ("" for the archive itself), reason code, sentence."""

    key: str
    code: str
    detail: str


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


@dataclass(frozen=True)
class Split:
    """One split of a corpus: sample numbers 0 .. len-1, in manifest order."""

    name: str
    folder: Path
    shards: Sequence[Mapping[str, Any]]
    starts: Sequence[int] = field(repr=False, default=())

    def __len__(self) -> int:
        return self.starts[-1] if self.starts else 0

    def locate(self, sample: int) -> tuple[Path, Mapping[str, Any]]:
        """Path of the shard and index entry {"key", "offset", "size", "ext"} of a sample number.

        Raises:
            IndexError: not in 0 .. len-1.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is not among the {len(self)} of split {self.name}")
        shard = bisect.bisect_right(self.starts, sample) - 1
        entry = self.shards[shard]
        return self.folder / entry["name"], entry["samples"][sample - self.starts[shard]]


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

    @cached_property
    def manifest(self) -> dict[str, dict[str, Any]]:
        """Manifest rows by key, checked against the index.

        Raises:
            Failure: the manifest is not the one that the index was made from.
        """
        data = (self.folder / "manifest.jsonl").read_bytes()
        if hashlib.sha256(data).hexdigest() != self.digest:
            raise Failure(f"{self.folder / 'manifest.jsonl'} was changed after curation: curate again.")
        return {row["key"]: row for row in parse_lines(data)}


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
        raise UsageError(f"{path} is not an index of format {FORMAT}.")
    splits = {}
    for name, entry in index["splits"].items():
        counts = [len(shard["samples"]) for shard in entry["shards"]]
        splits[name] = Split(name, folder / name, entry["shards"], list(itertools.accumulate(counts, initial=0)))
    return Corpus(folder, index["digest"], splits)


def read_sample(corpus: Corpus, split: str, sample: int) -> bytes:
    """The original picture bytes of a sample number: one ranged read.

    Raises:
        SampleError: the shard is missing ("missing_shard") or shorter than the index says ("truncated").
    """
    path, entry = corpus.split(split).locate(sample)
    try:
        with open(path, "rb") as shard:
            shard.seek(entry["offset"])
            data = shard.read(entry["size"])
    except OSError as error:
        raise SampleError("missing_shard", f"{path} cannot be read: {error.strerror}", entry["key"]) from error
    if len(data) != entry["size"]:
        raise SampleError("truncated", f"{path} ends before the sample does", entry["key"])
    return data


def verify(corpus: Corpus) -> list[str]:
    """One sentence for everything about a corpus that is not as its index says; empty where all is well."""
    problems = []
    try:
        manifest = corpus.manifest
    except (Failure, OSError) as error:
        return [str(error)]
    for split in corpus.splits.values():
        for shard in split.shards:
            path = split.folder / shard["name"]
            try:
                with open(path, "rb") as source:
                    found = hashlib.file_digest(source, "sha256").hexdigest()
                    if found != shard["sha256"]:
                        problems.append(f"{path}: sha256 is {found}, the index says {shard['sha256']}.")
                        continue
                    for entry in shard["samples"]:
                        source.seek(entry["offset"])
                        picture = hashlib.sha256(source.read(entry["size"])).hexdigest()
                        if picture != manifest.get(entry["key"], {}).get("sha256"):
                            problems.append(f"{path}: {entry['key']} is not the picture that the manifest names.")
            except OSError as error:
                problems.append(f"{path}: {error.strerror}.")
    indexed = sum(len(split) for split in corpus.splits.values())
    if indexed != len(manifest):
        problems.append(f"the index holds {indexed} samples, the manifest {len(manifest)}.")
    return problems


# --- tars of unknown origin -------------------------------------------------------------------------------------------


def iter_tar(path: Path, max_member_bytes: int = 256 << 20) -> Iterator[TarSample | TarProblem]:
    """Read a webdataset tar of any origin: intact samples come out, broken parts come out as problems, nothing raises.

    Codes: unreadable, empty, not_tar, truncated (cut short), tar_header (a damaged header; reading goes on at the next
    valid one), tar_order (a key comes back later: interleaved members), duplicate_member, unsafe_member (absolute or
    climbing names, links, devices, formats that can carry code), too_large, no_suffix.

    Args:
        path: an uncompressed tar.
        max_member_bytes: bound of memory; larger members are skipped.
    """
    finished: set[str] = set()
    key, spoilt = "", False  # the sample being collected
    members: dict[str, bytes] = {}
    for item in _members(path, max_member_bytes):
        if item is None:  # the proper end
            if key and not spoilt:
                yield TarSample(key=key, members=members)
            return
        name, data, problem = item
        stem, _, suffix = name.rpartition("/")[2].partition(".")
        this = name[: len(name) - len(suffix) - 1] if suffix else name
        if problem is not None and not name:  # the archive, not a sample
            if key and not spoilt:
                yield _before_damage(key, members, problem)
            finished.add(key)
            key, members, spoilt = "", {}, False
            yield TarProblem(key="", code=problem.code, detail=problem.detail)
            continue
        if this != key:
            if key and not spoilt:
                yield TarSample(key=key, members=members)
            finished.add(key)
            key, members, spoilt = this, {}, False
            if this in finished:
                spoilt = True
                yield TarProblem(key=this, code="tar_order", detail="members of this key are not next to each other")
        if problem is not None:
            spoilt = True
            yield TarProblem(key=this, code=problem.code, detail=problem.detail)
        elif not suffix or not stem:
            spoilt = True
            yield TarProblem(key=this, code="no_suffix", detail=f"member {name!r} has no stem or no suffix")
        elif suffix in members and not spoilt:
            spoilt = True
            yield TarProblem(key=this, code="duplicate_member", detail=f"member {name!r} comes twice")
        elif not spoilt:
            members[suffix] = data


def _before_damage(key: str, members: Mapping[str, bytes], problem: SampleError) -> TarSample | TarProblem:
    """The sample in front of a damaged place: surely whole only with its JSON, which webdataset writers put last."""
    if "json" in members:
        return TarSample(key=key, members=members)
    return TarProblem(key=key, code=problem.code, detail=f"{problem.detail}; this sample may lack a member")


def _members(path: Path, limit: int) -> Iterator[tuple[str, bytes, SampleError | None] | None]:
    """Walk tar headers: (name, data, problem) each; name "" for a problem of the archive; None for a proper end."""
    try:
        size = path.stat().st_size
        source = open(path, "rb")  # noqa: SIM115 - closed below; a with-statement would catch the consumer's OSErrors
    except OSError as error:
        yield "", b"", SampleError("unreadable", f"{path.name}: {error.strerror}")
        return
    with source:
        if size == 0:
            yield "", b"", SampleError("empty", f"{path.name} holds no bytes")
            return
        long_name, lost, seen = "", False, False
        records: dict[str, str] = {}
        while True:
            at = source.tell()
            block = source.read(BLOCK)
            if block == bytes(BLOCK):
                yield None
                return
            if len(block) < BLOCK:
                code = "truncated" if seen or size < BLOCK else "not_tar"
                yield "", b"", SampleError(code, f"{path.name} ends at byte {size} without an end marker")
                return
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                if not lost:  # say it once, then look for the next header, block by block
                    lost = True
                    code = "tar_header" if seen else "not_tar"
                    yield "", b"", SampleError(code, f"{path.name} has no tar header at byte {at}")
                continue
            seen, lost = True, False
            extra = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
            n_bytes = int(records.get("size", header.size)) if not extra else header.size
            start = source.tell()
            if start + n_bytes > size:
                name = "" if extra else long_name or records.get("path", header.name)
                yield name, b"", SampleError("truncated", f"{path.name} ends inside this member")
                return
            if extra:
                data = source.read(n_bytes) if n_bytes <= 1 << 20 else b""
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif header.type != tarfile.XGLTYPE:
                    records = _pax_records(data)
            else:
                name, problem, data = long_name or records.get("path", header.name), None, b""
                long_name, records = "", {}
                if header.isdir():
                    name = ""
                elif _is_unsafe(name, header):
                    problem = SampleError("unsafe_member", f"member {name!r} is refused")
                    name = safe_key(name)  # the problem's key may end up in a file name
                elif n_bytes > limit:
                    problem = SampleError("too_large", f"member {name!r} holds {n_bytes} bytes, over {limit}")
                else:
                    data = source.read(n_bytes)
                if name:
                    yield name, data, problem
            source.seek(start + n_bytes + -n_bytes % BLOCK)


def _pax_records(data: bytes) -> dict[str, str]:
    """PAX extended header records ("LENGTH KEY=VALUE\\n"); what cannot be read is left out."""
    records = {}
    while (match := re.match(rb"(\d{1,9}) ", data)) and 0 < int(match[1]) <= len(data):
        keyword, _, value = data[match.end() : int(match[1]) - 1].partition(b"=")
        records[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[int(match[1]) :]
    if not records.get("size", "0").isdigit():
        del records["size"]
    return records


def _is_unsafe(name: str, header: tarfile.TarInfo) -> bool:
    parts = re.split(r"[/\\]", name)
    suffixes = parts[-1].lower().split(".")[1:]
    return (
        not header.isreg()
        or header.issparse()
        or name.startswith(("/", "\\"))
        or ".." in parts
        or "\0" in name
        or any(suffix in REFUSED_SUFFIXES for suffix in suffixes)
    )
