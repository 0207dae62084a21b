"""A corpus in a store as a folder of this machine: index, tables and columns are copies, shards come when read.

    <folder>/.store.json      {"place": address of the corpus}; the other files are those of the corpus, without shards

The folder is opened like any corpus. A shard that is missing in it is fetched into the node's cache
(core/places/cache.py). A corpus on a disk has its shards, so its way to them is as ever.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from components.writing import replace_file
from pipelines.core.errors import UsageError
from pipelines.core.home import cache_folder
from pipelines.core.places.cache import NodeCache
from pipelines.core.places.place import Place, Where, place_of

STORE = ".store.json"


def corpus_folder(where: Where) -> Path:
    """The folder with which a corpus is opened; fetches index, tables and columns of one in a store.

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
    for name, stat in where.files():
        target = folder / name
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or name == "index.json" or _is_shard(name) or name.startswith("work/"):
            continue
        if not (target.is_file() and target.stat().st_size == stat.size):
            (where / name).download(target)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / STORE, json.dumps({"place": str(where)}).encode())
    if not (folder / "index.json").is_file():
        replace_file(folder / "index.json", index)  # the folder's name holds its digest; it comes last
    return folder


def stored_shard(path: Path) -> Path | None:
    """The cached file of a shard that is missing in its corpus' folder; None for a corpus that is not in a store.

    Raises:
        Failure, OSError, StoreUnavailable: see NodeCache.path_of.
    """
    folder = path.parent.parent
    place = _place(folder)
    if place is None:
        return None
    entry = _shards(folder).get(f"{path.parent.name}/{path.name}")
    if entry is None:
        return None
    return NodeCache().path_of(place / path.parent.name / path.name, *entry)


def _is_shard(name: str) -> bool:
    return name.count("/") == 1 and name.endswith(".tar")


@functools.lru_cache(maxsize=16)
def _place(folder: Path) -> Place | None:
    try:
        place = place_of(json.loads((folder / STORE).read_bytes())["place"])
    except FileNotFoundError:
        return None
    return place if isinstance(place, Place) else None


@functools.lru_cache(maxsize=16)
def _shards(folder: Path) -> dict[str, tuple[str, int]]:
    """(sha256, bytes) of the shards of a corpus, by "split/name"."""
    splits = json.loads((folder / "index.json").read_bytes())["splits"]
    return {
        f"{split}/{shard['name']}": (str(shard["sha256"]), int(shard["bytes"]))
        for split, content in splits.items()
        for shard in content["shards"]
    }
