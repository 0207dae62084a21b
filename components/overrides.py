"""key=value texts: the type of the field that the key names decides how the value is read.

A text field takes the characters that were typed: "#", ": ", brackets, quotes, blanks at the ends, digits, "yes" and
"${...}" have no meaning in it. A field that may be empty (`str | None`) reads "null" as None. All other fields read
YAML: numbers, true and false, null, lists, mappings. Texts inside lists and mappings keep their spelling. Numbers are
decimal: "010" is ten, and "1:30" is none, although YAML 1.1 reads 8 and 90.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from components.options import TEXTS

HOLDS_TEXT = "holds_text"
"""Metadata of a mapping field without types: a function (name of an entry) -> whether that entry is a text."""

PROMPTS = {HOLDS_TEXT: frozenset(TEXTS).__contains__}
"""Metadata of a field with restorer options."""

MARKS_MISSING = "???"
"""OmegaConf's mark of a missing value, which no text of a dataclass can hold."""

NOT_TEXT = {code: 0x100000 + code for code in range(0xDC80, 0xDD00)}
"""Python holds the bytes of a name that is not UTF-8 as lone surrogates, which YAML refuses. It gets characters for
private use in their place, which `with_bytes` turns back."""

_PRIVATE = {private: code for code, private in NOT_TEXT.items()}
_PRIVATE_LETTER = re.compile(f"[{chr(min(_PRIVATE))}-{chr(max(_PRIVATE))}]")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]*[0-9]")
_WORD = re.compile(r"[-+.~\w]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_SEPARATORS = re.compile(r"[.\[\]]+")
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_STORAGE = re.compile(r"(?:^|[.\[\]])storage(?:[.\[\]]|$)")  # the options of a store may be secrets
_LIST_PLACE = re.compile(r"[.\[]\d+(?:[.\]]|$)")


class OverrideError(ValueError):
    """A text is not key=value, or its value has a wrong form; the message names it."""


def split_pair(override: str) -> tuple[str, str]:
    """Return (key, value as typed) of a key=value text. Raises OverrideError for a text without a key or "="."""
    key, equals, text = override.partition("=")
    if not equals or not key or not all(_parts(key)):
        raise OverrideError(f'"{_without_value(override):.200}" is not key=value.')
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
    """Return plain data as YAML that OmegaConf loads with the same texts, after `with_bytes`."""
    return str(OmegaConf.to_yaml(OmegaConf.create(_without_bytes(literal(document)))))


def with_bytes(value: Any) -> Any:
    """Return loaded data with the names that are not UTF-8, as `yaml_text` had them."""
    if isinstance(value, DictConfig | ListConfig):
        data = OmegaConf.to_container(value)
        restored = with_bytes(data)
        return value if restored == data else OmegaConf.create(restored)
    if isinstance(value, str):
        return value.translate(_PRIVATE) if _PRIVATE_LETTER.search(value) else value
    if isinstance(value, Mapping):
        return {with_bytes(name): with_bytes(entry) for name, entry in value.items()}
    return [with_bytes(entry) for entry in value] if isinstance(value, list) else value


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


def read_word(text: str) -> Any:
    """Return the value of one word as the command line reads it: a number, true or false, None, or the text itself."""
    return _number_or_text("value", text)


def apply_overrides(schema: type[Any], document: Any, overrides: Sequence[str]) -> DictConfig:
    """Merge a dataclass' defaults, a document and key=value texts.

    Args:
        schema: a dataclass; see its fields' types for how the texts are read.
        document: a mapping, or OmegaConf's.
        overrides: "sources.0.path=DIR" changes an entry of a list.

    Raises:
        OverrideError: a text is not key=value, its value is no YAML where the field is not a text, or it or the
            document has a list where a mapping or one value belongs, or the reverse, or a number that is NaN or too
            large.
        OmegaConfBaseException: a key is unknown, or a value has a wrong type.
    """
    nested: dict[str, Any] = {}
    in_lists: list[tuple[str, Any]] = []
    for override in overrides:
        key, text = split_pair(override)
        _check_place(schema, key)
        value = _typed_value(schema, key, text)
        if _LIST_PLACE.search(key):
            in_lists.append((key, value))
        else:
            _put(nested, key, value)
    merged = _merge(OmegaConf.structured(schema), with_bytes(document), OmegaConf.create(nested))
    for key, value in in_lists:  # a merge would replace the whole list
        _check_number(merged, key)
        OmegaConf.update(merged, key, value)
    assert isinstance(merged, DictConfig)
    for place in _places_of_nan(OmegaConf.to_container(merged)):
        raise OverrideError(f"{place} must be a number, got nan.")
    return merged


def _places_of_nan(value: Any, place: str = "") -> Iterator[str]:
    """The keys of all NaN inside a document. Each comparison with NaN is false, so it would pass other checks."""
    if isinstance(value, float) and math.isnan(value):
        yield place
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in entries:
        yield from _places_of_nan(entry, f"{place}.{name}" if place else str(name))


def _merge(defaults: Any, *documents: Any) -> Any:
    try:
        return OmegaConf.merge(defaults, *documents)
    except OverflowError as error:  # an integer of over 308 digits in a field of floats
        raise OverrideError("it has a number that is too large.") from error
    except TypeError as error:  # it does not say where
        wrong = "has a list where names and values belong, or the reverse."
        for document in map(OmegaConf.create, documents):
            if not isinstance(document, DictConfig):
                continue
            for name in map(str, document):
                try:
                    OmegaConf.merge(defaults, OmegaConf.masked_copy(document, name))
                except TypeError:
                    raise OverrideError(f"{name} {wrong}") from error
        raise OverrideError(f"it {wrong}") from error


def _check_place(schema: type[Any], key: str) -> None:
    """Refuse a key with a name where a list has numbers, or with a name below a field of one value."""
    parts = _parts(key)
    for count, part in enumerate(parts):
        kind, _ = _field_type(schema, parts[:count], by_name=False)  # "headers" may hold a text, or texts by name
        place = ".".join(parts[:count])
        if get_origin(kind) is list and not part.isdecimal():
            raise OverrideError(f"{key}: {place} is a list; name an entry by its number, as in {place}.0.")
        if kind in (str, int, float, bool):
            raise OverrideError(f"{key}: {place} takes one value and has no settings of its own.")


def _check_number(merged: Any, key: str) -> None:
    """Refuse a number that a list does not have."""
    here, place = merged, ""
    for part in _parts(key):
        if isinstance(here, ListConfig) and int(part) >= len(here):
            raise OverrideError(f"{key}: {place} has {len(here)} entries, counted from 0.")
        if isinstance(here, ListConfig):
            here = here._get_node(int(part))
        elif isinstance(here, DictConfig):
            here = here._get_node(part)
        place = f"{place}.{part}" if place else part


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


def _field_type(schema: Any, parts: Sequence[str], by_name: bool = True) -> tuple[Any, bool]:
    """Return (type of the field at these names, whether None is allowed); Any for a field without a type.

    With `by_name`, HOLDS_TEXT makes such a field a text.
    """
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
    return (str if by_name and kind is Any and is_text is not None and is_text(parts[-1]) else kind), optional


def _without_none(kind: Any) -> tuple[Any, bool]:
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    others = [each for each in get_args(kind) if each is not type(None)]
    return (others[0] if len(others) == 1 else Any), len(others) < len(get_args(kind))


def _typed_value(schema: type[Any], key: str, text: str) -> Any:
    """Return the typed value of a text for OmegaConf."""
    parts = _parts(key)
    kind, optional = _field_type(schema, parts)
    if _is_text(kind):
        return _text_value(key, text, optional)
    if kind is Any:
        return literal(_plain_value(key, text))
    if not text:
        return ""  # YAML would read None
    if text.startswith("${"):
        return text
    safe = _without_bytes(text)
    return with_bytes(_node_value(schema, key, parts, _node(key, safe), safe))


def _node_value(schema: type[Any], key: str, parts: Sequence[str], node: yaml.Node, source: str) -> Any:
    """Return the value of a YAML node for OmegaConf: texts as they are spelled, the rest as `_yaml_value` reads it.

    Args:
        parts: place of the node in the schema.
        source: the YAML text.
    """
    kind, optional = _field_type(schema, parts)
    word = node.value if isinstance(node, yaml.ScalarNode) and node.style is None else ""
    is_open = kind is Any or (optional and word == "null")
    for is_kind, form, example in (
        (get_origin(kind) is list, yaml.SequenceNode, "a list, as in [a, b]"),
        (
            get_origin(kind) is dict or dataclasses.is_dataclass(kind),
            yaml.MappingNode,
            "names and values, as in {a: b}",
        ),
        (_is_text(kind), yaml.ScalarNode, "one text: quote it, as in 'b: c'"),
    ):
        if is_kind and not is_open and not isinstance(node, form):
            raise OverrideError(f"{'.'.join(parts)} needs {example}.")
    if isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return [_node_value(schema, key, [*parts, str(number)], entry, source) for number, entry in items]
    if isinstance(node, yaml.MappingNode):
        pairs = [(str(name.value), entry) for name, entry in node.value]
        return {name: _node_value(schema, key, [*parts, name], entry, source) for name, entry in pairs}
    if _is_text(kind):
        return _text_value(key, node.value, optional and bool(word))
    return literal(_yaml_value(key, source[node.start_mark.index : node.end_mark.index]))


def _node(key: str, text: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _no_yaml(key, text) from error
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise _no_yaml(key, text)  # a few aliases of aliases stand for millions of values
    return node or yaml.ScalarNode("tag:yaml.org,2002:null", "")


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(each, str) for each in get_args(kind)))


