"""What a wrong name probably meant, and names of a bounded length.

Standard library only: the console command imports it before anything heavy.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable


def near_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that is closest to a wrong one, or None where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'Did you mean "x"?' for the near name, else the list of known ones."""
    known = sorted(known)
    near = near_name(name, known)
    return f'Did you mean "{near}"?' if near is not None else f"Known: {', '.join(known) or 'none'}."


def bounded(text: str, limit_bytes: int, name: str) -> str:
    """`text` if it fits as UTF-8, else its beginning and a hash of `name`, so that different names stay different."""
    encoded = text.encode()
    if len(encoded) <= limit_bytes:
        return text
    tail = "-" + hashlib.sha256(name.encode()).hexdigest()[:12]
    return encoded[: limit_bytes - len(tail)].decode(errors="ignore") + tail
