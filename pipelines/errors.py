"""Failures that end a command, each with its exit code. Everything else that escapes is a bug and shows its traceback.

Exit codes: 0 ok, 1 failure, 2 usage, 3 finished with quarantined rows, 4 quality gate failed, 75 retry later,
130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable

from components.naming import near_name

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_QUARANTINED = 3
EXIT_GATE = 4
EXIT_RETRY = 75
EXIT_INTERRUPTED = 130


class RestorayError(Exception):
    """Base of every failure that is told to people in one sentence."""

    exit_code = EXIT_FAILURE


class Failure(RestorayError):
    """The work could not be done: unwritable output, too little disk, a broken model folder."""

    exit_code = EXIT_FAILURE


class UsageError(RestorayError):
    """The command cannot be meant: unknown name, wrong key, empty folder."""

    exit_code = EXIT_USAGE


class GateFailed(RestorayError):
    """The work was done and its result is below a stated threshold."""

    exit_code = EXIT_GATE


class RetryLater(RestorayError):
    """Something else holds what this command needs; the same command may succeed later."""

    exit_code = EXIT_RETRY


def near_miss(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' for the closest known name, "" where none is close."""
    near = near_name(name, known)
    return f' Did you mean "{near}"?' if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist: says what was asked, the near name, and what there is."""
    names = sorted(known)
    return UsageError(f'unknown {kind} "{name}".{near_miss(name, names)} Known: {", ".join(names) or "none"}.')