def _text_value(key: str, text: str, optional: bool) -> Any:
    if text == MARKS_MISSING:
        raise _marks_missing(key)
    return None if optional and text == "null" else literal(text)


def _plain_value(key: str, text: str) -> Any:
    """Return the value of a text for a field without a type."""
    is_nested = text.lstrip()[:1] in ("[", "{") and text.strip()[-1:] in ("]", "}")
    if is_nested:
        safe = _without_bytes(text)
        return with_bytes(_node_value(_Untyped, key, ["any"], _node(key, safe), safe))
    return _number_or_text(key, text)


def _number_or_text(key: str, text: str) -> Any:
    """Return the number, truth value or None that one word stands for, else the text."""
    if not _WORD.fullmatch(text.strip()):
        return text
    try:
        value = _yaml_value(key, text)
    except OverrideError:
        return text
    return value if isinstance(value, int | float) or value is None else text


def _yaml_value(key: str, text: str) -> Any:
    """Return the value of a YAML text, with OmegaConf's spelling of numbers ("1e-4")."""
    word = text.strip()
    if _LEADING_ZERO.fullmatch(word):
        return int(word)
    if _SEXAGESIMAL.fullmatch(word):
        return word
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload,index]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise _no_yaml(key, text) from error
    if value == MARKS_MISSING:
        raise _marks_missing(key)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise OverrideError(f"{key} is too large: {text:.80}...")
    return value


def _without_bytes(value: Any) -> Any:
    """Return data that YAML can hold; see NOT_TEXT."""
    if isinstance(value, str):
        return value if value.isascii() else value.translate(NOT_TEXT)
    if isinstance(value, Mapping):
        return {_without_bytes(name): _without_bytes(entry) for name, entry in value.items()}
    return [_without_bytes(entry) for entry in value] if isinstance(value, list) else value


@dataclasses.dataclass
class _Untyped:
    """A schema with one field without a type."""

    any: Any = None


def _marks_missing(key: str) -> OverrideError:
    return OverrideError(f'{key} cannot be "{MARKS_MISSING}", which marks a missing value.')


def _no_yaml(key: str, text: str) -> OverrideError:
    typed = "" if _STORAGE.search(key) else f": {text!r:.200}"
    return OverrideError(f"{key} cannot be read as YAML{typed}. Quote its texts, as in [\"a #1\", 'b: c'].")


def _without_value(override: str) -> str:
    """A text for a message: of an option of a store only its name, since its value may be a secret."""
    name = re.match(r"[\w.\[\]-]*", override)
    return f"{name[0]}..." if name is not None and _STORAGE.search(name[0]) else override
