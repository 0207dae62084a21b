"""A place in a store, with the part of pathlib.Path's interface that jobs use. Local paths stay pathlib.Path.

Every write is one request, or a multipart upload that is completed at its end: a reader sees the old object, the new
one or none, and never a part. Every request is repeated for a while if the store fails (patience.py).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from components.secrets import holds_secret, without_secrets
from components.writing import whole_file
from pipelines.core.errors import UsageError, near_miss
from pipelines.core.places.addresses import address_of, is_address
from pipelines.core.places.backends import CHUNK_BYTES, Stat, Store, download, shared_store
from pipelines.core.places.patience import patiently

T = TypeVar("T")

SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory")
"""Stores that may be named; the docs say which of them are tested."""


class Place:
    """An object of a store, or a prefix of objects that a path would call a folder. Immutable.

    No dataclass: a document made of its fields would hold the options, which may be secret.

    Attributes:
        scheme: protocol, as in SCHEMES.
        path: bucket and key, without "/" at either end.
        storage: options of the store; secrets come from the environment.
    """

    __slots__ = ("path", "scheme", "storage")

    def __init__(self, scheme: str, path: str, storage: Mapping[str, Any] | None = None) -> None:
        self.scheme, self.path, self.storage = scheme, path, dict(storage or {})

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __repr__(self) -> str:
        return f"Place({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str | PurePosixPath) -> Place:
        return Place(self.scheme, f"{self.path}/{name}".strip("/"), self.storage)

    def __lt__(self, other: Place) -> bool:
        return str(self) < str(other)

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> Place:
        return Place(self.scheme, self.path.rpartition("/")[0], self.storage)

    def absolute(self) -> Place:
        """As of Path: a place is always absolute."""
        return self

    def relative_to(self, other: Place) -> PurePosixPath:
        """As of Path."""
        return PurePosixPath(self.path).relative_to(other.path)

    def _patiently(self, action: Callable[[Store], T], patience_s: float | None = None) -> T:
        store = shared_store(str(self), self.storage)
        return patiently(lambda: action(store), str(self), self.storage, patience_s)

    # -- reading; FileNotFoundError, PermissionError, Refusal and StoreUnavailable as in patience.py --

    def read_bytes(self, start: int = 0, size: int = -1) -> bytes:
        """The object's bytes, or `size` of them from `start` on; fewer at its end."""
        return self._patiently(lambda store: store.read(self.path, start, size))

    def stat(self) -> Stat:
        """Size and version of the object."""
        return self._patiently(lambda store: store.stat(self.path))

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        try:
            return any(page for page in self.pages())
        except FileNotFoundError:
            return False

    def exists(self) -> bool:
        """Whether there is such an object, or one below it."""
        return self.is_file() or self.is_dir()

    def pages(self, patience_s: float | None = None, prefix: str = "") -> Iterator[list[Stat]]:
        """Objects below this place whose names begin with a prefix, in pages, in the store's order."""
        token = ""
        while True:
            page, token = self._page(token, patience_s, prefix)
            yield page
            if not token:
                return

    def _page(self, token: str, patience_s: float | None, prefix: str) -> tuple[list[Stat], str]:
        return self._patiently(lambda store: store.page(self.path, token, prefix), patience_s)

    def files(self, patience_s: float | None = None) -> Iterator[tuple[str, Stat]]:
        """(name below this place, details) of all objects below it, in the store's order."""
        skip = len(self.path) + 1
        for page in self.pages(patience_s):
            for stat in page:
                yield stat.path[skip:], stat

    def sha256(self) -> str:
        """Digest of the object's bytes; memory holds one chunk."""
        size, digest = self.stat().size, hashlib.sha256()
        for start in range(0, size, CHUNK_BYTES):
            digest.update(self.read_bytes(start, min(CHUNK_BYTES, size - start)))
        return digest.hexdigest()

    def download(self, target: Path) -> None:
        """Fetch the object into a local file, atomically."""
        size = self.stat().size
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as draft:
            self.fill(draft.temporary, size)

    def fill(self, file: Path, size: int) -> None:
        """Fetch the first `size` bytes of the object into a local file, which is made or overwritten."""
        handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.ftruncate(handle, size)
            if size:
                self._patiently(lambda store: download(store, self.path, handle, size))
        finally:
            os.close(handle)

    # -- writing --

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """As of Path; a store has no folders to make."""

    def write_bytes(self, data: bytes) -> None:
        """Write the object, atomically."""
        self._patiently(lambda store: store.write(self.path, data))

    def create(self, data: bytes) -> bool:
        """Write the object unless it exists; False if it does with other bytes.

        After a lost answer the object may hold our own bytes: then they were created. So `data` of two writers who
        must not both succeed have to differ.
        """
        try:
            self._patiently(lambda store: store.create(self.path, data))
        except FileExistsError:
            return self.read_bytes() == data
        return True

    def upload(self, file: Path) -> None:
        """Write the object from a local file of any size, atomically."""
        self._patiently(lambda store: store.upload(self.path, file))

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(2, "does not exist", str(self))
        self._patiently(lambda store: store.delete(self.path))

    def check(self, patience_s: float = 5.0) -> None:
        """Ask for one page: a wrong key, a missing bucket and an unreachable server become one sentence each.

        Raises:
            UsageError: the bucket does not exist, or the store refuses access.
            StoreUnavailable: the store does not answer.
        """
        try:
            next(self.pages(patience_s), None)
        except FileNotFoundError as error:
            if error.strerror == "the bucket does not exist":
                raise UsageError(f"{self}: {error.strerror}.") from None
        except PermissionError as error:
            raise UsageError(f"{self}: {error.strerror}.") from None


Where = Path | Place
"""Where an input or output is."""


def place_of(text: str | Path, storage: Mapping[str, Any] | None = None) -> Where:
    """The path or place that a text names.

    Raises:
        UsageError: the text cannot be a place: an unknown protocol, no bucket, a password in it, "..", a query.
    """
    if not is_address(text):
        if not str(text):
            raise UsageError('the path is empty; "." names this folder.')
        return Path(text)
    address = str(text)
    shown = address_of(address)
    if holds_secret(address):
        raise UsageError(
            f"{without_secrets(address)} holds a password or a signature, which files and messages would repeat: name "
            "it in the environment."
        )
    scheme, _, path = shown.partition("://")
    scheme = scheme.lower()
    if scheme == "file":
        return Path(f"/{path.lstrip('/')}")
    if scheme not in SCHEMES:
        raise UsageError(
            f'{shown} cannot be a place: "{scheme}" is no store.{near_miss(scheme, SCHEMES)} '
            f"Known: {', '.join(SCHEMES)}."
        )
    parts = path.strip("/").split("/")
    if not parts[0] or (isinstance(text, str) and text.partition("://")[2].startswith("/")):
        raise UsageError(f"{shown} cannot be a place: it names no bucket.")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\x00-\x1f\x7f]", path):
        raise UsageError(f'{shown} cannot be a place: "//", ".", ".." and control characters are no part of a key.')
    return Place(scheme, "/".join(parts), storage)
