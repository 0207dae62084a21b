"""The pictures of a restoration job by key: of a file, a folder, a pattern, tars, tables, or a corpus of ours.

    pics/a.jpg                the picture alone; key "a"
    pics                      all pictures below; key is the path without its suffix, "2024/a"
    'pics/**/*.jpg'           those that match; keys as of the folder before the first wildcard, "2024/a"
    shards/a.tar              the pictures in it; keys "x", "sub/y", as in a folder
    shards, 'shards/*.tar'    a tar below a folder is a sub-folder with its name: keys "a/x", "a/sub/y"
    t.parquet --column image  the cells of the column; keys of KEY_COLUMNS, else of the cell's path, else row numbers
    corpus                    the pictures of all its shards, by their keys in the corpus

All of them may be in a store. Keys are safe file names (components.restoring.file_key). A picture keeps the key that it
has in the records of an earlier job in the same output folder, so files that are added later rename nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.naming import printable
from components.secrets import holds_secret
from components.types import SampleError
from pipelines.core.errors import UsageError
from pipelines.core.pictures import (
    SIDECARS,
    list_names,
    list_pictures,
    make_keys,
    read_picture,
    spellings_of,
)
from pipelines.core.places.files import read
from pipelines.core.places.place import Place, Where, place_of
from pipelines.restoration.parts import PACKED_TARS, TABLES, TARS, Part, Source, distinct, list_table, list_tar

WILDCARDS = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The pictures of a job.

    Attributes:
        root: folder, or file, that the keys start from.
        pictures: by key, in the order of their names.
        ignored: files that are no pictures.
    """

    root: Where
    pictures: Mapping[str, Source]
    ignored: int = 0


def list_sources(src: str | Where, out: Where | None = None, column: str = "") -> Sources:
    """List the pictures of a job; see the top of this file.

    Args:
        src: a path, an address, or a pattern with *, ** and ?; patterns are texts.
        out: folder of the results, which is left out; its records keep keys.
        column: of a table.

    Raises:
        UsageError: there is nothing at that place, it holds no picture, or is `out` itself.
    """
    root, pattern = _split(src)
    if isinstance(root, Place):
        root.check()
    if _is_container(root):
        parts, ignored = _parts_of(root, column)
        named: list[tuple[str, Source]] = list(zip(distinct(part.inner for part in parts), parts, strict=True))
    elif pattern is None and isinstance(root, Path) and not root.is_dir():
        files, ignored = list_pictures(root, out)
        return Sources(root=root, pictures=files, ignored=ignored)
    else:
        named, ignored = _below(root, pattern, out, column)
        if not named and pattern is None and isinstance(root, Place):  # one object, or nothing
            stored, ignored = list_pictures(root, out)
            return Sources(root=root, pictures=stored, ignored=ignored)
    what = f"{root}/{pattern}" if pattern else str(root)
    if not named:
        raise UsageError(f"{what} holds no pictures")
    names = [name for name, _ in named]
    earlier = _earlier_keys([(name, str(source)) for name, source in named], out)
    keys = make_keys(names, earlier)
    pictures: dict[str, Source] = dict(zip(keys, (source for _, source in named), strict=True))
    if not any(not isinstance(each, Path) or each.is_file() for each in pictures.values()):
        raise UsageError(f"{what} holds no pictures{_first_refusal(pictures)}")
    return Sources(root=root, pictures=pictures, ignored=ignored)


def _first_refusal(pictures: Mapping[str, Source]) -> str:
    """Why the first file cannot be read, as the end of a sentence."""
    for key, path in pictures.items():
        try:
            assert not isinstance(path, Part)
            read_picture(path, key)
        except SampleError as error:
            return f"; {key}: {error.detail}"
    return ""


def _split(src: str | Where) -> tuple[Where, str | None]:
    """The folder or file that a text names, and the pattern below it, if it is one."""
    if not isinstance(src, str):
        return src, None
    # "?" is no wildcard in an address: place_of refuses it, because a signature may follow
    wild = WILDCARDS.search(src) if "://" not in src else "*" in src and "?" not in src and not holds_secret(src)
    if not wild or ("://" not in src and Path(src).exists()):
        return place_of(src), None
    parts = src.split("/")
    first = next(number for number, part in enumerate(parts) if WILDCARDS.search(part))
    if any(part == ".." for part in parts[first:]):
        raise UsageError(f'{src}: ".." cannot stand behind a wildcard.')
    head = "/".join(parts[:first])
    root = place_of(head or ("/" if src.startswith("/") else "."))
    if isinstance(root, Path) and not root.is_dir():
        raise UsageError(f"{root} does not exist")
    return root, "/".join(parts[first:])


