"""Which of several opened models restores which picture: names of models, and routes files of jobs.

A routes file is JSON lines, {"key": "a", "model": "portraits"}, or a table, see picture_lines.py. The `records.jsonl`
of an earlier job with several models is one. A picture without a line goes to the first model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.naming import did_you_mean
from components.options import OptionCheck
from components.restoring import Identity
from pipelines.core.errors import UsageError
from pipelines.core.places.place import Where
from pipelines.restoration.parts import Source
from pipelines.restoration.picture_lines import line_error, read_picture_lines

MIN_DIGEST_CHARS = 8
"""Shortest start of a digest that names a model; ours."""


class UnknownModel(ValueError):
    """No opened model, or more than one, has that name; the message suggests the nearest one."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of the models that pictures may name.

    Attributes:
        identity: information about it.
        check: of its restorer's options.
        names: what names it beside its digest.
    """

    identity: Identity
    check: OptionCheck
    names: tuple[str, ...]


def choose(name: str, choices: Sequence[Choice]) -> Choice:
    """The model of that name, digest or start of a digest; "" names the first.

    Raises:
        UnknownModel: see there.
    """
    if not name:
        return choices[0]
    matches = [choice for choice in choices if name in choice.names]
    if not matches and len(name) >= MIN_DIGEST_CHARS:
        matches = [choice for choice in choices if choice.identity.digest.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        digests = ", ".join(choice.identity.digest[:12] for choice in matches)
        raise UnknownModel(f"{len(matches)} models are called {name!r:.80}: name one by its digest ({digests})")
    names = dict.fromkeys(each for choice in choices for each in choice.names)
    raise UnknownModel(f"unknown model {name!r:.80}. {did_you_mean(name, list(names))}")


def read_routes(path: Path, sources: Mapping[str, Source], src: Where, choices: Sequence[Choice]) -> dict[str, str]:
    """Read the models' digests by key.

    Args:
        path: routes file, see the module's docstring.
        sources: the job's pictures by key, from list_pictures(src).
        src: the job's folder or picture.
        choices: the opened models.

    Raises:
        UsageError: a line is malformed, repeats a picture or names an unknown model or picture.
    """
    routes: dict[str, str] = {}
    for line in read_picture_lines(path, sources, src, ("model",), "routes"):
        if not isinstance(line.value, str) or not line.value:
            raise line_error(path, line.number, f"model must be the name of a model, got {line.value!r:.80}")
        try:
            routes[line.key] = choose(line.value, choices).identity.digest
        except UnknownModel as error:
            raise line_error(path, line.number, str(error)) from error
    if not routes:
        raise UsageError(f"{path} holds no routes")
    return routes
