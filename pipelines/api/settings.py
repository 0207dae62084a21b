"""Settings as Python values: the key=value texts that recipes, specs and plans read.

A keyword is a key of the command line, with two underscores for a dot: `optimizer__lr=1e-4` is `optimizer.lr=0.0001`,
and `sources__0__path="photos"` is `sources.0.path=photos`. `**{"optimizer.lr": 1e-4}` says the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.core.errors import UsageError


def setting_texts(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as key=value texts.

    Texts and paths stay as they are, so a text is read as on the command line. None is `null`, other values are JSON,
    which is YAML too: lists, mappings, numbers, true and false.

    Raises:
        UsageError: a value is none of these.
    """
    return [f"{key.replace('__', '.')}={value_text(key, value)}" for key, value in settings.items()]


def value_text(key: str, value: Any) -> str:
    """Return one value as the command line takes it; raises UsageError for a value that it cannot take."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    try:
        return json.dumps(_plain(value), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{key} must be a text, a number, true or false, a list or a mapping, got {value!r}."
        ) from error


def _plain(value: Any) -> Any:
    """Return a value in JSON's types: paths as texts, tuples as lists, numbers of numpy as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(entry) for entry in value]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
