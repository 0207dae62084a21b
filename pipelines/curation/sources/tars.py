"""Read webdataset tars of unknown origin: intact samples come out, broken parts come out as problems, nothing raises.

Common readers lose a whole tar to one bad byte, merge `a.v1.jpg` with `a.v2.jpg`, and skip `.jpeg`, `.webp` and `.JPG`.
This reader lists every member with its offset, so that a picture can be read again without the rest of the tar.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from components.corpora import FILE_SIZE_OPTION
from components.naming import printable
from components.types import SampleError
from pipelines.core.pictures import SYSTEM_NAMES
from pipelines.corpus.shards import BLOCK, PICTURE_EXTENSIONS, safe_key

REFUSED_SUFFIXES = frozenset({"pickle", "pkl", "pyd", "pt", "pth", "npy", "npz"})
"""Formats that can carry code."""

MAX_EXTRA_BYTES = 1 << 16  # ours: largest size of a member's long name and extended records
HELD_BYTES = 64 << 20  # ours: bytes of one sample's members in memory


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """One sample.

    Attributes:
        key: name of the sample.
        members: data by suffix. A picture beyond HELD_BYTES of its sample is left out; it can be read at its offset.
        offsets, sizes: offset of each member's data in the tar, and its size in bytes, by suffix.
    """

    key: str
    members: Mapping[str, bytes]
    offsets: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TarProblem:
    """A part of a tar that cannot be used: sample key ("" for the archive itself), reason code, sentence."""

    key: str
    code: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class _Member:
    """One member: its name ("" for a problem of the archive), offset and size of its data, and its problem."""

    name: str
    offset: int = 0
    size: int = 0
    problem: SampleError | None = None


def iter_tar(path: Path, max_member_bytes: int = 256 << 20) -> Iterator[TarSample | TarProblem]:
    """`read_tar` of a local file; a file that cannot be opened is a problem too."""
    try:
        size = path.stat().st_size
        source = open(path, "rb")  # noqa: SIM115 - closed below; a with-statement would catch the consumer's OSErrors
    except OSError as error:
        yield TarProblem(key="", code="unreadable", detail=f"{path.name}: {error.strerror}")
        return
    with source:
        yield from read_tar(source, size, path.name, max_member_bytes)


def read_tar(
    source: BinaryIO, size: int, label: str, max_member_bytes: int = 256 << 20
) -> Iterator[TarSample | TarProblem]:
    """Read a webdataset tar of any origin: intact samples come out, broken parts come out as problems, nothing raises.

    Codes: unreadable, empty, not_tar, truncated (cut short), tar_header (a damaged header; reading goes on at the next
    valid one), tar_order (a key comes back later: interleaved members), duplicate_member, unsafe_member (absolute
    names, names that leave the folder, links, devices, formats that can carry code), too_large, no_suffix.

    Memory: HELD_BYTES of one sample, and the keys so far, for a tar of any size.

    Args:
        source: an uncompressed tar, seekable; read once from front to end.
        size: size of the tar in bytes.
        label: name of the tar, for problems.
        max_member_bytes: larger members are skipped.
    """
    earlier_keys: set[str] = set()
    sample = _Sample("")  # the current sample
    usual = frozenset({"json"})  # suffixes of the last intact sample; webdataset writers put the JSON last
    for item in _members(source, size, label, max_member_bytes):
        if item is None:  # the end marker
            if sample.is_intact:
                yield sample.as_tar_sample()
            return
        name, problem = item.name, item.problem
        stem, _, suffix = name.rpartition("/")[2].partition(".")
        this = name[: len(name) - len(suffix) - 1] if suffix else name
        if problem is not None and not name:  # the archive, not a sample
            if sample.is_intact:
                yield _before_damage(sample.as_tar_sample(), usual, problem)
            earlier_keys.add(sample.key)
            sample = _Sample("")
            yield TarProblem(key="", code=problem.code, detail=problem.detail)
            continue
        if this != sample.key:
            if sample.is_intact:
                usual = frozenset(sample.offsets)
                yield sample.as_tar_sample()
            earlier_keys.add(sample.key)
            sample = _Sample(this)
            if this in earlier_keys:
                sample.is_broken = True
                yield TarProblem(key=this, code="tar_order", detail="members of this key are not next to each other")
        if problem is not None:
            sample.is_broken = True
            yield TarProblem(key=this, code=problem.code, detail=problem.detail)
        elif not suffix or not stem:
            sample.is_broken = True
            yield TarProblem(key=this, code="no_suffix", detail=f"member {name!r} has no stem or no suffix")
        elif sample.is_broken:
            continue
        elif suffix in sample.offsets:
            sample.is_broken = True
            yield TarProblem(key=this, code="duplicate_member", detail=f"member {name!r} comes twice")
        elif not sample.add(suffix, item, source):
            sample.is_broken = True
            detail = f"its members besides pictures hold over {HELD_BYTES} bytes"
            yield TarProblem(key=this, code="too_large", detail=detail)


class _Sample:
    """A sample while its members are read."""

    def __init__(self, key: str) -> None:
        self.key, self.is_broken, self.n_bytes = key, False, 0
        self.members: dict[str, bytes] = {}
        self.offsets: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    @property
    def is_intact(self) -> bool:
        return bool(self.key) and not self.is_broken

    def add(self, suffix: str, item: _Member, source: BinaryIO) -> bool:
        """Add a member; False for one that memory must hold but that is too large."""
        self.offsets[suffix], self.sizes[suffix] = item.offset, item.size
        if self.n_bytes + item.size > HELD_BYTES:
            return suffix.rpartition(".")[2].lower() in PICTURE_EXTENSIONS
        source.seek(item.offset)
        self.members[suffix] = source.read(item.size)
        self.n_bytes += item.size
        return True

    def as_tar_sample(self) -> TarSample:
        return TarSample(key=self.key, members=self.members, offsets=self.offsets, sizes=self.sizes)


def _before_damage(sample: TarSample, usual: frozenset[str], problem: SampleError) -> TarSample | TarProblem:
    """The sample before a damaged place: it counts as intact if it has all suffixes of the sample before it."""
    if usual <= frozenset(sample.offsets):
        return sample
    return TarProblem(key=sample.key, code=problem.code, detail=f"{problem.detail}; this sample may lack a member")


def _members(source: BinaryIO, size: int, label: str, limit: int) -> Iterator[_Member | None]:
    """The members by their tar headers; None for the end marker."""
    if size == 0:
        yield _broken("empty", f"{label} holds no bytes")
        return
    long_name, is_lost, has_members, at = "", False, False, 0
    records: dict[str, str] = {}
    while True:
        source.seek(at)
        block = source.read(BLOCK)
        start = at + BLOCK
        if block == bytes(BLOCK):
            if not has_members and not is_lost:
                yield _broken("empty", f"{label} holds no member")
            yield None
            return
        if len(block) < BLOCK:
            if is_lost and not has_members:  # after "not_tar"
                return
            code = "truncated" if has_members or size < BLOCK else "not_tar"
            yield _broken(code, f"{label} ends at byte {size} without an end marker")
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if not is_lost:  # report it once, then search for the next header, block by block
                is_lost = True
                hint = " (it is compressed: unpack it first)" if block[:2] == b"\x1f\x8b" and not at else ""
                code = "tar_header" if has_members else "not_tar"
                yield _broken(code, f"{label} has no tar header at byte {at}{hint}")
            at = start
            continue
        has_members, is_lost = True, False
        extra = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
        n_bytes = int(records.get("size", header.size)) if not extra else header.size
        if n_bytes < 0:  # a size in base 256 can be negative: the header is damaged
            yield _broken("tar_header", f"{label} has a negative size at byte {at}")
            return
        if start + n_bytes > size:
            name = "" if extra else long_name or records.get("path", header.name)
            yield _Member(name=name, problem=SampleError("truncated", f"{label} ends inside this member"))
            return
        if extra:
            data = source.read(n_bytes) if n_bytes <= MAX_EXTRA_BYTES else b""
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type != tarfile.XGLTYPE:
                records = _pax_records(data)
        else:
            name, long_name, records = long_name or records.get("path", header.name), "", {}
            if header.isdir() or _is_system_member(name):
                pass
            elif _is_unsafe(name, header):  # the key of the problem may become a file name
                unsafe = SampleError("unsafe_member", f"member {name!r} of {label} is refused")
                yield _Member(name=safe_key(printable_name(name)), problem=unsafe)
            elif n_bytes > limit:
                large = SampleError(
                    "too_large", f"member {name!r} of {label} holds {n_bytes} bytes, over {limit} ({FILE_SIZE_OPTION})"
                )
                yield _Member(name=printable_name(name), problem=large)
            elif name:
                yield _Member(name=printable_name(name), offset=start, size=n_bytes)
        at = start + n_bytes + -n_bytes % BLOCK


def _broken(code: str, detail: str) -> _Member:
    """A problem of the archive itself."""
    return _Member(name="", problem=SampleError(code, detail))


def printable_name(name: str) -> str:
    """A name of a file or member as text for JSON: bytes that are not UTF-8 become escapes."""
    return printable(name)


def _pax_records(data: bytes) -> dict[str, str]:
    """PAX extended header records ("LENGTH KEY=VALUE\\n"); unreadable ones are left out."""
    records = {}
    at = 0
    while (match := re.compile(rb"(\d{1,9}) ").match(data, at)) and 0 < int(match[1]) <= len(data) - at:
        keyword, _, value = data[match.end() : at + int(match[1]) - 1].partition(b"=")
        records[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(match[1])
    if not re.fullmatch(r"[0-9]{1,15}", records.get("size", "0")):
        del records["size"]
    return records


def _is_system_member(name: str) -> bool:
    """Whether the system of the tar's maker added a member: AppleDouble of macOS, Thumbs.db, folders of a disk station.

    Other hidden members are samples like any other.
    """
    parts = name.split("/")
    return parts[-1].lower().startswith(("._", "albumart_{")) or not SYSTEM_NAMES.isdisjoint(
        part.lower() for part in parts
    )


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
