"""The checks of `restoray doctor`: problems of this machine that would stop a run, with advice for each.

Every check is a function that returns findings. A check that raises becomes a finding.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import socket
import sqlite3
import sys
import sysconfig
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from components.places import (
    SHIPPED_MODELS,
    SHIPPED_PRIORS,
    shipped_models,
    shipped_priors,
    stored_models,
    weights_folder,
)
from components.secrets import without_secrets
from components.systems import SYSTEMS
from pipelines.commands.findings import Finding, fail, ok, warn
from pipelines.core.environment import cores
from pipelines.core.home import home
from pipelines.core.memory import usable_memory

MINIMUM_VERSIONS = {"ray": (2, 56), "pillow": (13, 0), "torch": (2, 10), "mlflow": (3, 17, 2)}
"""Older versions have known vulnerabilities. docs/decisions and the lock hold the versions that we test."""

TORCH_PAIRS: dict[tuple[int, ...], tuple[int, int]] = {(2, 13): (0, 28), (2, 14): (0, 29)}
"""The torchvision that was built for each torch. Other pairs fail at import or behave wrongly."""

DISK_WARN_GIB, DISK_FAIL_GIB = 5.0, 1.0
MEMORY_WARN_GIB, MEMORY_FAIL_GIB = 8.0, 4.0
SHARED_MEMORY_WARN_MIB = 512
RAY_PORTS = {6379: "GCS", 8265: "dashboard", 10001: "client server"}


def examine(out: Path | None = None) -> list[Finding]:
    """Run every check.

    Args:
        out: the folder of the runs; None takes RESTORAY_HOME.
    """
    target = (out or home()).absolute()
    checks: list[tuple[str, Callable[[], Sequence[Finding]]]] = [
        ("python", check_python),
        ("bytecode", check_bytecode),
        ("versions", check_versions),
        ("torch", check_torch),
        ("ray", check_ray),
        ("mlflow", lambda: check_mlflow(target)),
        ("weights", check_weights),
        ("metric weights", check_metric_weights),
        ("disk", lambda: check_disk(target)),
        ("memory", check_memory),
        ("shared memory", check_shared_memory),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 one broken check must not stop the others
            findings.append(fail(name, f"the check itself failed: {type(error).__name__}: {error}", "Report this."))
    return findings


def parse_version(text: str) -> tuple[int, ...]:
    """Leading integers of a version: "2.13.0+cpu" gives (2, 13, 0)."""
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def check_python() -> list[Finding]:
    """Check that the lock was resolved for this interpreter."""
    current = f"Python {sys.version.split()[0]}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return [ok("python", current)]
    return [fail("python", current, "Use Python 3.11, 3.12 or 3.13: `make clean setup PYTHON=python3.11`.")]


def check_bytecode() -> list[Finding]:
    """Check that Ray's bytecode can be stored: a training starts about ten processes, and each imports Ray."""
    source = importlib.util.find_spec("ray")
    if source is None or source.origin is None:
        return []  # the next check reports it
    has_bytecode = Path(importlib.util.cache_from_source(source.origin)).is_file()
    return [judge_bytecode(has_bytecode, sys.dont_write_bytecode)]


def judge_bytecode(has_bytecode: bool, forbidden: bool) -> Finding:
    """Judge whether every process compiles its imports again.

    Args:
        has_bytecode: the bytecode of Ray's package exists.
        forbidden: this Python must not write bytecode.
    """
    if has_bytecode or not forbidden:
        return ok("bytecode", "present" if has_bytecode else "written at the first import")
    return warn(
        "bytecode",
        "the packages are not compiled and PYTHONDONTWRITEBYTECODE is set: a start takes more than twice as long",
        f"Compile them once: {sys.executable} -m compileall -q -j 0 {sysconfig.get_paths()['purelib']}",
    )


def check_versions() -> list[Finding]:
    """Check packages whose older versions have known vulnerabilities."""
    return [judge_version(name, installed_version(name)) for name in MINIMUM_VERSIONS]


