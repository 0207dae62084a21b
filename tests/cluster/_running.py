"""Helpers of the tests of a cluster: start its nodes, run commands beside it, compare folders."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
NODES = Path(__file__).with_name("_nodes.py")
TOKEN = "0123456789abcdef0123456789abcdef"
COMMAND_TIMEOUT_S = 800  # a busy machine takes minutes for the imports of a few processes


def environment(**more: str) -> dict[str, str]:
    """The environment of a user who has the cluster's token; no address."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job starts "python"
    others = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    return {
        **{name: value for name, value in os.environ.items() if name not in others},
        "PATH": path,
        "PYTHONPATH": str(TOP),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_TOKEN": TOKEN,
        **more,
    }


@dataclass
class Nodes:
    """A running cluster. `folder` is where its commands work: no node has it as its working folder."""

    address: str
    jobs: str
    process: subprocess.Popen[str]
    folder: Path

    def run(self, *words: str, expected: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command and check its exit code."""
        with self.start(*words, **more) as process:
            try:
                output, errors = process.communicate(timeout=COMMAND_TIMEOUT_S)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert process.returncode == expected, f"{output[-1000:]}\n{errors[-3000:]}"
        assert TOKEN not in output + errors
        return subprocess.CompletedProcess(words, process.returncode, output, errors)

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines.commands.main", *words],
            cwd=self.folder,
            env=environment(RESTORAY_HOME=str(self.folder / "home"), **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def kill_node(self, number: int) -> None:
        """Kill a node like a power cut."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"kill {number}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "killed\n"


@contextmanager
def running_nodes(folder: Path, *cpus: int) -> Iterator[Nodes]:
    """A cluster with one node for each number of CPUs; see _nodes.py."""
    (folder / "driver").mkdir(parents=True)
    variables = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with (folder / "nodes.err").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(NODES), str(folder), *map(str, cpus)],
            env={**environment(RAY_raylet_start_wait_time_s="600"), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout is not None and process.stdin is not None
        line = process.stdout.readline()
        assert line, (folder / "nodes.err").read_text()[-3000:]
        places: dict[str, Any] = json.loads(line)
        yield Nodes(address=places["address"], jobs=places["jobs"], process=process, folder=folder / "driver")
        process.stdin.close()
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def contents(folder: Path, *patterns: str) -> dict[str, str]:
    """Digests of the files that match, by their paths in the folder."""
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_until(condition: Any, process: subprocess.Popen[str], timeout_s: float = COMMAND_TIMEOUT_S) -> None:
    """Wait until a condition holds while a process runs."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end
        time.sleep(0.2)


def secrets_in(folder: Path, values: Sequence[str]) -> list[str]:
    """Files below a folder that hold one of the values."""
    needles = [value.encode() for value in values]
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]
