"""Jobs of a Ray cluster: a command travels there with the code and small files, and runs on the head node.

Ray records a job's command and environment, shows them on its dashboard and writes them to its logs. So neither may
hold a secret: those belong into the environment of the cluster's processes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from components.secrets import HIDDEN, holds_secret, is_secret_variable, redacted, scrubbed
from pipelines.core.environment import JOBS_ADDRESS
from pipelines.core.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK, Failure, UsageError
from pipelines.core.shipping import MAX_CODE_MIB, files_below, write_code

PROGRAM = ("python", "-m", "pipelines.commands.main")
"""Starts the code that travels with the job, by the Python on the head node's PATH, which has the lock's packages."""

FORWARDED = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
"""Variables without secrets that a job gets when this command has them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command for a cluster.

    Attributes:
        words: the words of the command after `restoray`.
        folder: a folder whose files travel too; the command starts in its copy. None for none.
        environment: variables of the command and of its workers.
        cpus, memory_gib: of the command itself, not of its workers; 0 runs it on the head node.
    """

    words: Sequence[str]
    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 0.0
    memory_gib: float = 0.0

    @property
    def entrypoint(self) -> str:
        """The line of the shell that Ray runs."""
        return shlex.join([*PROGRAM, *self.words])

    def more_files(self) -> dict[str, Path]:
        """The files of `folder` by their names in the zip."""
        if self.folder is None:
            return {}
        return {path.relative_to(self.folder).as_posix(): path for path in files_below(self.folder)}


def check_words(words: Sequence[str]) -> None:
    """Refuse a secret in a command. Raises UsageError."""
    for word in words:
        name, equals, value = word.partition("=")
        key = name.rpartition(".")[2] if ".storage." in name or name.startswith("storage.") else ""
        if holds_secret(word) or (equals and key and redacted({key: value})[key] == HIDDEN):
            raise UsageError(
                f"{name or 'a word of the command'} holds a secret, and Ray shows a job's command to everybody: put it "
                "into the environment of the cluster's processes (in Kubernetes: a Secret)."
            )


def forwarded(names: Sequence[str]) -> dict[str, str]:
    """Values of the variables that travel with a job: NAME takes this command's value, NAME=VALUE is one.

    Raises:
        UsageError: a variable is not set, or sounds secret.
    """
    values = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    for text in names:
        name, equals, value = text.partition("=")
        if not name.replace("_", "a").isalnum():
            raise UsageError(f'--env "{text}" is not NAME or NAME=VALUE.')
        if not equals and name not in os.environ:
            raise UsageError(f"--env {name}: this variable is not set here.")
        value = value if equals else os.environ[name]
        if is_secret_variable(name) or holds_secret(value):
            raise UsageError(
                f"--env {name} sounds secret, and Ray writes a job's variables to its logs: put it into the "
                "environment of the cluster's processes (in Kubernetes: a Secret)."
            )
        values[name] = value
    return values


def connect(address: str) -> JobSubmissionClient:
    """The client of a cluster's job server.

    Args:
        address: http://HOST:8265, the address of the cluster from one of its nodes, or "" for RAY_ADDRESS.

    Raises:
        UsageError: no address is named, or the cluster refuses the token.
        Failure: no job server answers.
    """
    if not address:
        raise UsageError("submit needs the address of a cluster: --address http://HEAD:8265, or RAY_ADDRESS.")
    os.environ.pop(JOBS_ADDRESS, None)  # Ray would prefer it to our address
    for name in ("dashboard_sdk", "job.sdk"):  # we report ourselves
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UsageError(
            f"the cluster at {address} wants its token: set RAY_AUTH_TOKEN_PATH to a file with it, or RAY_AUTH_TOKEN."
        ) from error
    except Exception as error:  # the client raises errors of several libraries
        reason = scrubbed(" ".join(str(error).split())[:200], {})
        if "401" in reason or "403" in reason or "token" in reason.lower():
            raise UsageError(f"the cluster at {address} refuses this token ({reason}).") from error
        raise Failure(f"no job server answers at {address} ({reason}).") from error


def submit(client: JobSubmissionClient, job: Job, submission_id: str | None = None) -> str:
    """Send a job and return its id.

    Raises:
        UsageError: its files are too large, see shipping.write_code.
        Failure: the cluster refuses the job.
    """
    with tempfile.TemporaryDirectory(prefix="restoray-job-") as folder:
        code = write_code(Path(folder) / "restoray.zip", job.more_files(), MAX_CODE_MIB)
        environment: dict[str, Any] = {"working_dir": str(code), "env_vars": dict(job.environment)}
        own: dict[str, Any] = {"entrypoint_num_cpus": job.cpus} if job.cpus else {}
        if job.memory_gib:
            own["entrypoint_memory"] = int(job.memory_gib * 2**30)
        try:
            return client.submit_job(
                entrypoint=job.entrypoint, runtime_env=environment, submission_id=submission_id, **own
            )
        except (RuntimeError, ValueError) as error:
            reason = scrubbed(" ".join(str(error).split())[:300], {})
            raise Failure(f"the cluster does not take the job: {reason}") from error


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> int:
    """Pass on a job's output until it ends.

    Returns:
        The exit code of its command.
    """

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            write(lines)

    asyncio.run(tail())
    return exit_code(client, job)


def exit_code(client: JobSubmissionClient, job: str) -> int:
    """Exit code of a job's command that has ended; 1 if it has none, for example because the head node died."""
    info = client.get_job_info(job)
    code = getattr(info, "driver_exit_code", None)
    if code is not None:
        return int(code)
    return {"SUCCEEDED": EXIT_OK, "STOPPED": EXIT_INTERRUPTED}.get(str(info.status.value), EXIT_FAILURE)
