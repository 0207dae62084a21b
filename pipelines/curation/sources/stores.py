"""Files of any fsspec store (file, s3, gs, hf, memory, ...): listing, sizes, ranged reads. Local paths go without."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from components.secrets import hidden_names, holds_secret, scrubbed, usable, without_secrets
from pipelines.core.errors import Failure, RestorayError, UsageError, first_line

MAX_MESSAGE_CHARS = 1000  # ours: stores answer with whole pages


def is_address(path: str) -> bool:
    """Whether a path names a store ("s3://bucket/x") rather than a local file."""
    return re.match(r"[a-zA-Z][\w+.-]*://", path) is not None


def open_store(address: str, storage: Mapping[str, Any]) -> tuple[Any, str]:
    """(fsspec file system, path in it) of an address.

    Raises:
        UsageError: the protocol is unknown, or its package is not installed.
        Failure: the store refuses access.
    """
    if holds_secret(address):
        raise UsageError(
            f"{without_secrets(address)} holds a password or a signature, which files and messages would repeat: name "
            "it in the source's storage or in the environment."
        )
    with _without_secrets(address, storage):
        try:
            store, path = fsspec.core.url_to_fs(address, **usable(storage))
        except ValueError as error:
            raise UsageError(f"{address}: {error}.") from error
        except ImportError as error:
            extra = {"s3": "s3", "gs": "gs", "gcs": "gs"}.get(address.partition("://")[0])
            hint = f': install "restoray[{extra}]"' if extra else ""
            raise UsageError(f"{address}: {first_line(error)}{hint}.") from error
        except (OSError, TypeError) as error:
            raise Failure(f"{address} cannot be opened: {error}.") from error
    return store, str(path)


@contextmanager
def _without_secrets(address: str, storage: Mapping[str, Any]) -> Iterator[None]:
    """Errors of a store inside a `with` block, without the secrets of its options; a cause would repeat them.

    Raises:
        UsageError, Failure, OSError: as inside the block; other errors of a store become a Failure.
    """
    names = hidden_names(storage)
    hint = f" Its options {', '.join(names)} are secrets, which no file holds: type them again." if names else ""
    try:
        yield
    except RestorayError as error:
        raise type(error)(scrubbed(f"{error}{hint}", storage)[:MAX_MESSAGE_CHARS]) from None
    except OSError as error:
        reason = scrubbed(f"{error.strerror or error}{hint}", storage)[:MAX_MESSAGE_CHARS]
        raise (type(error)(error.errno, reason) if error.errno is not None else type(error)(reason)) from None
    except Exception as error:  # noqa: BLE001 - the packages of stores have errors of many classes
        reason = scrubbed(f"{type(error).__name__}: {error}{hint}", storage)[:MAX_MESSAGE_CHARS]
        raise Failure(f"{address} cannot be read: {reason}") from None


def list_files(pattern: str, storage: Mapping[str, Any]) -> Iterator[tuple[str, str, int, str]]:
    """(address, name below the pattern's fixed part, size, version) of files, sorted by name.

    A pattern may hold "*", "?" and "[...]" ("**" crosses folders). Without these it names one file, or a folder with
    its whole tree.

    Raises:
        UsageError: there is no file.
        Failure: the store cannot be read.
    """
    if not is_address(pattern):
        yield from _list_local(pattern)
        return
    store, path = open_store(pattern, storage)
    scheme = pattern.partition("://")[0]
    with _without_secrets(pattern, storage):
        infos, base = _list_store(store, path, pattern)
    files = sorted((name, info) for name, info in infos.items() if info.get("type", "file") == "file")
    if not files:
        raise UsageError(f"{pattern} holds no file.")
    for name, info in files:
        version = next((str(info[field]) for field in ("ETag", "etag", "mtime", "LastModified") if field in info), "")
        relative = name.removeprefix(base).lstrip("/")
        yield (
            f"{scheme}://{name.lstrip('/') if scheme != 'file' else name}",
            relative,
            int(info.get("size") or 0),
            version,
        )


def _list_store(store: Any, path: str, pattern: str) -> tuple[dict[str, Any], str]:
    """(details by path, the pattern's fixed part) of the files of a store."""
    try:
        if _has_wildcard(path):
            infos = store.glob(path, detail=True)
            base = path[: re.search(r"[*?\[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
        else:
            infos = store.find(path, detail=True)
            base = path if path not in infos else path.rpartition("/")[0]
    except FileNotFoundError:
        infos, base = {}, ""
    except OSError as error:
        raise Failure(f"{pattern} cannot be listed: {error}.") from error
    return dict(infos), base


def _list_local(pattern: str) -> Iterator[tuple[str, str, int, str]]:
    path = os.path.abspath(pattern)
    if _has_wildcard(path) and not os.path.exists(path):  # "[2020] trip" may be a folder's name
        prefix = path[: re.search(r"[*?\[]", path).start()]  # type: ignore[union-attr]
        base = Path(prefix.rpartition("/")[0] or "/")
        names = sorted(name for name in glob.iglob(path, recursive=True) if not os.path.isdir(name))
    elif os.path.isdir(path):
        base = Path(path)
        names = sorted(str(name) for name in base.rglob("*") if name.is_symlink() or not name.is_dir())
    else:
        base, names = Path(path).parent, [path] if os.path.isfile(path) else []
    if not names:
        raise UsageError(
            f"{pattern} holds no file." if _has_wildcard(path) or os.path.isdir(path) else f"there is no {pattern}."
        )
    for name in names:
        try:
            status = os.stat(name)
        except OSError:  # a link that leads nowhere: opening it gives the error of its row
            status = os.lstat(name)
        yield name, Path(name).relative_to(base).as_posix(), status.st_size, str(status.st_mtime_ns)


def _has_wildcard(path: str) -> bool:
    return any(letter in path for letter in "*?[")


def open_file(address: str, storage: Mapping[str, Any]) -> BinaryIO:
    """Open a file of any store for reading; it is seekable. OSError if it cannot be opened."""
    if not is_address(address):
        return open(address, "rb")
    store, path = open_store(address, storage)
    with _without_secrets(address, storage):
        return store.open(path, "rb", block_size=4 << 20)  # type: ignore[no-any-return]


def read_range(address: str, storage: Mapping[str, Any], offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on; size -1 reads to the end. OSError if they cannot be read."""
    if not is_address(address):
        with open(address, "rb") as source:
            source.seek(offset)
            rest = max(0, os.fstat(source.fileno()).st_size - offset)
            return source.read(rest if size < 0 else min(size, rest))  # read(n) allocates n bytes at once
    store, path = open_store(address, storage)
    with _without_secrets(address, storage):
        return bytes(store.cat_file(path, start=offset, end=None if size < 0 else offset + size))
