"""Which Ray a process uses: the address, its form, and the environment of a process that joins a cluster."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.core import environment
from pipelines.core.cluster import running_ray
from pipelines.core.environment import quiet_environment, use_address
from pipelines.core.errors import Failure, UsageError
from pipelines.core.joining import check_address, check_same_ray, host_and_port

NAMES = (*environment.OWN_OF_LOCAL_RAY, environment.ADDRESS)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the tests' environment, and no change that stays."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_before", {})


def test_an_address_gives_back_the_users_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command starts as for a local Ray, and --address comes later."""
    (tmp_path / "token").write_text("mine")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    quiet_environment()
    use_address("10.0.0.9:6379")
    assert {name: os.environ.get(name) for name in NAMES} == {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": None,  # with it, Ray would take this machine for 127.0.0.1
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_AUTH_TOKEN": None,
        "RAY_ADDRESS": "10.0.0.9:6379",
    }


def test_a_command_without_a_token_sends_none() -> None:
    quiet_environment()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64  # of a local Ray
    use_address("10.0.0.9:6379")
    assert "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_MODE" not in os.environ


def test_a_users_mode_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    quiet_environment()
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("disabled", "x")


def test_no_address_keeps_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    use_address(None)
    assert os.environ["RAY_ADDRESS"] == "10.0.0.9:6379"
    use_address("10.0.0.8:6379")
    assert os.environ["RAY_ADDRESS"] == "10.0.0.8:6379"  # the option comes first


def test_a_cluster_on_loopback_is_reached_there() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        use_address(f"127.0.0.1:{server.getsockname()[1]}")
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("head:6379", ("head", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("head", None),
        ("head:", None),
        (":6379", None),
        ("head:70000", None),
        ("head:port", None),
    ],
)
def test_parts_of_an_address(address: str, place: tuple[str, int] | None) -> None:
    assert host_and_port(address) == place


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "restoray submit --address http://HEAD:8265"),
        ("http://head:8265", "restoray submit --address http://head:8265"),
        ("head", "is no address of a cluster"),
        ("local", "leave the address out"),
    ],
)
def test_an_address_of_another_kind_is_refused(address: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_address(address)


def test_an_address_where_nothing_listens_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # the session's Ray may run
    with pytest.raises(Failure, match=f"no cluster answers at {address}"), running_ray():
        raise AssertionError("a Ray was started")


def test_another_ray_than_the_one_of_this_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:6379"))
    check_same_ray()
    for same in ("localhost:6379", "127.0.0.1:6379", "auto"):
        monkeypatch.setenv("RAY_ADDRESS", same)
        check_same_ray()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6380")
    with pytest.raises(UsageError, match=r"already uses the Ray at 127\.0\.0\.1:6379"):
        check_same_ray()
