"""Files of any fsspec store (file, s3, gs, hf, memory, ...): listing, sizes, ranged reads. Local paths go without."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.utils import glob_translate

from components.secrets import hidden_names, holds_secret, scrubbed, usable, without_secrets
from pipelines.core.errors import Failure, RestorayError, UsageError, first_line
from pipelines.core.places.backends import Stat
from pipelines.core.places.place import Place
from pipelines.curation.sources.objects import Listing
from pipelines.curation.sources.patterns import expand, fixed_folder, has_braces, has_wildcard

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


def list_files(
    pattern: str, storage: Mapping[str, Any], is_sorted: bool = False
) -> Iterator[tuple[str, str, int, str]]:
    """(address, name below the pattern's fixed part, size, version) of files, sorted by name.

    A pattern may hold "*", "?" and "[...]" ("**" crosses folders). Without these it names one file, or a folder with
    its whole tree. Braces (patterns.py) name several of these, whose order is kept. A store is listed in pages.

    Args:
        is_sorted: sort the listing of a store on disk, see objects.py.

    Raises:
        UsageError: there is no file, or a file that braces name does not exist.
        Failure: the store cannot be read.
        OutOfOrder: the store lists in another order.
    """
    if not is_address(pattern) and os.path.exists(pattern):  # "{a,b}" may be a folder's name
        yield from _list_local(pattern)
        return
    members: Iterator[str] = expand(pattern) if has_braces(pattern) else iter((pattern,))
    base = fixed_folder(pattern)
    for member in members:
        try:
            if is_address(member):
                yield from _list_store(member, base, storage, is_sorted)
            else:
                yield from _list_local(member, base if has_braces(pattern) else "")
        except UsageError as error:
            if member != pattern:
                raise UsageError(f"{pattern} names a file that does not exist: {error}") from error
            raise


def _list_store(
    pattern: str, base: str, storage: Mapping[str, Any], is_sorted: bool
) -> Iterator[tuple[str, str, int, str]]:
    """As `list_files`, for a pattern without braces; names are below `base`, or below the pattern if they are equal."""
    is_empty = True
    for place, stat in stored_objects(pattern, storage, is_sorted):
        is_empty = False
        address = address_in(place, stat.path)
        own_base = base if base != pattern else pattern if stat.path != place.path else pattern.rpartition("/")[0]
        start = own_base.partition("://")[2].strip("/")
        yield address, stat.path.removeprefix(start).lstrip("/"), stat.size, stat.version
    if is_empty:
        raise no_file(pattern)


def no_file(pattern: str) -> UsageError:
    """The error for a source without any file."""
    return UsageError(f"{pattern} holds no file.")


def address_in(place: Place, path: str) -> str:
    """The address of a path in a place's store."""
    return f"{place.scheme}://{'/' if place.scheme == 'file' else ''}{path}"


def place_in(address: str, storage: Mapping[str, Any]) -> Place:
    """The place of an address of any fsspec store.

    Raises:
        UsageError: the address holds a secret, or names an unknown store.
    """
    if holds_secret(address):
        raise UsageError(
            f"{without_secrets(address)} holds a password or a signature, which files and messages would repeat: name "
            "it in the source's storage or in the environment."
        )
    scheme, _, path = address.partition("://")
    return Place(scheme, path.strip("/"), storage)


def stored_objects(pattern: str, storage: Mapping[str, Any], is_sorted: bool = False) -> Iterator[tuple[Place, Stat]]:
    """(place of the pattern or of its fixed part, object) of the objects of a pattern without braces.

    Raises:
        UsageError: the bucket does not exist, or the store refuses access.
    """
    with store_errors(pattern, storage):
        root, prefix, chosen = scope_of(pattern, storage)
        is_empty = True
        for stat in Listing(root, prefix, is_sorted):
            if chosen is None or chosen.match(stat.path):
                is_empty = False
                yield root, stat
        if is_empty and chosen is None and "/" in root.path:
            with suppress(FileNotFoundError):
                yield root, root.stat()


def scope_of(pattern: str, storage: Mapping[str, Any]) -> tuple[Place, str, re.Pattern[str] | None]:
    """(folder to list, how names below it begin, what paths must match) of a pattern without braces."""
    place = place_in(pattern, storage)
    if not has_wildcard(place.path):
        return place, "", None
    root = place_in(fixed_folder(pattern), storage)
    prefix = re.split(r"[*?\[]", place.path)[0].removeprefix(root.path).lstrip("/")
    return root, prefix, re.compile(glob_translate(place.path))


@contextmanager
def store_errors(address: str, storage: Mapping[str, Any]) -> Iterator[None]:
    """Errors of listing a store as one sentence each.

    Raises:
        UsageError: the bucket does not exist, or the store refuses access.
        RestorayError: as inside the block.
    """
    names = hidden_names(storage)
    hint = f" Its options {', '.join(names)} are secrets, which no file holds: type them again." if names else ""
    try:
        yield
    except RestorayError as error:
        raise type(error)(scrubbed(f"{error}{hint}", storage)[:MAX_MESSAGE_CHARS]) from None
    except (FileNotFoundError, PermissionError) as error:
        raise UsageError(f"{address}: {scrubbed(error.strerror or str(error), storage)}.{hint}") from None
    except OSError as error:
        raise Failure(f"{address} cannot be listed: {scrubbed(error.strerror or str(error), storage)}.{hint}") from None


def check_store(pattern: str, storage: Mapping[str, Any]) -> None:
    """Ask for one page: a wrong key, a missing bucket and an unreachable server become one sentence each, in seconds.

    Raises:
        UsageError: the bucket does not exist, or the store refuses access.
        StoreUnavailable: the store does not answer.
    """
    with store_errors(pattern, storage):
        place_in(fixed_folder(pattern), storage).check()


def _list_local(pattern: str, root: str = "") -> Iterator[tuple[str, str, int, str]]:
    """As `list_files`; names are below `root` if it is not ""."""
    path = os.path.abspath(pattern)
    if has_wildcard(path) and not os.path.exists(path):  # "[2020] trip" may be a folder's name
        prefix = path[: re.search(r"[*?\[]", path).start()]  # type: ignore[union-attr]
        base = Path(prefix.rpartition("/")[0] or "/")
        names = sorted(name for name in glob.iglob(path, recursive=True) if not os.path.isdir(name))
    elif os.path.isdir(path):
        base = Path(path)
        names = sorted(str(name) for name in base.rglob("*") if name.is_symlink() or not name.is_dir())
    else:
        base, names = Path(path).parent, [path] if os.path.isfile(path) else []
    base = Path(os.path.abspath(root)) if root else base
    if not names:
        raise UsageError(
            f"{pattern} holds no file." if has_wildcard(path) or os.path.isdir(path) else f"there is no {pattern}."
        )
    for name in names:
        try:
            status = os.stat(name)
        except OSError:  # a link that leads nowhere: opening it gives the error of its row
            status = os.lstat(name)
        yield name, Path(name).relative_to(base).as_posix(), status.st_size, str(status.st_mtime_ns)


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
    return place_in(address, storage).read_bytes(offset, size)
