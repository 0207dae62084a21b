"""Options of a restorer by name. One place checks and types them, so that every caller records them alike.

Standard library only: plans, jobs and the service check options before they load heavy packages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from components.naming import did_you_mean

T = TypeVar("T")

TEXTS = ("prompt", "negative_prompt")
"""Options of every system that are texts, taken as they were typed."""

COMPILE_MODES = ("off", "autoencoder", "blocks", "whole")
"""Which networks of a restorer torch.compile compiles, from none to all."""

OptionCheck = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""(options) -> the same options in their own types; raises ValueError with one sentence for a wrong option."""


class SystemOptionCheck(Protocol):
    """An OptionCheck for all models of a system: `defaults` are the options that the model's recipe sets."""

    def __call__(self, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]: ...


def typed_options(options: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Convert options to their types: an integral 2.0 becomes the integer 2, an integer 3 the float 3.0.

    Args:
        options: values by name.
        types: types by name; int, float, bool (the texts true and false too), str, or a Literal of texts.

    Raises:
        UnknownOption: a name has no type.
        ValueError: a value does not have its type.
    """
    values = {}
    for name, value in options.items():
        if name not in types:
            raise UnknownOption(name, types)
        values[name] = _convert(name, value, types[name])
    return values


def replace_options(options: Mapping[str, Any], defaults: T) -> T:
    """A dataclass of options with some of them changed by name, in their own types; raises as typed_options."""
    return replace(defaults, **typed_options(options, get_type_hints(type(defaults))))  # type: ignore[type-var]


def restore_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Default restorer options from a resolved recipe: its `restore_options`."""
    return dict(recipe.get("restore_options") or {})


def checked_options(options: Mapping[str, Any], defaults: Mapping[str, Any], own: T) -> dict[str, Any]:
    """The options in their own types, with their ranges checked beside the defaults; see OptionCheck.

    Args:
        defaults: from the model's recipe.
        own: the system's built-in options, a dataclass that checks ranges.

    Raises:
        ValueError: an unknown name (with the nearest one), a wrong type, or a value outside its range.
    """
    values = typed_options(options, get_type_hints(type(own)))
    replace(replace_options(defaults, own), **values)  # type: ignore[type-var]
    return values


def option_texts(options: Any) -> dict[str, str]:
    """The fields of a dataclass of options as text, for a PNG's text chunks."""
    return {name: str(value) for name, value in asdict(options).items()}


def apply_preset(values: Mapping[str, Any], defaults: T, presets: Mapping[str, Mapping[str, Any]]) -> T:
    """Replace fields of `defaults` by those of the options' preset, then by the typed options; check all ranges."""
    preset_values = presets[values["preset"]] if "preset" in values else {}
    return replace(defaults, **{**preset_values, **values})  # type: ignore[type-var]


def settings_by_name(cls: type[T], values: Mapping[str, Any], kind: str) -> T:
    """Build a dataclass from values by field name.

    Args:
        kind: noun for a field in the error, "speed setting" for example.

    Raises:
        ValueError: an unknown name, with a suggestion; or a value that the dataclass refuses.
    """
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise ValueError(f"unknown {kind} {name!r:.80}. {did_you_mean(str(name), names)}")
    return cls(**values)


def check_choices(settings: Any) -> None:
    """Check that every Literal or bool field of a dataclass holds one of its values.

    Raises:
        ValueError: a field holds another value.
    """
    for name, annotation in get_type_hints(type(settings)).items():
        value, choices = getattr(settings, name), get_args(annotation)
        if annotation is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r:.80}")
        if get_origin(annotation) is Literal and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}")


def _convert(name: str, value: Any, kind: Any) -> Any:
    if kind in (int, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max or (kind is int and value != int(value)):
            noun = "an integer" if kind is int else "a number"
            raise ValueError(f"option {name} must be {noun}, got {value!r:.80}")
        return kind(value)
    if kind is bool:
        flag = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(flag, bool):
            raise ValueError(f"option {name} must be true or false, got {value!r:.80}")
        return flag
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"option {name} must be text, got {value!r:.80}")
        return value
    choices = get_args(kind)
    if value not in choices:
        raise ValueError(f"option {name} must be one of {', '.join(choices)}, got {value!r:.80}")
    return value


class UnknownOption(ValueError):
    """An unknown option; `choices` are the known names."""

    def __init__(self, name: str, choices: Iterable[str]) -> None:
        self.name, self.choices = str(name)[:80], tuple(choices)
        super().__init__(self.name, self.choices)  # pickle calls __init__ with these

    def __str__(self) -> str:
        return f"unknown option {self.name!r}. {did_you_mean(self.name, self.choices)}"
