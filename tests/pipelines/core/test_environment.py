"""The environment of Ray whatever the user's holds, and commands whose standard streams are closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.images import encode_png
from components.synthetic import dead_leaves
from pipelines.core.environment import quiet_environment


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The changes of quiet_environment end with the test."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize("token", [None, "", "  "])
@pytest.mark.parametrize("path", [None, "", "missing", "blank"])
def test_a_blank_token_is_replaced_by_the_commands_own(
    token: str | None, path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would take or write the token in the user's home, which all its clusters share."""
    (tmp_path / "blank").write_text("\n")
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    if path is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / path) if path else "")
    quiet_environment()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_a_users_token_stays_and_nothing_opens_ray_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("mine")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")  # Ray would listen on every address
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    quiet_environment()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token") and "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0" and "RAY_AUTH_MODE" not in os.environ


def test_a_command_works_with_closed_standard_streams(repository: Path, tmp_path: Path) -> None:
    """As from cron or a daemon: "<&- >&- 2>&-"."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode_png(dead_leaves(32, 1, 0)))
    command = f"exec {sys.executable} -m pipelines.commands.main degrade in out <&- >&- 2>&-"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    process = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, check=False, timeout=120)
    assert process.returncode == 0 and (tmp_path / "out" / "a.png").is_file()
