"""Errors that end a command, each with its exit code. Any other exception is a bug and shows its traceback.

Exit codes: 0 ok, 1 failure, 2 usage, 3 finished with quarantined rows, 4 quality gate failed, 75 retry later,
130 interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable

from components.naming import limited, near_name

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_QUARANTINED = 3
EXIT_GATE = 4
EXIT_RETRY = 75
EXIT_INTERRUPTED = 130


class RestorayError(Exception):
    """Base of all errors that a command prints as one sentence."""

    exit_code = EXIT_FAILURE

    def __init__(self, *message: object) -> None:
        """Shorten a text to the longest message of a command, 2,000 characters."""
        super().__init__(*(limited(part) if isinstance(part, str) else part for part in message))


class Failure(RestorayError):
    """The work failed: for example unwritable output, too little disk space, a broken model folder."""

    exit_code = EXIT_FAILURE


class UsageError(RestorayError):
    """The command is wrong: for example an unknown name, a wrong key, an empty folder."""

    exit_code = EXIT_USAGE


class GateFailed(RestorayError):
    """The work finished, and its result misses a threshold."""

    exit_code = EXIT_GATE


class RetryLater(RestorayError):
    """Another process uses a resource that this command needs; the same command may succeed later."""

    exit_code = EXIT_RETRY


class Unfinished(RestorayError):
    """The time that the command was given is over; the same command continues the work."""

    exit_code = EXIT_RETRY


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def near_miss(name: str, choices: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the closest choice, "" if none is close."""
    near = near_name(name, choices)
    return f' Did you mean "{near}"?' if near else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """Return the error for an unknown name. The message has the name, the closest choice, and all choices."""
    names = sorted(choices)
    return UsageError(f'unknown {kind} "{name}".{near_miss(name, names)} Known: {", ".join(names) or "none"}.')
