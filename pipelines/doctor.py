"""`restoray doctor`: looks for what would keep a run from working and says what to do about each finding.

Every check is a function that returns findings and never raises; a check that breaks is itself a finding.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import socket
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pipelines.home import home, package_folder

Status = Literal["ok", "warn", "fail"]

MINIMUM_VERSIONS = {"ray": (2, 56), "pillow": (13, 0), "torch": (2, 10), "mlflow": (3, 17, 2)}
"""Below these, known vulnerabilities are open (docs/decisions and the lock hold the versions that we test)."""

TORCH_PAIRS: dict[tuple[int, ...], tuple[int, int]] = {(2, 13): (0, 28), (2, 14): (0, 29)}
"""Which torchvision is built for which torch; any other pair imports badly or not at all."""

DISK_WARN_GIB, DISK_FAIL_GIB = 5.0, 1.0
MEMORY_WARN_GIB, MEMORY_FAIL_GIB = 8.0, 4.0
SHARED_MEMORY_WARN_MIB = 512
RAY_PORTS = {6379: "GCS", 8265: "dashboard", 10001: "client server"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at: what was seen, and what to do where it is not well."""

    check: str
    status: Status
    seen: str
    advice: str = ""


def ok(check: str, seen: str) -> Finding:
    return Finding(check=check, status="ok", seen=seen)


def warn(check: str, seen: str, advice: str) -> Finding:
    return Finding(check=check, status="warn", seen=seen, advice=advice)


def fail(check: str, seen: str, advice: str) -> Finding:
    return Finding(check=check, status="fail", seen=seen, advice=advice)


def examine(out: Path | None = None) -> list[Finding]:
    """Run every check.

    Args:
        out: the folder that runs will be written to; None takes RESTORAY_HOME.
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
        ("disk", lambda: check_disk(target)),
        ("memory", check_memory),
        ("shared memory", check_shared_memory),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 a doctor that dies of a symptom helps nobody
            findings.append(fail(name, f"the check itself failed: {type(error).__name__}: {error}", "Report this."))
    return findings


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Findings for people, one line each and one more for advice."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<5} {finding.check:<14} {finding.seen}")
        if finding.advice:
            lines.append(f"      {'':<14} -> {finding.advice}")
    return lines


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
    """The interpreter is one that the lock was resolved for."""
    seen = f"Python {sys.version.split()[0]}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return [ok("python", seen)]
    return [fail("python", seen, "Use Python 3.11, 3.12 or 3.13: `make clean setup PYTHON=python3.11`.")]


def check_bytecode() -> list[Finding]:
    """Ray starts about ten processes for a training, and each imports it anew."""
    source = importlib.util.find_spec("ray")
    if source is None or source.origin is None:
        return []  # the next check says so
    compiled = Path(importlib.util.cache_from_source(source.origin)).is_file()
    return [judge_bytecode(compiled, sys.dont_write_bytecode)]


def judge_bytecode(compiled: bool, forbidden: bool) -> Finding:
    """Whether imports are compiled again in every process.

    Args:
        compiled: the bytecode of Ray's package lies beside it.
        forbidden: this Python may not write any.
    """
    if compiled or not forbidden:
        return ok("bytecode", "kept" if compiled else "kept from the first import on")
    return warn(
        "bytecode",
        "the packages are not compiled and PYTHONDONTWRITEBYTECODE is set: starting takes more than twice as long",
        f"Compile them once: {sys.executable} -m compileall -q -j 0 {sysconfig.get_paths()['purelib']}",
    )


def check_versions() -> list[Finding]:
    """Packages whose older versions have known holes."""
    return [judge_version(name, installed(name)) for name in MINIMUM_VERSIONS]


def installed(name: str) -> str | None:
    """Version of an installed distribution, None without one."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def judge_version(name: str, found: str | None) -> Finding:
    """One package against its floor."""
    floor = MINIMUM_VERSIONS[name]
    if found is None:
        return fail(name, "not installed", "Run `make setup`.")
    if parse_version(found) < floor:
        needed = ".".join(map(str, floor))
        return fail(name, found, f"Known vulnerabilities are open below {needed}: run `make setup`.")
    return ok(name, found)


def check_torch() -> list[Finding]:
    """torch and torchvision fit together, and which accelerator there is."""
    findings = [judge_pair(installed("torch"), installed("torchvision"))]
    if findings[0].status == "fail":
        return findings
    torch = importlib.import_module("torch")
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # noqa: BLE001 a broken binary raises anything
        broken = f"import torchvision: {error}"
        return [fail("torchvision", broken, "A CPU torch beside PyPI's torchvision does this: run `make clean setup`.")]
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        return [*findings, ok("accelerator", f"none; {cores} CPU cores (the demo is made for this)")]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        seen = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        findings.append(ok(f"cuda:{index}", seen))
    return findings


def judge_pair(torch: str | None, torchvision: str | None) -> Finding:
    """Whether a torchvision was built for a torch."""
    if torch is None or torchvision is None:
        return fail("torch pair", f"torch {torch}, torchvision {torchvision}", "Run `make setup`.")
    seen = f"torch {torch}, torchvision {torchvision}"
    wanted = TORCH_PAIRS.get(parse_version(torch)[:2])
    if wanted is None:
        return warn("torch pair", seen, "This torch is newer or older than those we know: watch for import errors.")
    if parse_version(torchvision)[:2] != wanted:
        return fail("torch pair", seen, f"This torch needs torchvision {wanted[0]}.{wanted[1]}: run `make setup`.")
    if ("+cpu" in torch) != ("+cpu" in torchvision):
        return fail("torch pair", seen, "One is a CPU build and the other is not: run `make clean setup`.")
    return ok("torch pair", seen)


