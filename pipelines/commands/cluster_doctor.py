"""`restoray doctor --address A`: the checks of a cluster. A small task on every node reports what it sees there.

The cluster's nodes need the lock's packages, the same clock, a place for caches, and a store that all of them can
write. Its ports need a token: whoever reaches Ray without one can run code on it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipelines.commands.findings import Finding, fail, ok, warn
from pipelines.commands.machine import DISK_FAIL_GIB, DISK_WARN_GIB, judge_amount
from pipelines.core.environment import cluster_address, holds_text
from pipelines.core.home import cache_folder

PACKAGES = ("torch", "torchvision", "numpy", "pyarrow", "opencv-python-headless", "diffusers", "transformers")
"""Packages whose versions may change bits or break what travels between nodes; Ray and Python are checked by Ray."""

PROBE_S = 180.0
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 30.0
"""Ours: modification times decide whether a file is new, to the second; a lock is stale after longer."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a task saw on its node.

    Attributes:
        versions: installed versions; "" for none.
        gpus: names of the GPUs that torch sees.
        clock: seconds since 1970 there, in the middle of the task.
        cache: folder of the caches; free: its free bytes, -1 if it cannot be made.
        store: "" if the store can be read and written, else the reason.
        token: whether the node's Ray asks for a token.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    gpus: Sequence[str] = ()
    clock: float = 0.0
    cache: str = ""
    free: int = -1
    store: str = ""
    token: bool = False


