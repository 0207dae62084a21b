"""Requests to stores: S3 with its own calls, every other store through fsspec's common ones.

S3 is called directly where fsspec's interface has too little: a read without a HEAD before it, pages of a listing, and
writes with a condition. fsspec's cache of listings is off: another machine may have written since.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import fsspec
import fsspec.asyn

from components.secrets import usable
from pipelines.core.errors import UsageError, first_line
from pipelines.core.places.patience import code_of

PAGE = 1000
"""Objects of a page of a listing; S3's own limit."""

CHUNK_BYTES = 16 << 20
"""Bytes of a request when a large object is fetched; ours."""

FETCHERS = 4
"""Requests at the same time when a large object is fetched; ours."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


@dataclass(frozen=True)
class Stat:
    """An object of a listing.

    Attributes:
        path: bucket and key.
        size: bytes.
        version: changes when the object does: S3's ETag; "" if the store has none.
        modified: time of the last write by the store's own clock, in seconds since 1970; 0.0 if unknown.
    """

    path: str
    size: int
    version: str = ""
    modified: float = 0.0


class Store(Protocol):
    """The requests that a place makes. They raise what the store's package raises; see patience.py."""

    def read(self, path: str, start: int = 0, size: int = -1) -> bytes:
        """`size` bytes from `start` on, fewer at the end; -1 reads to the end."""

    def write(self, path: str, data: bytes) -> None:
        """Write an object in one request: a reader sees the old one or the new one."""

    def create(self, path: str, data: bytes) -> None:
        """Write an object that must not exist; FileExistsError or a conflict otherwise."""

    def upload(self, path: str, file: Path) -> None:
        """Write an object from a file of any size; it appears when all of it has arrived."""

    def stat(self, path: str) -> Stat:
        """Size and version; FileNotFoundError without such an object."""

    def page(self, path: str, token: str, prefix: str = "") -> tuple[list[Stat], str]:
        """Objects below "path/" from a token on, "" for the first page; and the next token, "" after the last page.

        `prefix`: how their names below "path/" begin.
        """

    def delete(self, path: str) -> None:
        """Delete an object; one that does not exist is no error."""


def open_store(address: str, storage: Mapping[str, Any]) -> Store:
    """The store of an address.

    Raises:
        UsageError: the protocol is unknown, or its package is not installed.
    """
    scheme = address.partition("://")[0]
    options = usable(storage)
    if scheme in ("s3", "s3a"):
        # our own waiting replaces the long ones of botocore
        config = {"retries": {"max_attempts": 0}, "connect_timeout": 10, "read_timeout": 60}
        options["config_kwargs"] = {**config, **options.get("config_kwargs", {})}
        # fsspec's own cache does not see that the environment names another server or other keys
        options["skip_instance_cache"] = True
    try:
        file_system, _ = fsspec.core.url_to_fs(address, use_listings_cache=False, **options)
    except ValueError as error:
        raise UsageError(f"{address}: {first_line(error)}.") from error
    except ImportError as error:
        hint = f': install "restoray[{EXTRAS[scheme]}]"' if scheme in EXTRAS else ""
        raise UsageError(f"{address}: {first_line(error)}{hint}.") from error
    if scheme not in ("s3", "s3a"):
        return AnyStore(file_system)
    file_system.retries = 1  # s3fs would repeat five times by itself
    return S3Store(file_system)


_stores: dict[tuple[Any, ...], Store] = {}
_opening = threading.Lock()


def shared_store(address: str, storage: Mapping[str, Any]) -> Store:
    """The store of an address, one for all threads of this process.

    fsspec has one instance a thread, and each loads a client's tables anew: 25 MB for the 16 threads of ranged reads.
    """
    scheme, _, path = address.partition("://")
    variables = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    key = (os.getpid(), scheme, path.partition("/")[0], repr(sorted(storage.items())), variables)
    store = _stores.get(key)
    if store is None:
        with _opening:
            store = _stores.get(key) or open_store(address, storage)
            _stores[key] = store
    return store