def check_ray() -> list[Finding]:
    """Whether a Ray is reachable from other machines without a token: that is remote code execution for anyone."""
    exposed = exposed_ports(tuple(RAY_PORTS))
    tokens = ray_token_mode()
    findings = [judge_exposure(exposed, tokens)]
    address = os.environ.get("RAY_ADDRESS")
    if address and not tokens:
        advice = "Set RAY_AUTH_MODE=token on the cluster and here, or unset RAY_ADDRESS for a local Ray."
        findings.append(warn("ray address", f"RAY_ADDRESS={address} without token authentication", advice))
    return findings


def judge_exposure(ports: Sequence[int], tokens: bool) -> Finding:
    """Open Ray ports on non-loopback addresses, with or without tokens."""
    if not ports:
        return ok("ray exposure", "no Ray port is reachable from other machines")
    names = ", ".join(f"{port} ({RAY_PORTS.get(port, 'Ray')})" for port in ports)
    if tokens:
        return ok("ray exposure", f"{names} reachable, token authentication on")
    advice = "Anyone who reaches it runs code: bind to 127.0.0.1, or set RAY_AUTH_MODE=token and close the ports."
    return fail("ray exposure", f"{names} reachable from other machines without a token", advice)


def ray_token_mode() -> bool:
    """Whether clusters started from this environment demand a token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def exposed_ports(ports: Sequence[int]) -> list[int]:
    """Those ports that something on this machine listens to on an address that is not loopback."""
    import psutil

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
    """Whether this machine's own outside address accepts a connection; False where it has none."""
    try:
        address = socket.gethostbyname(socket.gethostname())
        if address.startswith("127."):
            return False
        with socket.create_connection((address, port), timeout=timeout_s):
            return True
    except OSError:
        return False


def check_mlflow(target: Path) -> list[Finding]:
    """The tracking store that runs will write: sqlite below the output folder, or what the environment names."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named and not named.startswith("sqlite:"):
        advice = "Runs keep their own sqlite store; unset it unless you mean that server."
        return [warn("mlflow store", f"MLFLOW_TRACKING_URI={named.split('@')[-1]}", advice)]
    stores = sorted(target.glob("runs/*/mlflow.db")) + sorted(target.glob("mlflow.db"))
    return [judge_store(store) for store in stores] or [ok("mlflow store", "none yet; a run makes its own")]


def judge_store(store: Path) -> Finding:
    """One sqlite file: whole, and not locked for writing."""
    import sqlite3

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
    """The shipped prior is whole."""
    shipped = package_folder().parent / "components" / "priors" / "weights" / "nano"
    return [judge_weights(shipped, "nano prior")]


def judge_weights(folder: Path, name: str) -> Finding:
    """A model folder: model.json is there and every part has the sha256 that it states."""
    import hashlib
    import json

    if not (folder / "model.json").is_file():
        return fail(name, f"no model.json in {folder}", "Reinstall, or train it: `restoray run nano-prior`.")
    try:
        parts = json.loads((folder / "model.json").read_text())["parts"]
        for part, entry in parts.items():
            found = hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest()
            if found != entry["sha256"]:
                return fail(name, f"part {part} has another sha256 than model.json says", "Fetch the file again.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return fail(name, f"{folder} is not a readable model folder: {error}", "Fetch it again.")
    return ok(name, f"{len(parts)} parts, sha256 verified")


def check_disk(target: Path) -> list[Finding]:
    """Free space where runs go."""
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
            "Free some, or choose another folder with --out.",
        )
    ]


def check_memory() -> list[Finding]:
    """Memory that a run can get, counting a container's own limit."""
    import psutil

    available = psutil.virtual_memory().available
    limit = container_memory_left(Path("/sys/fs/cgroup"))
    amount = min(available, limit) if limit is not None else available
    return [
        judge_amount(
            "memory",
            amount,
            MEMORY_WARN_GIB,
            MEMORY_FAIL_GIB,
            "available",
            "The demo wants up to 8 GiB: close other programs or use workers=1.",
        )
    ]


def container_memory_left(cgroup: Path) -> int | None:
    """Bytes below a container's memory limit, None without a limit. Files that can be reclaimed count as free."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        used = int((cgroup / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        return max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def check_shared_memory() -> list[Finding]:
    """/dev/shm, where Ray keeps objects; where it is too small Ray falls back to slow files."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return [warn("shared memory", "no /dev/shm", "Ray will use files instead, which is slower.")]
    free = shutil.disk_usage(place).free // 2**20
    if free < SHARED_MEMORY_WARN_MIB:
        advice = "Give the container more: docker run --shm-size=2g. Ray falls back to slower files."
        return [warn("shared memory", f"{free} MiB free in /dev/shm", advice)]
    return [ok("shared memory", f"{free} MiB free in /dev/shm")]


def judge_amount(check: str, size: int, warn_gib: float, fail_gib: float, what: str, advice: str) -> Finding:
    """An amount of bytes against two thresholds."""
    gib = size / 2**30
    seen = f"{gib:.1f} GiB {what}"
    if gib < fail_gib:
        return fail(check, seen, advice)
    return warn(check, seen, advice) if gib < warn_gib else ok(check, seen)
