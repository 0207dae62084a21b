"""A Ray cluster that already runs: a command joins it as a driver, brings its code, and leaves it as it was."""

from __future__ import annotations

import logging
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.secrets import scrubbed
from pipelines.core.environment import ADDRESS, cluster_address
from pipelines.core.errors import Failure, UsageError
from pipelines.core.ray_output import DRIVER_LOG, ray_output_in
from pipelines.core.ray_watch import ray_processes
from pipelines.core.shipping import code_environment

_REFUSED = re.compile(r"(?i)unauthenticated|auth\w* token|invalid token")

CONNECT_S = 20.0
"""Time for the cluster's port to answer. Without this check Ray itself tries for minutes."""


@contextmanager
def joined_ray() -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS inside a `with` block. The cluster's processes import this driver's code.

    Raises:
        UsageError: the address is no cluster's, or the cluster refuses the token.
        Failure: no cluster answers.
    """
    import ray

    address = cluster_address()
    check_address(address)
    folder = Path(tempfile.mkdtemp(prefix="restoray-join-"))
    try:
        with ray_output_in(folder):
            try:
                _connect(address, folder)
                yield
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _connect(address: str, folder: Path) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(
            address=address,
            runtime_env=code_environment(folder),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except AuthenticationError as error:
        raise UsageError(
            f"the cluster at {address} asks for a token: set RAY_AUTH_TOKEN_PATH to a file with the cluster's token, "
            "or RAY_AUTH_TOKEN."
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:  # Ray raises these without a class of their own
        reason = scrubbed(" ".join(str(error).split())[:300], {})
        log = (folder / DRIVER_LOG).read_text(errors="replace")  # Ray's C++ part alone knows the reason
        if _REFUSED.search(reason) or _REFUSED.search(log):
            raise UsageError(
                f"the cluster at {address} refuses this token: RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN must be the "
                "cluster's."
            ) from error
        raise Failure(f"the cluster at {address} cannot be joined: {reason}") from error


def check_address(address: str) -> None:
    """Check the form of an address, and that something listens there.

    Raises:
        UsageError: it is not host:port or auto.
        Failure: nothing answers there.
    """
    if "://" in address:
        jobs = address if address.startswith("http") else "http://HEAD:8265"
        raise UsageError(
            f"{address}: a command joins a cluster from one of its nodes, at HOST:PORT or auto. From elsewhere, send "
            f"the command to the cluster: restoray submit --address {jobs} -- VERB ..."
        )
    if address in ("auto", "local"):
        if address == "local":
            raise UsageError(f"{ADDRESS}=local: leave the address out for a Ray of this command alone.")
        return
    place = host_and_port(address)
    if place is None:
        raise UsageError(f'"{address}" is no address of a cluster: HOST:PORT (often port 6379), or auto.')
    try:
        with socket.create_connection(place, timeout=CONNECT_S):
            return
    except (OSError, UnicodeError) as error:
        raise Failure(f"no cluster answers at {address} ({getattr(error, 'strerror', None) or error}).") from error


def host_and_port(address: str) -> tuple[str, int] | None:
    """The parts of HOST:PORT, the host perhaps in brackets; None if the address has another form."""
    host, colon, port = address.rpartition(":")
    if not colon or not host.strip("[]") or not port.isdigit() or not 0 < int(port) < 2**16:
        return None
    return host.strip("[]"), int(port)


def check_same_ray() -> None:
    """Check that RAY_ADDRESS, if it is set, names the Ray that this process already uses.

    Raises:
        UsageError: it names another one: a process can use only one.
    """
    import ray

    address, current = cluster_address(), str(ray.get_runtime_context().gcs_address)
    wanted_place, place = host_and_port(address), host_and_port(current)
    if wanted_place is None or place is None or _resolved(wanted_place) == _resolved(place):
        return
    raise UsageError(f"this process already uses the Ray at {current}, and {ADDRESS} names the one at {address}.")


def _resolved(place: tuple[str, int]) -> tuple[str, int]:
    try:
        return socket.gethostbyname(place[0]), place[1]
    except (OSError, UnicodeError):
        return place


def is_own_ray() -> bool:
    """Whether the running Ray was started by this process, and ends with it."""
    return bool(ray_processes())


def ray_is_running() -> bool:
    """Whether this process uses a Ray; imports nothing."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
