"""Webdataset tars of unknown origin: intact samples come out, broken parts come out as problems, nothing raises.

Stock readers lose a whole tar to one bad byte, merge `a.v1.jpg` with `a.v2.jpg`, and skip `.jpeg`, `.webp` and `.JPG`.
Here every member is seen, and told from which byte on it lies, so that a picture can be read again without the rest.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from components.types import SampleError
from pipelines.shards import BLOCK, PICTURE_SUFFIXES, safe_key

REFUSED_SUFFIXES = frozenset({"pickle", "pkl", "pyd", "pt", "pth", "npy", "npz"})
"""Formats that can carry code."""


MAX_EXTRA_BYTES = 1 << 16  # ours: of a member's long name and extended records
HELD_BYTES = 64 << 20  # ours: of a sample's members in memory at a time


@dataclass(frozen=True, kw_only=True)
class TarSample:
    """One sample.

    Attributes:
        key: its name.
        members: data by suffix. A picture beyond HELD_BYTES of its sample is not here: read it at its offset.
        offsets, sizes: byte at which each member's data begins, and how many it holds; of all members.
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
    """One member: name ("" for a problem of the archive), where its data lies, and what is wrong with it."""

    name: str
    offset: int = 0
    size: int = 0
    problem: SampleError | None = None


