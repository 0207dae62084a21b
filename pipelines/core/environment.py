"""The environment of Ray: settings that it reads at its import, and its use. Light imports: commands start fast."""

from __future__ import annotations

import logging
import os
import secrets
import sys

ADDRESS = "RAY_ADDRESS"
"""Ray's own variable with the address of a cluster; the option --address sets it for one command."""

JOBS_ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Ray's own variable with the address of a cluster's job server."""

LISTEN = "0A"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1 and ::1 in the kernel's tables of sockets."""

_before: dict[str, str | None] = {}
"""The user's values of variables that a local Ray must not have."""

OWN_OF_LOCAL_RAY = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN")


def cluster_address() -> str:
    """Address of the cluster that this process shall join; "" for a Ray of its own."""
    return os.environ.get(ADDRESS, "").strip()


def use_address(address: str | None) -> None:
    """Let this process join the cluster at an address, as RAY_ADDRESS does; None keeps RAY_ADDRESS as it is.

    The variable is for the whole process, so that every part of a command uses the same Ray. Call it before anything
    imports Ray.
    """
    if address is not None:
        os.environ[ADDRESS] = address
        quiet_environment()


def quiet_environment() -> None:
    """Set Ray's environment variables, for this process and its workers. Ray reads them at import.

    A local Ray has a token of its own. A process that joins a cluster has the user's token.
    """
    # a library of diffusers asks for a kernel that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2", "1")
    # A proxy of Ray Serve has 5 s to start by default. On a busy machine its imports take longer.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    if cluster_address():
        _restore_users_values()
    else:
        _isolate()


def _restore_users_values() -> None:
    """Undo `_isolate`, and send the user's token to the cluster.

    Ray sends no token to an address unless RAY_AUTH_MODE says so. The file in the user's home is not taken by itself:
    it is the token of another cluster.
    """
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _before.clear()
    if _listens_on_loopback_only(cluster_address()):  # Ray would replace 127.0.0.1 by this machine's outside address
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN", "").strip()) or holds_text(
        os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    )
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _listens_on_loopback_only(address: str) -> bool:
    """Whether an address is of this machine's loopback, and its port listens at no other address.

    Read from the kernel's tables of sockets: the modules for sockets are slow to import.
    """
    host, _, port = address.rpartition(":")
    if not (host.startswith("127.") or host == "localhost") or not port.isdigit():
        return False
    places = set()
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/net/{table}", encoding="ascii") as stream:
                rows = [line.split() for line in stream.readlines()[1:]]
        except OSError:
            continue
        listening = (row[1].split(":") for row in rows if row[3] == LISTEN)
        places |= {place for place, number in listening if int(number, 16) == int(port)}
    return bool(places) and places <= LOOPBACK


def _isolate() -> None:
    """Let a local Ray listen on loopback only, and answer nobody without this command's token."""
    for name in OWN_OF_LOCAL_RAY:
        _before.setdefault(name, os.environ.get(name))
    # Despite its name, this variable makes a local Ray listen on loopback only, on any system. Checked with 2.60: with
    # it all sockets are on 127.0.0.1; without it most are on every address, also with _node_ip_address.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Every process of Ray listens for the others and unpickles what they send, Serve's replicas on all addresses. Each
    # command has a token of its own, and refuses a caller without it, also where the user's environment disables that.
    os.environ.pop("RAY_AUTH_MODE", None)
    # An empty token, or a file without one, would make Ray take or write the one in the user's home.
    if not holds_text(os.environ.get("RAY_AUTH_TOKEN_PATH", "")):
        os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
        if not os.environ.get("RAY_AUTH_TOKEN", "").strip():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def cores() -> int:
    """The CPU cores that this process may use; where the system does not tell (macOS), those of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def holds_text(path: str) -> bool:
    """Whether a file exists, can be read and is not blank."""
    try:
        with open(path, "rb") as stream:
            return bool(stream.read(4096).strip())
    except OSError:
        return False


def ray_in_use() -> str:
    """How many CPUs and GPUs of the running Ray are in use, in words; "" without a running Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    try:
        total, free = ray.cluster_resources(), ray.available_resources()
    except Exception:  # noqa: BLE001 - Ray is shutting down, in another thread
        return ""
    return ", ".join(
        f"{total[name] - free.get(name, 0.0):g} of {total[name]:g} {name}s"
        for name in ("CPU", "GPU")
        if total.get(name)
    )
