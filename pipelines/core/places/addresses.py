"""Addresses of stores ("s3://bucket/x"), and the refusal of those that a command cannot use. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

from components.secrets import without_secrets
from pipelines.core.errors import UsageError

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+")  # at least two letters: "c:/x" is a drive


def is_address(text: str | Path) -> bool:
    """Whether a text names a store and not a path; a Path has lost one slash of "s3://bucket"."""
    return _SCHEME.match(str(text)) is not None


def address_of(path: str | Path) -> str:
    """The address that became this path, without secrets; other paths as they are."""
    return without_secrets(_SCHEME.sub(r"\1://", str(path), count=1) if is_address(path) else str(path))


def refuse_address(path: str | Path, name: str = "") -> None:
    """Raise a UsageError if a path is an address: taken as a path, it would become a local folder called "s3:".

    Args:
        name: of the option or argument, for the sentence.
    """
    if is_address(path):
        where = f"{name}: " if name else ""
        raise UsageError(f"{where}{address_of(path)} is an address; here only a path of this machine can be used.")
