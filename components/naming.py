"""Suggestions for misspelt names, and names of limited length.

Standard library only: the console command imports it before heavy packages.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence

MESSAGE_CHARS = 2000
"""Longest message of an error; ours."""


def near_name(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that is closest to a misspelt name, or None if none is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return 'Did you mean "x"?' for the closest name, else the list of names."""
    names = sorted(names)
    near = near_name(name, names)
    return f'Did you mean "{near}"?' if near is not None else f"Known: {', '.join(names) or 'none'}."


def list_some(names: Sequence[str], chars: int = 240) -> str:
    """Return the first names that fit, joined by commas, and the count of the others: "a, b and 931 more"."""
    text = ""
    for number, name in enumerate(names):
        longer = f"{text}, {name}" if text else str(name)
        if len(longer) > chars:
            return f"{text} and {len(names) - number} more" if text else f"{longer[:chars]}... ({len(names)} in all)"
        text = longer
    return text


def limited(message: str, chars: int = MESSAGE_CHARS) -> str:
    """Return a message of at most `chars` characters; a longer one keeps its beginning and its end."""
    if len(message) <= chars:
        return message
    mark = f" ... [{len(message)} characters in all] ... "
    end = (chars - len(mark)) // 4
    return message[: chars - len(mark) - end] + mark + message[len(message) - end :]


def shorten(text: str, limit_bytes: int, name: str) -> str:
    """Return `text` if it fits as UTF-8, else its beginning and a hash of `name`; different names stay different."""
    data = text.encode()
    if len(data) <= limit_bytes:
        return text
    tail = "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
    return data[: limit_bytes - len(tail)].decode(errors="ignore") + tail


def printable(name: str) -> str:
    """Return a file's name as text for JSON, reports and messages: bytes that are not UTF-8 become "\\xe9".

    Python holds such bytes as lone surrogates (PEP 383), which no UTF-8 file can hold.
    """
    return name if is_text(name) else _SURROGATE.sub(_escape, name)


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8 text."""
    return name.isascii() or _SURROGATE.search(name) is None


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


_SURROGATE = re.compile("[\ud800-\udfff]")