class S3Store:
    """A server with S3's interface, through s3fs."""

    def __init__(self, file_system: Any) -> None:
        self.fs = file_system

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        bucket, _, key = path.partition("/")
        return self.fs.call_s3(method, Bucket=bucket, Key=key, **arguments)

    def read(self, path: str, start: int = 0, size: int = -1) -> bytes:
        if size == 0:
            return b""
        span = {} if start == 0 and size < 0 else {"Range": f"bytes={start}-{start + size - 1 if size > 0 else ''}"}
        try:
            return bytes(fsspec.asyn.sync(self.fs.loop, self._get, path, span))
        except OSError as error:
            if code_of(error)[0] in ("InvalidRange", "416"):  # the object ends before `start`
                return b""
            raise

    async def _get(self, path: str, span: Mapping[str, str]) -> bytes:
        bucket, _, key = path.partition("/")
        answer = await self.fs._call_s3("get_object", Bucket=bucket, Key=key, **span)
        try:
            data: bytes = await answer["Body"].read()
        finally:
            answer["Body"].close()
        if len(data) != answer.get("ContentLength", len(data)):
            raise ConnectionError(f"the answer has {len(data)} of {answer['ContentLength']} bytes")
        return data

    def write(self, path: str, data: bytes) -> None:
        self._call("put_object", path, Body=data)

    def create(self, path: str, data: bytes) -> None:
        self._call("put_object", path, Body=data, IfNoneMatch="*")

    def upload(self, path: str, file: Path) -> None:
        self.fs.put_file(str(file), path)

    def stat(self, path: str) -> Stat:
        answer = self._call("head_object", path)
        return Stat(path, int(answer["ContentLength"]), str(answer.get("ETag", "")), _seconds(answer["LastModified"]))

    def page(self, path: str, token: str, prefix: str = "") -> tuple[list[Stat], str]:
        bucket, _, key = path.partition("/")
        more = {"ContinuationToken": token} if token else {}
        start = f"{key}/{prefix}" if key else prefix
        answer = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=start, MaxKeys=PAGE, **more)
        stats = [
            Stat(f"{bucket}/{row['Key']}", int(row["Size"]), str(row.get("ETag", "")), _seconds(row["LastModified"]))
            for row in answer.get("Contents", ())
            if not row["Key"].endswith("/")  # marks of folders, as consoles make them
        ]
        return stats, answer["NextContinuationToken"] if answer.get("IsTruncated") else ""

    def delete(self, path: str) -> None:
        self._call("delete_object", path)


class AnyStore:
    """Any other store of fsspec: memory, gs, az, hf. Tested with memory."""

    def __init__(self, file_system: Any) -> None:
        self.fs = file_system

    def _own(self, path: str) -> str:
        """A path as this store spells it; some begin with "/"."""
        return f"{self.fs.root_marker}{path}"

    def read(self, path: str, start: int = 0, size: int = -1) -> bytes:
        return bytes(self.fs.cat_file(self._own(path), start=start or None, end=None if size < 0 else start + size))

    def write(self, path: str, data: bytes) -> None:
        self.fs.pipe_file(self._own(path), data)

    def create(self, path: str, data: bytes) -> None:
        self.fs.pipe_file(self._own(path), data, mode="create")

    def upload(self, path: str, file: Path) -> None:
        self.fs.put_file(str(file), self._own(path))

    def stat(self, path: str) -> Stat:
        info = self.fs.info(self._own(path))
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return self._stat(info)

    def _stat(self, info: Mapping[str, Any]) -> Stat:
        modified = next((info[name] for name in ("created", "LastModified", "updated", "mtime") if info.get(name)), 0.0)
        version = next((str(info[name]) for name in ("ETag", "etag", "generation") if name in info), "")
        version = version or str(_seconds(modified) or "")
        return Stat(str(info["name"]).lstrip("/"), int(info.get("size") or 0), version, _seconds(modified))

    def page(self, path: str, token: str, prefix: str = "") -> tuple[list[Stat], str]:
        try:
            infos = self.fs.find(self._own(path), detail=True)
        except FileNotFoundError:
            return [], ""
        stats = (self._stat(infos[name]) for name in sorted(infos))
        return [stat for stat in stats if stat.path.startswith(f"{path}/{prefix}")], ""

    def delete(self, path: str) -> None:
        if self.fs.exists(self._own(path)):
            self.fs.rm_file(self._own(path))


def download(store: Store, path: str, target: int, size: int) -> None:
    """Fetch an object of `size` bytes into an open file, in chunks; memory holds FETCHERS of them."""

    def fetch(start: int) -> None:
        count = min(CHUNK_BYTES, size - start)
        data = store.read(path, start, count)
        if len(data) != count:
            raise ConnectionError(f"a chunk has {len(data)} of {count} bytes")
        os.pwrite(target, data, start)

    if size <= CHUNK_BYTES:
        fetch(0)
        return
    with ThreadPoolExecutor(FETCHERS, "fetch") as pool:
        for _ in pool.map(fetch, range(0, size, CHUNK_BYTES)):
            pass


def _seconds(moment: Any) -> float:
    if isinstance(moment, datetime):
        return moment.timestamp()
    return float(moment) if isinstance(moment, int | float) else 0.0