def installed_version(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def judge_version(name: str, current: str | None) -> Finding:
    """Judge one package against its minimum version."""
    floor = MINIMUM_VERSIONS[name]
    if current is None:
        return fail(name, "not installed", "Run `make setup`.")
    if parse_version(current) < floor:
        minimum = ".".join(map(str, floor))
        return fail(name, current, f"Versions below {minimum} have known vulnerabilities: run `make setup`.")
    return ok(name, current)


def check_torch() -> list[Finding]:
    """Check that torch and torchvision fit together, and list the accelerators."""
    findings = [judge_pair(installed_version("torch"), installed_version("torchvision"))]
    if findings[0].status == "fail":
        return findings
    torch = importlib.import_module("torch")
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # noqa: BLE001 a broken binary raises anything
        problem = f"import torchvision: {error}"
        return [
            fail("torchvision", problem, "A CPU torch with PyPI's torchvision causes this: run `make clean setup`.")
        ]
    if not torch.cuda.is_available():
        return [*findings, ok("accelerator", f"none; {cores()} CPU cores, which suffice for the demo")]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        findings.append(ok(f"cuda:{index}", memory))
    return findings


def judge_pair(torch: str | None, torchvision: str | None) -> Finding:
    """Judge whether torchvision was built for torch."""
    if torch is None or torchvision is None:
        return fail("torch pair", f"torch {torch}, torchvision {torchvision}", "Run `make setup`.")
    pair = f"torch {torch}, torchvision {torchvision}"
    match = TORCH_PAIRS.get(parse_version(torch)[:2])
    if match is None:
        return warn("torch pair", pair, "We have not tested this torch: watch for import errors.")
    if parse_version(torchvision)[:2] != match:
        return fail("torch pair", pair, f"This torch needs torchvision {match[0]}.{match[1]}: run `make setup`.")
    if ("+cpu" in torch) != ("+cpu" in torchvision):
        return fail("torch pair", pair, "One is a CPU build and the other is not: run `make clean setup`.")
    return ok("torch pair", pair)


def check_ray() -> list[Finding]:
    """Check that no Ray is reachable from other machines without a token: anyone could run code on it."""
    open_ports = exposed_ports(tuple(RAY_PORTS))
    tokens = ray_token_mode()
    findings = [judge_exposure(open_ports, tokens)]
    address = os.environ.get("RAY_ADDRESS")
    if address and not tokens:
        advice = "Set RAY_AUTH_MODE=token on the cluster and here, or unset RAY_ADDRESS for a local Ray."
        findings.append(warn("ray address", f"RAY_ADDRESS={address} without token authentication", advice))
    return findings


def judge_exposure(ports: Sequence[int], tokens: bool) -> Finding:
    """Judge Ray ports that are open on addresses other than loopback."""
    if not ports:
        return ok("ray exposure", "no Ray port is reachable from other machines")
    names = ", ".join(f"{port} ({RAY_PORTS.get(port, 'Ray')})" for port in ports)
    if tokens:
        return ok("ray exposure", f"{names} reachable, with token authentication")
    advice = "Anyone who can reach Ray can run code: bind to 127.0.0.1, or set RAY_AUTH_MODE=token and close the ports."
    return fail("ray exposure", f"{names} reachable from other machines without a token", advice)


def ray_token_mode() -> bool:
    """Whether clusters that start from this environment require a token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def exposed_ports(ports: Sequence[int]) -> list[int]:
    """The ports on which a process of this machine listens on an address other than loopback."""
    try:
        connections = psutil.net_connections(kind="inet")
    except psutil.AccessDenied:
        return [port for port in ports if answers(port)]
    listening = {
        c.laddr.port
        for c in connections
        if c.status == psutil.CONN_LISTEN and not c.laddr.ip.startswith(("127.", "::1", "::ffff:127."))
    }
    return [port for port in ports if port in listening]


def answers(port: int, timeout_s: float = 0.3) -> bool:
    """Whether this machine's outside address accepts a connection; False if it has no such address."""
    try:
        address = socket.gethostbyname(socket.gethostname())
        if address.startswith("127."):
            return False
        with socket.create_connection((address, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def check_mlflow(target: Path) -> list[Finding]:
    """Check the tracking stores of the runs, and that the environment does not name another store."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and not uri.startswith("sqlite:"):
        advice = "Runs write their own sqlite store; unset the variable unless you want that server."
        return [warn("mlflow store", f"MLFLOW_TRACKING_URI={without_secrets(uri)}", advice)]
    stores = sorted(target.glob("runs/*/mlflow.db")) + sorted(target.glob("mlflow.db"))
    return [judge_store(store) for store in stores] or [ok("mlflow store", "none yet; a run makes its own")]


def judge_store(store: Path) -> Finding:
    """Judge one sqlite file: it must open and pass a quick check."""
    try:
        connection = sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True, timeout=2.0)
        try:
            result = connection.execute("PRAGMA quick_check").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.Error as error:
        return fail("mlflow store", f"{store}: {error}", "Move it away; finished stages keep their own metrics.jsonl.")
    if result != "ok":
        return fail("mlflow store", f"{store}: {result}", "Move it away; finished stages keep their own metrics.jsonl.")
    return ok("mlflow store", str(store))


def check_weights() -> list[Finding]:
    """Check the files of every shipped prior and restorer; those of the name nano must be there.

    List the defaults of imported models.
    """
    shipped = [judge_weights(SHIPPED_PRIORS / name, f"{name} prior") for name in sorted({"nano", *shipped_priors()})]
    shipped += [judge_weights(SHIPPED_MODELS / name, f"{name} model") for name in sorted({"nano", *shipped_models()})]
    return shipped + [judge_defaults(weights_folder() / name, name) for name in stored_models()]


def judge_defaults(folder: Path, name: str) -> Finding:
    """State the options with which a stored model restores; its gigabytes are not read."""
    try:
        info = json.loads((folder / "model.json").read_text())
        system, recipe = SYSTEMS[info["system"]], info.get("recipe") or {}
        defaults = system.restore_defaults(recipe)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return fail(name, f"{folder} is not a readable model folder: {error}", "Fetch or import it again.")
    options = " ".join(f"{key}={value}" for key, value in sorted(defaults.items()))
    if not recipe and system.weights is not None and system.weights.defaults:
        command = f"restoray weights import {info['system']} --from FILES --out {folder} --overwrite"
        return warn(name, f"{info['system']}, imported without the release's defaults", f"Import again: {command}")
    return ok(name, f"{info['system']}, restores {f'with {options}' if options else 'with the built-in options'}")


def judge_weights(folder: Path, name: str) -> Finding:
    """Judge a model folder: every part must have the sha256 of model.json."""
    if not (folder / "model.json").is_file():
        return fail(
            name,
            f"no model.json in {folder}",
            "Reinstall, or train it: `restoray run nano`, or `nano-prior` for the prior.",
        )
    try:
        parts = json.loads((folder / "model.json").read_text())["parts"]
        for part, entry in parts.items():
            digest = hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()
            if digest != entry["sha256"]:
                return fail(name, f"part {part} has another sha256 than in model.json", "Fetch the file again.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return fail(name, f"{folder} is not a readable model folder: {error}", "Fetch it again.")
    return ok(name, f"{len(parts)} parts, sha256 verified")


def check_metric_weights() -> list[Finding]:
    """Look at the folder in which pyiqa keeps the weights of metrics."""
    import torch.hub

    return [judge_metric_weights(Path(torch.hub.get_dir()) / "pyiqa")]


def judge_metric_weights(folder: Path) -> Finding:
    """Judge a folder of metric weights; the default metrics need none of them."""
    check = "metric weights"
    place = next(p for p in (folder, *folder.parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        advice = "Set TORCH_HOME to another folder: metrics such as niqe and lpips keep their weights there."
        return warn(check, f"{place} cannot be written", advice)
    files = [p for p in folder.glob("*") if p.is_file() and p.suffix != ".partial"]
    empty = sorted(p.name for p in files if not p.stat().st_size)
    if empty:
        return warn(check, f"empty files in {folder}: {', '.join(empty[:5])}", "Delete them; they are fetched again.")
    return ok(
        check,
        f"{len(files)} files in {folder} (TORCH_HOME moves it); the default metrics need none. Without a network, put "
        "the file there that a metric's error names",
    )


def check_disk(target: Path) -> list[Finding]:
    """Check the free space of the folder of the runs."""
    place = next(p for p in (target, *target.parents) if p.exists())
    if not os.access(place, os.W_OK):
        return [fail("disk", f"{place} cannot be written", "Choose another folder: --out, or RESTORAY_HOME.")]
    return [
        judge_amount(
            "disk",
            shutil.disk_usage(place).free,
            DISK_WARN_GIB,
            DISK_FAIL_GIB,
            f"free at {place}",
            "Free some space, or choose another folder with --out.",
        )
    ]


def check_memory() -> list[Finding]:
    """Check the memory that a run can use, within a container's limit."""
    return [
        judge_amount(
            "memory",
            usable_memory(),
            MEMORY_WARN_GIB,
            MEMORY_FAIL_GIB,
            "available",
            "The demo needs up to 8 GiB: close other programs or use workers=1.",
        )
    ]


def check_shared_memory() -> list[Finding]:
    """Check /dev/shm, where Ray stores objects. If it is too small, Ray uses slower files."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return [warn("shared memory", "no /dev/shm", "Ray will use files instead, which is slower.")]
    free = shutil.disk_usage(place).free // 2**20
    if free < SHARED_MEMORY_WARN_MIB:
        advice = "Give the container more: docker run --shm-size=2g. Ray falls back to slower files."
        return [warn("shared memory", f"{free} MiB free in /dev/shm", advice)]
    return [ok("shared memory", f"{free} MiB free in /dev/shm")]


def judge_amount(check: str, size: int, warn_gib: float, fail_gib: float, what: str, advice: str) -> Finding:
    """Judge a number of bytes against two thresholds."""
    gib = size / 2**30
    amount = f"{gib:.1f} GiB {what}"
    if gib < fail_gib:
        return fail(check, amount, advice)
    return warn(check, amount, advice) if gib < warn_gib else ok(check, amount)
