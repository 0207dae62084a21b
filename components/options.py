"""Options of a restorer, by name: judged and typed in one place, so that every caller writes them down alike.

Standard library only: plans, jobs and the service judge options before anything heavy is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from components.naming import did_you_mean

T = TypeVar("T")

OptionCheck = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""(options) -> the same options in their own types; raises ValueError, one sentence, for what is refused."""


class SystemOptionCheck(Protocol):
    """An OptionCheck of all a system's models: `defaults` are the options that the model's recipe settles."""

    def __call__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]: ...


def typed_options(given: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """The given options in their types: an integral 2.0 becomes the integer 2, a whole 3 the number 3.0.

    Args:
        types: by name; int, float, bool (also as the texts true and false), or a Literal of texts.

    Raises:
        UnknownOption: a name without a type.
        ValueError: a value that is not of its type.
    """
    values = {}
    for name, value in given.items():
        if name not in types:
            raise UnknownOption(name, types)
        values[name] = _typed(name, value, types[name])
    return values


def on_top(values: Mapping[str, Any], defaults: T, presets: Mapping[str, Mapping[str, Any]]) -> T:
    """Typed options on top of what their preset settles, on top of defaults, a dataclass that checks its ranges."""
    settled = presets[values["preset"]] if "preset" in values else {}
    return replace(defaults, **{**settled, **values})  # type: ignore[type-var]


def settings_by_name(cls: type[T], given: Mapping[str, Any], kind: str) -> T:
    """A dataclass from values by field name.

    Args:
        kind: what a field is called in the error, "speed setting" for example.

    Raises:
        ValueError: an unknown name, with the near one; or what the dataclass itself refuses.
    """
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for name in given:
        if name not in names:
            raise ValueError(f"unknown {kind} {name!r:.80}. {did_you_mean(str(name), names)}")
    return cls(**given)


def check_choices(settings: Any) -> None:
    """Every field of a dataclass that is a Literal or a bool holds one of its values.

    Raises:
        ValueError: a value outside its set.
    """
    for name, wanted in get_type_hints(type(settings)).items():
        value, choices = getattr(settings, name), get_args(wanted)
        if wanted is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r:.80}")
        if get_origin(wanted) is Literal and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r:.80}")


def _typed(name: str, value: Any, wanted: Any) -> Any:
    if wanted in (int, float):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= sys.float_info.max or (wanted is int and value != int(value)):
            kind = "an integer" if wanted is int else "a number"
            raise ValueError(f"option {name} must be {kind}, got {value!r:.80}")
        return wanted(value)
    if wanted is bool:
        named = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(named, bool):
            raise ValueError(f"option {name} must be true or false, got {value!r:.80}")
        return named
    choices = get_args(wanted)
    if value not in choices:
        raise ValueError(f"option {name} must be one of {', '.join(choices)}, got {value!r:.80}")
    return value


class UnknownOption(ValueError):
    """An option that nothing knows; `known` are the names that it could have meant."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name, self.known = str(name)[:80], tuple(known)
        super().__init__(self.name, self.known)  # what pickle calls __init__ with

    def __str__(self) -> str:
        return f"unknown option {self.name!r}. {did_you_mean(self.name, self.known)}"
