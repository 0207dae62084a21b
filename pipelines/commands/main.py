"""`restoray`: builds the parser, runs a command and maps errors to exit codes. Each command imports what it needs.

Exit codes: 0 ok, 1 failure, 2 usage, 3 finished with quarantined rows, 4 quality gate failed, 75 retry later,
130 interrupted (Ctrl-C or SIGTERM).
"""

from __future__ import annotations

import functools
import io
import json
import signal
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from components.naming import printable
from pipelines.commands import analyze, corpora, doctor, measuring, restoration, runs, submit, training, weights
from pipelines.commands.support import Command
from pipelines.core import ray_watch
from pipelines.core.environment import quiet_environment
from pipelines.core.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, RestorayError
from pipelines.core.ray_output import open_standard_streams, separate_stderr

INTERRUPT_MESSAGE = "interrupted: the same command resumes where this one stopped."


def show_version(value: bool) -> None:
    """The callback of --version."""
    if value:
        typer.echo(f"restoray {version('restoray')}")
        raise typer.Exit


def restoray(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Curate, train, restore, evaluate and serve generative image restoration on Ray."""


COMMANDS = (
    runs.demo,
    runs.run,
    corpora.curate,
    corpora.datasets,
    corpora.caption,
    corpora.replay,
    training.train,
    restoration.restore,
    measuring.degrade,
    measuring.evaluate,
    restoration.serve,
    submit.submit,
    doctor.doctor,
    training.recipes,
    runs.report,
)
"""In the order of `restoray --help`."""


def build_app() -> typer.Typer:
    """The parser of the command line."""
    app = typer.Typer(
        name="restoray",
        help="Curate, train, restore, evaluate and serve generative image restoration on Ray.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(restoray)
    for command in COMMANDS:
        app.command(cls=Command)(command)
    app.add_typer(analyze.app, name="analyze")
    app.add_typer(weights.app)
    return app


def interrupt(signum: int, frame: object) -> None:
    """The handler of SIGTERM: ends a command cleanly like Ctrl-C, with exit code 130."""
    raise KeyboardInterrupt


def main() -> None:
    """The entry point of `restoray`."""
    open_standard_streams()
    quiet_environment()
    separate_stderr()
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that are not text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, interrupt)
    as_json = "--json" in sys.argv
    ray_watch.end_with(functools.partial(report_error, code=EXIT_FAILURE, as_json=as_json))
    try:
        code = int(build_app()(standalone_mode=False) or EXIT_OK)
        message = (
            INTERRUPT_MESSAGE if code == EXIT_INTERRUPTED else ""
        )  # typer turns Ctrl-C into this code without a message
    except RestorayError as error:
        code, message = error.exit_code, "\n".join([str(error), *getattr(error, "__notes__", [])])
    except (KeyboardInterrupt, typer.Abort):
        code, message = EXIT_INTERRUPTED, INTERRUPT_MESSAGE
    except BrokenPipeError:  # the reader of our output has ended
        sys.stderr.close()
        sys.exit(EXIT_FAILURE)
    except OSError as error:
        code, message = EXIT_FAILURE, f"{error.filename or 'input or output'}: {error.strerror or error}."
    except ImportError as error:
        if (error.name or "").partition(".")[0] in ("components", "pipelines"):
            raise  # a fault of ours
        code, message = EXIT_FAILURE, broken_package(error)
    except Exception as error:  # the parser's error classes are private to typer
        show = getattr(error, "show", None)
        if show is None:
            raise
        code, message = getattr(error, "exit_code", EXIT_USAGE), ""
        show()
    if message:
        report_error(printable(message), code, as_json)
    sys.exit(code)


def broken_package(error: ImportError) -> str:
    """One sentence about a package that is missing or cannot be imported."""
    name = (error.name or "").partition(".")[0]
    reason = (str(error).strip().splitlines() or [""])[0]
    return f"the Python package {name or '(unnamed)'} cannot be imported: {reason}. `restoray doctor` names the remedy."


def report_error(message: str, code: int, as_json: bool) -> None:
    """Print one sentence on standard error; with --json also a document on standard output."""
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit_code": code}) + "\n")
        sys.stdout.flush()
    sys.stderr.write(f"restoray: {message}\n")


if __name__ == "__main__":
    main()
