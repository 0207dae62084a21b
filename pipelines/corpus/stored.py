"""A corpus in a store as a folder of this machine: index and lists are copies, the rest comes when it is read.

    <folder>/.store.json                {"place": address of the corpus}
    <folder>/index.json, .lists.*       the index, and its lists of shards as mapped arrays (lists.py)
    <folder>/<split>.arrow              the table of a split; a large one is fetched in parts (partial_tables.py)
    <folder>/columns/<name>/            column.json and its mapped lists, when the column is opened

The folder is opened like any corpus. Shards and the files of columns come into the node's cache, which names a file by
its sha256 (core/places/cache.py). A corpus on a disk has its files, so its way to them is as ever.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from components.writing import replace_file
from pipelines.core.errors import Failure, UsageError
from pipelines.core.folders import folder_lock, waiting
from pipelines.core.home import cache_folder
from pipelines.core.places.cache import NodeCache
from pipelines.core.places.files import sha256_of
from pipelines.core.places.place import Place, Where, place_of
from pipelines.corpus.lists import DOCUMENT, ShardList, open_mapped, write_mapped
from pipelines.corpus.partial_tables import PartialTable, is_large

STORE = ".store.json"

_cap: list[int] = [0]


def set_cap(max_bytes: int) -> None:
    """Set the cap of the node's cache for this process; 0: half of the disk's free bytes."""
    _cap[0] = max_bytes


def node_cache() -> NodeCache:
    """The node's cache with this process' cap."""
    return NodeCache(max_bytes=_cap[0])


def corpus_folder(where: Where) -> Path:
    """The folder with which a corpus is opened; fetches the index of one in a store. One fetch a node at a time.

    Raises:
        UsageError: there is no corpus at that place.
    """
    if isinstance(where, Path):
        return where
    where.check()
    try:
        index = (where / "index.json").read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{where} is not a curated corpus: it holds no index.json.") from None
    digest = hashlib.sha256(index).hexdigest()[:16]
    folder = cache_folder() / "corpora" / f"{hashlib.sha256(str(where).encode()).hexdigest()[:8]}-{digest}-{where.name}"
    if (folder / "index.json").is_file() and (folder / DOCUMENT).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with waiting(folder_lock, folder):
        replace_file(folder / STORE, json.dumps({"place": str(where)}).encode())
        try:
            write_mapped(folder, index)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{where / 'index.json'} cannot be read: {error}.") from error
        replace_file(folder / "index.json", index)  # the folder's name holds its digest; it comes last
    return folder


def address_of(folder: str | Path) -> str:
    """The address of the corpus in a store that a folder stands for; "" for a corpus on a disk."""
    place = _place(Path(folder))
    return "" if place is None else str(place)


def on_this_node(folder: str, address: str) -> str:
    """This node's folder for the corpus that another node opened as `folder`.

    Raises:
        Failure: the corpus at the address is another one by now.
    """
    own = cache_folder() / "corpora" / Path(folder).name
    if not (own / "index.json").is_file():
        where = place_of(address)
        if corpus_folder(where).name != own.name:
            raise Failure(f"{address} was curated again since the stream began: start the command again.")
    return str(own)


def shard_object(folder: Path, split: str, number: int, shards: Any) -> tuple[Place, str, int] | None:
    """(place, sha256, bytes) of a shard of a split; None for a corpus that is not in a store."""
    place = _place(folder)
    if place is None:
        return None
    shard = shards[number]
    return place / split / shard["name"], shard["sha256"], shard["bytes"]


def stored_shard(path: Path) -> Path | None:
    """The cached file of a shard that is missing in its corpus' folder; None for a corpus that is not in a store.

    Raises:
        Failure, OSError, StoreUnavailable: see NodeCache.path_of.
    """
    folder, split = path.parent.parent, path.parent.name
    place = _place(folder)
    if place is None:
        return None
    shards = _lists(folder)["splits"][split]["shards"]
    number = _number(shards, path.name)
    if number < 0:
        return None
    shard = shards[number]
    return node_cache().path_of(place / split / path.name, shard["sha256"], shard["bytes"])


def stored_table(path: Path, split: str) -> PartialTable | None:
    """Fetch the table of a split that is missing in its corpus' folder, or open a large one for fetches of parts.

    Raises:
        Failure: the table is not the one that the index names.
        OSError, StoreUnavailable: as of a place.
    """
    folder = path.parent
    place = _place(folder)
    if place is None:
        return None
    if not path.is_file():
        size = (place / path.name).stat().size
        if is_large(size):
            with waiting(folder_lock, folder):
                return PartialTable.make(place / path.name, path, size)
        _fetch_checked(place / path.name, path, _lists(folder)["splits"][split]["table"]["sha256"])
    return PartialTable.opened(place / path.name, path)


def stored_manifest(folder: Path) -> Path:
    """The manifest of a corpus; that of one in a store is fetched."""
    path, place = folder / "manifest.jsonl", _place(folder)
    if place is not None and not path.is_file():
        _fetch_checked(place / path.name, path, _lists(folder)["digest"])
    return path


def stored_column(corpus: Path, name: str) -> None:
    """Fetch the description of a column of a corpus in a store, if it has one; its files come when they are read."""
    place = _place(corpus)
    if place is None:
        return
    folder = corpus / "columns" / name
    try:
        data = (place / "columns" / name / "column.json").read_bytes()
    except FileNotFoundError:
        return
    stamp = hashlib.sha256(data).hexdigest()
    current = folder / "column.json"
    if current.is_file() and sha256_of(current) == stamp:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with waiting(folder_lock, folder):
        current.unlink(missing_ok=True)
        write_mapped(folder, data)
        replace_file(current, data)


def stored_column_file(path: Path, split: str, number: int) -> Path | None:
    """The cached file of a column's shard that is missing in its folder; None for a corpus that is not in a store."""
    folder = path.parent
    place = _place(folder.parent.parent)
    if place is None:
        return None
    files = open_mapped(folder)["splits"][split]
    file = files[number]
    return node_cache().path_of(place / "columns" / folder.name / path.name, file["sha256"], file["bytes"])


def _fetch_checked(place: Place, path: Path, sha256: str) -> None:
    with waiting(folder_lock, path.parent):
        if path.is_file():  # another process fetched it meanwhile
            return
        draft = path.with_name(f".{path.name}.draft")
        place.fill(draft, place.stat().size)
        if sha256_of(draft) != sha256:
            draft.unlink()
            raise Failure(f"{place} is not the file that its index names.")
        draft.replace(path)


def _number(shards: ShardList, name: str) -> int:
    """Row of a shard by its name, whose first number is the row in corpora that this version writes; -1 if absent."""
    digits = name.partition("-")[2].partition("-")[0]
    if digits.isdigit() and int(digits) < len(shards) and shards.names[int(digits)] == name.encode():
        return int(digits)
    rows = (shards.names == name.encode()).nonzero()[0]
    return int(rows[0]) if len(rows) else -1


@functools.lru_cache(maxsize=16)
def _place(folder: Path) -> Place | None:
    try:
        place = place_of(json.loads((folder / STORE).read_bytes())["place"])
    except FileNotFoundError:
        return None
    return place if isinstance(place, Place) else None


@functools.lru_cache(maxsize=16)
def _lists(folder: Path) -> dict[str, Any]:
    document = open_mapped(folder)
    for content in document["splits"].values():
        if not isinstance(content["shards"], ShardList):  # of an empty split
            content["shards"] = ShardList(content["shards"])
    return document