def _is_container(root: Where) -> bool:
    name = root.name.lower()
    if name.endswith(PACKED_TARS) and (isinstance(root, Place) or root.is_file()):
        raise UsageError(f"{root} is compressed, so no member can be read alone: unpack it to a plain .tar.")
    return name.endswith(TARS + TABLES) and (isinstance(root, Place) or root.is_file())


def _parts_of(container: Where, column: str) -> tuple[list[Part], int]:
    if container.name.lower().endswith(TABLES):
        return list_table(container, column), 0
    return list_tar(container)


def _below(root: Where, pattern: str | None, out: Where | None, column: str) -> tuple[list[tuple[str, Source]], int]:
    """(path below the root, picture) of a folder's files, and of the parts of its tars or tables."""
    shards = _corpus_shards(root)
    names, ignored = (shards, 0) if shards else list_names(root, out, _sidecars(column))
    if column:
        ignored += sum(not name.lower().endswith(TABLES) for name in names)
        names = [name for name in names if name.lower().endswith(TABLES)]
    if pattern is not None:
        matching = re.compile(translate(pattern))
        names = [name for name in names if matching.fullmatch(name)]
        if not names:
            hint = "; a table needs --column NAME" if pattern.endswith(TABLES) and not column else ""
            raise UsageError(f"no file below {root} matches {pattern}{hint}")
    named: list[tuple[str, Source]] = []
    for name in names:
        where = (root / name).absolute()
        if name.lower().endswith(TARS + TABLES):
            try:
                parts, others = _parts_of(where, column)
            except UsageError:
                if column:
                    raise
                named.append((name, where))  # no tar: refused as any other file that is no picture
                continue
            prefix = "" if shards else f"{name.rpartition('.')[0]}/"
            inner = distinct(part.inner for part in parts)
            named += [(f"{prefix}{each}", part) for each, part in zip(inner, parts, strict=True)]
            ignored += others
        else:
            named.append((name, where))
    return named, ignored


def _sidecars(column: str) -> frozenset[str]:
    return SIDECARS - set(TABLES) if column else SIDECARS


def _corpus_shards(root: Where) -> list[str]:
    """Paths of a corpus' shards below its folder; [] for another folder."""
    try:
        document: Mapping[str, Any] = json.loads(read(root / "index.json"))
        splits = document["splits"] if "digest" in document else {}
        return [f"{split}/{shard['name']}" for split, content in splits.items() for shard in content["shards"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def translate(pattern: str) -> str:
    """A regular expression for a pattern: "*" and "?" stay in a folder, "**" is any number of folders."""
    result, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            result, at = result + r"(?:[^/]+/)*", at + 3
        elif pattern.startswith("**", at):
            result, at = result + ".*", at + 2
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inner = pattern[at + 1 : end].replace("\\", "\\\\")
            result, at = (
                result + "[" + ("^" + inner[1:] if inner[0] == "!" else inner.replace("^", "\\^")) + "]",
                end + 1,
            )
        else:
            letter = pattern[at]
            result, at = result + {"*": "[^/]*", "?": "[^/]"}.get(letter, re.escape(letter)), at + 1
    return result


def _earlier_keys(named: Sequence[tuple[str, str]], out: Where | None) -> dict[str, str]:
    """Keys of the records in `out` by path, for the pictures whose shortest key is not theirs alone."""
    if out is None or make_keys([name for name, _ in named]) == [spellings_of(name)[0] for name, _ in named]:
        return {}
    sources: dict[str, str] = {}
    try:
        lines = read(out / "records.jsonl").split(b"\n")
    except OSError:
        return {}
    for line in lines:
        try:
            record = json.loads(line)
            sources[record["key"]] = record["source"]
        except (ValueError, KeyError, TypeError):
            continue  # core.rows refuses a broken list with a sentence of its own
    earlier = {}
    for name, path in named:
        for key in spellings_of(name):
            source = sources.get(key, "")
            if source == printable(path) or source.endswith(f"/{printable(name)}"):
                earlier[name] = key
                break
    return earlier
