"""`restoray submit`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.support import PLACES
from pipelines.commands.words import DryRun, Json
from pipelines.core.console import Console
from pipelines.core.environment import JOBS_ADDRESS, cluster_address, use_address
from pipelines.core.errors import UsageError, unknown
from pipelines.core.places.addresses import is_address

LOCAL_ONLY = ("submit", "doctor")


def submit(
    context: typer.Context,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="-- VERB ...", help="The command, as it would be typed here.")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="http://HEAD:8265, or the cluster's address on one of its nodes.")
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(help="A folder of small files (recipes, specs) that travel too; the command starts in its copy."),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME[=VALUE]", help="A variable of the command; may be repeated. No secrets."),
    ] = None,
    job_id: Annotated[str | None, typer.Option("--id", help="Name of the job; must be new on this cluster.")] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs of the command itself; 0 runs it on the head node.")] = 0,
    memory: Annotated[float, typer.Option(min=0, help="GiB of the command itself.")] = 0,
    detach: Annotated[bool, typer.Option("--detach", help="Return at once and leave the job alone.")] = False,
    follow: Annotated[str | None, typer.Option(metavar="ID", help="Instead: follow the output of a job.")] = None,
    logs: Annotated[str | None, typer.Option(metavar="ID", help="Instead: print the output of a job so far.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Instead: stop a job.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a command on a Ray cluster as a job. Its code travels along, and data and weights stay where they are."""
    place = address or os.environ.get(JOBS_ADDRESS, "") or cluster_address()
    use_address(place or None)
    from pipelines.core import jobs  # imports Ray, which reads its variables

    console = Console(silent=as_json)
    words = list(command or [])
    asked = [name for name in (follow, logs, stop) if name is not None]
    if len(asked) + bool(words) != 1:
        raise UsageError("submit needs one thing to do: -- VERB ..., --follow ID, --logs ID or --stop ID.")
    if words:
        check_command(context, words, working_dir)
        jobs.check_words(words)
    job = jobs.Job(
        words=words,
        folder=working_dir,
        environment=jobs.forwarded(env or []),
        cpus=cpus,
        memory_gib=memory,
    )
    if dry_run:
        files = len(job.more_files())
        document = {"entrypoint": job.entrypoint, "environment": dict(job.environment), "files": files}
        names = ", ".join(job.environment) or "none"
        console.result(document, [job.entrypoint, f"variables: {names}; files besides the code: {files}"])
        return
    client = jobs.connect(place)
    if stop is not None:
        client.stop_job(stop)
        console.result({"job": stop, "stopped": True}, [f"{stop} is being stopped"])
        return
    if logs is not None:
        sys.stdout.write(client.get_job_logs(logs))
        return
    name = follow or jobs.submit(client, job, job_id)
    if detach:
        console.result({"job": name}, [f"submitted as {name}; see restoray submit --follow {name}"])
        return
    if follow is None:
        console.say(f"submitted as {name}; Ctrl-C leaves it running, restoray submit --stop {name} ends it")
    raise typer.Exit(_follow(client, name, as_json))


def _follow(client: Any, name: str, as_json: bool) -> int:
    """Follow a job; with --json its output goes to the standard error."""
    from pipelines.core import jobs

    target = sys.stderr if as_json else sys.stdout

    def write(lines: str) -> None:
        target.write(lines)
        target.flush()

    code = jobs.follow(client, name, write)
    Console(silent=as_json).result({"job": name, "exit_code": code}, [f"{name} ended with exit code {code}"])
    return code


def check_command(context: typer.Context, words: Sequence[str], working_dir: Path | None) -> None:
    """Parse a command as the cluster would, and refuse what cannot work there.

    Raises:
        UsageError: there is no such verb, or a path is relative and not one of `working_dir`: the job starts in a
            folder that is removed after it.
    """
    root: Any = context.find_root().command
    verbs = [name for name in root.commands if name not in LOCAL_ONLY]
    if words[0] not in verbs:
        raise unknown("verb", words[0], verbs)
    verb, rest, parent = root.commands[words[0]], list(words[1:]), context
    while hasattr(verb, "commands") and rest and rest[0] in verb.commands:
        verb, rest = verb.commands[rest[0]], rest[1:]
    with verb.make_context(words[0], list(rest), parent=parent, resilient_parsing=False) as parsed:
        if parsed.params.get("address"):
            raise UsageError("a job joins the cluster on which it runs: leave --address out of its command.")
        for parameter in verb.params:
            value = parsed.params.get(parameter.name)
            if parameter.name == "inputs":  # NAME=FOLDER
                value = [Path(pair.partition("=")[2]) for pair in value or ()]
            for path in value if isinstance(value, list | tuple) else [value]:
                if isinstance(path, Path) or (isinstance(path, str) and parameter.name in PLACES):
                    _check_path(str(parameter.name), Path(path), working_dir)


def _check_path(name: str, path: Path, working_dir: Path | None) -> None:
    text = str(path)
    if path.is_absolute() or is_address(text) or text.startswith("~"):
        return
    if working_dir is not None and (working_dir / path).exists() and name != "out":
        return
    raise UsageError(
        f"{name} {text} is relative: on the cluster it would lie in a folder that is removed with the job. Give a path "
        "that all nodes share, an address in a store, or put small files into --working-dir."
    )