def look_around(store: str, mark: str) -> dict[str, Any]:
    """Look at the node on which this runs.

    Args:
        store: folder that all nodes share; "" for none.
        mark: content of the file `.restoray-doctor` in it, which the driver wrote.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free if os.access(cache, os.W_OK) else -1
    except OSError:
        free = -1
    sight = Sight(
        versions={name: _version(name) for name in PACKAGES},
        gpus=_gpus(),
        clock=time.time(),
        cache=str(cache),
        free=free,
        store=store_problem(Path(store), mark) if store else "",
        token=os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
    )
    return asdict(sight)


def store_problem(store: Path, mark: str) -> str:
    """Why this process cannot use a shared folder; "" if it can read the driver's file and write its own."""
    try:
        if (store / f".restoray-doctor-{mark}").read_text() != mark:
            return "the driver's file has another content there"
        own = store / f".restoray-doctor-{mark}-{secrets.token_hex(4)}"
        own.write_text(mark)
        own.unlink()
    except OSError as error:
        return f"{type(error).__name__}: {error.strerror or error}"
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _gpus() -> list[str]:
    import torch

    return (
        [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )


def examine_cluster(store: Path | None) -> list[Finding]:
    """Join the cluster of RAY_ADDRESS and look at every node.

    Args:
        store: folder of the results, which all nodes share; None leaves this check out.

    Raises:
        UsageError, Failure: see joining.joined_ray.
    """
    from pipelines.core.cluster import running_ray

    with running_ray():
        sights, lost = _look_everywhere(store)
    findings = [judge_token(cluster_address(), has_token(), [sight.token for sight, _ in sights.values()])]
    findings += [fail(name, "no answer", f"The node did not run a small task in {PROBE_S:g} s.") for name in lost]
    findings += judge_versions({name: sight.versions for name, (sight, _) in sights.items()})
    for name, (sight, skew) in sights.items():
        findings += judge_node(name, sight, skew)
        if store is not None:
            findings.append(judge_store(name, store, sight.store))
    return findings


def _look_everywhere(store: Path | None) -> tuple[dict[str, tuple[Sight, float]], list[str]]:
    """(sight, clock skew in seconds) of every node by its name, and the names of those that did not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    mark, where = secrets.token_hex(8), store.expanduser().absolute() if store is not None else None
    own = where / f".restoray-doctor-{mark}" if where is not None else None
    if own is not None:
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(mark)
    try:
        probe = ray.remote(num_cpus=0, max_retries=0)(look_around)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        calls = {
            f"node {number} ({node.get('NodeName') or node['NodeManagerAddress']})": probe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            )
            for number, node in enumerate(nodes)
        }
        sights: dict[str, tuple[Sight, float]] = {}
        lost: list[str] = []
        first = {name: call.remote("" if where is None else str(where), mark) for name, call in calls.items()}
        end = time.monotonic() + PROBE_S
        for name, call in calls.items():
            try:
                sight = Sight(**ray.get(first[name], timeout=max(1.0, end - time.monotonic())))
                begin = time.time()  # the second call finds a warm process: its way there and back is short
                later = ray.get(call.remote("", mark), timeout=PROBE_S)
                sights[name] = sight, later["clock"] - (begin + time.time()) / 2
            except ray.exceptions.RayError:
                lost.append(name)
        return sights, lost
    finally:
        if own is not None:
            own.unlink(missing_ok=True)


def has_token() -> bool:
    """Whether this process sends a token to the cluster."""
    own = os.environ.get("RAY_AUTH_TOKEN", "").strip() or holds_text(os.environ.get("RAY_AUTH_TOKEN_PATH", ""))
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token" and bool(own)


def judge_token(address: str, sends: bool, asked: Sequence[bool]) -> Finding:
    """Judge whether a stranger could use the cluster.

    Args:
        sends: this process sent a token.
        asked: whether each node's Ray asks for one.
    """
    host = address.rpartition(":")[0]
    try:
        outside = not socket.gethostbyname(host).startswith("127.") if host else True
    except OSError:
        outside = True
    if asked and all(asked):
        return ok("token", f"every node asks for a token{'' if sends else ', from a file of this user'}")
    advice = "Start every node with RAY_AUTH_MODE=token and one token; in KubeRay: authOptions: {mode: token}."
    seen = f"{sum(not ask for ask in asked)} of {len(asked)} nodes ask for no token"
    return (
        fail("token", f"{seen}: whoever reaches them runs code there", advice)
        if outside
        else warn("token", seen, advice)
    )


def judge_versions(by_node: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Judge whether all nodes, and this machine, have the same packages."""
    findings = []
    for name in PACKAGES:
        own = _version(name)
        others = {node: seen[name] for node, seen in by_node.items() if seen.get(name) != own}
        if others:
            places = ", ".join(f"{seen or 'none'} on {node}" for node, seen in others.items())
            advice = "Install the lock on every node: other versions may give other bits, or fail."
            findings.append(fail(name, f"{own} here, {places}", advice))
    return findings or [ok("versions", f"{len(PACKAGES)} packages are the same on {len(by_node)} nodes and here")]


def judge_node(name: str, sight: Sight, skew: float) -> list[Finding]:
    """Judge one node: GPUs, clock and the disk of its caches."""
    gpus = ", ".join(sight.gpus) or "none"
    findings = [ok(name, f"GPUs: {gpus}")]
    advice = "Let all nodes follow one time server."
    text = f"clock {skew:+.2f} s from this one"
    if abs(skew) >= SKEW_FAIL_S:
        findings.append(fail(name, text, advice))
    else:
        findings.append(warn(name, text, advice) if abs(skew) >= SKEW_WARN_S else ok(name, text))
    if sight.free < 0:
        findings.append(
            fail(name, f"{sight.cache} cannot be written", "Set RESTORAY_HOME for the processes of that node.")
        )
    else:
        what = f"free for caches at {sight.cache}"
        findings.append(judge_amount(name, sight.free, DISK_WARN_GIB, DISK_FAIL_GIB, what, "Free space there."))
    return findings


def judge_store(name: str, store: Path, problem: str) -> Finding:
    """Judge whether a node can use the store."""
    if not problem:
        return ok(name, f"{store} can be read and written")
    return fail(name, f"{store}: {problem}", "Mount the folder of the results on every node, at the same path.")
