"""Patterns of files: braces, which name files one by one, and wildcards, which choose among those that are there.

"x-{000..009}.tar" and "{train,val}/*.tar" mean what they mean in a shell: numbers keep their zeros, "{1..9..2}" has a
step, and braces may stand inside braces. Braces without a comma or two dots are letters of a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipelines.core.errors import UsageError

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?")
_WILDCARD = re.compile(r"[*?\[]")


def has_wildcard(path: str) -> bool:
    """Whether a path holds "*", "?" or "["."""
    return _WILDCARD.search(path) is not None


def has_braces(path: str) -> bool:
    """Whether a path holds braces that name several files.

    Raises:
        UsageError: a brace is not closed, or a range is none.
    """
    return _first_group(path, path) is not None


def fixed_folder(path: str) -> str:
    """The folder before the first wildcard or brace of a path."""
    match = re.search(r"[*?\[{]", path)
    return path[: match.start()].rpartition("/")[0] if match else path


def expand(pattern: str) -> Iterator[str]:
    """The paths that the braces of a pattern name, one at a time, in the pattern's order.

    Raises:
        UsageError: a brace is not closed, or a range is none; at the first item, before any path.
    """
    _check_all(pattern)
    return _expand(pattern, pattern)


def _check_all(pattern: str) -> None:
    rest = pattern
    while (group := _first_group(rest, pattern)) is not None:
        start, end = group
        for choice in _split(rest[start + 1 : end]):
            _check_all(choice)
        rest = rest[end + 1 :]


def _expand(text: str, pattern: str) -> Iterator[str]:
    group = _first_group(text, pattern)
    if group is None:
        yield text
        return
    start, end = group
    for choice in _choices(text[start + 1 : end], pattern):
        for rest in _expand(text[end + 1 :], pattern):
            yield f"{text[:start]}{choice}{rest}"


def _first_group(text: str, pattern: str) -> tuple[int, int] | None:
    """(opening, closing brace) of the first group that is a list or a range."""
    start = text.find("{")
    while start >= 0:
        end = _closing(text, start, pattern)
        inner = text[start + 1 : end]
        if len(_split(inner)) > 1 or _RANGE.fullmatch(inner):
            return start, end
        if ".." in inner and "{" not in inner:
            raise UsageError(
                f'{pattern}: "{{{inner}}}" is no range; ranges are {{first..last}} or {{first..last..step}}.'
            )
        start = text.find("{", start + 1)
    return None


def _closing(text: str, start: int, pattern: str) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
    raise UsageError(f'{pattern}: the brace "{text[start : start + 20]}" is not closed.')


def _split(inner: str) -> list[str]:
    """The items of a list, at the commas that are in no inner brace."""
    items, depth = [""], 0
    for letter in inner:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return items


def _choices(inner: str, pattern: str) -> Iterator[str]:
    match = _RANGE.fullmatch(inner)
    if match is None:
        for item in _split(inner):
            yield from _expand(item, pattern)
        return
    first, last, step = int(match[1]), int(match[2]), abs(int(match[3] or 1))
    if step == 0:
        raise UsageError(f'{pattern}: the step of "{{{inner}}}" is 0.')
    has_zeros = any(re.match(r"-?0\d", end) for end in (match[1], match[2]))
    width = max(len(match[1]), len(match[2])) if has_zeros else 0
    for number in range(first, last + 1, step) if first <= last else range(first, last - 1, -step):
        yield f"{number:0{width}d}"