def iter_tar(path: Path, max_member_bytes: int = 256 << 20) -> Iterator[TarSample | TarProblem]:
    """`read_tar` of a local file; one that cannot be opened is a problem, too."""
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
    valid one), tar_order (a key comes back later: interleaved members), duplicate_member, unsafe_member (absolute or
    climbing names, links, devices, formats that can carry code), too_large, no_suffix.

    Memory: HELD_BYTES of one sample, and the keys that were seen, whatever the tar holds.

    Args:
        source: an uncompressed tar, seekable; read once from front to end.
        size: of it, bytes.
        label: its name, for problems.
        max_member_bytes: larger members are skipped.
    """
    finished: set[str] = set()
    sample = _Sample("")  # the one that is collected
    usual = frozenset({"json"})  # suffixes of the last whole sample; webdataset writers put the JSON last
    for item in _members(source, size, label, max_member_bytes):
        if item is None:  # the proper end
            if sample.is_whole:
                yield sample.finished()
            return
        name, problem = item.name, item.problem
        stem, _, suffix = name.rpartition("/")[2].partition(".")
        this = name[: len(name) - len(suffix) - 1] if suffix else name
        if problem is not None and not name:  # the archive, not a sample
            if sample.is_whole:
                yield _before_damage(sample.finished(), usual, problem)
            finished.add(sample.key)
            sample = _Sample("")
            yield TarProblem(key="", code=problem.code, detail=problem.detail)
            continue
        if this != sample.key:
            if sample.is_whole:
                usual = frozenset(sample.offsets)
                yield sample.finished()
            finished.add(sample.key)
            sample = _Sample(this)
            if this in finished:
                sample.spoilt = True
                yield TarProblem(key=this, code="tar_order", detail="members of this key are not next to each other")
        if problem is not None:
            sample.spoilt = True
            yield TarProblem(key=this, code=problem.code, detail=problem.detail)
        elif not suffix or not stem:
            sample.spoilt = True
            yield TarProblem(key=this, code="no_suffix", detail=f"member {name!r} has no stem or no suffix")
        elif sample.spoilt:
            continue
        elif suffix in sample.offsets:
            sample.spoilt = True
            yield TarProblem(key=this, code="duplicate_member", detail=f"member {name!r} comes twice")
        elif not sample.take(suffix, item, source):
            sample.spoilt = True
            detail = f"its members besides pictures hold over {HELD_BYTES} bytes"
            yield TarProblem(key=this, code="too_large", detail=detail)


class _Sample:
    """A sample while it is collected."""

    def __init__(self, key: str) -> None:
        self.key, self.spoilt, self.held = key, False, 0
        self.members: dict[str, bytes] = {}
        self.offsets: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    @property
    def is_whole(self) -> bool:
        return bool(self.key) and not self.spoilt

    def take(self, suffix: str, item: _Member, source: BinaryIO) -> bool:
        """Take in a member; False where it should be held and is too large for that."""
        self.offsets[suffix], self.sizes[suffix] = item.offset, item.size
        if self.held + item.size > HELD_BYTES:
            return suffix.rpartition(".")[2].lower() in PICTURE_SUFFIXES
        source.seek(item.offset)
        self.members[suffix] = source.read(item.size)
        self.held += item.size
        return True

    def finished(self) -> TarSample:
        return TarSample(key=self.key, members=self.members, offsets=self.offsets, sizes=self.sizes)


def _before_damage(sample: TarSample, usual: frozenset[str], problem: SampleError) -> TarSample | TarProblem:
    """The sample in front of a damaged place: surely whole only with all that the sample before it had."""
    if usual <= frozenset(sample.offsets):
        return sample
    return TarProblem(key=sample.key, code=problem.code, detail=f"{problem.detail}; this sample may lack a member")


def _members(source: BinaryIO, size: int, label: str, limit: int) -> Iterator[_Member | None]:
    """Walk tar headers; None for a proper end."""
    if size == 0:
        yield _broken("empty", f"{label} holds no bytes")
        return
    long_name, lost, seen, at = "", False, False, 0
    records: dict[str, str] = {}
    while True:
        source.seek(at)
        block = source.read(BLOCK)
        start = at + BLOCK
        if block == bytes(BLOCK):
            if not seen and not lost:
                yield _broken("empty", f"{label} holds no member")
            yield None
            return
        if len(block) < BLOCK:
            if lost and not seen:  # "not_tar" has said it
                return
            code = "truncated" if seen or size < BLOCK else "not_tar"
            yield _broken(code, f"{label} ends at byte {size} without an end marker")
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if not lost:  # say it once, then look for the next header, block by block
                lost = True
                packed = " (it is compressed: unpack it first)" if block[:2] == b"\x1f\x8b" and not at else ""
                yield _broken("tar_header" if seen else "not_tar", f"{label} has no tar header at byte {at}{packed}")
            at = start
            continue
        seen, lost = True, False
        extra = header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
        n_bytes = int(records.get("size", header.size)) if not extra else header.size
        if n_bytes < 0:  # a size in base 256 may be negative: no honest header
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
            if header.isdir() or name.rpartition("/")[2].startswith("._"):  # AppleDouble: macOS adds one to each file
                pass
            elif _is_unsafe(name, header):  # the problem's key may end up in a file name
                refused = SampleError("unsafe_member", f"member {name!r} of {label} is refused")
                yield _Member(name=safe_key(_text(name)), problem=refused)
            elif n_bytes > limit:
                large = SampleError("too_large", f"member {name!r} of {label} holds {n_bytes} bytes, over {limit}")
                yield _Member(name=_text(name), problem=large)
            elif name:
                yield _Member(name=_text(name), offset=start, size=n_bytes)
        at = start + n_bytes + -n_bytes % BLOCK


def _broken(code: str, detail: str) -> _Member:
    """A problem of the archive itself."""
    return _Member(name="", problem=SampleError(code, detail))


def _text(name: str) -> str:
    """A member's name as text that JSON can hold: bytes that are no UTF-8 show as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _pax_records(data: bytes) -> dict[str, str]:
    """PAX extended header records ("LENGTH KEY=VALUE\\n"); what cannot be read is left out."""
    records = {}
    at = 0
    while (match := re.compile(rb"(\d{1,9}) ").match(data, at)) and 0 < int(match[1]) <= len(data) - at:
        keyword, _, value = data[match.end() : at + int(match[1]) - 1].partition(b"=")
        records[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += int(match[1])
    if not re.fullmatch(r"[0-9]{1,15}", records.get("size", "0")):
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
