"""key=value texts: the type of the field that the key names decides how the value is read.

A text field takes the characters that were typed: "#", ": ", brackets, quotes, blanks at the ends, digits, "yes" and
"${...}" have no meaning in it. A field that may be empty (`str | None`) reads "null" as None. All other fields read
YAML: numbers, true and false, null, lists, mappings. Lists and mappings of texts keep the spelling of their entries.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.options import TEXTS

HOLDS_TEXT = "holds_text"
"""Metadata of a mapping field without types: a function (name of an entry) -> whether that entry is a text."""

PROMPTS = {HOLDS_TEXT: frozenset(TEXTS).__contains__}
"""Metadata of a field with restorer options."""

MARKS_MISSING = "???"
"""OmegaConf's mark of a missing value, which no text of a dataclass can hold."""

_SEPARATORS = re.compile(r"[.\[\]]+")
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_LIST_PLACE = re.compile(r"[.\[]\d+(?:[.\]]|$)")


class OverrideError(ValueError):
    """A text is not key=value, or its value has a wrong form; the message names it."""


def split_pair(override: str) -> tuple[str, str]:
    """Return (key, value as typed) of a key=value text. Raises OverrideError for a text without a key or "="."""
    key, equals, text = override.partition("=")
    if not equals or not key or not all(_parts(key)):
        raise OverrideError(f'"{override:.200}" is not key=value.')
    return key, text


def literal(value: Any) -> Any:
    """Return plain data whose texts OmegaConf reads as they are, although "${" begins an interpolation there."""
    if isinstance(value, str):
        return _INTERPOLATION.sub(lambda match: match[1] * 2 + r"\${", value)
    if isinstance(value, Mapping):
        return {literal(name) if isinstance(name, str) else name: literal(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [literal(entry) for entry in value]
    return value


def yaml_text(document: Any) -> str:
    """Return plain data as YAML that OmegaConf loads with the same texts."""
    return str(OmegaConf.to_yaml(OmegaConf.create(literal(document))))


def read_options(overrides: Iterable[str], texts: Iterable[str] = ()) -> dict[str, Any]:
    """Return the values of key=value texts whose types are checked later, nested by the dots of the keys.

    Args:
        texts: keys of text values. The values of other keys are numbers, true or false, null, lists or mappings if
            they read as such from their first to their last character, and texts otherwise.

    Raises:
        OverrideError: a text is not key=value, or a list or mapping has a wrong form.
    """
    names = frozenset(texts)
    document: dict[str, Any] = {}
    for override in overrides:
        key, text = split_pair(override)
        _put(document, key, text if key in names else _plain_value(key, text))
    return document


def apply_overrides(schema: type[Any], document: Any, overrides: Sequence[str]) -> DictConfig:
    """Merge a dataclass' defaults, a document and key=value texts.

    Args:
        schema: a dataclass; see its fields' types for how the texts are read.
        document: a mapping, or OmegaConf's.
        overrides: "sources.0.path=DIR" changes an entry of a list.

    Raises:
        OverrideError: a text is not key=value, or its value is no YAML where the field is not a text.
        OmegaConfBaseException: a key is unknown, or a value has a wrong type.
    """
    nested: dict[str, Any] = {}
    in_lists: list[tuple[str, Any]] = []
    for override in overrides:
        key, text = split_pair(override)
        value = _typed_value(key, text, *_field_type(schema, _parts(key)))
        if _LIST_PLACE.search(key):
            in_lists.append((key, value))
        else:
            _put(nested, key, value)
    merged = OmegaConf.merge(OmegaConf.structured(schema), document, OmegaConf.create(nested))
    for key, value in in_lists:  # a merge would replace the whole list
        OmegaConf.update(merged, key, value)
    assert isinstance(merged, DictConfig)
    return merged


def _parts(key: str) -> list[str]:
    return _SEPARATORS.split(key.removesuffix("]"))


def _put(document: dict[str, Any], key: str, value: Any) -> None:
    """Set a value in nested mappings; a later value replaces an earlier one."""
    *folders, last = _parts(key)
    for name in folders:
        inner = document.get(name)
        if not isinstance(inner, dict):
            inner = document[name] = {}
        document = inner
    document[last] = value


def _field_type(schema: Any, parts: Sequence[str]) -> tuple[Any, bool]:
    """Return (type of the field at these names, whether None is allowed); Any for a field without a type."""
    kind, optional, is_text = schema, False, None
    for name in parts:
        if dataclasses.is_dataclass(kind):
            entries = {entry.name: entry for entry in dataclasses.fields(kind)}
            if name not in entries:
                return Any, False
            is_text = entries[name].metadata.get(HOLDS_TEXT)
            kind = get_type_hints(kind)[name]
        elif get_origin(kind) in (list, dict):
            kind = get_args(kind)[-1]
        else:
            kind = Any
        kind, optional = _without_none(kind)
    return (str if kind is Any and is_text is not None and is_text(parts[-1]) else kind), optional


def _without_none(kind: Any) -> tuple[Any, bool]:
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    others = [each for each in get_args(kind) if each is not type(None)]
    return (others[0] if len(others) == 1 else Any), len(others) < len(get_args(kind))


def _typed_value(key: str, text: str, kind: Any, optional: bool) -> Any:
    """Return a typed text for OmegaConf."""
    if kind is str or (get_origin(kind) is Literal and all(isinstance(each, str) for each in get_args(kind))):
        if text == MARKS_MISSING:
            raise OverrideError(f'{key} cannot be "{MARKS_MISSING}", which marks a missing value.')
        return None if optional and text == "null" else literal(text)
    if kind is Any:
        return literal(_plain_value(key, text))
    if not text:
        return ""  # YAML would read None
    if get_origin(kind) in (list, dict) and get_args(kind)[-1] is str:
        try:
            return literal(yaml.load(text, Loader=yaml.BaseLoader))  # noqa: S506 - it makes texts only
        except yaml.YAMLError as error:
            raise _no_yaml(key, text) from error
    return _yaml_value(key, text)


def _plain_value(key: str, text: str) -> Any:
    """Return the value of a text for a field without a type."""
    is_nested = text.lstrip()[:1] in ("[", "{") and text.strip()[-1:] in ("]", "}")
    try:
        value = _yaml_value(key, text) if text else ""
    except OverrideError:
        if is_nested:
            raise
        return text
    if isinstance(value, list | dict):
        return value if is_nested else text
    is_number = isinstance(value, int | float) or value is None
    return value if is_number and not re.search(r"[#:\s]", text.strip()) else text  # "1:30" is a number in YAML 1.1


def _yaml_value(key: str, text: str) -> Any:
    """Return the value of a YAML text, with OmegaConf's spelling of numbers ("1e-4")."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise _no_yaml(key, text) from error


def _no_yaml(key: str, text: str) -> OverrideError:
    return OverrideError(f"{key} cannot be read as YAML: {text!r:.200}. Quote its texts, as in [\"a #1\", 'b: c'].")
