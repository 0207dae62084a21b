"""`restoray submit`: what is refused before a job leaves, and how a job's end becomes an exit code."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.commands.main import build_app
from pipelines.core import environment, jobs
from pipelines.core.errors import UsageError


def refusal(*words: str) -> str:
    result = CliRunner().invoke(build_app(), ["submit", *words])
    assert isinstance(result.exception, UsageError), result.output
    return str(result.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one thing to do"),
        (["--follow", "a", "--stop", "a"], "one thing to do"),
        (["--", "restor", "/in", "-o", "/out"], 'Did you mean "restore"'),
        (["--", "submit"], "unknown verb"),
        (["--", "restore", "/in", "--ot", "/out"], 'Did you mean "--out"'),
        (["--", "restore", "pictures", "-o", "/out"], "source pictures is relative"),
        (["--", "restore", "/in", "-o", "out"], "out out is relative"),
        (["--", "train", "instantir-dcp", "-o", "/out", "-i", "corpus=data"], "inputs data is relative"),
        (["--", "curate", "laion", "-o", "/out", "sources.0.storage.secret=abc"], "holds a secret"),
        (["--", "curate", "laion", "-o", "/out", "sources.0.path=s3://me:word@host/x"], "holds a secret"),
        (["--env", "AWS_SECRET_ACCESS_KEY=abc", "--", "recipes"], "sounds secret"),
        (["--env", "HF_TOKEN", "--", "recipes"], "sounds secret"),
        (["--env", "NOT_SET_HERE", "--", "recipes"], "not set here"),
        (["--", "recipes"], "needs the address of a cluster"),
    ],
)
def test_what_cannot_work_is_refused_here(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    for name in ("RAY_ADDRESS", environment.JOBS_ADDRESS):
        monkeypatch.delenv(name, raising=False)
    text = refusal(*words)
    assert message in text and "abc" not in text and "hf_0123" not in text and "word" not in text.partition(" holds")[2]


def test_a_dry_run_shows_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("x: 1")
    (tmp_path / ".netrc").write_text("secret")
    monkeypatch.setenv("RESTORAY_HOME", "/data/home")  # a place of this machine, unless it is named
    words = ["restore", "/in put", "-o", "/out", "--prompts", "mine.yaml", "prompt=a fox"]
    options = ["--working-dir", str(tmp_path), "--env", "MODE=fast", "--env", "RESTORAY_HOME", "--dry-run", "--json"]
    result = CliRunner().invoke(build_app(), ["submit", *options, "--", *words])
    document = json.loads(result.output)
    assert shlex.split(document["entrypoint"]) == ["python", "-m", "pipelines.commands.main", *words]
    assert document["environment"].items() >= {"RESTORAY_HOME": "/data/home", "MODE": "fast"}.items()
    assert document["files"] == 1


def test_a_command_between_stores_may_be_sent() -> None:
    words = ["restore", "s3://b/in", "-o", "s3://b/out", "--model", "s3://b/model"]
    result = CliRunner().invoke(build_app(), ["submit", "--dry-run", "--json", "--", *words])
    assert shlex.split(json.loads(result.output)["entrypoint"])[3:] == words


class Client:
    """The job client of Ray, with one job."""

    def __init__(self, status: str, code: int | None) -> None:
        self.info = SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=code)
        self.sent: dict[str, Any] = {}

    def get_job_info(self, job: str) -> Any:
        return self.info

    def submit_job(self, **arguments: Any) -> str:
        self.sent = arguments
        assert Path(arguments["runtime_env"]["working_dir"]).stat().st_size
        return "raysubmit_1"

    async def tail_job_logs(self, job: str) -> Any:
        for line in ("restore: 1/2\n", "2 restored\n"):
            yield line


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 75, 75), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_the_exit_code_is_that_of_the_command(status: str, code: int | None, expected: int) -> None:
    lines: list[str] = []
    client: Any = Client(status, code)
    assert jobs.follow(client, "raysubmit_1", lines.append) == expected
    assert lines == ["restore: 1/2\n", "2 restored\n"]


def test_a_job_brings_its_code_and_its_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("x")
    monkeypatch.setattr("pipelines.core.shipping.code_files", lambda: iter([("components/x.py", tmp_path / "code.py")]))
    client: Any = Client("SUCCEEDED", 0)
    job = jobs.Job(words=["recipes"], environment={"MODE": "fast"}, cpus=1, memory_gib=2)
    assert jobs.submit(client, job, "mine") == "raysubmit_1"
    assert client.sent["runtime_env"]["env_vars"] == {"MODE": "fast"} and client.sent["submission_id"] == "mine"
    assert (client.sent["entrypoint_num_cpus"], client.sent["entrypoint_memory"]) == (1, 2 * 2**30)
    jobs.submit(client, jobs.Job(words=["recipes"]))
    assert "entrypoint_num_cpus" not in client.sent  # then Ray runs it on the head node
