"""The local Ray: it listens on loopback only, restores the SIGTERM handler, and leaves no process and no folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.core.cluster import load_local, local_ray, logical_cpus, remove_ray_folders
from pipelines.core.errors import UsageError

PROGRAM = """
import json, signal
from pathlib import Path
from pipelines.core.cluster import local_ray

def mine(signum, frame): pass

signal.signal(signal.SIGTERM, mine)
with local_ray(num_cpus=3, object_store_mib=80):
    import psutil, ray
    outside = []
    for process in psutil.Process().children(recursive=True):
        for c in process.net_connections(kind="inet"):
            if c.status == psutil.CONN_LISTEN and not c.laddr.ip.startswith(("127.", "::1", "::ffff:127.")):
                outside.append([process.name(), list(c.laddr)])
    with local_ray():  # uses the Ray that runs
        cpus = ray.cluster_resources()["CPU"]
    runs = ray.is_initialized()
    same_handler = signal.getsignal(signal.SIGTERM) is mine
print(json.dumps([cpus, outside, runs, same_handler, ray.is_initialized(), len(psutil.Process().children())]))
"""


@pytest.mark.slow
def test_local_ray_is_isolated(repository: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=repository, capture_output=True, text=True, timeout=280, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert json.loads(process.stdout.splitlines()[-1]) == [3.0, [], True, True, False, 0]


def test_an_address_of_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # the session's Ray may run
    with pytest.raises(UsageError, match="RAY_ADDRESS is set"), local_ray():
        raise AssertionError("a Ray was started")


def test_sizes() -> None:
    settings = load_local()
    assert settings.minimum_logical_cpus >= 4
    assert logical_cpus(64) == 64 and logical_cpus(1) >= 1


def test_only_folders_of_dead_drivers_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f"rr-{dead.pid}-a", f"rr-{os.getpid()}-b", "rr-x-c", "other"):
        (tmp_path / name).mkdir()
    remove_ray_folders(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f"rr-{os.getpid()}-b", "rr-x-c", "other"}
